"""What the demo measures of the applications, in its world: compression, re-weighting, confusion."""

import random
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
from scipy.stats import spearmanr

from anchors.analyses import Rows, interval
from anchors.cache import beginning, prefill
from anchors.compress import Keep, best_random, compress
from anchors.config import Task
from anchors.diagnose import diagnose
from anchors.evaluate import alone, label_loyalty, predict, word_loyalty
from anchors.prompts import Prompt, build_prompt
from anchors.reweight import Reweighter
from anchors.world import TASKS, Episode, World, asked, episodes, tempted

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Numbers = dict[str, float]

#: Texts of each class to train beta on, and how.
TRAINED_ON, EPOCHS, LEARNING_RATE, BATCH = 20, 10, 0.02, 4

#: Texts on which confusion is measured are shorter and noisier: on others there is hardly any.
NOISE, LENGTHS, TEXTS = 0.5, (1, 3), 240


def prompt_of(tokenizer: "PreTrainedTokenizerBase", episode: Episode) -> Prompt:
    """An episode as a prompt."""
    task = Task(TASKS[episode.task][0], episode.words)
    return build_prompt(task, tokenizer, episode.demonstrations, episode.text)


def compression(
    world: World,
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    count: int,
    seed: int,
) -> tuple[Numbers, Rows]:
    """Loyalty of compressed demonstrations, over several sets of them with 40 texts each.

    Args:
        world: that the model lives in.
        model: the trained decoder.
        tokenizer: its tokenizer.
        count: sets of demonstrations.
        seed: of the episodes.

    Returns:
        Mean label loyalties, and a table.
    """
    draw = random.Random(f"compression/{seed}")
    kinds: tuple[tuple[str, Keep], ...] = (
        ("hidden anchors", "anchors+format"), ("label words alone", "anchors"),
        ("text anchors", "text"), ("hidden random", "random"),
    )  # fmt: skip
    found: dict[str, list[tuple[float, float, float]]] = {}
    for number, episode in enumerate(episodes(world, count, 3, 1, seed + 1000)):
        texts = asked(world, episode, 40, draw)
        prompts = [prompt_of(tokenizer, one) for one in texts]
        held = [prompt_of(tokenizer, one) for one in asked(world, episode, 12, draw)]
        right = [one.label for one in texts]
        before = predict(model, prompts, 50, cache=prefill(model, beginning(prompts)))
        caches = {
            name: compress(model, prompts[0], keep, seed=seed + number) for name, keep in kinds
        }
        caches["hidden random, best of 20 on other texts"] = best_random(model, held, batch_size=50)
        for name, cache in caches.items():
            after = predict(model, prompts, 50, cache=cache)
            label, word = label_loyalty(before, after), word_loyalty(before, after)
            found.setdefault(name, []).append(
                (float(label.mean()), float(word.mean()), after.accuracy(right))
            )
    rows: Rows = []
    for name, values in found.items():
        label, word, accuracy = (np.array(column) for column in zip(*values, strict=True))
        rows.append(
            {"kept": name, "label loyalty": float(label.mean()),
             "label loyalty interval": interval(label), "word loyalty": float(word.mean()),
             "word loyalty interval": interval(word), "accuracy": float(accuracy.mean())}
        )  # fmt: skip
    return {f"loyalty {row['kept']}": row["label loyalty"] for row in rows}, rows


def reweighting(
    world: World,
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    count: int,
    seed: int,
) -> tuple[Numbers, Rows]:
    """Accuracy before an imposed label bias, under it, and under it with re-weighting.

    The bias is one of the demonstrations: class 0 is shown four times, by texts that hold words of the
    other classes too, so that everything looks a little like class 0.

    Args:
        world: that the model lives in.
        model: the trained decoder.
        tokenizer: its tokenizer.
        count: prompts to judge on.
        seed: of the episodes.
    """
    draw = random.Random(f"re-weighting/{seed}")
    plain = episodes(world, count, 3, 1, seed + 2000)
    biased = tempted(world, plain, seed)
    several = episodes(world, 3 * TRAINED_ON, 3, 1, seed + 3000)
    trained = tempted(
        world,
        [asked(world, one, 3, draw)[n % 3] for n, one in enumerate(several)],
        seed + 1,
    )

    def prompts(some: Sequence[Episode]) -> tuple[list[Prompt], list[int]]:
        return [prompt_of(tokenizer, one) for one in some], [one.label for one in some]

    weighter = Reweighter(model, 3)
    weighter.fit(model, *prompts(trained), LEARNING_RATE, EPOCHS, BATCH, seed)
    rows: Rows = []
    for name, some, around in (
        ("one demonstration a class", plain, alone),
        ("biased to class 0", biased, alone),
        ("biased, re-weighted", biased, weighter.around(model)),
    ):
        asked_for, labels = prompts(some)
        found = predict(model, asked_for, 50, around)
        rows.append(
            {"prompts": name, "accuracy": found.accuracy(labels),
             "interval": interval(found.classes == np.asarray(labels)),
             "answered class 0": float((found.classes == 0).mean())}
        )  # fmt: skip
    names = ("accuracy unbiased", "accuracy biased", "accuracy re-weighted")
    return {name: row["accuracy"] for name, row in zip(names, rows, strict=True)}, rows


def confusion(
    world: World,
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    count: int,
    seed: int,
) -> tuple[Numbers, Rows]:
    """Predicted and real confusion where two of three classes are sibling topics, on short, noisy texts.

    Args:
        world: that the model lives in.
        model: the trained decoder.
        tokenizer: its tokenizer.
        count: sets of demonstrations, with 240 texts each.
        seed: of the episodes.
    """
    draw = random.Random(f"confusion/{seed}")
    noisy, pairs = replace(world, noise=NOISE, lengths=LENGTHS), []
    for episode in episodes(world, count, 3, 1, seed + 4000, siblings=True):
        texts = asked(noisy, episode, TEXTS, draw)
        found = diagnose(
            model, [prompt_of(tokenizer, one) for one in texts], [one.label for one in texts],
            batch_size=60, resamples=0,
        )  # fmt: skip
        pairs.append([(found.overall[p], found.real[p]) for p in ((0, 1), (0, 2), (1, 2))])
    values = np.array(pairs)  # [sets, pairs, predicted or real]
    each = np.array([spearmanr(*one.T).statistic for one in values])  # pyright: ignore
    each = np.where(np.isnan(each), 0.0, each)  # where areas tie, nothing is ranked
    correlation = float(each.mean())
    rows: Rows = [
        {"pair": name, "distance of anchors": float(values[:, which, 0].mean()),
         "AUC of the two": float(values[:, which, 1].mean())}
        for which, name in enumerate(("siblings", "one sibling, other", "other sibling, other"))
    ]  # fmt: skip
    rows.append(
        {"pair": "rank correlation within a set, mean", "distance of anchors": correlation,
         "interval": interval(each)}
    )  # fmt: skip
    siblings, *others = (float(values[:, which, 0].mean()) for which in range(3))
    return {"spearman": correlation, "siblings": siblings, "no siblings": min(others)}, rows
