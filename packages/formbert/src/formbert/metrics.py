"""How well senses are told: accuracy by subset with intervals, paired comparison, calibration.

The subsets are defined here once. All but `all` hold polysemous words alone, since a word with one
sense is right without any model.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from octavo.errors import DataError
from octavo.stats import bootstrap_interval, calibration_error, mcnemar
from scipy.stats import binom

from formbert.data import Instance, need_gold
from formbert.inventory import Inventory, Sense
from formbert.predictions import Prediction

#: Where a target's first character may stand; from 108 on, cutting at the right end may lose it.
STARTS = (0, 32, 64, 108)


def aligned(
    predictions: Sequence[Prediction], instances: Sequence[Instance]
) -> Sequence[Prediction]:
    """The predictions in the order of the instances, matched by their names.

    Raises:
        DataError: an instance has no prediction, a prediction no instance, or a name stands twice
            while the two are not in the same order.
    """
    if len(predictions) == len(instances) and all(
        told.key == one.key and told.word == one.word
        for told, one in zip(predictions, instances, strict=True)
    ):
        return predictions
    by_key = {told.key: told for told in predictions}
    keys = {one.key for one in instances}
    if len(by_key) < len(predictions) or len(keys) < len(instances):
        what = "predictions" if len(by_key) < len(predictions) else "instances"
        raise DataError(f"two {what} have the same id: give each its own")
    if missing := [one.key for one in instances if one.key not in by_key]:
        raise DataError(f"{len(missing)} instances have no prediction, the first is {missing[0]!r}")
    if extra := [key for key in by_key if key not in keys]:
        raise DataError(f"{len(extra)} predictions have no instance, the first is {extra[0]!r}")
    for one in instances:
        if by_key[one.key].word != one.word:
            raise DataError(
                f"{one.key!r} is about {one.word!r}, its prediction about "
                f"{by_key[one.key].word!r}: are they of the same data?"
            )
    return [by_key[one.key] for one in instances]


def outcomes(predictions: Sequence[Prediction], instances: Sequence[Instance]) -> np.ndarray:
    """Whether each instance is answered rightly, [n] of bool.

    Of several right senses any counts; no answer is a wrong one; a guess that the model abstained from
    counts as the guess it is.

    Raises:
        DataError: they do not belong together (see `aligned`), or an instance has no right sense.
    """
    need_gold(instances, "to be judged by")
    pairs = zip(aligned(predictions, instances), instances, strict=True)
    return np.array([told.sense_id in one.gold for told, one in pairs], bool)


def subsets(
    instances: Sequence[Instance], inventory: Inventory, train: Sequence[Instance] = ()
) -> dict[str, np.ndarray]:
    """Members of every subset by its name, [n] of bool; empty subsets are left out.

    - `all`; `polysemous`: the word has two senses or more in the inventory. The rest are parts of this:
    - `POS=...`: part of speech of the right sense.
    - `formation-differs`: two of the word's senses are annotated with different formations;
      `formation-same`: they are not. `POS-differs`, `POS-same` likewise; and the cross of both, the only
      place where formation can be told from part of speech.
    - `senses=2`, `3`, `4`, `5+`: number of candidates.
    - `gold=first`: the first sense of the dictionary is right (MFS); `gold=other`: it is not (LFS).
    - `sense-seen`, `sense-new` (the word was seen, in other senses) and `word-new`: in `train`.
    - `length=1`, `2`, `3`, `4+`: characters of the word.
    - `start=0-31`, `32-63`, `64-107`, `108+`: where the word begins, in characters.

    Args:
        instances: with their right senses.
        inventory: of which the candidates are.
        train: what was learnt from; its words and right senses count as seen.
    """
    senses = [inventory.get(one.word, ()) for one in instances]
    words = {one.word: listed for one, listed in zip(instances, senses, strict=True)}
    differ = {word: (_differ(listed, "formation"), _differ(listed, "pos"))
              for word, listed in words.items()}  # fmt: skip
    counts = np.array([len(listed) for listed in senses], int)
    polysemous = counts > 1
    formation, pos = np.array([differ[one.word] for one in instances], bool).reshape(-1, 2).T
    tags = np.array([_gold_pos(one, inventory) for one in instances], str)
    first = np.array([bool(listed) and listed[0].sense_id in one.gold
                      for one, listed in zip(instances, senses, strict=True)], bool)  # fmt: skip
    lengths = np.array([len(one.word) for one in instances], int)
    starts = np.searchsorted(STARTS, [one.start for one in instances], "right") - 1
    within: dict[str, np.ndarray] = {
        "formation-differs": formation, "formation-same": ~formation,
        "POS-differs": pos, "POS-same": ~pos,
        "formation-differs, POS-differs": formation & pos,
        "formation-differs, POS-same": formation & ~pos,
        "formation-same, POS-differs": ~formation & pos,
        "formation-same, POS-same": ~formation & ~pos,
        "gold=first": first, "gold=other": ~first,
    }  # fmt: skip
    within |= {f"POS={tag}": tags == tag for tag in sorted(set(tags.tolist())) if tag}
    within |= {f"senses={k}": counts == k for k in (2, 3, 4)} | {"senses=5+": counts >= 5}
    within |= {f"length={k}": lengths == k for k in (1, 2, 3)} | {"length=4+": lengths >= 4}
    ends = [f"-{edge - 1}" for edge in STARTS[1:]] + ["+"]
    within |= {f"start={edge}{end}": starts == band
               for band, (edge, end) in enumerate(zip(STARTS, ends, strict=True))}  # fmt: skip
    if train:
        within |= _novelty(instances, train)
    parts = {"all": np.ones(len(instances), bool), "polysemous": polysemous}
    parts |= {name: members & polysemous for name, members in within.items()}
    return {name: members for name, members in parts.items() if members.any()}


def _differ(senses: Sequence[Sense], what: str) -> bool:
    """Whether two of the senses that have an annotation differ in it."""
    return len({getattr(sense, what) for sense in senses} - {None, ""}) > 1


def _gold_pos(one: Instance, inventory: Inventory) -> str:
    sense = inventory.by_id.get(one.gold[0]) if one.gold else None
    return sense.pos if sense else ""


def _novelty(instances: Sequence[Instance], train: Sequence[Instance]) -> dict[str, np.ndarray]:
    words = {one.word for one in train}
    names = {name for one in train for name in one.gold}
    word = np.array([one.word in words for one in instances], bool)
    sense = np.array([not names.isdisjoint(one.gold) for one in instances], bool)
    return {"sense-seen": word & sense, "sense-new": word & ~sense, "word-new": ~word}


def evaluate(
    predictions: Sequence[Prediction],
    instances: Sequence[Instance],
    inventory: Inventory,
    train: Sequence[Instance] = (),
    seed: int = 0,
) -> list[dict[str, Any]]:
    """Accuracy on every subset, and its mean over polysemous words.

    Args:
        predictions: one for each instance.
        instances: with their right senses.
        inventory: of which the candidates are.
        train: what was learnt from, for the subsets of seen and new senses.
        seed: of the resampling of words.

    Returns:
        Rows `subset`, `n`, `accuracy`, `low`, `high`, in percent, as `subsets` orders them, then
        `mean-over-words`, where n counts words. The interval is the 95 % percentile bootstrap: over
        instances its limit for endless resamples (how many a resample has right is binomial), over
        words `octavo.stats.bootstrap_interval`.

    Raises:
        DataError: predictions and instances do not belong together, or one has no right sense.
    """
    right = outcomes(predictions, instances)
    parts = subsets(instances, inventory, train)
    rows = [_row(name, right[members]) for name, members in parts.items()]
    if "polysemous" in parts:
        means = _means_over_words(right, instances, parts["polysemous"])
        low, high = bootstrap_interval(means, seed=seed) if len(means) > 1 else (means[0],) * 2
        rows.append({"subset": "mean-over-words", "n": len(means),
                     "accuracy": 100 * float(means.mean()),
                     "low": 100 * float(low), "high": 100 * float(high)})  # fmt: skip
    return rows


def _row(name: str, right: np.ndarray) -> dict[str, Any]:
    n, share = len(right), float(right.mean())
    low, high = binom.ppf((0.025, 0.975), n, share) / n
    return {"subset": name, "n": n, "accuracy": 100 * share,
            "low": 100 * float(low), "high": 100 * float(high)}  # fmt: skip


def _means_over_words(
    right: np.ndarray, instances: Sequence[Instance], members: np.ndarray
) -> np.ndarray:
    words = np.array([one.word for one in instances])[members]
    _, which, counts = np.unique(words, return_inverse=True, return_counts=True)
    return np.bincount(which, right[members]) / counts


def compare(
    first: Sequence[Prediction],
    second: Sequence[Prediction],
    instances: Sequence[Instance],
    inventory: Inventory,
    train: Sequence[Instance] = (),
) -> list[dict[str, Any]]:
    """How much better the second system is than the first on the same instances, by subset.

    Args:
        first: predictions of the one.
        second: of the other.
        instances: with their right senses.
        inventory: of which the candidates are.
        train: what was learnt from.

    Returns:
        Rows `subset`, `n`, `first`, `second` (accuracy in percent), `delta` (second less first, in
        points), `low` and `high` (95 % paired bootstrap: how many instances a resample wins and loses is
        multinomial, 10,000 of them are drawn), and `p` (exact McNemar, two-sided).

    Raises:
        DataError: as `evaluate`.
    """
    one, other = outcomes(first, instances), outcomes(second, instances)
    rng = np.random.default_rng(0)
    rows = []
    for name, members in subsets(instances, inventory, train).items():
        a, b = one[members], other[members]
        n, won, lost = len(a), int((b & ~a).sum()), int((a & ~b).sum())
        drawn = rng.multinomial(n, [won / n, lost / n, (n - won - lost) / n], 10_000)
        low, high = np.quantile((drawn[:, 0] - drawn[:, 1]) / n, (0.025, 0.975))
        rows.append({
            "subset": name, "n": n, "first": 100 * float(a.mean()), "second": 100 * float(b.mean()),
            "delta": 100 * (won - lost) / n, "low": 100 * float(low), "high": 100 * float(high),
            "p": mcnemar(a, b),
        })  # fmt: skip
    return rows


def summary(
    predictions: Sequence[Prediction], instances: Sequence[Instance], inventory: Inventory
) -> dict[str, float]:
    """Measures that are one number each, all of polysemous words.

    Returns:
        `accuracy`, `macro_accuracy` (mean over words) and `macro_f1` (mean over the senses that are
        right or chosen somewhere), in percent; `calibration_error` and `brier` of the probabilities, as
        shares; `coverage`: percent that was answered without abstaining, and `accuracy_covered` there
        (NaN of none).

    Raises:
        DataError: as `evaluate`, and when no instance is of a polysemous word.
    """
    told = aligned(predictions, instances)
    right = outcomes(told, instances)
    members = _polysemous(instances, inventory)
    some = [pair for pair, member in zip(zip(told, instances, strict=True), members, strict=True)
            if member]  # fmt: skip
    sure = np.array([answer.sense_id is not None and not answer.abstained for answer, _ in some])
    correct = right[members]
    confidence = [answer.probability for answer, _ in some]
    return {
        "accuracy": 100 * float(correct.mean()),
        "macro_accuracy": 100 * float(_means_over_words(right, instances, members).mean()),
        "macro_f1": 100 * _macro_f1(some),
        "calibration_error": calibration_error(confidence, correct),
        "brier": float(np.mean([_brier(answer, one) for answer, one in some])),
        "coverage": 100 * float(sure.mean()),
        "accuracy_covered": 100 * float(correct[sure].mean()) if sure.any() else float("nan"),
    }


def _polysemous(instances: Sequence[Instance], inventory: Inventory) -> np.ndarray:
    members = np.array([len(inventory.get(one.word, ())) > 1 for one in instances], bool)
    if not members.any():
        raise DataError("no instance is of a word with several senses: there is nothing to judge")
    return members


def _macro_f1(pairs: Sequence[tuple[Prediction, Instance]]) -> float:
    """Mean F1 over senses; of several right ones the chosen, else the first, is the right one."""
    chosen = [told.sense_id or "" for told, _ in pairs]
    gold = [told.sense_id if told.sense_id in one.gold else one.gold[0] for told, one in pairs]
    names, codes = np.unique(np.array(chosen + gold, str), return_inverse=True)
    a, b = codes[: len(pairs)], codes[len(pairs) :]
    hits = np.bincount(a[a == b], minlength=len(names))
    total = np.bincount(a, minlength=len(names)) + np.bincount(b, minlength=len(names))
    senses = names != ""  # no answer is no sense: it is a miss of the right one and no more
    return float((2 * hits / total)[senses].mean())


def _brier(told: Prediction, one: Instance) -> float:
    """Squared distance of the probabilities to the truth, which several right senses share evenly."""
    share = 1 / len(one.gold)
    square = sum(candidate.probability**2 for candidate in told.candidates)
    mass = sum(c.probability for c in told.candidates if c.sense_id in one.gold)
    return square - 2 * share * mass + share


def pair_scores(
    predictions: Sequence[Prediction],
    instances: Sequence[Instance],
    inventory: Inventory,
    threshold: float = 0.5,
) -> dict[str, float]:
    """Accuracy and F1 over (context, gloss) pairs, the kind of measure that the authors' code has.

    Theirs judges each pair's own two logits; here a sense's probability among its word's is judged, so
    that the numbers are near, not the same.

    This is no accuracy of sense disambiguation: every pair is judged alone, so that none or two senses
    of one instance may be told right; the threshold matters, which no choice among senses needs; words
    with many senses count more often in the accuracy, and "no" to everything is right most of the time.
    Only for comparison with pair scores. Words with one sense are in it, as in the public files.

    Args:
        predictions: with the probabilities of all candidates.
        instances: with their right senses.
        inventory: of which the candidates are.
        threshold: a pair whose probability is at least this is told to be right.

    Returns:
        `pairs` (how many), `pair_accuracy` and `pair_f1` in percent.
    """
    need_gold(instances, "to be judged by")
    pairs = told_right = truly_right = both = 0
    for told, one in zip(aligned(predictions, instances), instances, strict=True):
        yes = {c.sense_id for c in told.candidates if c.probability >= threshold}
        names = {sense.sense_id for sense in inventory.get(one.word, ())} | set(one.gold)
        pairs += len(names)
        told_right += len(yes)
        truly_right += len(set(one.gold))
        both += len(yes & set(one.gold))
    wrong = told_right + truly_right - 2 * both
    f1 = 2 * both / max(told_right + truly_right, 1)
    return {"pairs": pairs, "pair_accuracy": 100 * (1 - wrong / max(pairs, 1)), "pair_f1": 100 * f1}


def coverage_curve(
    predictions: Sequence[Prediction],
    instances: Sequence[Instance],
    inventory: Inventory,
    points: int = 20,
) -> list[dict[str, float]]:
    """Accuracy on the most certain answers, for more and more of them (polysemous words).

    Args:
        predictions: one for each instance, with probabilities.
        instances: with their right senses.
        inventory: of which the candidates are.
        points: how many shares of the instances are looked at, the last of them all.

    Returns:
        Rows `coverage` (percent that is answered), `threshold` (the probability from which on), `n`,
        `accuracy` (percent). Answers of equal probability are kept together, so rows may be fewer.

    Raises:
        DataError: as `summary`.
    """
    told = aligned(predictions, instances)
    members = _polysemous(instances, inventory)
    right = outcomes(told, instances)[members]
    sure = np.array([answer.probability for answer in told])[members]
    order = np.argsort(-sure, kind="stable")
    right, sure = right[order], sure[order]
    cut = np.ceil(np.arange(1, points + 1) * len(sure) / points).astype(int)
    last = np.unique(np.searchsorted(-sure, -sure[cut - 1], "right"))
    hits = np.cumsum(right)
    return [{"coverage": 100 * int(n) / len(sure), "threshold": float(sure[n - 1]), "n": int(n),
             "accuracy": 100 * float(hits[n - 1]) / int(n)} for n in last]  # fmt: skip
