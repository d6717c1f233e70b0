"""Packages stand on octavo alone, and octavo stays thin."""

import ast
import io
import tokenize

import pytest

LARGEST_OCTAVO = 1500
EMPTY_NAMES = {"utils", "helpers", "core", "common"}
LAYOUT = {
    tokenize.COMMENT,
    tokenize.NL,
    tokenize.NEWLINE,
    tokenize.INDENT,
    tokenize.DEDENT,
    tokenize.ENCODING,
    tokenize.ENDMARKER,
}

SAMPLE = '''"""A module.

With a long docstring.
"""

import os  # code with a comment

# a comment


class Box:
    """A class."""

    size: int = 1
    """A field."""

    def open(self) -> str:
        """Two lines,
        the second é."""
        return """words

        not a docstring"""


VALUE = (
    1,  # counted

    2,
)
'''


def code_lines(source: str) -> int:
    """Lines that hold code: not blank, not only a comment, not part of a docstring.

    A string that stands alone as a statement is a docstring, a field's too.
    """
    docstrings = {
        node.lineno: node.end_lineno or node.lineno
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Expr)
        and isinstance(node.value, ast.Constant)
        and isinstance(node.value.value, str)
    }
    lines: set[int] = set()
    end_of_docstring = 0
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        first, last = token.start[0], token.end[0]
        if token.type in LAYOUT:
            continue
        if token.type == tokenize.STRING and first in docstrings:
            end_of_docstring = docstrings[first]
        if token.type == tokenize.STRING and last <= end_of_docstring:
            continue
        lines |= set(range(first, last + 1))
    text = source.splitlines()
    return sum(bool(text[number - 1].strip()) for number in lines)


def test_code_lines_of_a_sample():
    counted = [
        "import",
        "class",
        "size",
        "def",
        "return",
        "not a docstring",
        "VALUE",
        "1",
        "2",
        ")",
    ]
    assert code_lines(SAMPLE) == len(counted)


@pytest.mark.parametrize(
    ("source", "count"),
    [
        ("", 0),
        ("# only a comment\n\n", 0),
        ('"""Doc."""', 0),
        ('("""Doc, """\n "in two parts.")\n', 2),  # the parentheses are code
        ('"""Doc, """ \\\n    "in two parts."\n', 0),
        ('"""Doc."""; x = 1\n', 1),
        ("x = '''a\nb'''\n", 2),
        ("def f(): ...\n", 1),
        ("f'{1}\\n'\n", 1),
    ],
)
def test_code_lines_of_corner_cases(source, count):
    assert code_lines(source) == count


def test_octavo_stays_thin(root):
    sizes = {
        file.name: code_lines(file.read_text(encoding="utf-8"))
        for file in (root / "shared" / "src").rglob("*.py")
    }
    assert sizes
    assert sum(sizes.values()) < LARGEST_OCTAVO, sizes


def test_package_imports_no_other_package(package, packages, imports_below):
    others = {other.name for other in packages} - {package.name}
    assert imports_below(package.folder) & others == set()


def test_octavo_imports_no_package(root, packages, imports_below):
    assert imports_below(root / "shared") & {package.name for package in packages} == set()


def test_imports_are_found_wherever_they_stand(imports):
    source = """
import one.part as other
from two.part import name
from . import own
from .own import name
def f():
    import three, four
    importlib.import_module("five.part")
    import_module("six")
    __import__("seven")
if TYPE_CHECKING:
    from eight import Name
"""
    assert imports(source) == set("one two three four five six seven eight".split())


def test_files_are_named_after_an_idea(member):
    stems = {path.stem for path in member.source.rglob("*")}
    assert stems
    assert stems & EMPTY_NAMES == set()
