"""Each example runs on the tests' small generator and says what it is about."""

import json
import random

import pytest
from mathshepherd.records import load_solutions
from mathshepherd.reward_model import Reading, StepRewardModel
from mathshepherd.sft import open_generator
from mathshepherd.shop import FORMAT, demonstrate, solve


@pytest.fixture(scope="session")
def reward(generator):
    """A reward model of the generator's weights."""
    model, tokenizer = open_generator(str(generator / "model"), FORMAT)
    folder = generator.parent / "reward"
    StepRewardModel(model, tokenizer, Reading(form=FORMAT)).save(folder)
    return folder


@pytest.fixture
def asked(world, tmp_path):
    """Questions with right and other solutions as texts."""
    rows, draw = [], random.Random(0)
    for one in world.pool[:4]:
        tale = world.tales[one.id]
        both = (solve(world.shop, tale), demonstrate(world.shop, tale, draw))
        texts = [" ".join(f"{step} {FORMAT.tag}" for step in steps) for steps in both]
        rows += [{"question": one.question, "answer": one.answer, "solution": text,
                  "candidates": texts} for text in texts]  # fmt: skip
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return file


def test_label(example, generator, asked, tmp_path, capsys):
    out = tmp_path / "labelled.jsonl"
    example("label").main(str(generator / "model"), str(asked), out)
    lines = capsys.readouterr().out.splitlines()
    assert "rollouts" in lines[-2]
    assert lines[-1].startswith("left out:")
    labelled = load_solutions(out)
    assert all(one.labels and one.labels.hard[-1] == one.correct for one in labelled)
    assert out.with_suffix(".rollouts").is_file()


def test_rerank(example, reward, asked, capsys):
    best = example("rerank").main(str(reward), str(asked))
    printed = capsys.readouterr().out
    assert len(best) == 8
    assert printed.count("* ") >= 8
    assert "answer" in printed


def test_reward(example, generator, reward, asked, capsys):
    mean = example("reward").main(str(generator / "model"), str(reward), str(asked))
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("32 responses")
    assert f"mean reward {mean:.3f}" in lines[1]
    assert sum("score" in line for line in lines) >= 1
