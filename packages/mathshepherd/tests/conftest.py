"""A small shop and what the stations make of it, shared by the tests of commands and examples."""

import json

import pytest
from mathshepherd import shop
from mathshepherd.records import write_solutions
from mathshepherd.shop import FORMAT, Shop, make_world
from mathshepherd.steps import save_format
from octavo.models import save_model


@pytest.fixture(scope="session")
def world():
    return make_world(Shop(events=(2, 3), highest=12, operand=3), 120, 12, 10, 6, 0)


@pytest.fixture(scope="session")
def files(world, tmp_path_factory):
    """A folder of problems and demonstrations, and of a model without training."""
    folder = tmp_path_factory.mktemp("files")
    for name, problems in (("train", world.pool), ("test", world.test), ("dev", world.dev)):
        rows = [{"id": one.id, "question": one.question, "answer": one.answer} for one in problems]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    write_solutions(folder / "demonstrations.jsonl", world.demonstrations)
    tokenizer = shop.make_tokenizer(world.shop)
    save_model(folder / "model", shop.make_model(tokenizer, 0, 2, 32), tokenizer)
    save_format(folder / "model", FORMAT)
    return folder


@pytest.fixture(scope="session")
def generator(files):
    """The same model, fine-tuned so far that its texts have steps and answers."""
    from mathshepherd.sft import finetune, open_generator
    from mathshepherd.stations import save_generator, shown_rows
    from octavo.rundir import RunDir
    from octavo.training import TrainOptions

    run = RunDir(files / "sft")
    model, tokenizer = open_generator(str(files / "model"), FORMAT)
    rows = shown_rows(str(files / "demonstrations.jsonl"), FORMAT)
    options = TrainOptions(learning_rate=1e-2, epochs=24, batch_size=16)
    finetune(model, tokenizer, rows, FORMAT, run, options)
    save_generator(run, model, tokenizer, FORMAT)
    return run.path
