r"""Final answers: found in a text, compared, and put into classes for votes.

The paper names no grader; this is what the field does. GSM8K's answers stand behind `####` or
`A:`, MATH's in the last `\boxed{}`, those of the released solutions behind `The answer is:`. Two
answers are compared by ever costlier means, and the first that finds them equal decides:

- `exact`: the same text.
- `numeric`: the same number: 1/2, 0.5 and \frac12.
- `hendrycks`: the same text after LaTeX's ways of writing are made one, as MATH's own grader does.
- `symbolic`: the same formula to `math-verify` (`symbolic.py`).
"""

import re
from collections.abc import Sequence
from fractions import Fraction
from functools import lru_cache
from typing import Literal, get_args

from octavo.errors import ConfigError

from mathshepherd import symbolic

Style = Literal["auto", "marker", "gsm8k", "boxed"]
Level = Literal["exact", "numeric", "hendrycks", "symbolic"]

#: Characters of an answer that is no more than its text: a runaway generation's.
LONGEST = 1000

# without a colon "the answer is" may go on as any sentence does, unless it ends the text
_MARKER = re.compile(
    r"\b[Aa]nswer\s+is(?:\s*:|"
    r"\b(?!\s+(?:(?:in)?correct|right|wrong|not)\b)(?=\s+[^a-z\s]|[^\n]*\Z))"
)
_LAST_LINE = re.compile(r"^[ \t]*(?:A|Answer)[ \t]*:[ \t]*(\S.*)\Z", re.MULTILINE)
_BOXED = re.compile(r"\\f?boxed\b\s*")
_DIGITS = r"(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d*)?|\.\d+"
_SIGNED = rf"[-+]?\s*[$€£]?\s*[-+]?(?:{_DIGITS})"
_FIRST_NUMBER = re.compile(rf"(?<![\w.])({_SIGNED})(\s*/\s*(?:{_DIGITS}))?")
# words behind a number; two letters could be symbols
_UNIT = re.compile(
    rf"({_SIGNED}(?:\s*/\s*(?:{_DIGITS}))?)\s+"
    r"(?!(?:and|sqrt|plus|minus|times|over|sin|cos|tan|log|exp|mod|factorial|squared|cubed|half|"
    r"halves|thirds?|quarters?|dozen|hundred|thousand|million|billion|trillion)\b)"
    r"[A-Za-z]{3,}[A-Za-z .²³/-]*"
)


def extract(text: str, style: str = "auto") -> str | None:
    r"""The final answer that a text gives.

    Args:
        text: of a solution, without step tags.
        style: `boxed` takes what is in the last balanced \boxed{}, as it stands; `marker` what
            follows the last "the answer is"; `gsm8k` the number behind the last `####`, or behind
            `A:` in the last line; `auto` whichever of these stands last.

    Returns:
        The answer without dollars around it, a full stop behind it, or, in a plain number, currency
        signs, commas and units; None where there is none.

    Raises:
        ConfigError: no such style.
    """
    finders = {"marker": (_by_marker,), "gsm8k": (_by_number,), "boxed": (_by_box,),
               "auto": (_by_marker, _by_number, _by_box)}  # fmt: skip
    if style not in finders:
        raise ConfigError(f"answer style {style!r}: must be one of {', '.join(finders)}")
    found = [place for finder in finders[style] if (place := finder(text))]
    return max(found)[1] if found else None


def _by_marker(text: str) -> tuple[int, str] | None:
    places = list(_MARKER.finditer(text))
    if not places:
        return None
    tail = text[places[-1].end() :]
    if boxed := _by_box(tail):
        answer: str | None = boxed[1]
    else:
        answer = _tidied(_sentence(tail))
    return (places[-1].start(), answer) if answer else None


def _by_number(text: str) -> tuple[int, str] | None:
    start = text.rfind("####")
    if start >= 0:
        tail = text[start + 4 :].strip().split("\n")[0]
    elif found := _LAST_LINE.search(text.rstrip()):
        start, tail = found.start(), found[1]
    else:
        return None
    number = _FIRST_NUMBER.search(tail)
    answer = _plain_number(number[0]) if number else _tidied(tail)
    return (start, answer) if answer else None


def _by_box(text: str) -> tuple[int, str] | None:
    closed = _closed_braces(text)
    for place in reversed(list(_BOXED.finditer(text))):
        start = place.end()
        if text[start : start + 1] == "{":
            answer = text[start + 1 : closed.get(start, start)]
        else:
            answer = re.split(r"[\s$]", text[start : start + LONGEST], maxsplit=1)[0]  # \boxed 5
        if answer.strip():
            return place.start(), answer.strip()
    return None


def _closed_braces(text: str) -> dict[int, int]:
    """The place of each brace that is closed, and that of the brace which closes it."""
    waiting: list[int] = []
    closed = {}
    for found in re.finditer(r"\\[{}]|[{}]", text):
        if found[0] == "{":
            waiting.append(found.start())
        elif found[0] == "}" and waiting:
            closed[waiting.pop()] = found.start()
    return closed


def _sentence(text: str) -> str:
    """The first line with something in it, or more where braces are open, up to its full stop."""
    lines = text.strip().split("\n")[:50]
    taken = lines[0]
    for number, line in enumerate(lines):
        longer = "\n".join(lines[: number + 1])
        opened = len(re.findall(r"\\begin\b", longer)) - len(re.findall(r"\\end\b", longer))
        if line.strip(" $\\[(") and opened <= 0 and longer.count("{") <= longer.count("}"):
            taken = longer
            break
    # a short word before the stop is rather an abbreviation
    return re.split(r"(?<=[\d)}\]$%])\.\s+(?=[A-Z])|(?<=[a-z]{4})\.\s+(?=[A-Z])", taken)[0]


def _tidied(text: str) -> str:
    """An answer without what stands around it."""
    text = text.strip().strip("*").strip()
    if not text.endswith(("\\!", "\\,", "\\;", "\\:")):
        text = text.rstrip(".,;:! \t\n")
    for left, right in (("$$", "$$"), ("$", "$"), (r"\(", r"\)"), (r"\[", r"\]")):
        if text.startswith(left) and text.endswith(right) and len(text) > len(left + right):
            inside = text[len(left) : -len(right)]
            if left not in inside:
                text = inside.rstrip(". \t\n").strip()
    if unit := _UNIT.fullmatch(text):
        text = unit[1]
    return _plain_number(text) if _FIRST_NUMBER.fullmatch(text) else text


def _plain_number(text: str) -> str:
    text = re.sub(r"[\s,$€£]", "", text)
    return re.sub(r"\.\Z", "", text)


def gradable(gold: str | None) -> bool:
    """Whether a right answer can be compared with: it is not blank, and its braces close."""
    if gold is None or key(gold, "hendrycks") == "":
        return False
    bare = re.sub(r"\\[{}]", "", gold)
    return bare.count("{") == bare.count("}")


def equivalent(
    predicted: str | None, gold: str, level: str = "symbolic", timeout: float = 5.0
) -> bool:
    """Whether two answers are the same; the order does not matter.

    Args:
        predicted: None, or a blank one, is never right.
        gold: right answer; nothing is equal to a blank one.
        level: the costliest means of comparison (see the module's description).
        timeout: seconds for a symbolic comparison; one that takes longer counts as different,
            and is counted in `symbolic.counts`.

    Raises:
        ConfigError: no such level, or math-verify cannot be started where it is needed.
    """
    right = key(gold, level)
    if predicted is None or not predicted.strip() or not gold.strip():
        return False
    if key(predicted, level) == right:
        return True
    return level == "symbolic" and _same(predicted, gold, timeout)


def classes(
    answers: Sequence[str | None], level: str = "symbolic", timeout: float = 5.0
) -> list[int | None]:
    """The class of equal answers that each belongs to, numbered as they come; None for no answer.

    Answers are sorted by their keys first, so that only different keys are compared, each with the
    first answer of every class.

    Raises:
        ConfigError: as `equivalent`.
    """
    numbers: dict[str | Fraction, int] = {}
    firsts: list[str] = []
    found: list[int | None] = []
    for answer in answers:
        if answer is None or not answer.strip():
            found.append(None)
            continue
        own = key(answer, level)
        if own not in numbers:
            others = enumerate(firsts) if level == "symbolic" else ()
            number = next((i for i, one in others if _same(one, answer, timeout)), len(firsts))
            if number == len(firsts):
                firsts.append(answer)
            numbers[own] = number
        found.append(numbers[own])
    return found


def key(answer: str, level: str = "hendrycks") -> str | Fraction:
    """What equal answers have in common at a level (at `symbolic`: at the one below it).

    Raises:
        ConfigError: no such level.
    """
    if level not in get_args(Level):
        raise ConfigError(f"level {level!r}: must be one of {', '.join(get_args(Level))}")
    if level == "exact" or len(answer) > LONGEST:
        return answer.strip()
    number = _number(_without_percent(_lightly(answer)))
    if number is not None:
        return number
    return answer.strip() if level == "numeric" else _normal(answer)


@lru_cache(maxsize=100_000)
def _same(first: str, second: str, timeout: float) -> bool:
    """By math-verify, unless it is clear already."""
    if max(len(first), len(second)) > LONGEST:
        return False
    one, other = key(first), key(second)
    if isinstance(one, Fraction) and isinstance(other, Fraction):
        far = abs(one - other) > Fraction(1, 10_000) * max(1, abs(other))
        if far and "%" not in first + second:
            return False
    texts = [_formula(first), _formula(second)]
    # letters of a word would be multiplied: an anagram would do
    named = r"\\(?:begin|end)\s*\{\w+\}|\\[A-Za-z]+"
    if any(re.search(r"[A-Za-z]{3}", re.sub(named, " ", text)) for text in texts):
        return False
    bases = [re.findall(r"\d_\{?(\d+)", text) for text in texts]
    if all(bases) and bases[0] != bases[1]:  # math-verify takes no notice of a number's base
        return False
    first, second = sorted(texts)
    return symbolic.same(first, second, timeout)


def _formula(answer: str) -> str:
    """An answer as LaTeX without dollars, whatever it was."""
    text = re.sub(r"(?<!\\)%", r"\%", _dressed_down(_lightly(answer)))
    text = re.sub(r"(?<![\\A-Za-z])sqrt\s*\(([^()]*)\)", r"\\sqrt{\1}", text)
    text = re.sub(r"(?<![\\A-Za-z])sqrt\s*(\d+)", r"\\sqrt{\1}", text)
    text = re.sub(
        r"(?<![\\A-Za-z])(pi|infty|theta|sin|cos|tan|cot|log|ln)(?![A-Za-z])", r"\\\1 ", text
    )
    return _without_units(text).replace(_ROW, r"\\ ")


_SIGNS = str.maketrans({"−": "-", "–": "-", "×": r"\times ", "·": r"\cdot ", "÷": "/", "π": r"\pi ",
                        "∞": r"\infty ", "°": r"^\circ ", "√": r"\sqrt ", "≤": r"\le ",
                        "≥": r"\ge ",
                        "∪": r"\cup ", "\u00a0": " ", "\u202f": " "})  # fmt: skip


#: Stands for the end of a matrix's row, whose second backslash begins no command.
_ROW = "␤"


def _lightly(text: str) -> str:
    """An answer without wrapping, currency, and blanks that only LaTeX sees."""
    text = text.translate(_SIGNS).replace(r"\\", _ROW).strip().strip("*")
    text = re.sub(r"\\\$|\$|\\\(|\\\)|\\\[|\\\]|[€£]", " ", text)
    text = re.sub(r"\{,\}|,\\!\s*", ",", text).replace(r"\!", "")
    text = re.sub(r"(?<=\d)(?:\\,|~|\\ |\\;)(?=\d{3}(?!\d))", "", text)
    text = re.sub(r"\\[,;: ]|~|\\q?quad\b|\\enspace\b", " ", text)
    text = re.sub(r"\s+", " ", text).strip()
    return text.rstrip(". ") or text


def _without_percent(text: str) -> str:
    return re.sub(r"\s*\\?%", "", text)


def _number(text: str) -> Fraction | None:
    """The number that a text is; None where it is something else, or too long to be one."""
    if len(text) > 200:
        return None
    text = re.sub(r"\\[dtc]?frac\s*(\d)\s*(\d)(?!\d)", r"\\frac{\1}{\2}", text)
    text = re.sub(r"\s*([+-])\s*", r"\1", text)
    digits = rf"(?:{_DIGITS})"
    for form in (
        rf"(?P<sign>[-+]?)(?P<over>[-+]?{digits})(?:\s*/\s*(?P<under>[-+]?{digits}))?",
        rf"(?P<sign>[-+]?)(?:(?P<whole>\d+)\s*)?\\[dtc]?frac\s*\{{\s*(?P<over>[-+]?{digits})\s*\}}"
        rf"\s*\{{\s*(?P<under>[-+]?{digits})\s*\}}",
        r"(?P<sign>[-+]?)(?P<whole>\d+)\s+(?P<over>\d+)\s*/\s*(?P<under>\d+)",
        rf"(?P<sign>[-+]?)(?P<over>{digits})\s*(?:\\times|\\cdot|\*)\s*"
        r"10\s*\^\s*\{?(?P<power>-?\d{1,2})\}?",
    ):
        if found := re.fullmatch(form, text):
            parts = found.groupdict()
            over, under = (Fraction((parts.get(name) or "1").replace(",", ""))
                           for name in ("over", "under"))  # fmt: skip
            if under == 0:
                return None
            value = int(parts.get("whole") or 0) + over / under
            value *= Fraction(10) ** int(parts.get("power") or 0)
            return -value if parts["sign"] == "-" else value
    return None


_TEXT = (
    r"\\(?:text(?:bf|it|rm|tt|sf|normal)?|mbox|hbox|mathrm|mathbf|mathit|mathsf|operatorname|emph)"
)


def _dressed_down(text: str) -> str:
    """LaTeX without what changes only its looks."""
    text = re.sub(r"\\(?:left|right|[bB]igg?[lr]?)(?![A-Za-z])", "", text)
    text = re.sub(r"\\(?:displaystyle|textstyle|limits|rm|bf|it)(?![A-Za-z])", "", text)
    return re.sub(r"\\[dtc]frac", r"\\frac", text)


def _without_units(text: str) -> str:
    """The text without degrees and without words behind a number."""
    text = re.sub(
        r"\^\s*(?:\\circ|\{\s*\\circ\s*\})|\\degrees?\b|(?<=[\d}])\s*degrees?\Z", "", text
    )
    words = r"\\(?:text(?:rm)?|mbox|hbox|mathrm)\s*\{[^{}]*\}"
    behind = rf"(?<=[\w)}}])\s*(?:{words})(?:\s*\^\s*\{{?\d\}}?)?\Z"
    shorter = re.sub(behind, "", text)
    if not re.search(_TEXT, shorter):
        text = shorter
    unit = _UNIT.fullmatch(text)
    return (unit[1] if unit else text).strip()


@lru_cache(maxsize=100_000)
def _normal(answer: str) -> str | Fraction:
    """An answer with one way of writing for each thing (as MATH's own grader, Hendrycks et al.)."""
    text = _without_units(_dressed_down(_without_percent(_lightly(answer))))
    text = re.sub(rf"{_TEXT}\s*\{{([^{{}}]*)\}}", r" \1 ", text).strip()
    assigned = r"(?:[A-Za-z]|\\[a-z]+|[A-Za-z]_\{?\w+\}?|[A-Za-z]\([A-Za-z]\))"
    if text.count("=") <= 1:
        text = re.sub(rf"\A{assigned}\s*(?:=|\\in(?![a-z]))\s*", "", text)
    if re.fullmatch(r"[A-Za-z .'-]*", text) and re.search(r"[A-Za-z]{3}", text):  # words
        return re.sub(r"\s+", " ", text).strip().lower()
    text = re.sub(r"(?<=[\w)}])\s+(?:and|or)\s+(?=[-\\(\w])", ",", text)
    text = re.sub(r"\\(?:cdot|times)(?![A-Za-z])", "*", text)
    for name, long in (("le", "leq"), ("ge", "geq"), ("ne", "neq"), ("infinity", "infty")):
        text = re.sub(rf"\\{name}(?![A-Za-z])", rf"\\{long}", text)
    text = re.sub(r"(\\(?:sqrt|frac)|\^|_)\s+", r"\1", text)
    text = re.sub(r"\\sqrt(\w)", r"\\sqrt{\1}", text)
    text = re.sub(r"\\frac(\d)\s*(\d)", r"\\frac{\1}{\2}", text)
    text = re.sub(r"\\frac(\w)\s*\{", r"\\frac{\1}{", text)
    text = re.sub(r"\\frac(\{[^{}]*\})\s*(\w)", r"\\frac\1{\2}", text)
    text = re.sub(r"([\^_])\{(\w)\}", r"\1\2", text)
    text = re.sub(r"(?<![\w.}/])(\d+)/(\d+)(?![\w./^])", r"\\frac{\1}{\2}", text)
    text = re.sub(
        r"(?<![\d.,([])(\d{1,3}(?:,\d{3})+)(?![\d,.)\]])", lambda m: m[1].replace(",", ""), text
    )
    text = re.sub(r"(?<!\d)\.(?=\d)", "0.", text)
    text = re.sub(r"(\.\d*?)0+(?!\d)", r"\1", text)
    text = re.sub(r"(?<=\d)\.(?!\d)", "", text)
    text = re.sub(r"(?<=\d) (?=\d)", "\x00", text)  # two numbers do not make one
    text = re.sub(r"\s+", "", text).replace("\x00", " ")
    while _closed_braces(text).get(0) == len(text) - 1:
        text = text[1:-1]
    number = _number(text)
    return text if number is None else number
