"""Train, calibrate and ask a cascade from Python: how many syllables has a word?

python words.py runs/example
"""

import sys
from pathlib import Path

from cascadebert import Cascade, Examples, TrainConfig, generate_words, train_cascade
from octavo.rundir import RunDir, options_of


def main(out: Path, size: int = 2000) -> None:
    """Train two models on generated words and print what each stage answers."""
    words = generate_words(size + 500)
    train, dev = words.at(range(size)), words.at(range(size, len(words)))
    config = TrainConfig(
        model=("scratch:1x32", "scratch:3x64"),
        train_data="generated words",
        out=out,
        learning_rate=(4e-3, 2e-3),
        epochs=(4.0,),
        max_length=16,
        alphabet="char",
    )
    with RunDir.open(out, options_of(config)) as run:
        train_cascade(train, config, run)

    cascade = Cascade.from_pretrained(out)
    policy = cascade.calibrate(dev, target_speedup=2)
    asked = Examples(["making", "helped", "wanted", "lion", "unhappiness"])
    answers = cascade.predict(asked, policy)
    for word, label, stage, sure in zip(
        asked.texts, answers.labels, answers.stages, answers.confidence, strict=True
    ):
        print(f"{word:12} {label} syllables, stage {stage + 1}, sure to {sure:.0%}")  # noqa: T201


if __name__ == "__main__":
    main(Path(sys.argv[1]), *map(int, sys.argv[2:]))
