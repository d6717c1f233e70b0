"""What is claimed of formations, on what the demo measured, and what each claim must reach."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from octavo.report import Claim


@dataclass(frozen=True)
class Margins:
    """What a claim must reach, in percentage points.

    Attributes:
        known: accuracy of the plain cross-encoder on known words in known frames, otherwise filled.
        gloss_only: its accuracy on words it was not taught; always taking the first sense gives 50, and
            an earlier sketch with a linear model had 65 set here.
        gain: of interacting formations on contrast words, over the plain cross-encoder.
        beyond: the same over a plain one whose encoder learnt to tell formations from contexts along
            with it (a claim that was added when the first seed's table showed the need of it).
        control: how far they may move control words, either way.
        added: what adding formations, as the paper does, may give on contrast words at most.
        slack: how far formations predicted from the gloss may lie below the plain cross-encoder or above
            annotated ones.
        predictor: accuracy of the formation from the context, on words it was not taught.
        pos: share of the gain that parts of speech in the formations' place must give for the gain to be
            called theirs as well.
    """

    known: float = 75.0
    gloss_only: float = 55.0
    gain: float = 8.0
    beyond: float = 4.0
    control: float = 6.0
    added: float = 6.0
    slack: float = 4.0
    predictor: float = 50.0
    pos: float = 0.5


def judge(found: Sequence[Mapping[str, float]], margins: Margins = Margins()) -> list[Claim]:
    """The claims, on the means over seeds.

    Args:
        found: the numbers of each seed, of `demo.numbers`.
        margins: what each claim must reach.
    """
    mean = {key: float(np.mean([one[key] for one in found])) for key in found[0]}
    gate = Claim(
        "A cross-encoder of text and gloss learns what it is taught",
        f"{mean['gloss only, known']:.1f} % on known words in known frames",
        f"at least {margins.known:g}",
        mean["gloss only, known"] >= margins.known,
    )
    from_glosses = Claim(
        "It disambiguates words of which it knows the glosses alone",
        f"{mean['gloss only, new words']:.1f} % (first sense {mean['first sense, new words']:.1f})",
        f"at least {margins.gloss_only:g}",
        mean["gloss only, new words"] >= margins.gloss_only,
    )
    claims = [from_glosses, _gain(mean, margins)]
    if "taught along, contrast" in mean:
        claims.append(_beyond(mean, margins))
    claims += [_predicted(mean, margins), _control(mean, margins)]
    if "added, contrast" in mean:
        claims += [_added(mean, margins), _ranking(mean)]
    claims.append(_context(mean, margins))
    if "parts of speech, contrast" in mean:
        claims.append(_pos(mean, margins))
    why = "the plain cross-encoder did not learn, so that nothing can be compared with it"
    return [
        gate,
        *(one if gate.passed else replace(one, passed=None, criterion=why) for one in claims),
    ]


def _gain(mean: Mapping[str, float], margins: Margins) -> Claim:
    gain = mean["annotated, contrast"] - mean["gloss only, contrast"]
    return Claim(
        "Formations that interact with the context help where senses differ in formation",
        f"contrast words {mean['annotated, contrast']:.1f} % against {mean['gloss only, contrast']:.1f} "
        f"without ({gain:+.1f})",
        f"at least {margins.gain:+g}",
        gain >= margins.gain,
    )


def _beyond(mean: Mapping[str, float], margins: Margins) -> Claim:
    gain = mean["annotated, contrast"] - mean["taught along, contrast"]
    return Claim(
        "They give more than teaching the encoder formations along, with none told when it answers",
        f"contrast words {mean['annotated, contrast']:.1f} % against "
        f"{mean['taught along, contrast']:.1f} ({gain:+.1f})",
        f"at least {margins.beyond:+g}",
        gain >= margins.beyond,
    )


def _predicted(mean: Mapping[str, float], margins: Margins) -> Claim:
    told = mean["predicted, new words (contrast)"]
    low = mean["gloss only, new words (contrast)"] - margins.slack
    high = mean["annotated, new words (contrast)"] + margins.slack
    return Claim(
        "Without annotations, formations predicted from the gloss stand in",
        f"new contrast words, which the predictor has not seen either, {told:.1f} %",
        f"from {low:.1f} (gloss only, {-margins.slack:+g}) to {high:.1f} (annotated, "
        f"{margins.slack:+g})",
        low <= told <= high,
    )


def _control(mean: Mapping[str, float], margins: Margins) -> Claim:
    moved = mean["annotated, control"] - mean["gloss only, control"]
    return Claim(
        "They leave words alone whose senses are formed alike",
        f"control words {mean['annotated, control']:.1f} % against {mean['gloss only, control']:.1f} "
        f"({moved:+.1f})",
        f"at most {margins.control:g} either way",
        abs(moved) <= margins.control,
    )


def _added(mean: Mapping[str, float], margins: Margins) -> Claim:
    gain = mean["added, contrast"] - mean["gloss only, contrast"]
    return Claim(
        "Adding a formation's vector to the pooled state, as the paper does, gives little here",
        f"contrast words {mean['added, contrast']:.1f} % ({gain:+.1f}): the senses' formations are "
        "balanced, and a sum cannot interact",
        f"at most {margins.added:+g}",
        gain <= margins.added,
    )


def _ranking(mean: Mapping[str, float]) -> Claim:
    return Claim(
        "With one formation predicted for all senses, adding changes no choice; interacting does",
        f"{mean['added, changed']:.1f} % of choices change with the paper's fusion, "
        f"{mean['annotated, changed']:.1f} % with token + agreement",
        "0; above 0",
        mean["added, changed"] == 0 and mean["annotated, changed"] > 0,
    )


def _context(mean: Mapping[str, float], margins: Margins) -> Claim:
    return Claim(
        "The context tells how a new word is formed",
        f"{mean['context predictor']:.1f} % of formations right on words not taught (the commonest "
        f"formation: {mean['commonest formation']:.1f})",
        f"at least {margins.predictor:g}, and above the commonest",
        mean["context predictor"] >= max(margins.predictor, mean["commonest formation"]),
    )


def _pos(mean: Mapping[str, float], margins: Margins) -> Claim:
    gain = mean["annotated, contrast"] - mean["gloss only, contrast"]
    pos = mean["parts of speech, contrast"] - mean["gloss only, contrast"]
    return Claim(
        "Parts of speech in the formations' place explain most of the gain",
        f"{pos:+.1f} of {gain:+.1f}: in this lexicon nearly every contrast is one of part of speech",
        f"at least {margins.pos:g} of the gain" if gain > 0 else "there is no gain to explain",
        pos >= margins.pos * gain if gain > 0 else None,
    )
