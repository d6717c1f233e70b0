"""Collect finished demos for the README's tables: demo.json of the bundled lexicon, micls.json of MiCLS.

formbert demo --profile full --seeds 3,4,5 --out FOLDER
python packages/formbert/benchmarks/bench_demo.py FOLDER...
"""

import json
import sys
from pathlib import Path
from typing import Any

import yaml
from formbert import claims, real
from formbert.demo import mean_table, of_table
from octavo.report import load_claims
from octavo.rundir import write_json

RESULTS = Path(__file__).parent / "results"


def collect(folder: Path) -> dict[str, Any]:
    """Claims and the table (means over seeds), differences of each seed, and where it was run."""
    options = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))
    seeds, data = options["seeds"], options.get("data")
    what = (
        f"--data DIR --profile {options['profile']}" if data else f"--profile {options['profile']}"
    )
    command = f"formbert demo {what} --seeds {','.join(map(str, seeds))}"
    each = [
        json.loads((folder / f"seed-{seed}.json").read_text(encoding="utf-8")) for seed in seeds
    ]
    table = mean_table([one["table"] for one in each])
    if data:
        judged = real.judge(table)
    else:
        judged = claims.judge([one["numbers"] | of_table(one["table"]) for one in each])
    environment = json.loads((folder / "environment.json").read_text(encoding="utf-8"))
    return {
        "profile": options["profile"],
        "data": bool(data),
        "command": command,
        "seconds": load_claims(folder)["seconds"],
        "claims": [claim.row() for claim in judged],
        "table": table,
        "seeds": [{"seed": seed} | one for seed, one in zip(seeds, each, strict=True)],
        "environment": environment | {"command": command},
    }


def keep(folder: Path, results: Path = RESULTS) -> Path:
    """Write what a folder holds where it belongs; gives the file."""
    found = collect(folder)
    for one in found["seeds"]:  # what the figures are drawn from is long, and in the report
        one.pop("reliability", None)
        one.pop("confusion", None)
    name = "micls" if found["data"] else "quick" if found["profile"] == "quick" else "demo"
    write_json(results / f"{name}.json", found)
    return results / f"{name}.json"


def main() -> None:
    """Collect the folders that are named."""
    for place in sys.argv[1:]:
        keep(Path(place))


if __name__ == "__main__":
    main()
