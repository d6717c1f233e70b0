"""What each promise costs in speed: thresholds for a trained cascade under several targets.

python guarantee.py runs/words words/dev.jsonl words/test.jsonl
"""

import sys
from pathlib import Path

from cascadebert import CalibrateConfig, Cascade, compare, load_examples
from octavo.errors import ConfigError

WANTED = {
    "3 times faster": CalibrateConfig(target_speedup=3),
    "never below 60 %": CalibrateConfig(min_accuracy=0.6),
    "harm at most 5 %, surely": CalibrateConfig(max_risk=0.05, risk="harm", temperature=True),
    "as the large one but for 10 %": CalibrateConfig(max_risk=0.1, risk="disagreement"),
}


def main(model: Path, dev: Path, test: Path) -> None:
    """Calibrate for each target on `dev`, and see what it gives on `test`."""
    cascade = Cascade.from_pretrained(model)
    calibration = load_examples(str(dev), labels=cascade.labels)
    new = load_examples(str(test), labels=cascade.labels)
    for name, config in WANTED.items():
        try:
            policy = cascade.calibrate(calibration, config=config)
        except ConfigError as error:
            print(f"{name}: {error}")  # noqa: T201
            continue
        row = compare(cascade, policy, new)[-1]
        print(f"{name}: {row['accuracy %']:.1f} % at {row['speed-up (flops)']:.2f}x")  # noqa: T201
        if policy.guarantee:
            print(f"    {policy.guarantee['text']}")  # noqa: T201


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:4]))
