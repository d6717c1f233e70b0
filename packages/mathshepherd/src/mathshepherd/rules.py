"""The paper's rule baselines: steps labelled by arithmetic, or by numbers of a reference solution.

Neither asks whether a step leads to the answer, which is what rollouts are for (Table 4 of the
paper compares them); both are free. A step that a rule has nothing to say of gets no label.
"""

import ast
import operator
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from fractions import Fraction

from octavo.errors import DataError

from mathshepherd.records import Solution, StepLabels

_NOTE = re.compile(r"<<([^<>=]*)=([^<>=]*)>>")
_NUMBER = r"(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?|\.\d+"
_RESULT = re.compile(rf"=\s*[$€£]?\s*(-?\s*[$€£]?(?:{_NUMBER}))(?!\s*[-+*/×÷^]\s*[\d(])")
_ANY = re.compile(rf"(?:(?<![\w)])-)?[$€£]?(?:{_NUMBER})")

_OPERATORS: dict[type[ast.AST], Callable[[Fraction, Fraction], Fraction]] = {
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv,
    ast.FloorDiv: lambda over, under: Fraction(over // under),  # two of GSM8K's notes have it
}  # fmt: skip


def evaluate(expression: str) -> Fraction | None:
    """The exact value of plain arithmetic; None where it is something else, or has no value.

    Knows numbers, + - * / // (also x, × and ÷), powers up to 100, per cent and parentheses; names,
    calls and whatever else Python knows are not evaluated.
    """
    text = re.sub(r"(?<=\d),(?=\d{3}(?!\d))|[\s$€£]", "", expression)
    if not text or len(text) > 500:
        return None
    for sign, plain in (("×", "*"), ("x", "*"), ("÷", "/"), ("−", "-"), ("^", "**"), ("%", "/100")):
        text = text.replace(sign, plain)
    text = re.sub(r"(?<![\d.])0+(?=\d)", "", text)
    if not re.fullmatch(r"[\d.()+*/-]+", text):
        return None
    try:
        return _value(ast.parse(text, mode="eval").body, text)
    except (SyntaxError, ValueError, ZeroDivisionError, RecursionError, MemoryError):
        return None


def _value(node: ast.AST, text: str) -> Fraction:
    match node:
        case ast.Constant():
            return Fraction(ast.get_source_segment(text, node) or "")  # 0.1 is one tenth
        case ast.UnaryOp(op=ast.USub()):
            return -_value(node.operand, text)
        case ast.UnaryOp(op=ast.UAdd()):
            return _value(node.operand, text)
        case ast.BinOp(op=ast.Pow()):
            base, power = _value(node.left, text), _value(node.right, text)
            if (
                power.denominator != 1
                or abs(power) > 100
                or max(map(abs, base.as_integer_ratio())) > 10**20
            ):
                raise ValueError(text)
            return base ** int(power)
        case ast.BinOp() if type(node.op) in _OPERATORS:
            return _OPERATORS[type(node.op)](_value(node.left, text), _value(node.right, text))
    raise ValueError(text)


@dataclass(frozen=True)
class Note:
    """A calculator note `<<expression=stated>>`, as GSM8K's solutions have them.

    Attributes:
        expression: what is computed.
        stated: what is said to come out.
        value: what does come out, None where it is no arithmetic.
        right: whether they agree, exactly or rounded to the decimals that are stated.
    """

    expression: str
    stated: str
    value: Fraction | None
    right: bool


def notes(text: str) -> list[Note]:
    """The calculator notes of a text, each evaluated."""
    found = []
    for expression, stated in _NOTE.findall(text):
        value, said = evaluate(expression), evaluate(stated)
        decimals = len(stated.strip().partition(".")[2])
        off = None if value is None or said is None else abs(value - said)
        rounded = decimals > 0 and off is not None and off <= Fraction(1, 2 * 10**decimals)
        found.append(Note(expression.strip(), stated.strip(), value, off == 0 or rounded))
    return found


def results(text: str) -> list[Fraction]:
    """The numbers that a text computes: those of its notes, and those behind an equals sign."""
    found = [evaluate(stated) for _, stated in _NOTE.findall(text)]
    found += [evaluate(number) for number in _RESULT.findall(_NOTE.sub("", text))]
    return list(dict.fromkeys(number for number in found if number is not None))


def by_calculator(solution: Solution) -> StepLabels:
    """A step is good if all its calculator notes are right; one without notes is not judged."""
    judged = [[note.right for note in notes(step)] for step in solution.steps]
    return StepLabels(
        tuple(int(all(rights)) if rights else None for rights in judged), strategy="calculator"
    )


def by_numbers(solution: Solution, references: str | Iterable[str]) -> StepLabels:
    """A step is good if the number it computes occurs in a reference solution (DIVERSE's rule).

    The number is the last that the step computes, or, where it computes none, the last that it
    names; a step without a number is not judged. The references' numbers are all that they compute,
    and the one that they end with.

    Args:
        solution: whose steps are judged.
        references: texts of right solutions: the data's own, or others that reach the right answer.

    Raises:
        DataError: no reference holds a number.
    """
    texts = [references] if isinstance(references, str) else list(references)
    known = {number for text in texts for number in [*results(text), *_named(text)[-1:]]}
    if not known:
        raise DataError(f"{solution.key}: no reference solution holds a number to compare with")
    hard = []
    for step in solution.steps:
        own = results(step) or _named(step)
        hard.append(int(own[-1] in known) if own else None)
    return StepLabels(tuple(hard), strategy="numbers")


def _named(text: str) -> list[Fraction]:
    plain = re.sub(r"\AStep\s+\d+\s*:", "", _NOTE.sub("", text).strip())
    found = (evaluate(number) for number in _ANY.findall(plain))
    return [number for number in found if number is not None]
