"""Collect finished demos for the README's tables.

deepseekmoe demo --profile full --seeds 3,4,5 [--data DIR] --out FOLDER
python packages/deepseekmoe/benchmarks/bench_demo.py FOLDER
"""

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import yaml
from deepseekmoe.report import mean_table, models_table
from octavo.report import load_claims
from octavo.rundir import write_json

RESULTS = Path(__file__).parent / "results"


def collect(folder: Path) -> tuple[str, dict[str, Any]]:
    """A result's name and what stands in it: tables as means over seeds, claims, where it was run."""
    options = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))
    seeds = ",".join(str(seed) for seed in options["seeds"])
    command = f"deepseekmoe demo --profile {options['profile']} --seeds {seeds}"
    command += " --data DIR" * bool(options["data"])
    files = [folder / f"seed-{seed}.json" for seed in options["seeds"]]
    found: Any = [SimpleNamespace(**json.loads(file.read_text(encoding="utf-8"))) for file in files]
    claims = load_claims(folder)
    environment = json.loads((folder / "environment.json").read_text(encoding="utf-8"))
    result = {
        "command": command,
        "seconds": claims["seconds"],
        "claims": claims["claims"],
        **{name: mean_table(found, name) for name in found[0].tables},
        "models": models_table(found),
        "environment": environment | {"command": command},
    }
    return f"demo-{'texts' if options['data'] else 'embedded'}", result


def main() -> None:
    """Collect the folders that are named."""
    for place in sys.argv[1:]:
        name, result = collect(Path(place))
        write_json(RESULTS / f"{name}.json", result)


if __name__ == "__main__":
    main()
