"""Tables, figures and claims in one `report.md` and one `report.html` that needs nothing else.

report = Report("Cascade")
report.text("What was done.")
report.table("Accuracy", rows)
report.figure("Pareto curve", figure)
report.save(folder)
"""

import base64
import html
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from octavo.console import cell, columns_of
from octavo.rundir import atomic, write_json, write_text

if TYPE_CHECKING:
    from matplotlib.figure import Figure

STYLE = """
body{font:16px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem;color:#222}
table{border-collapse:collapse;margin:.5rem 0 1.5rem}th,td{padding:.2rem .7rem;text-align:left}
th{border-bottom:2px solid #444}td{border-bottom:1px solid #ddd}td.n{text-align:right;
font-variant-numeric:tabular-nums}img{max-width:100%}figure{margin:1rem 0}
figcaption,caption{text-align:left;font-weight:600;padding:.3rem 0}
td.PASS{color:#176b2c;font-weight:600}td.FAIL{color:#b3261e;font-weight:600}
"""


@dataclass(frozen=True)
class Claim:
    """One statement of the paper, what was measured here, and whether it holds.

    Attributes:
        claim: the statement, in a few words.
        measured: what came out, with its unit.
        criterion: when it counts as shown.
        passed: None where it cannot be shown at this size; `criterion` then gives the reason.
    """

    claim: str
    measured: str
    criterion: str
    passed: bool | None

    @property
    def verdict(self) -> str:
        """PASS, FAIL, or why there is neither."""
        if self.passed is None:
            return "not shown at this size"
        return "PASS" if self.passed else "FAIL"

    def row(self) -> dict[str, str]:
        """The claim as a row of a table."""
        return {name: getattr(self, name) for name in ("claim", "measured", "criterion", "verdict")}


def save_claims(claims: Sequence[Claim], seconds: float, folder: Path) -> None:
    """Write `claims.json`, which the workspace's demo collects."""
    rows = [asdict(claim) | {"verdict": claim.verdict} for claim in claims]
    write_json(folder / "claims.json", {"claims": rows, "seconds": round(seconds, 1)})


class Report:
    """A page built from top to bottom and saved in both forms."""

    def __init__(self, title: str) -> None:
        self.title = title
        self.markdown = [f"# {title}\n"]
        self.html = [f"<h1>{html.escape(title)}</h1>"]
        self.images: dict[str, bytes] = {}

    def heading(self, words: str) -> None:
        """Begin a section."""
        self.markdown.append(f"## {words}\n")
        self.html.append(f"<h2>{html.escape(words)}</h2>")

    def text(self, words: str) -> None:
        """Add a paragraph of plain words."""
        self.markdown.append(f"{words}\n")
        self.html.append(f"<p>{html.escape(words)}</p>")

    def table(self, caption: str, rows: Sequence[Mapping[str, Any]]) -> None:
        """Add a table; each row maps column to value."""
        self.markdown.append(f"**{caption}**\n\n{markdown_table(rows)}\n")
        columns = columns_of(rows)
        head = "".join(f"<th>{html.escape(column)}</th>" for column in columns)
        body = "".join(
            "<tr>" + "".join(_html_cell(row.get(column)) for column in columns) + "</tr>"
            for row in rows
        )
        self.html.append(
            f"<table><caption>{html.escape(caption)}</caption>"
            f"<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
        )

    def claims(self, claims: Sequence[Claim]) -> None:
        """Add the table of claims."""
        self.table("Claims", [claim.row() for claim in claims])

    def figure(self, caption: str, figure: "Figure") -> None:
        """Add a matplotlib figure, drawn once for both forms; the figure is left as it is."""
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", dpi=120, bbox_inches="tight")
        name = f"figure-{len(self.images) + 1}.png"
        self.images[name] = buffer.getvalue()
        self.markdown.append(f"![{caption}]({name})\n")
        data = base64.b64encode(buffer.getvalue()).decode()
        words = html.escape(caption, quote=True)
        self.html.append(
            f'<figure><img alt="{words}" src="data:image/png;base64,{data}">'
            f"<figcaption>{words}</figcaption></figure>"
        )

    def save(self, folder: Path) -> Path:
        """Write `report.md` with its figures and `report.html`; returns the latter's path."""
        for name, image in self.images.items():
            with atomic(folder / name) as temporary:
                temporary.write_bytes(image)
        write_text(folder / "report.md", "\n".join(self.markdown))
        write_text(folder / "report.html", html_page(self.title, "\n".join(self.html)))
        return folder / "report.html"


def html_page(title: str, body: str) -> str:
    """A page that asks nothing of the network."""
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        '<link rel="icon" href="data:,">'
        f"<title>{html.escape(title)}</title><style>{STYLE}</style></head>\n"
        f"<body>\n{body}\n</body></html>\n"
    )


def markdown_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows as a table in Markdown."""
    columns = columns_of(rows)
    lines = [columns, ["---"] * len(columns)]
    lines += [[cell(row.get(column)) for column in columns] for row in rows]
    return "\n".join(
        "| " + " | ".join(text.replace("|", "\\|").replace("\n", " ") for text in line) + " |"
        for line in lines
    )


def _html_cell(value: Any) -> str:
    words = cell(value)
    kind = "n" if isinstance(value, int | float) else words if words in ("PASS", "FAIL") else ""
    attribute = f' class="{kind}"' if kind else ""
    return f"<td{attribute}>{html.escape(words)}</td>"


def load_claims(folder: Path) -> dict[str, Any]:
    """What `save_claims` wrote."""
    return json.loads((folder / "claims.json").read_text(encoding="utf-8"))
