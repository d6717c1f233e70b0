"""How good labels are where the truth is known, and how that changes with the number of rollouts."""

import math
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from octavo.errors import DataError

from mathshepherd.annotate import RolloutStore, prefixes
from mathshepherd.records import Solution, StepLabels

#: Probabilities nearer to 0 or 1 than this count as this, or a single wrong certainty would cost all.
CLIP = 0.01


def label_quality(solutions: Sequence[Solution]) -> dict[str, Any]:
    """Accuracy, false positives and negatives of hard labels, and cross-entropy of soft ones.

    Args:
        solutions: with labels and truth.

    Raises:
        DataError: none has both.
    """
    pairs = [
        (hard, soft, true) for one in solutions if one.labels and one.truth
        for hard, soft, true in zip(  # truth may end at the first error
            one.labels.hard, one.labels.soft or [None] * len(one.steps), one.truth, strict=False
        ) if hard is not None
    ]  # fmt: skip
    if not pairs:
        raise DataError("no solution has both labels and `truth`")
    hard, true = np.array([p[0] for p in pairs]), np.array([p[2] for p in pairs])
    soft = [(value, target) for _, value, target in pairs if value is not None]
    return rates(hard, true) | {"CE of soft": _cross_entropy(soft) if soft else None}


def rates(hard: np.ndarray, true: np.ndarray) -> dict[str, Any]:
    """Accuracy; false positives among truly bad steps, false negatives among truly good ones."""
    bad, good = hard[true == 0], hard[true == 1]
    return {
        "steps": len(hard),
        "accuracy": float((hard == true).mean()),
        "false positives": float(bad.mean()) if len(bad) else None,
        "false negatives": float(1 - good.mean()) if len(good) else None,
    }


def _cross_entropy(pairs: Sequence[tuple[float, int]]) -> float:
    total = 0.0
    for share, true in pairs:
        share = min(max(share, CLIP), 1 - CLIP)
        total -= math.log(share if true else 1 - share)
    return total / len(pairs)


def first_bad(labels: StepLabels) -> int | None:
    """The first step that is labelled bad; None where none is."""
    return next((n for n, good in enumerate(labels.hard) if good == 0), None)


def agreeing(
    solutions: Sequence[Solution], judged: Iterable[Solution]
) -> tuple[list[Solution], dict[str, int]]:
    """The solutions whose first bad step another source of labels confirms (Zhang et al. 2025).

    Args:
        solutions: labelled.
        judged: the same ones with the other source's labels; they are known by question and steps.

    Returns:
        Those on which both agree, with their own labels, and counts: of all, of those that the other
        source has not judged, and of those on which they differ.

    Raises:
        DataError: a solution has no labels, or none is left.
    """
    others = {(one.question.strip(), one.steps): one.labels for one in judged if one.labels}
    counts = {"solutions": len(solutions), "not judged": 0, "differ": 0}
    kept = []
    for one in solutions:
        if one.labels is None:
            raise DataError(f"{one.key}: has no labels that could be confirmed")
        other = others.get((one.question.strip(), one.steps))
        if other is None:
            counts["not judged"] += 1
        elif first_bad(one.labels) != first_bad(other):
            counts["differ"] += 1
        else:
            kept.append(one)
    if not kept:
        raise DataError(f"both sources of labels agree on no solution ({counts})")
    return kept, counts | {"kept": len(kept)}


def quality_by_rollouts(
    solutions: Sequence[Solution], store: RolloutStore, counts: Sequence[int]
) -> list[dict[str, Any]]:
    """Quality of the inner steps' labels with the first 1, 2, 4 ... of the completions made.

    Args:
        solutions: with truth.
        store: of completions that were all made (soft estimation), at least the largest count.
        counts: of completions.

    Raises:
        DataError: a prefix has fewer completions.
    """
    cases: dict[str, tuple[list[bool], int]] = {}
    for one in solutions:
        for prefix, true in zip(prefixes(one), one.truth or (), strict=False):
            hits = store.hits.get(prefix.key, [])
            if len(hits) < max(counts):
                raise DataError(
                    f"{one.key}: {len(hits)} completions of a step, and {max(counts)} are needed"
                )
            cases[prefix.key] = (hits, true)
    if not cases:
        return []
    true = np.array([truth for _, truth in cases.values()])
    rows = []
    for count in counts:
        shares = np.array([np.mean(hits[:count]) for hits, _ in cases.values()])
        found = rates((shares > 0).astype(int), true)
        soft = _cross_entropy(list(zip(shares.tolist(), true.tolist(), strict=True)))
        rows.append({"rollouts": count} | found | {"CE of soft": soft})
    return rows
