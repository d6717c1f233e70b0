"""The bundled teaching lexicon: 65 words of two senses each, and sentences made from its frames.

Two senses of a *contrast* word differ in formation (存款, "to save money" and "money saved"). Those of
a *control* word do not: either only their part of speech differs (编辑, "to edit" and "an editor"), or
not even that (饭碗, "a bowl" and "a living"), so that what formation explains can be told from what it
does not. Words, glosses, formations and sentences were written for this package and are under its
licence; they teach, and are no gold standard.

Each sense has four frames: a sentence with the word between `#` and slots for a person `{人}` and a time
`{时}`. Both senses of a word yield equally many sentences, so that always taking the first is right half
the time.
"""

import random
from collections.abc import Iterator
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any, Literal

from octavo.data import load_rows

from formbert.data import Instance, locate
from formbert.formations import parse
from formbert.inventory import Inventory, Sense

Group = Literal["contrast", "control-pos", "control-same"]

FILE = Path(__file__).with_name("mini_lexicon.tsv")
COLUMNS: dict[str, Any] = dict.fromkeys(
    ("word", "group", "pos", "formation", "gloss", "frames"), str
)  # fmt: skip

#: What may stand in a slot.
FILLERS = {
    "{人}": "我 他 她 小王 小李 小张 老师 妈妈 爸爸 经理 邻居 朋友".split(),
    "{时}": "昨天 今天 前天 早上 中午 下午 晚上 上周 周末 前几天".split(),
}

#: Words of which no sentence is trained on: eleven contrast words, then six control words.
HELD_OUT = tuple(
    "捐款 炸鸡 录音 报价 投稿 出口 藏书 回信 发言 白花 合影 翻译 广播 通知 饭碗 眉目 血汗".split()
)

#: Sentences of each frame in the parts for testing.
TESTED = 3


@cache
def _rows() -> tuple[dict[str, Any], ...]:
    """Rows of the file, each with the name of its sense."""
    rows = load_rows(FILE, COLUMNS)
    seen: dict[str, int] = {}
    for row in rows:
        seen[row["word"]] = seen.get(row["word"], 0) + 1
        row["sense_id"] = f"{row['word']}_{seen[row['word']]:02d}"
    return tuple(rows)


@cache
def mini_inventory() -> Inventory:
    """The bundled words and senses; without examples, since its sentences are what is tested on."""
    return Inventory(
        Sense(row["sense_id"], row["word"], row["gloss"], row["pos"], parse(row["formation"]))
        for row in _rows()
    )


def group_of(word: str) -> Group:
    """What tells the two senses of a bundled word apart.

    Raises:
        KeyError: it is no bundled word.
    """
    return {row["word"]: row["group"] for row in _rows()}[word]


def mini_instances(seed: int = 13, per_frame: int = 8) -> dict[str, list[Instance]]:
    """Sentences of the bundled lexicon, the same for the same arguments.

    Args:
        seed: of the choice of fillers.
        per_frame: sentences of each frame for training, at the most; the last of them is for `dev`.

    Returns:
        Four parts: `train`; `dev`, the same frames otherwise filled; `test_frames`, the last frame of
        each sense, of which no sentence is in `train`; and `test_words`, all frames of `HELD_OUT`.
    """
    parts: dict[str, list[Instance]] = {
        "train": [], "dev": [], "test_frames": [], "test_words": []
    }  # fmt: skip
    for row in _rows():
        frames = row["frames"].split("|")
        for number, frame in enumerate(frames):
            texts = list(_filled(frame))
            random.Random(f"{seed} {row['sense_id']} {number}").shuffle(texts)
            if row["word"] in HELD_OUT:
                places = ["test_words"] * TESTED
            elif number == len(frames) - 1:
                places = ["test_frames"] * TESTED
            else:
                many = min(per_frame, len(texts))
                places = ["train"] * max(1, many - 1) + ["dev"] * (many > 1)
            for one, (text, part) in enumerate(zip(texts, places, strict=False)):
                parts[part].append(_instance(text, row, f"{row['sense_id']}.{number}.{one}", part))
    return parts


def _instance(text: str, row: dict[str, Any], key: str, part: str) -> Instance:
    found = locate(text, row["word"])
    return Instance(
        found.text, found.start, found.end, found.word, (row["sense_id"],), key, part
    )  # fmt: skip


def _filled(frame: str) -> Iterator[str]:
    """A frame with every filler in every slot; nobody, and no time, is named twice in a sentence."""
    slots = [slot for slot in FILLERS if slot in frame]
    for chosen in product(*(FILLERS[slot] for slot in slots)):
        if not any(word in frame for word in chosen):
            text = frame
            for slot, word in zip(slots, chosen, strict=True):
                text = text.replace(slot, word)
            yield text
