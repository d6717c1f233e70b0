"""Collect a finished demo for the README's table.

anchors demo --profile full --seeds 3,4,5 --out FOLDER
python packages/anchors/benchmarks/bench_demo.py FOLDER
"""

import json
import sys
from pathlib import Path
from typing import Any

import yaml
from octavo.report import load_claims
from octavo.rundir import write_json

RESULTS = Path(__file__).parent / "results"


def collect(folder: Path) -> dict[str, Any]:
    """Claims, each seed's numbers, and where it was run."""
    options = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))
    seeds = options["seeds"]
    command = f"anchors demo --profile {options['profile']} --seeds {','.join(map(str, seeds))}"
    each = [json.loads((folder / f"seed-{s}.json").read_text(encoding="utf-8")) for s in seeds]
    environment = json.loads((folder / "environment.json").read_text(encoding="utf-8"))
    return {
        "command": command,
        **load_claims(folder),
        "numbers": [{"seed": seed} | one["numbers"] for seed, one in zip(seeds, each, strict=True)],
        "environment": environment | {"command": command},
    }


def main() -> None:
    """Collect the folder that is named."""
    for place in sys.argv[1:]:
        write_json(RESULTS / "demo.json", collect(Path(place)))


if __name__ == "__main__":
    main()
