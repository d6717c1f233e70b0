"""The eighteen word-formations of Peking University's lexicon, in the official order.

The names in Chinese are the codes that data sets carry. `00`, `01` and `10` are codes too: neither
morpheme, the second alone, or the first alone has a meaning of its own. The coarse types are those of
CSentiPackage's Cmorph (Huang, Ku and Chen, LREC 2010); which formation belongs to which is our reading.
"""

import difflib
from enum import IntEnum
from typing import Any, NamedTuple

from octavo.errors import DataError


class About(NamedTuple):
    """What is said of one formation."""

    zh: str
    en: str
    coarse: str
    definition: str
    examples: tuple[str, ...]


class Formation(IntEnum):
    """A word-formation; its number is the official one."""

    ADVERBIAL_HEAD = 0
    LOCALITY = 1
    PREFIXATION = 2
    SUFFIXATION = 3
    SERIAL_VERB = 4
    MODIFIER_HEAD = 5
    SUBJECT_PREDICATE = 6
    NOUN_QUANTIFIER = 7
    VERB_COMPLEMENT = 8
    PREPOSITION_OBJECT = 9
    COMPOUND_QUANTIFIER = 10
    VERB_OBJECT = 11
    FIRST_ONLY = 12
    REDUPLICATION = 13
    PARALLEL = 14
    OPAQUE = 15
    SECOND_ONLY = 16
    NUMBER_QUANTIFIER = 17

    @property
    def zh(self) -> str:
        """The name in Chinese, or the code, as data sets write it."""
        return _ABOUT[self].zh

    @property
    def en(self) -> str:
        """The name in English."""
        return _ABOUT[self].en

    @property
    def coarse(self) -> str:
        """One of `COARSE`."""
        return _ABOUT[self].coarse

    @property
    def definition(self) -> str:
        """What the morphemes are to each other."""
        return _ABOUT[self].definition

    @property
    def examples(self) -> tuple[str, ...]:
        """Words formed so."""
        return _ABOUT[self].examples


_ABOUT = {
    Formation.ADVERBIAL_HEAD: About(
        "状中", "adverb-verb", "modifier_head",
        "the first morpheme modifies a verbal or adjectival second", ("预报", "透支", "白花"),
    ),
    Formation.LOCALITY: About(
        "方位", "noun-locality", "modifier_head",
        "a noun of place or time, and where of it", ("乡间", "敌后", "心间"),
    ),
    Formation.PREFIXATION: About(
        "前缀", "prefixation", "other", "an affix, and a root", ("老板", "第一", "阿姨")
    ),
    Formation.SUFFIXATION: About(
        "后缀", "suffixation", "other", "a root, and an affix", ("口子", "绿化", "党性")
    ),
    Formation.SERIAL_VERB: About(
        "连谓", "serial verbs", "other", "two actions, one after or for the other",
        ("整改", "吸取", "教练"),
    ),
    Formation.MODIFIER_HEAD: About(
        "定中", "modifier-head", "modifier_head", "an attribute, and a nominal head",
        ("新房", "树种", "冷战"),
    ),
    Formation.SUBJECT_PREDICATE: About(
        "主谓", "subject-predicate", "subject_predicate", "the second is said of the first",
        ("心静", "地震", "自称"),
    ),
    Formation.NOUN_QUANTIFIER: About(
        "名量", "noun-quantifier", "other", "a noun, and its classifier", ("事件", "纸张", "人口")
    ),
    Formation.VERB_COMPLEMENT: About(
        "述补", "verb-complement", "verb_complement", "an action, and its result or direction",
        ("起来", "提取", "查实"),
    ),
    Formation.PREPOSITION_OBJECT: About(
        "介宾", "preposition-object", "other", "a preposition, and its object",
        ("从此", "因此", "就势"),
    ),
    Formation.COMPOUND_QUANTIFIER: About(
        "复量", "compound quantifier", "other", "two classifiers", ("人次", "批次", "场次")
    ),
    Formation.VERB_OBJECT: About(
        "述宾", "verb-object", "verb_object", "an action, and its object", ("破土", "超额", "放心")
    ),
    Formation.FIRST_ONLY: About(
        "10", "first morpheme only", "other", "only the first morpheme has a meaning of its own",
        ("节气", "出现", "原来"),
    ),
    Formation.REDUPLICATION: About(
        "重叠", "reduplication", "other", "the same morpheme twice", ("星星", "处处", "白白")
    ),
    Formation.PARALLEL: About(
        "联合", "parallel", "parallel", "like or opposite morphemes, side by side",
        ("检测", "典礼", "关系"),
    ),
    Formation.OPAQUE: About(
        "00", "opaque", "other", "a single morpheme, or none that can be told",
        ("名堂", "积极", "对象"),
    ),
    Formation.SECOND_ONLY: About(
        "01", "second morpheme only", "other", "only the second morpheme has a meaning of its own",
        ("陆续", "为止", "跳舞"),
    ),
    Formation.NUMBER_QUANTIFIER: About(
        "数量", "number-quantifier", "other", "a number, and a classifier or measure",
        ("一些", "两手", "一度"),
    ),
}  # fmt: skip

#: Names in Chinese by number: the label set of every model here.
NAMES = tuple(formation.zh for formation in Formation)

#: The six coarse types.
COARSE = (
    "modifier_head", "parallel", "verb_object", "verb_complement", "subject_predicate", "other",
)  # fmt: skip

#: Other names of the same formations, as grammars and data sets write them.
ALIASES = {
    "偏正": Formation.MODIFIER_HEAD, "定语中心语": Formation.MODIFIER_HEAD,
    "状语中心语": Formation.ADVERBIAL_HEAD, "动宾": Formation.VERB_OBJECT,
    "支配": Formation.VERB_OBJECT, "动补": Formation.VERB_COMPLEMENT,
    "中补": Formation.VERB_COMPLEMENT, "补充": Formation.VERB_COMPLEMENT,
    "陈述": Formation.SUBJECT_PREDICATE, "并列": Formation.PARALLEL,
    "连动": Formation.SERIAL_VERB, "单纯": Formation.OPAQUE, "叠音": Formation.REDUPLICATION,
    "加前缀": Formation.PREFIXATION, "加后缀": Formation.SUFFIXATION,
    "量补": Formation.NOUN_QUANTIFIER, "overlapping": Formation.REDUPLICATION,
    "adverb-verb": Formation.ADVERBIAL_HEAD, "coordination": Formation.PARALLEL,
}  # fmt: skip

_KEYS: dict[str, Formation] = {
    **{key: formation for formation in Formation
       for key in (formation.zh, formation.en, formation.name.lower())},
    **ALIASES,
}  # fmt: skip


def parse(value: Any) -> Formation:
    """A formation from its name in Chinese or English, its code, or another name of it.

    Raises:
        DataError: it is none of these; the message says which is near, and what became of a code that
            was read as a number.
    """
    if isinstance(value, Formation):
        return value
    if isinstance(value, int | float) and not isinstance(value, bool):
        raise DataError(
            f"formation {value!r} is a number; the codes 00, 01 and 10 are text: quote them"
        )
    words = str(value).strip()
    for key in (words, words.lower(), words.lower().replace(" ", "_")):
        if key in _KEYS:
            return _KEYS[key]
    if words in ("0", "1"):
        raise DataError(f"formation {words!r}: was 0{words} read as a number? The code is 0{words}")
    near = difflib.get_close_matches(words, _KEYS, 1, 0.4)
    hint = f"did you mean {near[0]}?" if near else f"it is one of {', '.join(NAMES)}"
    raise DataError(f"formation {words!r} is unknown; {hint}")
