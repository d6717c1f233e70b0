"""Run every package's demo to the end, whatever fails, and show all claims in one table.

    python .ci/demo.py --packages '*' --profile quick        what `make demo` calls

A demo's log goes to stderr as it runs, its own table to `runs/demo/<package>.log`, its report to
`runs/demo/<package>/`; `runs/demo/index.html` holds the table and links the reports.
"""

import argparse
import html
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from octavo.console import Outcome, show
from octavo.report import Report, html_page, load_claims
from octavo.rundir import write_text

REPOSITORY = Path(__file__).resolve().parent.parent

#: Exit codes of a demo that came to its end: no claim failed, or one did.
FINISHED = (0, 3)


@dataclass(frozen=True)
class Demo:
    """How one package's demo went; a demo that crashed has no claims."""

    package: str
    exit_code: int
    seconds: float
    claims: Sequence[dict[str, Any]]

    @property
    def failed(self) -> bool:
        """Whether it ended badly, or a claim did."""
        return self.exit_code != 0 or "FAIL" in [row["verdict"] for row in self.rows()]

    def rows(self) -> list[dict[str, Any]]:
        """A row for each claim, or one that says that there is none."""
        if self.exit_code in FINISHED and self.claims:
            found = self.claims
        else:
            what = "wrote no claims" if self.exit_code in FINISHED else "did not finish"
            measured = f"{what} (exit code {self.exit_code})"
            found = [{"claim": "the demo runs to its end", "measured": measured, "verdict": "FAIL"}]
        return [
            {
                "method": self.package,
                "claim": claim["claim"],
                "measured": claim["measured"],
                "verdict": claim["verdict"],
                "seconds": None if number else round(self.seconds, 1),  # once a demo
            }
            for number, claim in enumerate(found)
        ]


def run_demo(package: str, profile: str, commands: Path, runs: Path) -> Demo:
    """Run one demo as a user does; what an earlier one left can not be taken for its result."""
    folder = runs / package
    for stale in ("claims.json", "report.html"):
        (folder / stale).unlink(missing_ok=True)
    begin = time.perf_counter()
    with (runs / f"{package}.log").open("wb") as log:
        exit_code = _call(
            [commands / package, "demo", "--profile", profile, "--out", folder, "--overwrite"], log
        )
    seconds = time.perf_counter() - begin
    there = (folder / "claims.json").is_file()
    return Demo(package, exit_code, seconds, load_claims(folder)["claims"] if there else [])


def _call(command: Sequence[str | Path], log: Any) -> int:
    try:
        return subprocess.run(command, stdout=log, check=False).returncode
    except OSError as error:
        _say(f"{command[0]}: {error.strerror}; run `make setup`")
        return 127


def write_index(demos: Sequence[Demo], rows: Sequence[dict[str, Any]], runs: Path) -> Path:
    """Write the page that holds the table and links each package's report."""
    page = Report("Octavo: demos")
    page.table("Claims of the papers, and what was measured here", rows)
    items = []
    for demo in demos:
        name, link = html.escape(demo.package), f"{demo.package}/report.html"
        there = (runs / link).is_file()
        items.append(f'<a href="{link}">{name}</a>' if there else f"{name}: no report")
    page.html.append("<h2>Reports</h2><ul>" + "".join(f"<li>{i}</li>" for i in items) + "</ul>")
    index = runs / "index.html"
    write_text(index, html_page(page.title, "\n".join(page.html)))
    return index


def main(
    arguments: Sequence[str],
    packages: Path = REPOSITORY / "packages",
    commands: Path = Path(sys.executable).parent,
    runs: Path = REPOSITORY / "runs" / "demo",
) -> int:
    """Run the demos that the command line asks for; 1 if one failed, 2 if there is none such."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("--packages", default="*", help="name or glob of packages [default: *]")
    parser.add_argument("--profile", default="quick", help="quick or full [default: quick]")
    options = parser.parse_args(arguments)
    present = sorted(file.parent.name for file in packages.glob("*/pyproject.toml"))
    chosen = [name for name in present if fnmatch(name, options.packages)]
    if not chosen:
        _say(f"no package is named {options.packages}; there are: {', '.join(present)}")
        return 2
    runs.mkdir(parents=True, exist_ok=True)
    demos = []
    for number, package in enumerate(chosen, 1):
        _say(f"[{number}/{len(chosen)}] {package} demo --profile {options.profile}")
        demos.append(run_demo(package, options.profile, commands, runs))
    rows = [row for demo in demos for row in demo.rows()]
    index = write_index(demos, rows, runs)
    failed = [demo.package for demo in demos if demo.failed]
    ending = f"failed: {', '.join(failed)}" if failed else "no claim failed"
    show(Outcome({f"Demos, {options.profile} profile": rows}, note=f"{ending}; reports: {index}"))
    return 1 if failed else 0


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except KeyboardInterrupt:
        _say("interrupted")
        sys.exit(130)
