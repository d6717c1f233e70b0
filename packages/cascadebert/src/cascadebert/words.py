"""Words like English ones, spelled by rules, whose number of syllables is known by construction.

How many syllables a spelling has depends on the order of its letters: a final e is silent after a
consonant, -ed sounds only after t and d, -es only after a hiss, two vowels are one sound in `boat` and
two in `lion`. Deep models read that better than shallow ones, which is what a cascade needs. The
label is true by construction, since the word is made from its syllables.
"""

import random
from collections.abc import Sequence
from pathlib import Path

from octavo.errors import ConfigError
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


def _word(source: random.Random, syllables: int) -> str:
    """One word of that many syllables: a stem, and an ending with its own rule."""
    ending, sounds = _ending(source, syllables)
    stem = _stem(source, syllables - sounds)
    return _joined(source, stem, ending)


#: Endings as (letters, syllables); the rules that depend on the stem are in `_joined`.
ENDINGS = {
    "": 0, "e": 0, "ed": 0, "+ed": 1, "es": 0, "+es": 1, "y": 1, "ing": 1, "er": 1, "ly": 1,
    "le": 1, "tion": 1, "cious": 1, "ious": 2, "ism": 2, "ia": 2, "ity": 2, "less": 1, "ness": 1,
}  # fmt: skip


def _ending(source: random.Random, syllables: int) -> tuple[str, int]:
    fitting = [(letters, sounds) for letters, sounds in ENDINGS.items() if sounds < syllables]
    return source.choice([*fitting, ("", 0), ("", 0), ("e", 0), ("ed", 0)])


def _stem(source: random.Random, syllables: int) -> str:
    """Onset, vowels and consonants between them; two vowels that sound apart fill two syllables."""
    letters = source.choice(["", *ONSETS * 2]) if syllables > 1 else source.choice(ONSETS)
    left = syllables
    while left:
        if left >= 2 and source.random() < 0.2:
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
