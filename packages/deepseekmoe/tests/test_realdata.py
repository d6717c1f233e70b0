"""On the texts that the project is developed with."""

import json

import pytest
from deepseekmoe.accounting import count_parameters, training_flops
from deepseekmoe.architecture import DeepseekMoeConfig
from deepseekmoe.config import CorpusConfig
from deepseekmoe.corpus import documents, tokenize, train_tokenizer

pytestmark = pytest.mark.realdata


@pytest.fixture
def tables(data_folder):
    return json.loads((data_folder / "paper" / "tables.json").read_text(encoding="utf-8"))


def tera(text):
    return float(text.removesuffix("T"))


def billion(text):
    return float(text.removesuffix("B")) * 1e9


NAMES = {
    "Dense": "dense", "Hash Layer": "hash", "Switch": "switch", "GShard": "gshard",
    "DeepSeekMoE": "deepseekmoe",
}  # fmt: skip


def test_table_1_is_reproduced_by_counting(tables):
    base = DeepseekMoeConfig.preset("2b")
    for column, name in NAMES.items():
        config = base.baseline(name)
        count, table = count_parameters(config), tables["table1"]
        assert abs(count.total - billion(table["# Total Params"][column])) <= 0.05e9
        assert abs(count.active - billion(table["# Activated Params"][column])) <= 0.05e9
        flops = training_flops(config, 2048) / 1e12
        assert flops == pytest.approx(tera(table["FLOPs per 2K Tokens"][column]), rel=0.02)


def test_table_2_is_reproduced_by_counting(tables):
    base = DeepseekMoeConfig.preset("2b")
    names = {"GShardx1.5": "gshard-x1.5", "Densex16": "dense-x16", "DeepSeekMoE": "deepseekmoe"}
    table = tables["table2"]
    for column, name in names.items():
        config = base.baseline(name)
        count = count_parameters(config)
        assert count.experts == pytest.approx(
            billion(table["# Total Expert Params"][column]), rel=0.02
        )
        assert count.active_experts == pytest.approx(
            billion(table["# Activated Expert Params"][column]), rel=0.02
        )
        flops = training_flops(config, 2048) / 1e12
        assert flops == pytest.approx(tera(table["FLOPs per 2K Tokens"][column]), rel=0.02)


def test_every_domain_is_tokenised_without_a_loss(data_folder, tmp_path):
    corpus = CorpusConfig(data=str(data_folder / "text"))
    dev = list(documents(corpus, "dev"))
    assert len(dev) == 10
    tokenizer = train_tokenizer(dev, 1024)
    tokens = tokenize(dev, tokenizer, tmp_path / "tokens")
    for document in dev:
        part = tokens.of_domain(document.domain).values.tolist()
        assert tokenizer.decode(part[1:-1]) == document.text


def test_training_on_them_learns(data_folder, command, tmp_path):
    """On the beginnings of all texts: to tokenise the whole takes far longer than to train on it."""
    beginnings = tmp_path / "text"
    beginnings.mkdir()
    for file in (data_folder / "text").glob("*.txt"):
        text = file.read_text(encoding="utf-8")[:40_000]
        (beginnings / file.name).write_text(text, encoding="utf-8")
    code, _, err = command(
        "train", "--data", beginnings, "--out", tmp_path / "run", "--steps", 10,
        "--length", 64, "--batch-size", 8, "--warmup-steps", 5, "--log-every", 10, "--dev-share", 0.02,
        "--device", "cpu", "--quiet",
    )  # fmt: skip
    assert code == 0, err
    rows = json.loads((tmp_path / "run" / "evaluation.json").read_text())
    assert rows[-1]["domain"] == "all"
    assert rows[-1]["loss"] < 6.8  # ln 1024 is 6.93
