"""The demo over three seeds that nothing was tuned on; the README's tables are made of this.

python packages/cascadebert/benchmarks/bench_demo.py            quick profile, generated words
python packages/cascadebert/benchmarks/bench_demo.py FOLDER     collects a finished full demo:

cascadebert demo --profile full --seeds 0,1,2 [--data DIR] --out FOLDER
"""

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import yaml
from cascadebert.demo import run_demo
from cascadebert.report import mean_rows
from octavo.report import load_claims
from octavo.rundir import write_json
from octavo.runtime import Runtime

RESULTS = Path(__file__).parent / "results"
QUICK = "cascadebert demo --profile quick --seeds 0,1,2"
FULL = "cascadebert demo --profile full --seeds 0,1,2"


def collect(folder: Path, command: str) -> dict[str, Any]:
    """The tables of a finished demo as means over its seeds."""
    found = [json.loads(path.read_text()) for path in sorted(folder.glob("seed-*.json"))]
    tables = {
        name: mean_rows([one["tables"][name] for one in found]) for name in found[0]["tables"]
    }
    methods: dict[str, dict[str, Any]] = {}
    for row in tables["speed"]:
        line = methods.setdefault(row["method"], {"method": row["method"]})
        if "target" in row:
            line[f"{row['target']:g}x"] = row.get("accuracy %", row.get("note"))
        else:
            line["accuracy %"] = row["accuracy %"]
    claims = load_claims(folder)
    return {
        "command": command,
        "seeds": len(found),
        "seconds": claims["seconds"],
        "claims": claims["claims"],
        "accuracy": [line for line in methods.values() if "accuracy %" not in line],
        "alone": [line for line in methods.values() if "accuracy %" in line],
        **tables,
        "environment": json.loads((folder / "environment.json").read_text()) | {"command": command},
    }


def main() -> None:
    """Run or collect, and write the result."""
    if len(sys.argv) > 1:
        folder = Path(sys.argv[1])
        real = bool(yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))["data"])
        name, command = ("demo-real", f"{FULL} --data DIR") if real else ("demo-full", FULL)
        write_json(RESULTS / f"{name}.json", collect(folder, command))
        return
    runtime = Runtime(threads=1)
    runtime.start()
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "run"
        run_demo("quick", (0, 1, 2), out, runtime=runtime)
        write_json(RESULTS / "demo.json", collect(out, QUICK))


if __name__ == "__main__":
    main()
