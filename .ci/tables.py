"""Fill the tables of the READMEs from the committed results of the benchmarks.

A README marks a table so, with the path beside it, the key in the file and its columns:

    <!-- table benchmarks/results/demo.json claims: claim, measured, verdict -->
    <!-- end -->

    python .ci/tables.py        rewrites every README in place
"""

import json
import re
import sys
from pathlib import Path

from octavo.report import markdown_table

ROOT = Path(__file__).parents[1]
TABLE = re.compile(r"(<!-- table (\S+) ([^:>]+): ([^>]+) -->\n).*?(<!-- end -->)", re.DOTALL)


def filled(readme: Path) -> str:
    """The README's text with every marked table made anew."""

    def table(match: re.Match[str]) -> str:
        begin, path, key, columns, end = match.groups()
        names = [name.strip() for name in columns.split(",")]
        content = json.loads((readme.parent / path).read_text(encoding="utf-8"))
        rows = [{name: row.get(name) for name in names} for row in content[key]]
        return f"{begin}{markdown_table(rows)}\n{end}"

    return TABLE.sub(table, readme.read_text(encoding="utf-8"))


def main() -> int:
    """Rewrite what differs."""
    for readme in [ROOT / "README.md", *ROOT.glob("packages/*/README.md")]:
        readme.write_text(filled(readme), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
