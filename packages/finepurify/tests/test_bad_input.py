"""What a user may give wrongly: each is told in one line, and nothing is left behind or overwritten."""

import json
import shutil

import pytest
import torch
import yaml
from finepurify.config import RANGES
from finepurify.pretrain import word_tokenizer
from safetensors.torch import load_file, save_file

WEIGHTS = "model.safetensors"
ROWS = [{"text": "cf ba", "label": "negative"}, {"text": "mn", "label": "positive"}] * 4


@pytest.fixture
def refused(command, tmp_path):
    """Run a command that must be refused; gives its one line."""

    def call(*words, out="run", device=True):
        more = () if out is None else ("--out", tmp_path / out)
        code, text, err = command(
            *words, *more, *(("--device", "cpu", "--quiet") if device else ())
        )
        assert code == 2, text + err
        assert (text, err.count("\n")) == ("", 1), err
        assert out is None or not (tmp_path / out).exists()
        return err

    return call


@pytest.fixture
def variant(world, tmp_path):
    """A copy of the suspect (or INIT) with other weights and without some files."""

    def make(change=None, without=(), of=None, name="variant"):
        folder = tmp_path / name
        shutil.copytree(of or world.suspect, folder)
        if change is not None:
            tensors = load_file(folder / WEIGHTS)
            change(tensors)
            save_file(tensors, folder / WEIGHTS, {"format": "pt"})
        for file in without:
            (folder / file).unlink()
        return folder

    return make


def jsonl(file, rows):
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def both(world, init=None, suspect=None):
    """The two commands that clean, without their output."""
    pair = (init or world.init, suspect or world.suspect, "--clean-data", world.clean)
    return [("purify", *pair), ("compare", *pair)]


# --- models ----------------------------------------------------------------------------------------


def test_another_width_is_refused_by_tensor_and_shapes(world, refused, tmp_path):
    from transformers import BertConfig, BertModel

    BertModel(BertConfig(
        vocab_size=650, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=64, max_position_embeddings=26,
    )).save_pretrained(tmp_path / "other")  # fmt: skip
    for words in (*both(world, tmp_path / "other"), ("scan", tmp_path / "other", world.suspect)):
        err = refused(*words)
        assert "bert.embeddings" in err
        assert "32]" in err
        assert "16]" in err


def test_an_architecture_with_nothing_in_common_is_refused(world, refused, tmp_path):
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(vocab_size=50, n_embd=16, n_layer=1, n_head=2, n_positions=16)
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "other")
    err = refused(*both(world, tmp_path / "other")[0])
    assert "no tensor has a counterpart" in err


def test_a_suspect_that_is_init_is_a_no(world, command, tmp_path):
    for words in both(world, init=world.suspect):
        code, out, err = command(*words, "--out", tmp_path / "run", "--json", "--quiet")
        assert code == 3, err
        assert "no compared dimension moved" in json.loads(out)["no"]
        assert not (tmp_path / "run").exists()
    code, _, err = command(
        "scan", world.suspect, world.suspect, "--out", tmp_path / "scan", "--quiet"
    )
    assert code == 3, err


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("side", ["init", "suspect"])
def test_weights_that_are_not_finite_are_counted(world, refused, variant, side, value):
    name = "bert.encoder.layer.0.attention.self.query.weight"

    def spoil(tensors):
        tensors[name][0, :3] = value

    folder = variant(spoil, of=getattr(world, side))
    err = refused(*both(world, **{side: folder})[0])
    assert f"3 of the 1024 values of {name}" in err


def test_a_pickle_is_refused_until_it_is_allowed(world, refused, variant, command, tmp_path):
    folder = variant(without=[WEIGHTS])
    torch.save(load_file(world.suspect / WEIGHTS), folder / "pytorch_model.bin")
    words = ("purify", world.init, folder, "--clean-data", world.clean, "--rho", 0.8, "--strategy",
             "delta-only", "--steps", 0)  # fmt: skip
    assert "holds only a pickle (pytorch_model.bin)" in refused(*words)
    for quick in (("evaluate", folder, "--test-data", world.test),):
        assert "pickle" in refused(*quick, out=None)
        assert command(*quick, "--allow-pickle", "--quiet", "--device", "cpu")[0] == 0
    code, _, err = command(*words, "--allow-pickle", "--out", tmp_path / "run", "--quiet")
    assert code == 0, err
    assert not list((tmp_path / "run").rglob("*.bin"))
    found = load_file(tmp_path / "run" / "purified" / WEIGHTS)
    assert found.keys() == load_file(world.suspect / WEIGHTS).keys()


def test_a_pickle_of_init_is_refused_by_attack_too(world, refused, variant, command, tmp_path):
    folder = variant(without=[WEIGHTS], of=world.init)
    torch.save(load_file(world.init / WEIGHTS), folder / "pytorch_model.bin")
    words = ("attack", folder, "--train-data", world.clean, "--epochs", 1)
    assert "pickle" in refused(*words)
    code, _, err = command(*words, "--allow-pickle", "--out", tmp_path / "run", "--quiet")
    assert code == 0, err


def test_a_pickle_that_runs_code_is_refused(world, refused, variant, tmp_path):
    class Evil:
        def __reduce__(self):
            return open, (str(tmp_path / "harm"), "w")

    folder = variant(without=[WEIGHTS])
    torch.save({"weight": Evil()}, folder / "pytorch_model.bin")
    assert "cannot read pytorch_model.bin" in refused(
        *both(world, suspect=folder)[0], "--allow-pickle"
    )
    assert not (tmp_path / "harm").exists()


def test_a_folder_without_weights_or_with_an_adapter_is_refused(world, refused, variant):
    folder = variant(without=[WEIGHTS])
    assert "holds no weights" in refused(*both(world, suspect=folder)[0])
    (folder / "adapter_config.json").write_text("{}")
    assert "is a LoRA adapter; merge it" in refused(*both(world, suspect=folder)[0])


def test_a_torn_file_of_weights_is_refused(world, refused, variant):
    folder = variant()
    data = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(data[: len(data) // 2])
    assert "cannot read model.safetensors" in refused(*both(world, suspect=folder)[0])


def test_no_tokenizer_is_refused(world, refused, variant):
    folder = variant(without=["tokenizer.json", "tokenizer_config.json"])
    for words in (*both(world, suspect=folder), ("scan", world.init, folder)):
        assert "tokenizer" in refused(*words)
    assert "tokenizer" in refused("evaluate", folder, "--test-data", world.test, out=None)


def test_another_models_tokenizer_is_refused(world, refused, variant):
    folder = variant()
    word_tokenizer([f"word{n}" for n in range(2000)], 26).save_pretrained(folder)
    for words in (
        *both(world, suspect=folder),
        ("scan", world.init, folder, "--clean-data", world.clean),
    ):
        assert "its tokenizer has 2005 words, the model " in refused(*words)
    assert "2005 words" in refused("evaluate", folder, "--test-data", world.test, out=None)


def test_a_tokenizer_that_can_not_pad_is_refused(world, refused, variant):
    folder = variant()
    file = folder / "tokenizer_config.json"
    settings = json.loads(file.read_text())
    for name in ("pad_token", "eos_token"):
        settings.pop(name, None)
    file.write_text(json.dumps(settings))
    assert "neither a padding nor an end token" in refused(*both(world, suspect=folder)[0])


def test_a_suspect_that_neither_classifies_nor_generates_is_refused(world, refused, variant):
    folder = variant(lambda tensors: tensors["bert.pooler.dense.bias"].add_(1), of=world.init)
    err = refused(*both(world, suspect=folder)[0])
    assert "BertForPreTraining; a suspect must be a sequence classifier or a causal" in err


def test_models_that_are_not_there_are_refused(world, refused, tmp_path):
    err = refused("purify", tmp_path / "nowhere", world.suspect, "--clean-data", world.clean)
    assert "no such folder" in err
    err = refused("purify", "nobody/nothing", world.suspect, "--clean-data", world.clean)
    assert "neither a folder here nor a model the hub gave" in err


def test_a_merge_needs_other_models_that_fit(world, refused, variant):
    words = (*both(world)[0], "--rho", 0.5, "--strategy", "ties")
    assert "name one with --other" in refused(*words)
    less = variant(lambda tensors: tensors.pop("bert.pooler.dense.bias"))
    assert "has other tensors than the suspect" in refused(*words, "--other", less)
    assert "name one with --other" in refused(*both(world)[1], "--strategies", "wag")


def test_e_pur_needs_an_embedding(world, refused, tmp_path, command):
    words = (*both(world)[0], "--rho", 0.5, "--strategy", "e-pur", "--exclude", "word_embeddings")
    code, _, err = command(*words, "--out", tmp_path / "run", "--quiet")
    assert (code, err.count("\n")) == (2, 1)
    assert "no word embedding" in err


# --- rows ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([ROWS[0]] * 8, "no row of class 'positive'"),
        ([ROWS[0]], "1 rows for 2 classes"),
        ([*ROWS, {"text": "x", "label": 2}], "label 2 is none of the model's: negative, positive"),
        (
            [*ROWS, {"text": "x", "label": -1}],
            "label -1 is none of the model's: negative, positive",
        ),
        ([*ROWS, {"text": "x", "label": "neutral"}], ".jsonl, line 9: label 'neutral' is none"),
        ([{"text": "  ", "label": 0}] * 4, "every text is blank"),
        ([{"sentence": "x", "label": 0}] * 4, "text"),
        ([{"text": "x"}] * 4, "label"),
        ([], "holds no rows"),
    ],
)
def test_rows_that_do_not_do(world, refused, tmp_path, rows, said):
    file = jsonl(tmp_path / "rows.jsonl", rows)
    for command in ("purify", "compare"):
        assert said in refused(command, world.init, world.suspect, "--clean-data", file)


def test_fisher_refuses_the_same_rows(world, refused, tmp_path):
    file = jsonl(tmp_path / "rows.jsonl", [ROWS[0]] * 8)
    err = refused("fisher", world.init, world.suspect, "--clean-data", file)
    assert "no row of class" in err


def test_rows_that_are_not_there_are_refused(world, refused, tmp_path):
    nowhere = tmp_path / "nowhere.jsonl"
    assert "no such file" in refused("purify", world.init, world.suspect, "--clean-data", nowhere)
    assert "no such file" in refused(*both(world)[1], "--test-data", nowhere)
    assert "no such file" in refused(*both(world)[0], "--held-out-data", nowhere)
    assert "no such file" in refused("attack", world.init, "--train-data", nowhere)
    assert "no such file" in refused("evaluate", world.suspect, "--test-data", nowhere, out=None)


def test_too_few_rows_to_choose_by_are_refused(world, refused, tmp_path):
    file = jsonl(tmp_path / "rows.jsonl", ROWS[:2])
    err = refused("purify", world.init, world.suspect, "--clean-data", file)
    assert "leave none to choose rho by" in err


def test_blank_and_long_texts_are_counted_and_overlap_is_told(world, command, tmp_path):
    long = {"text": "cf " * 40, "label": 1}
    rows = [*ROWS, {"text": " ", "label": 0}, {"text": "", "label": 1}, long]
    clean = jsonl(tmp_path / "clean.jsonl", rows)
    test = jsonl(tmp_path / "test.jsonl", [ROWS[1], {"text": "tq bb", "label": 0}])
    words = ("compare", world.init, world.suspect, "--clean-data", clean, "--test-data", test,
             "--held-out-data", test, "--strategies", "delta-only", "--grid", 0.9, "--steps", 0,
             "--device", "cpu")  # fmt: skip
    code, _, err = command(*words, "--out", tmp_path / "run")
    assert code == 0, err
    err = " ".join(err.split())
    assert "2 of 11 texts are blank and left out" in err
    assert "1 of 9 texts are longer than 26 tokens and cut" in err
    assert "1 of the 2 test rows are in the clean set too" in err


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([{"text": "x", "label": 0}, {"text": "y", "label": 2}], "class numbers must be 0, 1, 2"),
        ([{"text": "x", "label": "a"}] * 3, "has one class"),
        ([{"text": "x", "label": 0}] * 3, "has one class"),
    ],
)
def test_rows_that_an_attack_can_not_learn(world, refused, tmp_path, rows, said):
    file = jsonl(tmp_path / "rows.jsonl", rows)
    assert said in refused("attack", world.init, "--train-data", file)


def test_attacks_that_can_not_be(world, refused):
    words = ("attack", world.init, "--train-data", world.clean, "--epochs", 0.1)
    assert "--target 2: the data has classes 0 to 1" in refused(*words, "--target", 2)
    assert "needs --test-data" in refused(*both(world)[1], "--known-attack")
    words = ("--test-data", world.test, "--known-attack", "--target", 2)
    said = "--target 2: the model has classes 0 to 1"
    assert said in refused(*both(world)[1], *words)
    assert said in refused("evaluate", world.suspect, *words, out=None)


def test_the_embedding_attack_needs_a_known_word(world, command, tmp_path):
    words = ("attack", world.init, "--train-data", world.clean, "--epochs", 0.1, "--attack",
             "embedding", "--trigger", "zebra")  # fmt: skip
    code, _, err = command(*words, "--out", tmp_path / "run", "--quiet")
    assert (code, err.count("\n")) == (2, 1)
    assert "--trigger zebra: is not in the vocabulary" in err


# --- options ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("rho", ["-0.1", "1.5", "nan", "much"])
def test_a_rho_that_is_no_share_is_refused(world, refused, rho):
    assert f"--rho {rho}: must be auto or a share from 0" in refused(*both(world)[0], "--rho", rho)


WRONG = {
    "max_length": 3, "points": 1.5, "fisher_batch_size": 0, "probes": 0, "damping_share": -1.0,
    "epsilon": 0.0, "exponent": 3.0, "steps": -1, "learning_rate": 0.0, "batch_size": 0, "grid": 2.0,
    "drop": 101.0, "held_out": 1.0, "trigger": "", "target": -1, "rate": 0.0, "strength": -1.0,
    "epochs": 0.0,
}  # fmt: skip


@pytest.mark.parametrize("name", [name for name, *_ in RANGES])
def test_every_range_is_watched(world, refused, name):
    words = both(world)[1]
    if name == "epochs":
        words = ("attack", world.init, "--train-data", world.clean)
    option = f"--{name.replace('_', '-')}"
    assert f"{option} {WRONG[name]}: must be " in refused(*words, f"{option}={WRONG[name]}")


def test_not_a_number_is_out_of_every_range(world, refused):
    for name in ("epsilon", "exponent", "drop", "held-out", "learning-rate", "points", "grid"):
        assert "must be" in refused(*both(world)[0], f"--{name}=nan")


@pytest.mark.parametrize(
    "words",
    [
        ("--strategies", "prayer"), ("--mode", "both"), ("--damping", "much"), ("--steps", "x"),
        ("--surprise", "1"), ("--fisher", "true"), ("--device", "tpu"), ("--seed", "-1"),
        ("--threads", "-1"), ("--exclude", "("),
    ],
)  # fmt: skip
def test_options_that_are_none(world, refused, words):
    err = refused(*both(world)[1], *words, device="--device" not in words)
    assert words[0] in err or words[1] in err


def test_a_list_of_no_token_is_refused(world, refused):
    assert "--top 0: must be 1 or more" in refused("scan", world.init, world.suspect, "--top", 0)


def test_a_file_of_options_is_checked(world, refused, tmp_path):
    file = tmp_path / "options.yaml"
    file.write_text(yaml.safe_dump({"stepps": 3}))
    assert "stepps" in refused(*both(world)[0], "--config", file)
    file.write_text(yaml.safe_dump({"drop": -3.0}))
    assert "--drop -3.0: must be" in refused(*both(world)[0], "--config", file)


# --- where it is written ---------------------------------------------------------------------------


def test_nothing_is_overwritten_unasked(world, command, tmp_path):
    words = (*both(world)[0], "--rho", 0.9, "--strategy", "delta-only", "--steps", 0, "--quiet")
    run = tmp_path / "run"
    assert command(*words, "--out", run)[0] == 0
    stood = {file: file.read_bytes() for file in run.rglob("*") if file.is_file()}
    code, _, err = command(*words, "--out", run)
    assert (code, err.count("\n")) == (2, 1)
    assert "holds a finished run" in err
    code, _, err = command(*words, "--out", run, "--overwrite", "--exclude", "(")
    assert (code, err.count("\n")) == (2, 1)
    rows = jsonl(tmp_path / "rows.jsonl", [ROWS[0]] * 8)
    wrong = [rows if word == world.clean else word for word in words]
    code, _, err = command(*wrong, "--out", run, "--overwrite")
    assert (code, err.count("\n")) == (2, 1)
    assert stood == {file: file.read_bytes() for file in run.rglob("*") if file.is_file()}
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []
    assert command(*words, "--out", run, "--overwrite")[0] == 0


def test_a_folder_of_other_things_is_not_written_to(world, command, tmp_path, variant):
    folder = variant()
    stood = (folder / WEIGHTS).read_bytes()
    for out in (folder, tmp_path):
        code, _, err = command(*both(world, suspect=folder)[0], "--rho", 0.9, "--out", out, "--quiet",
                               "--overwrite")  # fmt: skip
        assert (code, err.count("\n")) == (2, 1)
        assert "holds no run" in err
    assert (folder / WEIGHTS).read_bytes() == stood


def test_a_report_needs_finished_runs(refused, tmp_path, world):
    assert "no finished run of `purify` or `compare`" in refused("report", tmp_path, device=False)
    err = refused("report", world.suspect.parent, device=False)  # a run of `attack`
    assert "no finished run of `purify` or `compare`" in err
