"""Fine-tuning: the loss is on the solution's tokens alone, nothing is cut, and nothing begins twice."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from mathshepherd import shop
from mathshepherd.records import Problem, Solution
from mathshepherd.sft import (
    IGNORED,
    collate,
    encode_all,
    encode_solution,
    finetune,
    open_generator,
    right_solutions,
    solution_loss,
    with_answer,
    worked,
)
from mathshepherd.steps import StepFormat, StepTokens
from octavo import tiny
from octavo.errors import DataError, ModelError
from octavo.models import save_model
from octavo.rundir import RunDir
from octavo.runtime import Runtime
from octavo.training import TrainOptions
from tokenizers.processors import TemplateProcessing

SHOP = shop.Shop(highest=9)
TOKENIZER = shop.make_tokenizer(SHOP)
ROWS = [
    ("Ann has 3 pens. buys 2. How many?", ["3 + 2 = 5. The answer is: 5"]),
    ("Bob has 9 eggs. eats 2. eats 3. How many?", ["9 - 2 = 7", "7 - 3 = 4. The answer is: 4"]),
]


def make_model(seed=0) -> Any:
    return shop.make_model(TOKENIZER, seed, layers=1, width=16).eval()


def test_questions_and_solutions_are_told_apart():
    for row in ROWS:
        found = encode_solution(TOKENIZER, shop.FORMAT, *row)
        assert TOKENIZER.decode(found.ids[: found.start]) == row[0]
        tail = " " + " ".join(f"{step} ки" for step in row[1])
        assert TOKENIZER.decode(found.ids[found.start :]) == tail + "<|endoftext|>"


@pytest.mark.parametrize("form", [
    StepFormat(), StepFormat(prompt="Q: {question}\nA:"), StepFormat(prompt="{question}\n\n"),
    StepFormat(numbered=False, joiner=" "),
])  # fmt: skip
def test_they_are_whatever_the_format(form):
    tokenizer = tiny.make_tokenizer(
        ["Step 1: ки A: Q?\n\n"] * 3, tiny.Shape(kind="llama", alphabet="bpe", vocabulary=290)
    )
    found = encode_solution(tokenizer, form, *ROWS[1])
    head = str(tokenizer.decode(found.ids[: found.start]))
    assert head.rstrip() == form.question(ROWS[1][0]).rstrip()  # "\n\n" and the step are two tokens
    assert head + str(tokenizer.decode(found.ids[found.start : -1])) == form.prefix(*ROWS[1])


def test_the_loss_is_on_the_solutions_tokens_alone():
    model = make_model()
    rows = [encode_solution(TOKENIZER, shop.FORMAT, *row) for row in ROWS]
    batch = collate(0)(rows)
    total, count = 0.0, 0
    for row in rows:  # one by one, without padding
        with torch.no_grad():
            logs = model(torch.tensor([row.ids])).logits[0].log_softmax(-1)
        for place in range(row.start, len(row.ids)):
            total -= float(logs[place - 1, row.ids[place]])
            count += 1
    assert float(solution_loss(model, batch).detach()) == pytest.approx(total, rel=1e-5)
    assert int((batch["labels"] != IGNORED).sum()) == count
    assert count == sum(len(row.ids) - row.start for row in rows)  # the end token too
    first = batch["labels"][0]
    assert first[: rows[0].start].eq(IGNORED).all()
    assert first[len(rows[0].ids) :].eq(IGNORED).all()


def test_the_gradient_is_where_the_solutions_tokens_are_predicted():
    rows = [encode_solution(TOKENIZER, shop.FORMAT, *row) for row in ROWS]
    batch = collate(0)(rows)
    logits = torch.randn(*batch["input_ids"].shape, len(TOKENIZER), requires_grad=True)
    solution_loss(lambda **_: SimpleNamespace(logits=logits), batch).backward()
    assert logits.grad is not None
    for row, changed in zip(rows, logits.grad.abs().sum(-1) > 0, strict=True):
        assert changed.nonzero().flatten().tolist() == list(range(row.start - 1, len(row.ids) - 1))


def test_what_is_too_long_is_left_out_and_counted():
    lengths = [len(encode_solution(TOKENIZER, shop.FORMAT, *row).ids) for row in ROWS]
    assert lengths[0] < lengths[1]
    kept, dropped = encode_all(TOKENIZER, shop.FORMAT, ROWS, lengths[0])
    assert dropped == 1
    assert kept == [encode_solution(TOKENIZER, shop.FORMAT, *ROWS[0])]  # whole
    assert encode_all(TOKENIZER, shop.FORMAT, ROWS, lengths[1])[1] == 0
    with pytest.raises(DataError, match="none of 2 solutions has 9 tokens or fewer"):
        encode_all(TOKENIZER, shop.FORMAT, ROWS, 9)


def test_a_text_begins_once():
    tokenizer = tiny.make_tokenizer(
        ["Step 1: ки Q"] * 3, tiny.Shape(kind="llama", alphabet="bpe", vocabulary=290)
    )
    begin: Any = tokenizer.bos_token_id
    plain = encode_solution(tokenizer, StepFormat(), *ROWS[0])
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", begin)]
    )
    for form in (StepFormat(), StepFormat(prompt="<|endoftext|>{question}")):
        found = encode_solution(tokenizer, form, *ROWS[0])
        assert found.ids == [begin, *plain.ids]
        assert found.start == plain.start + 1
        assert found.ids.count(begin) == 2  # and ends once


def test_a_model_learns_and_what_was_too_long_is_told(tmp_path):
    long = ("Cid has 2 cups. buys 2. How many?", ["2 + 2 = 4"] * 40)
    run = RunDir.open(tmp_path / "run", {})
    options = TrainOptions(epochs=40, batch_size=2, learning_rate=2e-2)
    model, dropped = finetune(
        make_model(), TOKENIZER, [*ROWS, long], shop.FORMAT, run, options, Runtime(device="cpu")
    )
    assert dropped == 1  # 128 tokens are the model's context, whatever --max-length says
    assert not model.training
    batch = collate(0)([encode_solution(TOKENIZER, shop.FORMAT, *row) for row in ROWS])
    with torch.no_grad():
        tokens = int((batch["labels"] != IGNORED).sum())
        before = solution_loss(make_model(), batch) / tokens
        assert solution_loss(model, batch) / tokens < 0.3 < 1 < before
    assert all(line["training"] == "sft" for line in run.metrics())


def test_solutions_at_once_change_nothing(tmp_path):
    states = []
    for batch, accumulate in ((8, 1), (2, 4)):
        run = RunDir.open(tmp_path / str(batch), {})
        options = TrainOptions(
            epochs=3, batch_size=batch, accumulate=accumulate, learning_rate=1e-2
        )
        rows = [(f"{question} {n}", steps) for n in range(8) for question, steps in ROWS]
        model, _ = finetune(
            make_model(), TOKENIZER, rows, shop.FORMAT, run, options, Runtime(device="cpu")
        )
        states.append(torch.cat([weight.flatten() for weight in model.parameters()]))
    begun = torch.cat([weight.flatten() for weight in make_model().parameters()])
    assert (states[0] - begun).abs().max() > 1e-2
    assert torch.allclose(*states, atol=1e-5)


def test_words_are_added_when_that_is_wanted(tmp_path):
    save_model(tmp_path / "model", make_model(), TOKENIZER)
    form = StepFormat(tag="done", numbered=False)
    with pytest.raises(ModelError, match="--tag 'done': this model does not know it"):
        open_generator(str(tmp_path / "model"), form)
    model, tokenizer = open_generator(str(tmp_path / "model"), form, words=True)
    tag = StepTokens.of(tokenizer, form).tag
    assert tag == len(TOKENIZER)
    weight: Any = model.get_input_embeddings().weight
    assert weight.shape[0] == len(tokenizer) == tag + 1
    found = encode_solution(tokenizer, form, *ROWS[1])
    assert found.ids.count(tag) == 2
    assert torch.isfinite(solution_loss(model, collate(0)([found])))
    # the known ones stay as they are
    same, tokens = open_generator(str(tmp_path / "model"), shop.FORMAT, words=True)
    assert len(tokens) == len(TOKENIZER)
    for one, other in zip(same.parameters(), make_model().parameters(), strict=True):
        assert torch.equal(one, other)


def test_worked_solutions_end_in_their_answers():
    problems = [
        Problem("1", "How many?", "18", "16 - 7 = 9 eggs.\n9 * 2 = 18."),
        Problem("2", "Why?", "5", "Step 1: so ки\nStep 2: The answer is: 5 ки"),
        Problem("3", "What?", None, "because"),
    ]
    assert worked(problems, StepFormat()) == [
        ("How many?", ("16 - 7 = 9 eggs.", "9 * 2 = 18. The answer is: 18")),
        ("Why?", ("Step 1: so", "Step 2: The answer is: 5")),
        ("What?", ("because",)),
    ]
    assert with_answer(["a", "b"], "3", "####") == ("a", "b #### 3")
    for missing in (None, "", "ки"):
        with pytest.raises(DataError, match="problem 4: has no `solution` to learn from"):
            worked([Problem("4", "How?", "1", missing)], StepFormat())


def test_only_right_and_finished_solutions_are_learnt():
    cases = [(True, True), (False, True), (True, False), (None, True)]
    pool = [Solution("1", n, "?", (str(n),), correct=right, finished=done)
            for n, (right, done) in enumerate(cases)]  # fmt: skip
    assert right_solutions(pool) == [("?", ("0",))]


def test_what_cannot_be_encoded_is_refused():
    with pytest.raises(DataError, match="a solution without steps, of the question 'Why"):
        encode_solution(TOKENIZER, shop.FORMAT, "Why?", [])
    with pytest.raises(DataError, match="step 1 holds the tag"):
        encode_solution(TOKENIZER, shop.FORMAT, "Why?", ["3 ки"])
    endless = shop.make_tokenizer(SHOP)
    endless.eos_token = None
    with pytest.raises(ModelError, match="has no end token"):
        encode_solution(endless, shop.FORMAT, *ROWS[0])
