"""Texts of unlike domains that any machine with Python has or can generate: nothing is shipped.

The standard library's source, its help topics, names of characters, and two generated ones: worded
arithmetic, and numbers in words of three languages.
"""

import random
import sysconfig
import unicodedata
from collections.abc import Iterator
from pathlib import Path

#: Characters of each domain, so that none outweighs another.
SIZE = 300_000

NAMES = "Anna Ben Clara David Emma Felix Greta Hugo Ines Jonas Klara Leo Mia Noah Olga Paul".split()
THINGS = "apples books coins eggs pens stamps shells tickets cards stones".split()


def domain_texts(size: int = SIZE) -> dict[str, str]:
    """Each domain's text, the same on every machine with the same Python version.

    Args:
        size: characters a domain, at the most.
    """
    return {
        "arithmetic": _take(arithmetic(), size),
        "characters": _take(characters(), size),
        "code": _take(library_source(), size),
        "help": _take(help_topics(), size),
        "numbers": _take(numbers(), size),
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
    for code in range(0x20, 0x1_0000):
        name = unicodedata.name(chr(code), "")
        if name and "IDEOGRAPH" not in name and "SYLLABLE" not in name:
            yield f"U+{code:04X};{name};{unicodedata.category(chr(code))}\n"


def library_source() -> Iterator[str]:
    """Lines of the standard library's modules, in the order of their names."""
    for file in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py")):
        try:
            text = file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError):
            continue
        yield from text[:40_000].splitlines(keepends=True)


def help_topics() -> Iterator[str]:
    """Lines of the pages that `help()` shows."""
    from pydoc_data.topics import topics

    for _, page in sorted(topics.items()):
        yield from str(page).splitlines(keepends=True)


def numbers(seed: int = 0) -> Iterator[str]:
    """Numbers in digits and in English, German and French words."""
    draw = random.Random(seed)
    spell = {"en": english, "de": german, "fr": french}
    while True:
        language = draw.choice(sorted(spell))
        number = draw.randrange(10 ** draw.randint(1, 6))
        yield f"{number} ({language}): {spell[language](number)}\n"


_EN = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen "
    "sixteen seventeen eighteen nineteen"
).split()
_EN_TENS = "- - twenty thirty forty fifty sixty seventy eighty ninety".split()
_DE = (
    "null eins zwei drei vier fünf sechs sieben acht neun zehn elf zwölf dreizehn vierzehn fünfzehn "
    "sechzehn siebzehn achtzehn neunzehn"
).split()
_DE_TENS = "- - zwanzig dreißig vierzig fünfzig sechzig siebzig achtzig neunzig".split()
_FR = (
    "zéro un deux trois quatre cinq six sept huit neuf dix onze douze treize quatorze quinze seize "
    "dix-sept dix-huit dix-neuf"
).split()
_FR_TENS = "- - vingt trente quarante cinquante soixante soixante quatre-vingt quatre-vingt".split()


def english(number: int) -> str:
    """A number below a million in English."""
    if number < 20:
        return _EN[number]
    if number < 100:
        return _EN_TENS[number // 10] + (f"-{_EN[number % 10]}" if number % 10 else "")
    unit, word = (100, "hundred") if number < 1000 else (1000, "thousand")
    rest = f" {english(number % unit)}" if number % unit else ""
    return f"{english(number // unit)} {word}{rest}"


def german(number: int) -> str:
    """A number below a million in German."""
    if number < 20:
        return _DE[number]
    if number < 100:
        one = "ein" if number % 10 == 1 else _DE[number % 10]
        return (f"{one}und" if number % 10 else "") + _DE_TENS[number // 10]
    unit, word = (100, "hundert") if number < 1000 else (1000, "tausend")
    many = german(number // unit)
    many = many[:-1] if many.endswith("eins") else many
    return many + word + (german(number % unit) if number % unit else "")


def french(number: int) -> str:
    """A number below a million in French."""
    if number < 20:
        return _FR[number]
    if number < 100:
        tens, ones = divmod(number, 10)
        if tens in (7, 9):
            ones += 10
        joint = " et " if ones in (1, 11) and tens < 8 else "-"
        last = f"{joint}{_FR[ones]}" if ones else ("s" if tens == 8 else "")
        return _FR_TENS[tens] + last
    unit, word = (100, "cent") if number < 1000 else (1000, "mille")
    many = "" if number // unit == 1 else f"{french(number // unit)} "
    if unit == 1000:  # no plural before mille
        many = many.replace("vingts ", "vingt ").replace("cents ", "cent ")
    rest = number % unit
    plural = "s" if unit == 100 and number // unit > 1 and not rest else ""
    return f"{many}{word}{plural}" + (f" {french(rest)}" if rest else "")
