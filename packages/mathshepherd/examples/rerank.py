"""Pick the best of several candidates by a process reward model, and see the scores of their steps.

python rerank.py REWARD_MODEL CANDIDATES.jsonl

A row of CANDIDATES.jsonl: {"question": ..., "candidates": [text with steps, ...]}.
"""

import sys

import numpy as np
from mathshepherd.aggregate import aggregate
from mathshepherd.answers import extract
from mathshepherd.reward_model import StepRewardModel
from octavo.data import iter_rows


def main(source: str, rows: str) -> list[int]:
    """Score all candidates in one call; returns the number of each question's best."""
    reward = StepRewardModel.load(source)
    form, best = reward.reading.form, []
    given = list(iter_rows(rows, {"question": str, "candidates": list}))
    pairs = [(row["question"], form.split(text)) for row in given for text in row["candidates"]]
    scores = iter(reward.step_scores([q for q, _ in pairs], [steps for _, steps in pairs]))
    for row in given:
        found = [next(scores) for _ in row["candidates"]]
        lowest = [aggregate(each, "min") for each in found]
        best.append(int(np.argmax(lowest)))
        print(row["question"])  # noqa: T201
        for number, text in enumerate(row["candidates"]):
            mark = "*" if number == best[-1] else " "
            print(f"{mark} {lowest[number]:.3f}  answer {extract(text)}")  # noqa: T201
        for score, step in zip(
            found[best[-1]], form.split(row["candidates"][best[-1]]), strict=True
        ):
            print(f"    {score:.3f}  {step}")  # noqa: T201
    return best


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
