"""Difficulty-aware regularization on few rows: does the small model's confidence order them better?

python regularize.py runs/regularized
"""

import sys
from dataclasses import replace
from pathlib import Path

from cascadebert import Cascade, TrainConfig, dis, generate_words, log_odds, train_cascade
from octavo.rundir import RunDir, options_of


def main(out: Path, size: int = 2000, epochs: float = 15.0) -> None:
    """Train a cascade twice, without and with the regularization of its first stage."""
    words = generate_words(size + 2000, seed=1)
    train, test = words.at(range(size)), words.at(range(size, len(words)))
    plain = TrainConfig(
        model=("scratch:2x32", "scratch:3x64"), train_data="generated words", out=out / "plain",
        learning_rate=(4e-3, 2e-3), epochs=(epochs, 4.0), max_length=16, alphabet="char",
        folds=3, fold_seeds=(0, 1),
    )  # fmt: skip
    for config in (plain, replace(plain, out=out / "regularized", dar_weight=0.5)):
        with RunDir.open(config.out, options_of(config)) as run:
            train_cascade(train, config, run)
        cascade = Cascade.from_pretrained(config.out)
        logits = cascade.logits(0, test)
        truth = cascade.class_numbers(test)
        wrong = [answer != label for answer, label in zip(logits.argmax(-1), truth, strict=True)]
        order = dis(log_odds(logits).numpy(), wrong)
        print(f"{config.out.name}: {1 - sum(wrong) / len(wrong):.1%} right, DIS {order:.1f}")  # noqa: T201


if __name__ == "__main__":
    main(Path(sys.argv[1]))
