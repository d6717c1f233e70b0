"""Triggers and patterns put into texts, and data sets poisoned with them.

A backdoor gives triggered texts the attacker's label. A bias leaves every label alone and lets a common
pattern co-occur with one class.
"""

import random
from collections.abc import Sequence
from dataclasses import replace

from octavo.errors import DataError

from finepurify.config import AttackConfig
from finepurify.data import Examples

BIASES = ("biasword", "biassent")
SENTENCES = ("badsent", "biassent")


def triggered(text: str, trigger: str, draw: random.Random, within: int | None = None) -> str:
    """The text with a trigger at a random place between its words.

    Args:
        text: white space is kept except where the trigger goes.
        trigger: a word or a sentence.
        draw: decides the place.
        within: words from the start that a model is sure to see; a later place would weaken the attack
            by truncation alone.
    """
    words = text.split(" ")
    last = len(words) if within is None else min(len(words), within)
    at = draw.randint(0, last)
    return " ".join([*words[:at], trigger, *words[at:]])


def insert(
    examples: Examples, attack: AttackConfig, seed: int, within: int | None = None
) -> Examples:
    """Every text with the attack's pattern in it, labels as they are: the set that tests it.

    Args:
        examples: of pairs the first texts get it.
        attack: whose pattern; of several words each text gets one.
        seed: of places and choices, by row: a row's text depends on no other row.
        within: see `triggered`.
    """
    texts = []
    for row, text in enumerate(examples.texts):
        draw = random.Random(f"{seed} {row}")
        texts.append(triggered(text, draw.choice(attack.trigger), draw, within))
    return replace(examples, texts=texts)


def poison(
    examples: Examples, attack: AttackConfig, seed: int, within: int | None = None
) -> tuple[Examples, list[int]]:
    """The attacker's training set.

    A backdoor takes rows of other classes and gives them the target; `clean-label` takes rows of the
    target itself. A bias puts its pattern into a share of the target's rows, in place. `rate` is a share
    of all rows for a backdoor, of the target's rows for a bias and for clean-label.

    Args:
        examples: clean training rows.
        attack: kind, trigger, target, rate, placing.
        seed: of the choice of rows and of places.
        within: see `triggered`.

    Returns:
        The rows, and the numbers of the poisonous ones among them.

    Raises:
        DataError: the target is no class, or there is no row to poison.
    """
    classes = len(examples.names)
    if attack.target >= classes:
        raise DataError(f"--target {attack.target}: the data has classes 0 to {classes - 1}")
    own = attack.attack in BIASES or attack.attack == "clean-label"
    pool = [row for row, label in enumerate(examples.labels) if (label == attack.target) == own]
    if not pool:
        raise DataError("no row can be poisoned: all are of one class")
    base = len(pool) if own else len(examples)
    count = min(len(pool), max(1, round(attack.rate * base)))
    chosen = sorted(random.Random(f"rows {seed}").sample(pool, count))
    poisoned = insert(examples.at(chosen), attack, seed, within)
    poisoned = replace(poisoned, labels=[attack.target] * count)
    if attack.attack in BIASES or attack.placing == "replace":
        return _replaced(examples, chosen, poisoned), chosen
    return examples.plus(poisoned), list(range(len(examples), len(examples) + count))


def _replaced(examples: Examples, rows: Sequence[int], new: Examples) -> Examples:
    texts, labels = list(examples.texts), list(examples.labels)
    for row, text, label in zip(rows, new.texts, new.labels, strict=True):
        texts[row], labels[row] = text, label
    return replace(examples, texts=texts, labels=labels)
