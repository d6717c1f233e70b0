"""Words like English ones, spelled by rules, whose number of syllables is known by construction.

How many syllables a spelling has depends on the order of its letters: a final e is silent after a
consonant, -ed sounds only after t and d, -es only after a hiss, two vowels are one sound in `boat` and
two in `lion`. Two irregular classes make it as hard as real English: compounds hide a silent e inside
(`lifeboat`), and borrowed words sound every vowel (`sake`), which only the whole word tells, and not
always. Deep models read that better than shallow ones, which is what a cascade needs. The label is
true by construction, since the word is made from its syllables.
"""

import gzip
import random
import re
from collections.abc import Sequence
from pathlib import Path

from octavo.errors import ConfigError, DataError
from octavo.rundir import atomic

from cascadebert.data import Examples

#: Share of each number of syllables, 1 to 5 and more, as in an English dictionary.
SHARES = (0.13, 0.47, 0.27, 0.10, 0.03)

#: Words at the most; far fewer than there are spellings of one syllable for their share.
MOST = 200_000

ONSETS = (
    "b c d f g h j k l m n p r s t v w z bl br ch cl cr dr fl fr gl gr ph pl pr qu sc sh sk sl sm "
    "sn sp st sw th tr tw wh str spr thr"
).split()
CODAS = "b ck d ff g l ll m mp n nd ng nt p r rd rk rm rn rt s ss st t tch th x".split()
SHORT = "a e i o u".split()
ONE_SOUND = "ai au ay ea ee ei ew ie oa oi oo ou ow oy ue".split()
TWO_SOUNDS = "io ia iu eo ua ao".split()
OPEN = "b d f g h k l m n p r s t v z".split()
BETWEEN = (
    "b c d f g l m n p r s t v z bb dd ff ll mm nn pp rr ss tt ct lt mb nd nt rt sp st".split()
)


def generate_words(count: int, seed: int = 0, longest: int = 13) -> Examples:
    """Distinct spellings with their number of syllables, `1` to `5` (and more).

    Args:
        count: how many; no spelling comes twice.
        seed: the same seed gives the same words.
        longest: letters at the most.

    Raises:
        ConfigError: none is wanted, or more than there are.
    """
    if not 1 <= count <= MOST:
        raise ConfigError(f"{count} words: must be from 1 to {MOST}")
    source = random.Random(seed)
    want = [round(count * share) for share in SHARES]
    want[1] += count - sum(want)  # what rounding left goes to the largest class
    made: set[str] = set()
    kept: list[tuple[str, int]] = []
    for number, share in enumerate(want, 1):
        found = 0
        while found < share:
            syllables = number if number < 5 else source.choice((5, 5, 5, 6))
            word = _word(source, syllables)
            if 3 <= len(word) <= longest and word not in made:
                made.add(word)
                kept.append((word, number))
                found += 1
    source.shuffle(kept)
    return Examples([word for word, _ in kept], labels=[str(number) for _, number in kept])


def read_dictionary(folder: Path) -> Examples:
    """Real words with their number of syllables, from a pronouncing dictionary in CMUdict's format.

    Words of 3 to 13 letters a to z with exactly one pronunciation; every phone that ends in a digit
    is a vowel.

    Args:
        folder: holds `cmudict.dict`, plain or as `.gz`.

    Raises:
        DataError: there is no such file, or no word in it.
    """
    files = sorted(folder.glob("cmudict.dict*"))
    if not files:
        raise DataError(f"{folder}: holds no cmudict.dict or cmudict.dict.gz")
    found: dict[str, list[int]] = {}
    try:
        with (gzip.open if files[0].suffix == ".gz" else open)(
            files[0], "rt", encoding="latin-1"
        ) as file:
            for line in file:
                word, *phones = line.partition("#")[0].split() or [""]
                vowels = sum(phone[-1].isdigit() for phone in phones)
                found.setdefault(word.partition("(")[0], []).append(vowels)
    except (OSError, EOFError) as error:
        raise DataError(f"{files[0]}: cannot be read ({error})") from None
    kept = {
        word: min(vowels[0], 5)
        for word, vowels in found.items()
        if len(vowels) == 1 and vowels[0] and re.fullmatch("[a-z]{3,13}", word)
    }
    if not kept:
        raise DataError(f"{files[0]}: holds no word with its pronunciation")
    return Examples(list(kept), labels=[str(number) for number in kept.values()])


def write_words(folder: Path, sizes: Sequence[tuple[str, int]], seed: int = 0) -> None:
    """Write splits of distinct words as `<split>.jsonl` into a folder.

    Args:
        folder: is made.
        sizes: pairs of a split's name and its number of words.
        seed: of the words.
    """
    import json

    for name, size in sizes:
        if size < 1:
            raise ConfigError(f"--{name} {size}: must be 1 or more")
    words = generate_words(sum(size for _, size in sizes), seed)
    rows = list(zip(words.texts, words.labels or [], strict=True))
    with atomic(folder) as temporary:
        temporary.mkdir()
        start = 0
        for name, size in sizes:
            lines = (json.dumps({"text": word, "label": label}) + "\n"
                     for word, label in rows[start : start + size])  # fmt: skip
            (temporary / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
            start += size


#: Shares of the irregular classes, and of vowel pairs that sound apart against the rule.
COMPOUND, BORROWED, APART = 0.2, 0.12, 0.04


def _word(source: random.Random, syllables: int) -> str:
    """One word of that many syllables, of one of the classes."""
    draw = source.random()
    if draw < BORROWED and syllables >= 2:
        return _borrowed(source, syllables)
    if draw < BORROWED + COMPOUND and syllables >= 2:
        first = source.randint(1, syllables - 1)
        head = _joined(source, _stem(source, first), source.choice(("", "e")))
        return head + _regular(source, syllables - first, onset=True)
    return _regular(source, syllables)


def _borrowed(source: random.Random, syllables: int) -> str:
    """Open syllables, each vowel sounded, a final e too."""
    parts = [source.choice(OPEN) + source.choice(SHORT) for _ in range(syllables)]
    return "".join(parts)


def _regular(source: random.Random, syllables: int, onset: bool = False) -> str:
    """A stem, and an ending with its own rule."""
    ending, sounds = _ending(source, syllables)
    stem = _stem(source, syllables - sounds, onset)
    return _joined(source, stem, ending)


#: Endings as (letters, syllables); the rules that depend on the stem are in `_joined`.
ENDINGS = {
    "": 0, "e": 0, "ed": 0, "+ed": 1, "es": 0, "+es": 1, "y": 1, "ing": 1, "er": 1, "ly": 1,
    "le": 1, "tion": 1, "cious": 1, "ious": 2, "ism": 2, "ia": 2, "ity": 2, "less": 1, "ness": 1,
}  # fmt: skip


def _ending(source: random.Random, syllables: int) -> tuple[str, int]:
    fitting = [(letters, sounds) for letters, sounds in ENDINGS.items() if sounds < syllables]
    return source.choice([*fitting, ("", 0), ("", 0), ("e", 0), ("ed", 0)])


def _stem(source: random.Random, syllables: int, onset: bool = False) -> str:
    """Onset, vowels and consonants between them; two vowels that sound apart fill two syllables."""
    free = syllables > 1 and not onset
    letters = source.choice(["", *ONSETS * 2]) if free else source.choice(ONSETS)
    left = syllables
    while left:
        if left >= 2 and source.random() < APART:  # diet, create: apart against the rule
            letters += source.choice(("ea", "ie", "oa", "oe"))
            left -= 2
            if left:
                letters += source.choice(BETWEEN)
            continue
        if left >= 2 and source.random() < 0.1:
            hissing = letters[-1:] in ("c", "s", "t")  # io is one sound in nation
            letters += source.choice(TWO_SOUNDS[1:] if hissing else TWO_SOUNDS)
            left -= 2
        else:
            letters += source.choice(SHORT * 3 + ONE_SOUND)
            left -= 1
        if left:
            letters += source.choice(BETWEEN)
    return letters


def _joined(source: random.Random, stem: str, ending: str) -> str:
    """The stem closed as its ending asks, so that the ending sounds as often as it is counted."""
    if ending == "":
        weak_e = stem.endswith("e") and stem[-2:-1] not in ("a", "e", "i", "o", "u")
        return stem + source.choice([coda for coda in CODAS if not (weak_e and coda in "ds")])
    if ending == "e":  # silent: make, like a single consonant before it
        return stem + source.choice("b c d f g k l m n p r s t v z".split()) + "e"
    if ending == "ed":  # silent: helped, not after t or d
        return stem + source.choice("ck ff l ll m mp n ng p r rk rm rn ss sh tch x".split()) + "ed"
    if ending == "+ed":  # sounds: wanted
        return stem + source.choice("t d nt nd rt rd st tt".split()) + "ed"
    if ending == "es":  # silent: makes
        return stem + source.choice("b k l m n p r t v".split()) + "es"
    if ending == "+es":  # sounds: boxes
        return stem + source.choice("ss x zz ch sh c g s z".split()) + "es"
    if ending == "le":  # sounds after a consonant: table
        return stem + source.choice("b bb d dd g gg p pp t tt ck st".split()) + "le"
    if ending in ("ly", "less", "ness"):
        return stem + source.choice("m n r t l d k".split()) + ending
    if ending in ("tion", "cious"):
        return stem + source.choice(["", "c", "n", "p"] if ending == "tion" else ["", "n"]) + ending
    if ending == "ious":  # two sounds, but one in spacious
        return stem + source.choice("b d l m n p r v".split()) + ending
    return stem + source.choice(BETWEEN) + ending
