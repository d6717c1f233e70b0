"""A small training as a user's own script would hold it; the tests kill it and launch it twice."""

import os
import sys
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
from octavo.rundir import RunDir
from octavo.runtime import Runtime, is_main, rank
from octavo.training import TrainOptions, fit
from safetensors.torch import save_file
from transformers import BertConfig, BertForSequenceClassification
from transformers.trainer_callback import DefaultFlowCallback


def rows(count=64):
    """Sequences whose label is whether they hold a 3."""
    made = torch.randint(3, 9, (count, 6), generator=torch.Generator().manual_seed(0))
    return [{"input_ids": row, "labels": int((row == 3).any())} for row in made]


def lengths():
    """As if the rows were not all equally long."""
    return [n * 37 % 11 for n in range(len(rows()))]


def collate(items):
    """Stack equal lengths."""
    return {
        "input_ids": torch.stack([item["input_ids"] for item in items]),
        "labels": torch.tensor([item["labels"] for item in items]),
    }


def loss(model, batch):
    """Twice the cross-entropy, to tell it from the model's own."""
    labels = batch.pop("labels")
    return 2 * torch.nn.functional.cross_entropy(model(**batch).logits, labels)


def make_model(seed=0):
    """A BERT of one layer without dropout."""
    torch.manual_seed(seed)
    return BertForSequenceClassification(
        BertConfig(
            vocab_size=9, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
            intermediate_size=32, max_position_embeddings=8, hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
        )
    )  # fmt: skip


def worst(model):
    """How bad it is, so that the first epoch's weights are the best; other ranks say the contrary."""
    with torch.inference_mode():
        value = loss(model, collate(rows())).item()
    return value if rank() == 0 else -value


class Stopped(Exception):
    """What an interrupted training raises."""


def die() -> None:
    """What a lost machine does."""
    os.kill(os.getpid(), 9)


def stop() -> None:
    """What a user's interrupt does."""
    raise Stopped


@contextmanager
def ended_at(step, end):
    """Have a training end when this step begins."""
    original = DefaultFlowCallback.on_step_begin

    def on_step_begin(self, args, state, control, **kwargs):
        if step and state.global_step == step:
            end()
        return original(self, args, state, control, **kwargs)

    DefaultFlowCallback.on_step_begin = on_step_begin
    try:
        yield
    finally:
        DefaultFlowCallback.on_step_begin = original


def main(out: Path, batch_size: int, evaluate=None) -> None:
    """Train."""
    model = make_model()
    options = TrainOptions(learning_rate=1e-2, epochs=3, batch_size=batch_size, save_every=3)
    with RunDir.open(out, {"batch": batch_size}) as run:
        fit(model, rows(), collate, run, "words", options=options, loss=loss,
            runtime=Runtime(device="cpu"), evaluate=evaluate, lengths=lengths())  # fmt: skip
        if is_main():
            model.save_pretrained(out / "model")
        else:
            save_file(model.state_dict(), out / f"rank-{rank()}.safetensors")


if __name__ == "__main__":  # BATCH_SIZE DIE_AT OUT...; in a folder `best` the best epoch is kept
    size, at = map(int, sys.argv[1:3])
    for place in map(Path, sys.argv[3:]):
        if place.name == "stopped":  # and taken up again
            with ended_at(14, stop), suppress(Stopped):
                main(place, size)
        with ended_at(at, die):
            main(place, size, worst if place.name == "best" else None)
