"""The quick demo over three seeds that nothing was tuned on; the README's table is made of this.

python packages/cascadebert/benchmarks/bench_demo.py
"""

import tempfile
from pathlib import Path

from cascadebert.demo import run_demo
from octavo import console
from octavo.rundir import environment, write_json
from octavo.runtime import Runtime

RESULTS = Path(__file__).parent / "results" / "demo.json"
COMMAND = "cascadebert demo --profile quick --seeds 0,1,2"


def main() -> None:
    """Run, print and write the result."""
    runtime = Runtime(threads=1)
    runtime.start()
    with tempfile.TemporaryDirectory() as folder:
        outcome = run_demo("quick", (0, 1, 2), Path(folder) / "run", runtime=runtime)
    console.show(outcome)
    models, claims = outcome.tables.values()
    result = {"command": COMMAND, "claims": claims, "models, seed 0": models}
    write_json(RESULTS, result | {"environment": environment()})


if __name__ == "__main__":
    main()
