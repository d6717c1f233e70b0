"""What is had without learning, or without formations: first senses, overlap with glosses, neighbours.

No baseline looks at right senses, but for the oracles: they are told how the right sense is formed, or
its part of speech, and answer what the first sense would be if that were known.
"""

import re
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any, cast

import numpy as np

from formbert.data import Instance, need_gold
from formbert.inventory import Inventory, Sense
from formbert.predictions import Candidate, Prediction

#: Instances, the inventory and what was learnt from, to predictions.
Baseline = Callable[[Sequence[Instance], Inventory, Sequence[Instance]], list[Prediction]]


def _answer(
    one: Instance, senses: Sequence[Sense], scores: Sequence[float] | np.ndarray
) -> Prediction:
    """The sense of the highest score; equal ones in the dictionary's order.

    Shares of the scores serve as probabilities; where all are 0, each sense has the same.
    """
    if not senses:
        return Prediction(one.key, one.word, None, reason="not in inventory")
    values = np.asarray(scores, float)
    total = values.sum()
    shares = values / total if total > 0 else np.full(len(senses), 1 / len(senses))
    ranked = tuple(
        Candidate(senses[at].sense_id, senses[at].gloss, float(shares[at]),
                  formation.zh if (formation := senses[at].formation) is not None else "")
        for at in np.argsort(-values, kind="stable")
    )  # fmt: skip
    return Prediction(one.key, one.word, ranked[0].sense_id, ranked)


def random_sense(
    instances: Sequence[Instance],
    inventory: Inventory,
    train: Sequence[Instance] = (),
    seed: int = 0,
) -> list[Prediction]:
    """Any of the word's senses, all equally probable; `random_accuracy` is what it gives on average."""
    rng = np.random.default_rng(seed)
    answers = []
    for one in instances:
        listed = inventory.get(one.word, ())
        order = [listed[at] for at in rng.permutation(len(listed))]
        answers.append(_answer(one, order, np.zeros(len(order))))
    return answers


def random_accuracy(instances: Sequence[Instance], inventory: Inventory) -> float:
    """Expected accuracy of a random sense, in percent.

    Raises:
        DataError: an instance has no right sense.
    """
    need_gold(instances, "to be judged by")
    shares = []
    for one in instances:
        names = [sense.sense_id for sense in inventory.get(one.word, ())]
        shares.append(len(set(names) & set(one.gold)) / max(len(names), 1))
    return 100 * float(np.mean(shares))


def first_sense(
    instances: Sequence[Instance], inventory: Inventory, train: Sequence[Instance] = ()
) -> list[Prediction]:
    """The first sense that the inventory lists."""
    answers = []
    for one in instances:
        senses = inventory.get(one.word, ())
        answers.append(_answer(one, senses, [float(at == 0) for at in range(len(senses))]))
    return answers


def train_most_frequent(
    instances: Sequence[Instance], inventory: Inventory, train: Sequence[Instance]
) -> list[Prediction]:
    """The sense most often right in `train`; the first sense of words that are not in it.

    Ties go to the sense listed first; an instance with several right senses counts for each in part.
    """
    counts: dict[str, float] = defaultdict(float)
    for seen in train:
        for name in seen.gold:
            counts[name] += 1 / len(seen.gold)
    answers = []
    for one in instances:
        senses = inventory.get(one.word, ())
        scores = [counts.get(sense.sense_id, 0.0) for sense in senses]
        answers.append(_answer(one, senses, scores if any(scores) else _first_alone(senses)))
    return answers


def _first_alone(senses: Sequence[Sense]) -> list[float]:
    return [float(at == 0) for at in range(len(senses))]


# The Lesk family ---------------------------------------------------------------------------------

_RUNS = re.compile(r"[^\W_]+")  # letters and digits: characters of every script, no punctuation


def _characters(text: str) -> list[str]:
    return [character for run in _RUNS.findall(text) for character in run]


def _grams(text: str) -> list[str]:
    """All runs of one to three characters that no punctuation breaks."""
    return [
        run[at : at + length]
        for run in _RUNS.findall(text)
        for length in (1, 2, 3)
        for at in range(len(run) - length + 1)
    ]


def _context(one: Instance) -> str:
    """The text without the target: glosses of all its senses may hold its characters."""
    return f"{one.text[: one.start]} {one.text[one.end :]}"


def _said_of(sense: Sense, *fields: str) -> str:
    return " ".join([sense.gloss, *(part for field in fields for part in getattr(sense, field))])


def _overlap(
    instances: Sequence[Instance], inventory: Inventory, fields: Sequence[str]
) -> list[Prediction]:
    """Answers by how many different characters context and gloss have in common."""
    known: dict[str, list[set[str]]] = {}
    answers = []
    for one in instances:
        senses = inventory.get(one.word, ())
        if one.word not in known:
            known[one.word] = [set(_characters(_said_of(sense, *fields))) for sense in senses]
        context = set(_characters(_context(one))) - set(one.word)
        scores = [float(len(context & characters)) for characters in known[one.word]]
        answers.append(_answer(one, senses, scores))
    return answers


def _cosine(
    instances: Sequence[Instance],
    inventory: Inventory,
    units: Callable[[str], list[str]],
    fields: Sequence[str],
) -> list[Prediction]:
    """Answers by the cosine of context and gloss, units weighted by TF-IDF over the glosses."""
    from sklearn.feature_extraction.text import TfidfVectorizer

    senses = inventory.senses
    rows = {sense.sense_id: row for row, sense in enumerate(senses)}
    weigher: Any = TfidfVectorizer(analyzer=cast(Any, units), sublinear_tf=True)
    glosses: Any = weigher.fit_transform([_said_of(sense, *fields) for sense in senses])
    contexts: Any = weigher.transform([_context(one) for one in instances])
    pairs = [(at, rows[sense.sense_id]) for at, one in enumerate(instances)
             for sense in inventory.get(one.word, ())]  # fmt: skip
    left, right = np.array(pairs, int).reshape(-1, 2).T
    scores = np.asarray(contexts[left].multiply(glosses[right]).sum(1)).ravel()
    ends = np.searchsorted(left, np.arange(1, len(instances) + 1))  # `left` ascends
    return [
        _answer(one, inventory.get(one.word, ()), part)
        for one, part in zip(instances, np.split(scores, ends[:-1]), strict=True)
    ]


def lesk(
    instances: Sequence[Instance], inventory: Inventory, train: Sequence[Instance] = ()
) -> list[Prediction]:
    """Most characters in common with the gloss (simplified Lesk; a character is the unit)."""
    return _overlap(instances, inventory, ())


def lesk_examples(
    instances: Sequence[Instance], inventory: Inventory, train: Sequence[Instance] = ()
) -> list[Prediction]:
    """Most characters in common with gloss and examples."""
    return _overlap(instances, inventory, ("examples",))


def lesk_tfidf(
    instances: Sequence[Instance], inventory: Inventory, train: Sequence[Instance] = ()
) -> list[Prediction]:
    """Nearest gloss with examples, by TF-IDF-weighted characters: rare ones count for more."""
    return _cosine(instances, inventory, _characters, ("examples",))


def lesk_extended(
    instances: Sequence[Instance], inventory: Inventory, train: Sequence[Instance] = ()
) -> list[Prediction]:
    """Nearest gloss with examples and what the morphemes mean, by TF-IDF of one to three characters."""
    return _cosine(instances, inventory, _grams, ("examples", "morphemes"))


# Oracles -----------------------------------------------------------------------------------------


def _oracle(
    instances: Sequence[Instance], inventory: Inventory, fields: Sequence[str]
) -> list[Prediction]:
    """The first sense that agrees with the right one in these fields, as far as they are annotated."""
    need_gold(instances, "for the oracle")
    answers = []
    for one in instances:
        senses = inventory.get(one.word, ())
        gold = [sense for sense in senses if sense.sense_id in one.gold]
        alike = [
            float(any(all(getattr(sense, field) == getattr(right, field) for field in fields)
                      for right in gold))
            for sense in senses
        ]  # fmt: skip
        answers.append(_answer(one, senses, alike if any(alike) else _first_alone(senses)))
    return answers


def formation_oracle(
    instances: Sequence[Instance], inventory: Inventory, train: Sequence[Instance] = ()
) -> list[Prediction]:
    """The first sense that is formed as the right one is: what formations could give at the least.

    Raises:
        DataError: an instance has no right sense.
    """
    return _oracle(instances, inventory, ("formation",))


def pos_oracle(
    instances: Sequence[Instance], inventory: Inventory, train: Sequence[Instance] = ()
) -> list[Prediction]:
    """The first sense of the right one's part of speech.

    Raises:
        DataError: an instance has no right sense.
    """
    return _oracle(instances, inventory, ("pos",))


def formation_pos_oracle(
    instances: Sequence[Instance], inventory: Inventory, train: Sequence[Instance] = ()
) -> list[Prediction]:
    """The first sense with both the formation and the part of speech of the right one.

    Raises:
        DataError: an instance has no right sense.
    """
    return _oracle(instances, inventory, ("formation", "pos"))


# Neighbours --------------------------------------------------------------------------------------


def nearest(
    instances: Sequence[Instance],
    inventory: Inventory,
    train: Sequence[Instance],
    vectors: np.ndarray,
    train_vectors: np.ndarray,
) -> list[Prediction]:
    """The right sense of the nearest training instance of the same word; else the first sense.

    Args:
        instances: to be answered.
        inventory: of which the candidates are; right senses in `train` that it lacks are passed over.
        train: with their right senses.
        vectors: [n, hidden] of the words in the contexts of `instances`, from any frozen encoder.
        train_vectors: [m, hidden] of those of `train`.

    Returns:
        Predictions; a sense's score is the nearest neighbour's, (1 + cosine) / 2, and 0 without one.

    Raises:
        ValueError: there is not one vector for each instance.
    """
    if len(vectors) != len(instances) or len(train_vectors) != len(train):
        raise ValueError(
            f"{len(instances)} and {len(train)} instances, but {len(vectors)} and "
            f"{len(train_vectors)} vectors"
        )
    unit, train_unit = _unit(vectors), _unit(train_vectors)
    seen: dict[str, list[int]] = defaultdict(list)
    for row, one in enumerate(train):
        seen[one.word].append(row)
    answers = []
    for one, vector in zip(instances, unit, strict=True):
        senses = inventory.get(one.word, ())
        best = dict.fromkeys((sense.sense_id for sense in senses), 0.0)
        rows = seen.get(one.word, [])
        for row, near in zip(rows, (1 + train_unit[rows] @ vector) / 2, strict=True):
            for name in train[row].gold:
                if name in best:
                    best[name] = max(best[name], float(near))
        scores = list(best.values())
        answers.append(_answer(one, senses, scores if any(scores) else _first_alone(senses)))
    return answers


def _unit(vectors: np.ndarray) -> np.ndarray:
    length = np.linalg.norm(vectors, axis=1, keepdims=True)
    return np.asarray(vectors, float) / np.where(length > 0, length, 1)


#: Baselines by name, which need no model and no right senses of what they answer.
BASELINES: dict[str, Baseline] = {
    "random": random_sense,
    "first-sense": first_sense,
    "train-mfs": train_most_frequent,
    "lesk": lesk,
    "lesk-examples": lesk_examples,
    "lesk-tfidf": lesk_tfidf,
    "lesk-extended": lesk_extended,
}

#: What would be had if something of the right sense were known: ceilings, no systems.
ORACLES: dict[str, Baseline] = {
    "formation-oracle": formation_oracle,
    "pos-oracle": pos_oracle,
    "formation-pos-oracle": formation_pos_oracle,
}
