"""Label the steps of one's own solutions with any model, and look at what it cost.

python label.py MODEL SOLUTIONS.jsonl LABELLED.jsonl

A row of SOLUTIONS.jsonl: {"question": ..., "answer": right answer, "solution": text with steps}.
"""

import sys
from pathlib import Path

from mathshepherd import LocalGenerator, Problem, Sampling
from mathshepherd.annotate import RolloutStore, annotate
from mathshepherd.config import AnnotateConfig
from mathshepherd.generate import Completion
from mathshepherd.records import key_of, write_solutions
from mathshepherd.sample import read_solution
from mathshepherd.sft import open_generator
from mathshepherd.steps import StepFormat, saved_format
from octavo.data import iter_rows


def main(source: str, rows: str, out: Path) -> None:
    """Read texts as solutions, complete each step, and keep completions beside the labels."""
    form = saved_format(source, StepFormat())
    model, tokenizer = open_generator(source, form)
    generator = LocalGenerator(model.eval(), tokenizer, Sampling(max_new_tokens=64))
    solutions = []
    for number, row in enumerate(
        iter_rows(rows, {"question": str, "answer": str, "solution": str})
    ):
        problem = Problem(key_of(row["question"]), row["question"], row["answer"])
        text = Completion(row["solution"], finished=True, tokens=0)
        solutions.append(read_solution(problem, number, text, form))

    store = RolloutStore(out.with_suffix(".rollouts"))  # a killed run goes on from here
    labelled, cost = annotate(solutions, generator, AnnotateConfig(rollouts=8), form, store)
    write_solutions(out, labelled)
    for one in labelled[:5]:
        print(one.question)  # noqa: T201
        for step, label in zip(one.steps, one.labels.hard if one.labels else (), strict=True):
            print("  good" if label else "  bad ", step)  # noqa: T201
    share = cost.rollouts / max(cost.plain, 1)
    print(  # noqa: T201
        f"{cost.solutions} solutions, {cost.steps} inner steps, {cost.rollouts} rollouts "
        f"({share:.0%} of the plain loop's), {cost.tokens} tokens"
    )
    print("left out:", dict(cost.left_out))  # noqa: T201


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], Path(sys.argv[3]))
