"""The paper's claims on what the demo measured, and what each must reach."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from octavo.report import Claim


@dataclass(frozen=True)
class Margins:
    """What a claim must reach.

    Attributes:
        greedy: the generator's accuracy, from and to: the method needs one that knows it sometimes.
        label: accuracy of hard labels.
        negatives: false negatives of eight rollouts as a share of those of one, at most.
        auc: of the process reward model's scores on unseen steps.
        prm: best-of-N of the process reward model above self-consistency.
        orm: the same of the outcome reward model.
        near: how far the process reward model may be below the outcome one.
        few: how far the product of its scores must be above it on few labelled solutions.
        decline: of the curve from one size to the next.
        rft: rejection sampling above the generator.
        ppo: step-by-step PPO above the generator.
        above_rft: and above rejection sampling.
        ppo_near: how far it may be below PPO with the outcome's reward.
        steps: share by which its number of steps may differ from the generator's.
        no_answer: share of its responses without an answer.
    """

    greedy: tuple[float, float] = (0.4, 0.75)
    label: float = 0.88
    negatives: float = 0.5
    auc: float = 0.95
    prm: float = 0.15
    orm: float = 0.12
    near: float = 0.02
    few: float = 0.02
    decline: float = 0.02
    rft: float = 0.05
    ppo: float = 0.2
    above_rft: float = 0.1
    ppo_near: float = 0.03
    steps: float = 0.1
    no_answer: float = 0.02


#: The quick profile has 200 problems: two standard errors of a difference on them are 0.05.
MARGINS = {"quick": Margins(near=0.05, ppo_near=0.05), "full": Margins()}


def judge(found: Sequence[Mapping[str, float]], margins: Margins = Margins()) -> list[Claim]:
    """The claims, on the means over seeds.

    Args:
        found: the numbers of each seed.
        margins: what each claim must reach.
    """
    mean = {key: float(np.mean([one[key] for one in found])) for key in found[0]}
    low, high = margins.greedy
    gate = Claim(
        "The generator knows it sometimes",
        f"accuracy {mean['SFT greedy']:.3f} greedy, {mean['SFT sampled']:.3f} sampled",
        f"greedy from {low:g} to {high:g}; by construction, its demonstrations have slips",
        low <= mean["SFT greedy"] <= high,
    )
    claims = [
        *label_claims(mean, margins), *verification_claims(mean, margins),
        *policy_claims(mean, margins),
    ]  # fmt: skip
    if gate.passed:
        return [gate, *claims]
    why = "the generator is no competent one that errs, so that nothing follows"
    return [gate, *(replace(one, criterion=why, passed=None) for one in claims)]


def label_claims(mean: Mapping[str, float], margins: Margins) -> list[Claim]:
    """The claims about labels."""
    return [
        Claim(
            "Rollouts label steps well (hard estimate, N = 8)",
            f"accuracy {mean['label accuracy']:.3f} against the true quality of the steps, by "
            f"{mean['share of plain']:.0%} of the completions that each step's eight would take",
            f"{margins.label:g} or more",
            mean["label accuracy"] >= margins.label,
        ),
        Claim(
            "More rollouts find more of the good steps",
            f"false negatives {mean['FN 1']:.3f} with one, {mean['FN 8']:.3f} with eight",
            f"{margins.negatives:.0%} of them at most",
            mean["FN 8"] <= margins.negatives * mean["FN 1"],
        ),
        Claim(
            "The soft estimate comes nearer to the truth with N",
            f"cross-entropy {mean['CE 1']:.3f} with one rollout, {mean['CE 32']:.3f} with 32",
            "lower",
            mean["CE 32"] < mean["CE 1"],
        ),
        Claim(
            "False positives rise with N (why the paper's hard estimate gets worse)",
            f"{mean['FP 1']:.3f} with one rollout, {mean['FP 32']:.3f} with 32",
            "higher; false negatives fall faster here, so that accuracy does not fall",
            mean["FP 32"] > mean["FP 1"],
        ),
    ]


def sizes_of(mean: Mapping[str, float]) -> list[int]:
    """Numbers of candidates that were measured."""
    return sorted(int(key.rpartition("@")[2]) for key in mean if key.startswith("PRM min @"))


def verification_claims(mean: Mapping[str, float], margins: Margins) -> list[Claim]:
    """The claims about best-of-N."""
    sizes = sizes_of(mean)
    n = min(16, sizes[-1])
    prm, orm, sc = (mean[f"{name} @{n}"] for name in ("PRM min", "ORM", "SC"))
    curve = [mean[f"PRM min @{size}"] for size in sizes]
    falls = float(min(np.diff(curve)))
    return [
        Claim(
            "The process reward model tells good steps from bad ones",
            f"AUC {mean['PRM AUC']:.3f}, accuracy {mean['PRM accuracy']:.3f} on unseen solutions",
            f"AUC {margins.auc:g} or more",
            mean["PRM AUC"] >= margins.auc,
        ),
        Claim(
            f"Best of {n} by the process reward model beats self-consistency",
            f"accuracy {prm:.3f} against {sc:.3f}; SC + PRM {mean[f'SC + PRM min @{n}']:.3f}",
            f"by {margins.prm:g} or more",
            prm >= sc + margins.prm,
        ),
        Claim(
            f"Best of {n} by the outcome reward model beats self-consistency",
            f"accuracy {orm:.3f} against {sc:.3f}",
            f"by {margins.orm:g} or more",
            orm >= sc + margins.orm,
        ),
        Claim(
            "The process reward model is no worse than the outcome one",
            f"accuracy {prm:.3f} against {orm:.3f} at N = {n}",
            f"not by more than {margins.near:g} (chains are short; the paper's gap on GSM8K is small)",
            prm >= orm - margins.near,
        ),
        few_claim(mean, margins),
        Claim(
            "More candidates do not hurt it",
            f"accuracy {curve[0]:.3f} at 1 to {curve[-1]:.3f} at {sizes[-1]}; "
            f"smallest change {falls:+.3f}",
            f"no fall of more than {margins.decline:g} from one size to the next",
            falls >= -margins.decline,
        ),
    ]


def few_claim(mean: Mapping[str, float], margins: Margins) -> Claim:
    """The claim about little data."""
    claim = "With little data it is better: it learns more from each solution"
    if "few ORM" not in mean:
        return Claim(
            claim, "", "one seed of this profile does not tell; --profile full runs it", None
        )
    prm, orm = mean["few PRM prod"], mean["few ORM"]
    measured = f"accuracy {prm:.3f} (product) against {orm:.3f}"
    return Claim(claim, measured, f"by {margins.few:g} or more", prm >= orm + margins.few)


def policy_claims(mean: Mapping[str, float], margins: Margins) -> list[Claim]:
    """The claims about reinforcement."""
    sft, rft = mean["SFT greedy"], mean["RFT greedy"]
    ppo, outcome = mean["PPO by steps greedy"], mean["PPO by outcome greedy"]
    longer = mean["PPO by steps steps"] / mean["SFT steps"] - 1
    silent = mean["PPO by steps no answer"]
    claims = [
        Claim(
            "Rejection sampling (RFT) improves the generator",
            f"greedy accuracy {rft:.3f} against {sft:.3f}, its demonstrations kept beside its own "
            f"right solutions; {mean['right solutions alone greedy']:.3f} by these alone",
            f"by {margins.rft:g} or more",
            rft >= sft + margins.rft,
        ),
        Claim(
            "Step-by-step PPO improves it more",
            f"greedy accuracy {ppo:.3f} against {sft:.3f} (SFT) and {rft:.3f} (RFT)",
            f"by {margins.ppo:g} above SFT and {margins.above_rft:g} above RFT, or more",
            ppo >= sft + margins.ppo and ppo >= rft + margins.above_rft,
        ),
        Claim(
            "Step-by-step PPO is no worse than PPO by outcome",
            f"greedy accuracy {ppo:.3f} against {outcome:.3f}",
            f"not by more than {margins.ppo_near:g} (the paper's gain is 2.3 points)",
            ppo >= outcome - margins.ppo_near,
        ),
        Claim(
            "Its policy still solves problems as it was taught",
            f"{longer:+.1%} steps, {silent:.1%} without an answer",
            f"within {margins.steps:.0%} and below {margins.no_answer:.0%}",
            abs(longer) <= margins.steps and silent < margins.no_answer,
        ),
    ]
    if "raw stopped" not in mean:
        reason = "thirty iterations take too long for this profile; --profile full runs them"
        claims.append(
            Claim("Raw sums of scores are hacked, and the monitor sees it", "", reason, None)
        )
        return claims
    return [
        *claims,
        Claim(
            "Raw sums of scores are hacked, and the monitor sees it",
            f"stopped in {mean['raw stopped']:.0%} of the runs, at iteration "
            f"{mean['raw stopped at']:.0f} on average; the default shaping alarmed in "
            f"{mean['PPO by steps alarmed']:.0%}",
            "in all of the former, and in none of the latter",
            mean["raw stopped"] == 1.0 and mean["PPO by steps alarmed"] == 0.0,
        ),
    ]
