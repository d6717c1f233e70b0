"""The formation predictor beside hashed character n-grams with logistic regression.

python packages/formbert/benchmarks/bench_formation.py INVENTORY [--seeds 0,1,2]

INVENTORY is any inventory with formations, such as MiCLS's. Its words, not its senses, are split: eight
tenths to train on, one to choose by, one to test on. Accuracy is on senses of words not trained on,
given the word alone, with its gloss, with its part of speech, and with both. Ours is one model for all
four; the rival is fitted for each anew, with the better of its strengths of regularisation on the words
to choose by. Speed is of words alone in one thread, medians of interleaved runs in CPU seconds; each
answers with probabilities of all formations.
"""

import argparse
import random
import statistics
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from formbert.formation import OPTIONS, FormationPredictor, train_predictor
from formbert.inventory import Inventory, Sense
from octavo.rundir import RunDir, environment, write_json
from octavo.runtime import Runtime
from octavo.training import TrainOptions
from scipy.sparse import hstack
from sklearn.exceptions import ConvergenceWarning
from sklearn.feature_extraction.text import HashingVectorizer
from sklearn.linear_model import LogisticRegression

RESULTS = Path(__file__).parent / "results"

#: What is given beside the word.
GIVEN = {"word": (), "+ gloss": ("gloss",), "+ pos": ("pos",), "+ both": ("gloss", "pos")}

#: Strengths of regularisation among which the rival has its choice.
STRENGTHS = (0.3, 1.0, 3.0)

#: Columns that each of its blocks is hashed into.
HASHED = 2**15


def split(senses: Sequence[Sense], seed: int) -> tuple[list[Sense], list[Sense], list[Sense]]:
    """Senses to train on, to choose by and to test on, with no word in common."""
    words = sorted({sense.word for sense in senses})
    random.Random(seed).shuffle(words)
    tenth = max(1, len(words) // 10)
    choose, test = set(words[:tenth]), set(words[tenth : 2 * tenth])
    return (
        [sense for sense in senses if sense.word not in choose | test],
        [sense for sense in senses if sense.word in choose],
        [sense for sense in senses if sense.word in test],
    )


def numbers(senses: Sequence[Sense]) -> np.ndarray:
    """Of the right formations."""
    return np.array([int(sense.formation or 0) for sense in senses])


class Rival:
    """Logistic regression on hashed character n-grams of the word and of what else is given."""

    def __init__(self, given: Sequence[str], train: Sequence[Sense], choose: Sequence[Sense]):
        self.given = given
        rows, held = self.rows(train), self.rows(choose)
        fitted = [
            LogisticRegression(C=strength, max_iter=60).fit(rows, numbers(train))
            for strength in STRENGTHS
        ]
        self.model = max(fitted, key=lambda one: float(one.score(held, numbers(choose))))

    def rows(self, senses: Sequence[Sense]) -> Any:
        """Sparse rows, a block for each thing given."""
        return hstack([
            HashingVectorizer(analyzer="char_wb", ngram_range=(1, 2 if name == "gloss" else 3),
                              n_features=HASHED, alternate_sign=False, norm=None, binary=True)  # pyright: ignore
            .transform([getattr(sense, name) for sense in senses])
            for name in ("word", *self.given)
        ]).tocsr()  # fmt: skip

    def probabilities(self, senses: Sequence[Sense]) -> np.ndarray:
        """Of the formations that training had."""
        return self.model.predict_proba(self.rows(senses))

    def accuracy(self, senses: Sequence[Sense]) -> float:
        """Share of right answers."""
        return float(self.model.score(self.rows(senses), numbers(senses)))


def ours(train: Sequence[Sense], seed: int, options: TrainOptions = OPTIONS) -> FormationPredictor:
    """A predictor without its lexicon, which has no word to be tested."""
    with tempfile.TemporaryDirectory() as folder:
        run = RunDir.open(Path(folder) / "run", {})
        runtime = Runtime(seed=seed, device="cpu")
        model = train_predictor(train, run, options=options, runtime=runtime).model
    return FormationPredictor(model)


def accuracy(predictor: FormationPredictor, senses: Sequence[Sense], given: Sequence[str]) -> float:
    """Share of right answers."""
    table = predictor.probabilities(
        [sense.word for sense in senses],
        glosses=[sense.gloss for sense in senses] if "gloss" in given else None,
        pos=[sense.pos for sense in senses] if "pos" in given else None,
    )
    return float((table.argmax(1) == numbers(senses)).mean())


def medians(ways: dict[str, Callable[[], Any]], repeats: int) -> dict[str, float]:
    """Median CPU seconds of each way, run in turns after a first round that does not count."""
    times: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(repeats + 1):
        for name, way in ways.items():
            begin = time.process_time()
            way()
            times[name].append(time.process_time() - begin)
    return {name: statistics.median(each[1:]) for name, each in times.items()}


def measure(
    senses: Sequence[Sense],
    seeds: Sequence[int] = (0, 1, 2),
    options: TrainOptions = OPTIONS,
    words: int = 50_000,
    tries: int = 5,
) -> dict[str, Any]:
    """Accuracy of both in per cent, by seed, and words a second."""
    known = [sense for sense in senses if sense.formation is not None]
    rows: list[dict[str, Any]] = []
    speed: dict[str, Any] = {}
    for seed in seeds:
        train, choose, test = split(known, seed)
        predictor = ours(train, seed, options)
        most = Counter(sense.formation for sense in train).most_common(1)[0][0]
        for name, given in GIVEN.items():
            rival = Rival(given, train, choose)
            rows.append({
                "given": name, "seed": seed, "tested": len(test),
                "majority": 100 * sum(sense.formation == most for sense in test) / len(test),
                "ours": 100 * accuracy(predictor, test, given),
                "logistic regression": 100 * rival.accuracy(test),
            })  # fmt: skip
            if seed == seeds[-1] and not given:
                speed = _speed(predictor, rival, known, words, tries)
    means = [
        {"given": name} | {
            column: statistics.mean(row[column] for row in rows if row["given"] == name)
            for column in ("majority", "ours", "logistic regression")
        }
        for name in GIVEN
    ]  # fmt: skip
    return {"senses": len(known), "means": means, "accuracy": rows, **speed}


def _speed(
    predictor: FormationPredictor, rival: Rival, senses: Sequence[Sense], words: int, tries: int
) -> dict[str, Any]:
    many = [senses[n % len(senses)] for n in range(words)]
    plain = [sense.word for sense in many]
    seconds = medians(
        {
            "ours": lambda: predictor.probabilities(plain),
            "ours, ranked answers": lambda: predictor.predict(plain),
            "logistic regression": lambda: rival.probabilities(many),
        },
        tries,
    )
    speeds = {name: words / each for name, each in seconds.items()}
    return {
        "words a second": speeds,
        "ratio": speeds["ours"] / speeds["logistic regression"],
        "bar": {"what": "words a second, ranked answers", "at least": 20_000},
    }


def main() -> None:
    """Measure and keep the result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("inventory", help="file of senses with formations")
    parser.add_argument("--seeds", default="0,1,2", help="of splits and training")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore", ConvergenceWarning)
    seeds = [int(seed) for seed in arguments.seeds.split(",")]
    found = measure(Inventory.load(arguments.inventory).senses, seeds)
    write_json(RESULTS / "formation.json", found | {"environment": environment()})


if __name__ == "__main__":
    main()
