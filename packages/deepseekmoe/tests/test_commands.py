"""Every command on a user's own data, with good input and with bad."""

import json
from importlib import import_module

import pytest
from deepseekmoe.analyze import Trace
from deepseekmoe.architecture import BASELINES
from deepseekmoe.esft import Selection, select_experts
from deepseekmoe.hub import load


def rows(out):
    return next(value for value in json.loads(out).values() if isinstance(value, list))


def test_train_leaves_a_model_and_what_it_measured(trained):
    evaluation = json.loads((trained / "evaluation.json").read_text())
    assert [row["domain"] for row in evaluation] == ["sums", "words", "all"]
    assert evaluation[-1]["loss"] < 5.0  # ln 300 is 5.7
    model, tokenizer = load(trained / "model")
    assert model.config.n_routed_experts == 15
    assert tokenizer is not None
    assert len(tokenizer) == model.config.vocab_size
    assert not (trained / "checkpoints" / "train").exists()
    card = (trained / "model" / "README.md").read_text()
    assert "1 shared and 15 routed experts" in card
    assert "| sums |" in card


def test_a_run_that_was_killed_behind_its_training_does_not_train_again(
    command, texts, tmp_path, monkeypatch
):
    evaluate, pretrain = (import_module(f"deepseekmoe.{name}") for name in ("evaluate", "pretrain"))

    def stop(*_):
        raise KeyboardInterrupt

    out = tmp_path / "run"
    words = (
        "train", "--data", texts, "--out", out, "--vocabulary", 300, "--steps", 4, "--width", 16,
        "--layers", 1, "--length", 16, "--batch-size", 2, "--log-every", 2, "--routed-experts", 4,
        "--active-experts", 2, "--device", "cpu", "--json",
    )  # fmt: skip
    with monkeypatch.context() as patch:
        patch.setattr(evaluate, "evaluate_domains", stop)
        assert command(*words)[0] == 130
    metrics = (out / "metrics.jsonl").read_bytes()
    weights = (out / "model" / "model.safetensors").read_bytes()
    monkeypatch.setattr(pretrain, "train_model", stop)
    code, printed, err = command(*words)
    assert code == 0, err
    assert [row["domain"] for row in rows(printed)] == ["sums", "words", "all"]
    assert (out / "metrics.jsonl").read_bytes() == metrics
    assert (out / "model" / "model.safetensors").read_bytes() == weights
    model = out / "model"
    code, printed, _ = command("evaluate", model, "--data", texts, "--length", 16, "--json")
    evaluation = json.loads((out / "evaluation.json").read_text())
    assert [row["loss"] for row in evaluation] == pytest.approx(
        [row["loss"] for row in rows(printed)]
    )


def test_evaluate(command, trained, texts):
    code, out, _ = command("evaluate", trained / "model", "--data", texts, "--length", 32, "--json")
    assert code == 0
    found = rows(out)
    wanted = json.loads((trained / "evaluation.json").read_text())
    assert [row["loss"] for row in found] == pytest.approx([row["loss"] for row in wanted])


def test_what_was_read_is_told(command, trained, texts):
    words = (trained / "model", "--data", texts / "words.txt", "--length", 32, "--json")
    notes = []
    for call in (("evaluate",), ("evaluate", "--dev-share", 0), ("analyze", "active")):
        code, out, err = command(*call, *words)
        assert code == 0, err
        notes.append(json.loads(out)["note"])
    assert "the 10 % that --dev-share holds out (0 reads everything)" in notes[0]
    assert notes[1].endswith("words.txt, all of it")
    some, everything, analysed = (int(note.split()[1].replace(",", "")) for note in notes)
    assert some == analysed == pytest.approx(everything / 10, rel=0.05)


@pytest.mark.parametrize(
    ("analysis", "columns"),
    [
        ("disable-top", {"disabled", "rise"}),
        ("swap-shared", {"active", "rise"}),
        ("active", {"active", "trained", "loss"}),
        ("specialization", {"layer", "JS divergence (bits)"}),
        ("coactivation", {"layer", "experts", "lift"}),
        ("vocabulary", {"layer", "expert", "tokens"}),
    ],
)
def test_analyses(command, trained, texts, analysis, columns):
    code, out, err = command(
        "analyze", analysis, trained / "model", "--data", texts, "--length", 32, "--json"
    )
    assert code == 0, err
    assert columns <= set(rows(out)[0])


def test_a_saved_trace_stands_for_model_and_texts(command, trained, texts, tmp_path):
    model, file = trained / "model", tmp_path / "trace.npz"
    given = (model, "--data", texts, "--length", 32)
    code, out, err = command("trace", *given, "--out", file, "--words", "--json")
    assert code == 0, err
    found = rows(out)
    assert [row["domain"] for row in found] == ["sums", "words"]
    assert all(row["tokens"] % 32 == 0 and row["experts"] == 15 for row in found)
    for analysis, named in (("specialization", ()), ("coactivation", ()), ("vocabulary", (model,))):
        code, out, err = command("analyze", analysis, *named, "--trace", file, "--json")
        assert code == 0, err
        assert rows(out) == rows(command("analyze", analysis, *given, "--json")[1])
    experts = tmp_path / "experts.json"
    code, out, err = command("esft-select", "--trace", file, "--out", experts, "--p", 0.3, "--json")
    assert code == 0, err
    assert [row["trained"].split("/")[1] for row in rows(out)] == ["15", "15"]
    assert Selection.load(experts) == select_experts(Trace.load(file), p=0.3)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["trace", "{model}", "--data", "{texts}", "--out", "{file}"], "--overwrite"),
        (["trace", "{model}", "--data", "{texts}", "--out", "{new}", "--length", "999999"],
         "no domain fills a window"),
        (["analyze", "specialization"], "give MODEL and --data, or --trace FILE"),
        (["analyze", "coactivation", "{model}"], "give MODEL and --data, or --trace FILE"),
        (["analyze", "coactivation", "{model}", "--trace", "{file}"], "name no others"),
        (["analyze", "vocabulary", "{model}", "--data", "{texts}", "--trace", "{file}"],
         "name no others"),
        (["analyze", "specialization", "--trace", "{file}"], "is no routing trace"),
        (["analyze", "specialization", "--trace", "{new}"], "No such file"),
        (["esft-select", "--trace", "{file}", "--out", "{new}"], "is no routing trace"),
        (["esft-select", "{model}", "--out", "{new}"], "either MODEL and --data, or --trace"),
        (["esft-select", "{model}", "--trace", "{file}", "--out", "{new}"], "either MODEL and"),
    ],
)  # fmt: skip
def test_wrong_traces_are_one_line(command, trained, texts, tmp_path, words, told):
    file = tmp_path / "trace.npz"
    file.write_bytes(b"PK\x03\x04 cut off")
    places = {"model": trained / "model", "texts": texts, "file": file, "new": tmp_path / "new"}
    code, _, err = command(*[word.format(**places) for word in words])
    assert (code, err.count("\n")) == (2, 1), err
    assert told in err
    assert list(tmp_path.iterdir()) == [file]


def test_saturation_compares_two_models(command, trained, texts):
    model = trained / "model"
    code, out, _ = command("analyze", "saturation", model, model, "--data", texts, "--json")
    assert code == 0
    assert all(row["saturation %"] == pytest.approx(100) for row in rows(out))


def test_earlier_models_are_kept_and_the_choice_settles(command, texts, tmp_path):
    words = (
        "--data", texts, "--vocabulary", 300, "--steps", 12, "--width", 16, "--layers", 2,
        "--length", 16, "--batch-size", 4, "--routed-experts", 8, "--active-experts", 2,
        "--warmup-steps", 0, "--device", "cpu", "--quiet",
    )  # fmt: skip
    kept, plain = tmp_path / "kept", tmp_path / "plain"
    code, _, err = command("train", *words, "--out", kept, "--keep-every", 4)
    assert code == 0, err
    assert command("train", *words, "--out", plain)[0] == 0
    assert sorted(path.name for path in kept.glob("model*")) == ["model", "model-4", "model-8"]
    assert not list(plain.glob("model-*"))
    file = "model/model.safetensors"
    assert (kept / file).read_bytes() == (plain / file).read_bytes()
    shares = []
    for earlier in ("model-4", "model"):
        code, out, err = command(
            "analyze", "saturation", kept / "model", kept / earlier, "--data", texts, "--json"
        )
        assert code == 0, err
        shares.append([row["saturation %"] for row in rows(out)])
    assert max(shares[0]) < 100
    assert shares[1] == pytest.approx([100, 100])
    assert command("evaluate", kept / "model-8", "--data", texts, "--json")[0] == 0


def test_ablate_resumes_and_compares(command, texts, tmp_path):
    words = (
        "ablate", "balance", "--data", texts, "--out", tmp_path / "suite", "--vocabulary", 300,
        "--steps", 4, "--width", 16, "--layers", 1, "--length", 16, "--batch-size", 2, "--warmup-steps",
        1, "--log-every", 2, "--routed-experts", 4, "--active-experts", 2, "--device", "cpu", "--json",
        "--seeds", "0,1",
    )  # fmt: skip
    code, out, err = command(*words)
    assert code == 0, err
    assert "sd over seeds" in rows(out)[0]
    assert [row["model"] for row in rows(out)] == ["loss", "bias", "none"]
    page = (tmp_path / "suite" / "report.html").read_text()
    assert page.count("<img") == 1
    code, _, err = command(*words)
    assert code == 2
    assert "holds a finished run" in err


def test_params_of_presets_and_of_a_model(command, trained):
    code, out, _ = command("params", "--json")
    assert code == 0
    assert [row["total"] for row in rows(out)] == [1966912000, 16375728128, 144620638208]
    code, out, _ = command("params", trained / "model", "--length", 64, "--json")
    assert code == 0
    model, _ = load(trained / "model", tokenizer=False)
    assert rows(out)[0]["total"] == sum(p.numel() for p in model.parameters())


def test_params_of_baselines_show_equal_budgets(command):
    code, out, err = command("params", "--preset", "tiny", "--baseline", "gshard", "--json")
    assert code == 0, err
    ours, gshard = rows(out)
    assert (ours["model"], gshard["model"]) == ("tiny", "tiny, gshard")
    for row in (ours, gshard):
        assert (row["experts in FFNs"], row["active in FFNs"]) == (16, 2)
    code, out, _ = command("params", "--baselines", "--json")
    assert code == 0
    budgets = {row["model"]: (row["experts in FFNs"], row["active in FFNs"]) for row in rows(out)}
    assert len(budgets) == 1 + len(BASELINES)
    assert budgets["2b, dense-x4"] == (4, 4)
    assert budgets["2b, switch"] == (16, 1)
    assert budgets["2b, gshard-x1.5"] == pytest.approx((24, 3), rel=0.005)
    code, _, err = command("params", "--preset", "16b", "--baselines")
    assert (code, err.count("\n")) == (2, 1)
    assert "first dense layer's width" in err
    code, _, err = command("params", "--baseline", "mixtral")
    assert (code, err.count("\n")) == (2, 1)
    assert "no baseline 'mixtral'" in err


def test_generate_continues_and_chats(command, trained):
    model = trained / "model"
    words = ("generate", model, "the cat", "--max-new-tokens", 5, "--device", "cpu", "--json")
    code, out, err = command(*words)
    assert code == 0, err
    assert isinstance(rows(out)[0]["continuation"], str)
    assert command(*words)[1] == out  # the most probable token is always the same
    assert command(*words, "--chat")[0] == 0
    assert command(*words, "--temperature", 1.0)[0] == 0
    assert command("generate", model, "", "--max-new-tokens", 3, "--json")[0] == 0


def test_check_tells_a_whole_checkpoint_from_a_broken_one(command, trained, released):
    code, out, _ = command("check", trained / "model", "--json")
    assert code == 0
    assert rows(out)[0]["tensors"] > 90
    broken = released(drop=("model.layers.1.mlp.experts.3.down_proj.weight",))
    code, _, err = command("check", broken)
    assert code == 2
    assert "experts.3.down_proj.weight is missing" in err


def test_doctor_names_the_backends(command):
    code, out, _ = command("doctor", "--device", "cpu", "--json")
    assert code == 0
    works = {row["backend"]: row["works"] for row in rows(out)}
    for name in ("reference", "grouped", "sorted", "batched", "transformers:grouped_mm"):
        assert works[name] == "yes"
    assert works["transformers:sonicmoe"] == "no"


@pytest.mark.parametrize(
    "words",
    [
        ["upcycle", "{model}", "--out", "{new}"],
        ["convert", "{model}", "--out", "{new}"],
        ["generate", "{model}", "the cat"],
        ["check", "{model}"],
        ["evaluate", "{model}", "--data", "{texts}"],
        ["trace", "{model}", "--data", "{texts}", "--out", "{new}"],
        ["params"],
        ["doctor", "--device", "cpu"],
    ],
    ids=lambda words: words[0],
)
def test_other_commands_run_alone(command, trained, texts, tmp_path, monkeypatch, words):
    monkeypatch.setenv("WORLD_SIZE", "2")
    places = {"model": trained / "model", "texts": texts, "new": tmp_path / "new"}
    code, _, err = command(*[word.format(**places) for word in words])
    assert (code, err.count("\n")) == (2, 1), err
    assert "only `train` and `sft` run under torchrun" in err
    assert not (tmp_path / "new").exists()


def test_the_seeds_of_a_suite_are_checked_before_any_work(command, texts, tmp_path):
    out = tmp_path / "suite"
    code, _, err = command("ablate", "balance", "--data", texts, "--out", out, "--seeds=0,-1")
    assert (code, err.count("\n")) == (2, 1), err
    assert "--seed -1: must be from 0" in err
    assert not out.exists()


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["train", "--data", "{texts}", "--preset", "7b"], "no preset '7b'"),
        (["train", "--data", "{texts}", "--baseline", "mixtral"], "no baseline 'mixtral'"),
        (["train", "--data", "{texts}", "--length", "1"], "--length 1: must be 2"),
        (["train", "--data", "{texts}", "--length", "900000"], "do not fill one window"),
        (["train", "--data", "{texts}", "--dev-share", "0.005"], "or --dev-share 0 to hold none out"),
        (["train", "--data", "{texts}", "--steps", "0"], "--steps 0"),
        (["train", "--data", "{texts}", "--keep-every", "-1"], "--keep-every -1: must be 0"),
        (["ablate", "balance", "--data", "{texts}", "--keep-every", "2"], "only `train` keeps"),
        (["train", "--data", "{texts}", "--dtype", "float16"], "--dtype float16"),
        (["train", "--data", "{texts}", "--devices", "0"], "n_devices 0"),
        (["train", "--data", "{texts}", "--preset", "16b", "--granularity", "4"],
         "first dense layer's width"),
        (["train", "--data", "{texts}", "--active-experts", "64"], "num_experts_per_tok 64"),
        (["train", "--data", "{texts}", "--devices", "4"], "no multiple of n_devices 4"),
        (["train", "--data", "{texts}", "--vocabulary", "99"], "--vocabulary 99"),
        (["train", "--data", "{texts}", "--granularity", "1", "--shared-experts", "2"],
         "--granularity 1 with 2 shared"),
        (["train", "--data", "{texts}", "--baseline", "gshard", "--active-experts", "3"],
         "--baseline gshard and --active-experts"),
        (["train", "--data", "{texts}", "--granularity", "2", "--routed-experts", "9"],
         "--granularity and --routed-experts"),
        (["train", "--data", "{texts}", "--backend", "fast"], "no backend 'fast'"),
        (["train", "--data", "{texts}", "--device-alpha", "0.1"], "--device-alpha on 1 device"),
        (["train", "--data", "{texts}", "--model-config", "none.json"], "none.json: no JSON"),
        (["train", "--data", "{texts}", "--tokenizer", "{texts}"], "holds no tokenizer"),
        (["train", "--data", "missing.jsonl"], "missing.jsonl: no such file"),
        (["ablate", "balance", "--data", "{texts}", "--dev-share", "0"], "--dev-share 0"),
        (["ablate", "balance", "--data", "{texts}", "--aux-alpha", "0.1"],
         "--aux-alpha: this suite sets it"),
        (["ablate", "baselines", "--data", "{texts}", "--baseline", "hash"],
         "--baseline: this suite sets it"),
        (["ablate", "granularity", "--data", "{texts}", "--active-experts", "3"],
         "--active-experts: this suite sets it"),
    ],
)  # fmt: skip
def test_wrong_training_is_one_line_and_leaves_nothing(command, texts, tmp_path, words, told):
    out = tmp_path / "run"
    small = ["--width", "16", "--layers", "1"] if "--preset" not in words else []
    given = [word.format(texts=texts) for word in words]
    code, _, err = command(*given, *small, "--out", out)
    assert code == 2
    assert told in err
    assert err.count("\n") == 1
    assert not (out / "model").exists()


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["evaluate", "{empty}", "--data", "{texts}"], "no config.json"),
        (["evaluate", "{model}", "--data", "{texts}", "--batch-size", "0"], "--batch-size 0"),
        (["evaluate", "{model}", "--data", "{empty}"], "holds no data file"),
        (["evaluate", "{model}", "--data", "{texts}", "--length", "1"], "--length 1"),
        (["evaluate", "{model}", "--data", "{texts}", "--length", "999999"],
         "no domain fills a window of 999999 tokens"),
        (["analyze", "disable-top", "{model}", "--data", "{texts}", "--length", "999999"],
         "do not fill one window"),
        (["generate", "{model}", "x", "--max-new-tokens", "0"], "--max-new-tokens"),
        (["check", "{empty}/none"], "no such folder"),
        (["params", "{empty}"], "config.json"),
    ],
)  # fmt: skip
def test_wrong_input_is_one_line(command, trained, texts, tmp_path, words, told):
    (tmp_path / "empty").mkdir()
    places = {"empty": tmp_path / "empty", "model": trained / "model", "texts": texts}
    code, _, err = command(*[word.format(**places) for word in words])
    assert code == 2
    assert told in err
    assert err.count("\n") == 1
