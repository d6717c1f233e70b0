"""Collect finished demos for the README's tables: demo.json, quick.json, and NAME.json of real texts.

Claims and tables are made anew from what each seed gave.

finepurify demo --profile full --seeds 3,4,5 --out FOLDER
python packages/finepurify/benchmarks/bench_demo.py FOLDER...
"""

import json
import sys
from pathlib import Path
from typing import Any

import yaml
from finepurify.claims import Margins, judge
from finepurify.demo import REAL, mean_rows, numbers, table
from finepurify.experiment import Found
from octavo.report import load_claims
from octavo.rundir import write_json

RESULTS = Path(__file__).parent / "results"
OTHERS = ("multi", "clean-label", "embedding", "layerwise", "adaptive")
SHOWN = ("before", "fine-tuning", "fine-purifying", "fine-mixing")


def collect(folder: Path) -> dict[str, Any]:
    """Claims, tables (means over seeds), each seed's numbers, and where it was run."""
    options = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))
    seeds, data = options["seeds"], Path(options["data"]).name
    what = f"--data {data}" if data else f"--profile {options['profile']}"
    command = f"finepurify demo {what} --seeds {','.join(map(str, seeds))}"
    each = []
    for seed in seeds:
        stored = json.loads((folder / f"seed-{seed}.json").read_text(encoding="utf-8"))
        each.append({name: Found(**found) for name, found in stored.items()})
    environment = json.loads((folder / "environment.json").read_text(encoding="utf-8"))
    scanned = [
        {"suspect": name, "seed": seed, "trigger's rank": one[name].rank,
         "of": one[name].judged, "alarm": one[name].fires}
        for name in each[0] if each[0][name].judged
        for seed, one in zip(seeds, each, strict=True)
    ]  # fmt: skip
    tables = {name: mean_rows([table(one[name]) for one in each]) for name in each[0]}
    claims = judge([numbers(one) for one in each], REAL if data else Margins())
    return {
        "profile": options["profile"],
        "data": data,
        "command": command,
        "seconds": load_claims(folder)["seconds"],
        "claims": [claim.row() for claim in claims],
        **{name: rows for name, rows in tables.items() if rows},
        "attacks": attacks(tables),
        "scans": scanned,
        "calibration": [
            {"suspect": name, "seed": seed} | row
            for name in each[0]
            for seed, one in zip(seeds, each, strict=True)
            for row in one[name].calibration
        ],
        "numbers": [{"seed": s} | numbers(one) for s, one in zip(seeds, each, strict=True)],
        "environment": environment | {"command": command},
    }


def attacks(tables: dict[str, list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """One row an attack: ASR as it came, after fine-tuning alone, and after both defences."""
    found = []
    for name in OTHERS:
        if name in tables:
            by = {row["defence"]: row for row in tables[name]}
            row: dict[str, Any] = {"attack": name, "ACC": by["before"]["ACC"]}
            row |= {f"ASR {defence}": by[defence]["ASR"] for defence in SHOWN}
            found.append(row | {f"ACC {d}": by[d]["ACC"] for d in SHOWN[1:]})
    return found


def keep(folder: Path, results: Path = RESULTS) -> Path:
    """Write what a folder holds where it belongs; gives the file."""
    found = collect(folder)
    name = found["data"] or ("quick" if found["profile"] == "quick" else "demo")
    file = results / f"{name}.json"
    write_json(file, found)
    return file


def main() -> None:
    """Collect the folders that are named."""
    for place in sys.argv[1:]:
        keep(Path(place))


if __name__ == "__main__":
    main()
