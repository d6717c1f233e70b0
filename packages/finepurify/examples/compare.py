"""What does each share that is kept cost? Two strategies on one suspect, judged on held clean rows.

python compare.py FOLDER

FOLDER holds `init` and `suspect`, two models, and `clean.jsonl`, rows with a text and a label.
"""

import sys
from pathlib import Path

from finepurify import DataConfig, FisherConfig, PurifyConfig, TuneConfig, choose, trials
from finepurify.bench import Bench
from finepurify.data import encode
from finepurify.stations import Settings, admit, clean_rows, evidence_for, open_pair, split_clean
from finepurify.sweep import sweep
from octavo.rundir import RunDir

STRATEGIES = ("fine-purifying", "fine-mixing")


def main(folder: Path, steps: int = 60, grid: tuple[float, ...] = (0.98, 0.9, 0.8, 0.6)) -> None:
    """Print held accuracy at every rho, and the rho that a defender would choose."""
    patient = admit(open_pair(str(folder / "init"), str(folder / "suspect")))
    source, data = str(folder / "clean.jsonl"), DataConfig()
    clean, held = split_clean(
        patient, clean_rows(patient, source, data), source, None, data, 0.5, 0
    )
    items, judged = (encode(rows, patient.tokenizer, data.max_length) for rows in (clean, held))
    tune = TuneConfig(steps=steps, learning_rate=3e-4)
    with RunDir.open(folder / "compared", {"steps": steps, "grid": list(grid)}) as run:
        evidence = evidence_for(STRATEGIES, patient, items, Settings(fisher=FisherConfig()), run)
        bench = Bench(
            patient.pair, patient.model, patient.pad, items, judged, held.labels, tune, run
        )  # fmt: skip
        rows = sweep(bench, trials(evidence, PurifyConfig(), STRATEGIES, grid))
    for row in rows:
        print(f"{row['strategy']} rho {row['rho']:g}: {row['ACC']:.1f} %")  # noqa: T201
    for strategy in STRATEGIES:
        best = choose(rows, strategy, 2.0)
        print(f"{strategy}: " + (f"rho {best['rho']:g}" if best else "no rho will do"))  # noqa: T201


if __name__ == "__main__":
    main(Path(sys.argv[1]))
