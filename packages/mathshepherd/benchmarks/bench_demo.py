"""Collect finished demos for the README's table: demo.json, and quick.json of the quick profile.

mathshepherd demo --profile full --seeds 3,4,5 --out FOLDER
python packages/mathshepherd/benchmarks/bench_demo.py FOLDER...
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
    command = (
        f"mathshepherd demo --profile {options['profile']} --seeds {','.join(map(str, seeds))}"
    )
    each = [json.loads((folder / f"seed-{s}.json").read_text(encoding="utf-8")) for s in seeds]
    environment = json.loads((folder / "environment.json").read_text(encoding="utf-8"))
    return {
        "profile": options["profile"],
        "command": command,
        **load_claims(folder),
        "numbers": [{"seed": seed} | one["numbers"] for seed, one in zip(seeds, each, strict=True)],
        "environment": environment | {"command": command},
    }


def keep(folder: Path, results: Path = RESULTS) -> Path:
    """Write what a folder holds where its profile belongs; gives the file."""
    found = collect(folder)
    file = results / ("quick.json" if found["profile"] == "quick" else "demo.json")
    write_json(file, found)
    return file


def main() -> None:
    """Collect the folders that are named."""
    for place in sys.argv[1:]:
        keep(Path(place))


if __name__ == "__main__":
    main()
