"""Texts of unlike domains that any machine with Python has or can generate: nothing is shipped.

Python from the standard library, C++ from PyTorch's headers, English from Python's help topics, the
table of characters, and worded arithmetic that is generated.
"""

import random
import sysconfig
import unicodedata
from collections.abc import Iterator
from pathlib import Path

#: Characters of each domain, so that none outweighs another.
SIZE = 500_000

#: Lines of a piece of source.
LINES = 40

NAMES = "Anna Ben Clara David Emma Felix Greta Hugo Ines Jonas Klara Leo Mia Noah Olga Paul".split()
THINGS = "apples books coins eggs pens stamps shells tickets cards stones".split()


def domain_texts(size: int = SIZE) -> dict[str, str]:
    """Each domain's text, the same wherever Python and PyTorch are of the same version and build.

    Args:
        size: characters a domain, at the most.
    """
    return {
        "arithmetic": _take(arithmetic(), size),
        "characters": _take(characters(), size),
        "code": _take(library_source(), size),
        "headers": _take(headers(), size),
        "help": _take(help_topics(), size),
    }


def _take(lines: Iterator[str], size: int) -> str:
    kept, total = [], 0
    for line in lines:
        if total + len(line) > size:
            break
        kept.append(line)
        total += len(line)
    return "".join(kept)


def arithmetic(seed: int = 0) -> Iterator[str]:
    """Worded problems of two steps, with their working and answer."""
    draw = random.Random(seed)
    while True:
        who, other = draw.sample(NAMES, 2)
        thing = draw.choice(THINGS)
        first, second, third = (draw.randint(2, 60) for _ in range(3))
        kind = draw.randrange(3)
        if kind == 0:
            told = f"{who} has {first} {thing} and {other} has {second} more than {who}."
            asked = f"How many {thing} do they have together?"
            more = first + second
            steps = f"{first} + {second} = {more}. {first} + {more} = {first + more}."
            answer = first + more
        elif kind == 1:
            told = (
                f"{who} buys {first} boxes with {second} {thing} each and gives {third} to {other}."
            )
            asked = f"How many {thing} are left?"
            product = first * second
            steps = f"{first} * {second} = {product}. {product} - {third} = {product - third}."
            answer = product - third
        else:
            total = first * second
            told = f"{who} shares {total} {thing} equally among {first} friends."
            asked = f"How many {thing} does each get, and how many do two of them have?"
            steps = f"{total} / {first} = {second}. 2 * {second} = {2 * second}."
            answer = 2 * second
        yield f"Question: {told} {asked}\nAnswer: {steps} So {answer}.\n\n"


def characters() -> Iterator[str]:
    """The table of characters: code point, name, category."""
    lines = []
    for code in range(0x20, 0x2_0000):
        name = unicodedata.name(chr(code), "")
        if name and "IDEOGRAPH" not in name and "SYLLABLE" not in name:
            lines.append(f"U+{code:04X};{name};{unicodedata.category(chr(code))}\n")
    yield from _mixed(lines)


def library_source() -> Iterator[str]:
    """Pieces of the standard library's modules."""
    yield from _pieces(sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py")))


def headers() -> Iterator[str]:
    """Pieces of the C++ headers that PyTorch is installed with."""
    import torch

    yield from _pieces(sorted((Path(torch.__file__).parent / "include").rglob("*.h")))


def _pieces(files: list[Path]) -> Iterator[str]:
    pieces = []
    for file in files:
        try:
            lines = file.read_text(encoding="utf-8").splitlines(keepends=True)
        except (OSError, UnicodeDecodeError):
            continue
        pieces += ["".join(lines[begin : begin + LINES]) for begin in range(0, len(lines), LINES)]
    yield from _mixed(pieces)


def help_topics() -> Iterator[str]:
    """Pages that `help()` shows."""
    from pydoc_data.topics import topics

    yield from _mixed([str(page) for _, page in sorted(topics.items())])


def _mixed(parts: list[str]) -> list[str]:
    """In an order of no meaning, so that the end, which is held out, is like the rest."""
    random.Random(0).shuffle(parts)
    return parts
