"""Each example runs on a folder with two tiny models and some clean rows."""

import json

import pytest
import torch
from finepurify.language import sentences
from finepurify.pairing import WeightPair
from octavo.models import save_model

from .small import TABLE, classifier, id_of, save_init, tokenizer


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """All words drifted a little, and one trigger far."""
    folder = tmp_path_factory.mktemp("examples")
    model = classifier(save_init(folder / "init"))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.startswith("bert."):
                weight += 1e-3 * torch.randn(weight.shape, generator=generator)
        model.get_parameter(TABLE)[id_of("cf")] += 0.2
    save_model(folder / "suspect", model, tokenizer())
    rows = sentences(24, 1)
    lines = [
        json.dumps({"text": text, "label": label}) + "\n"
        for text, label in zip(rows.texts, rows.labels, strict=True)
    ]
    (folder / "clean.jsonl").write_text("".join(lines))
    return folder


def test_clean(example, folder, capsys):
    example("clean").main(folder)
    pair = WeightPair.load(folder / "init", folder / "suspect")
    reset = round(pair.numel) - round(0.95 * pair.numel)
    assert f"{reset:,} of {pair.numel:,} dimensions are reset" in capsys.readouterr().out
    cleaned = WeightPair.load(folder / "init", folder / "cleaned")
    row = id_of("cf")
    both = cleaned.read(TABLE)
    assert torch.equal(both.suspect[row], both.init[row])  # the trigger's is INIT's again
    assert cleaned.moved() == pair.moved() - reset
    assert (folder / "cleaned" / "tokenizer.json").is_file()


def test_scan(example, folder, capsys):
    example("scan").main(folder)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 6
    assert lines[1].startswith("cf: drift 0.79")
    assert [line.endswith("stands out") for line in lines[1:]] == [True] + [False] * 4


def test_compare(example, folder, capsys):
    example("compare").main(folder, steps=2, grid=(0.9,))
    lines = capsys.readouterr().out.splitlines()
    assert [line.partition(":")[0] for line in lines] == [
        "none rho 1", "fine-purifying rho 0.9", "fine-mixing rho 0.9", "fine-purifying", "fine-mixing",
    ]  # fmt: skip
    assert all(line.endswith("%") for line in lines[:3])
