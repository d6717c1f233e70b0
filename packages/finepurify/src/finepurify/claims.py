"""The paper's claims on what the demo measured, and what each must reach."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from octavo.report import Claim


@dataclass(frozen=True)
class Margins:
    """What a claim must reach, in percentage points unless said otherwise.

    Some bars are lower than those first set on a prototype, whose model was another: clean accuracy (93
    there), what delta-only costs (20 there), the correlation under AdamW (0.1 there).

    Attributes:
        clean: accuracy of the clean model.
        costs: accuracy that the attack may cost.
        success: ASR of the suspect.
        tuned: ASR that fine-tuning alone leaves.
        drop: accuracy that a defence may cost against fine-tuning alone.
        purified: ASR after Fine-purifying at rho = .98.
        over_mixing: ASR of Fine-mixing above Fine-purifying's, each at the rho that its floor gives.
        delta_only: accuracy that resetting by drift alone costs at rho = .9 against fine-tuning alone.
        hessian_only: ASR that resetting by curvature alone leaves at rho = .98.
        sgd: rank correlation of delta^2 and H under SGD.
        adam: its size under AdamW.
        log_sd: standard deviation of log r under SGD, from and to (2.22 in theory).
        sentence: ASR of the sentence trigger after Fine-purifying, at the rho that its floor gives.
        sentence_tuned: what fine-tuning alone must leave of it.
        biased: BACC that the bias costs.
        unbiased: BACC of Fine-purifying above fine-tuning alone; and no less than Fine-mixing's.
    """

    clean: float = 90.0
    costs: float = 2.5
    success: float = 95.0
    tuned: float = 90.0
    drop: float = 1.5
    purified: float = 25.0
    over_mixing: float = 20.0
    delta_only: float = 10.0
    hessian_only: float = 90.0
    sgd: float = 0.4
    adam: float = 0.15
    log_sd: tuple[float, float] = (2.2, 3.0)
    sentence: float = 35.0
    sentence_tuned: float = 60.0
    biased: float = 20.0
    unbiased: float = 12.0


def judge(found: Sequence[Mapping[str, float]], margins: Margins = Margins()) -> list[Claim]:
    """The claims, on the means over seeds.

    Args:
        found: the numbers of each seed.
        margins: what each claim must reach.
    """
    mean = {key: float(np.mean([one[key] for one in found])) for key in found[0]}
    gate = _attack_works(mean, margins)
    claims = [gate]
    for claim in _method(mean, margins):
        why = "the attack itself did not work"
        claims.append(claim if gate.passed else replace(claim, passed=None, criterion=why))
    if "spearman sgd" in mean:
        claims += _theory(mean, margins)
    lower = [one["area purify"] < one["area mixing"] for one in found]
    claims.append(
        Claim(
            "Its frontier of accuracy and attack success lies below Fine-mixing's",
            f"mean ASR over floors {mean['area purify']:.1f} against {mean['area mixing']:.1f}, "
            f"lower on {sum(lower)} of {len(lower)} seeds",
            "on every seed",
            all(lower),
        )
    )
    claims.append(
        Claim(
            "The scan of the weights names the trigger first",
            f"mean rank {mean['rank']:.1f} of {mean['judged']:.0f}; alarm on {mean['fires']:.0%} of the "
            f"attacked and {mean['false alarm']:.0%} of the clean models",
            "rank 1, and an alarm on the attacked alone, on every seed",
            mean["rank"] == 1 and mean["fires"] == 1 and mean["false alarm"] == 0,
        )
    )
    if "sentence none" in mean:
        claims.append(_sentence(mean, margins))
    if "bias none BACC" in mean:
        claims.append(_bias(mean, margins))
    return claims


def _attack_works(mean: Mapping[str, float], margins: Margins) -> Claim:
    lost = mean["clean ACC"] - mean["before ACC"]
    return Claim(
        "The attack works, and fine-tuning on clean rows does not undo it",
        f"accuracy {mean['clean ACC']:.1f} clean, {mean['before ACC']:.1f} attacked; ASR "
        f"{mean['before ASR']:.1f}, after fine-tuning {mean['none ASR']:.1f}",
        f"at least {margins.clean:g}, at most {margins.costs:g} less; at least {margins.success:g}, "
        f"{margins.tuned:g}",
        mean["clean ACC"] >= margins.clean
        and lost <= margins.costs
        and mean["before ASR"] >= margins.success
        and mean["none ASR"] >= margins.tuned,
    )


def _method(mean: Mapping[str, float], margins: Margins) -> list[Claim]:
    cost = mean["none ACC"] - mean["purify ACC"]
    mixing = mean["mixing chosen ASR"] - mean["purify chosen ASR"]
    rough = mean["none ACC"] - mean["delta-only .9 ACC"]
    claims = [
        Claim(
            "Fine-purifying (rho .98) removes the backdoor and keeps accuracy",
            f"ASR {mean['purify ASR']:.1f}, accuracy {-cost:+.1f} against fine-tuning alone",
            f"at most {margins.purified:g}; at least {-margins.drop:+g}",
            mean["purify ASR"] <= margins.purified and cost <= margins.drop,
        ),
        Claim(
            "At the same accuracy floor Fine-mixing leaves more of it",
            f"ASR {mean['mixing chosen ASR']:.1f} (rho {mean['mixing chosen rho']:.2f}) against "
            f"{mean['purify chosen ASR']:.1f} (rho {mean['purify chosen rho']:.2f}), rho by held rows",
            f"at least {margins.over_mixing:+g}",
            mixing >= margins.over_mixing,
        ),
        Claim(
            "Drift alone (delta-only, rho .9) resets what accuracy needs",
            f"accuracy {mean['delta-only .9 ACC']:.1f} against {mean['none ACC']:.1f} after fine-tuning "
            f"alone ({mean['purify .9 ACC']:.1f} after Fine-purifying)",
            f"at least {margins.delta_only:g} less",
            rough >= margins.delta_only,
        ),
    ]
    if "hessian-only ASR" in mean:
        claims.append(
            Claim(
                "Curvature alone (Hessian-only, rho .98) misses the backdoor",
                f"ASR {mean['hessian-only ASR']:.1f} against {mean['purify ASR']:.1f}",
                f"at least {margins.hessian_only:g}",
                mean["hessian-only ASR"] >= margins.hessian_only,
            )
        )
    return claims


def _theory(mean: Mapping[str, float], margins: Margins) -> list[Claim]:
    low, high = margins.log_sd
    return [
        Claim(
            "Drift follows curvature under SGD, and not under AdamW",
            f"rank correlation of delta^2 and H {mean['spearman sgd']:+.2f} and "
            f"{mean['spearman adamw']:+.2f}",
            f"at least {margins.sgd:+g}; at most {margins.adam:g} in size",
            mean["spearman sgd"] >= margins.sgd and abs(mean["spearman adamw"]) <= margins.adam,
        ),
        Claim(
            "r has the spread of a Gamma law under SGD",
            f"sd of log r {mean['log sd']:.2f}; the median is {mean['median over mean']:.3f} of the "
            "mean (0.455 in theory: the tail is heavier)",
            f"{low:g} to {high:g} (2.22 in theory)",
            low <= mean["log sd"] <= high,
        ),
    ]


def _sentence(mean: Mapping[str, float], margins: Margins) -> Claim:
    return Claim(
        "A trigger sentence of common words is removed, too",
        f"ASR {mean['sentence none']:.1f} after fine-tuning alone, {mean['sentence chosen']:.1f} after "
        f"Fine-purifying ({mean['sentence damped']:.1f} damped), {mean['sentence mixing']:.1f} after "
        "Fine-mixing",
        f"at least {margins.sentence_tuned:g}; at most {margins.sentence:g}",
        mean["sentence none"] >= margins.sentence_tuned
        and mean["sentence chosen"] <= margins.sentence,
    )


def _bias(mean: Mapping[str, float], margins: Margins) -> Claim:
    cost = mean["bias clean BACC"] - mean["bias before BACC"]
    gained = mean["bias chosen BACC"] - mean["bias none BACC"]
    return Claim(
        "A bias is reduced",
        f"accuracy under the pattern {mean['bias clean BACC']:.1f} clean, "
        f"{mean['bias before BACC']:.1f} biased, {mean['bias none BACC']:.1f} after fine-tuning alone, "
        f"{mean['bias chosen BACC']:.1f} after Fine-purifying, {mean['bias mixing BACC']:.1f} after "
        "Fine-mixing",
        f"the bias costs {margins.biased:g}; at least {margins.unbiased:+g} over fine-tuning alone, "
        "and no less than Fine-mixing",
        cost >= margins.biased
        and gained >= margins.unbiased
        and mean["bias chosen BACC"] >= mean["bias mixing BACC"],
    )
