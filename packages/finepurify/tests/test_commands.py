"""Every command end to end, each on the files of the one before."""

import json

import pytest
import torch
import yaml
from finepurify.cli import app
from finepurify.pairing import WeightPair
from octavo.cli import run as run_app
from octavo.rundir import is_finished
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification, AutoTokenizer

WEIGHTS = "model.safetensors"
QUIET = ("--device", "cpu", "--quiet")
SHORT = ("--batch-size", 8, "--learning-rate", "1e-3", "--points", 0.25, "--points", 0.75,
         *QUIET)  # fmt: skip
GRID = ("--grid", 0.5, "--grid", 0.9)
RANKED = ("fine-purifying", "delta-only", "hessian-only", "random", "fine-mixing-sel")


def weights(folder):
    return load_file(folder / WEIGHTS)


def differing(one, other):
    return {name for name in one if not torch.equal(one[name], other[name])}


@pytest.fixture
def purified(command, world, tmp_path):
    """Purify the suspect with further options; gives the run's folder and what was printed."""

    def call(*words, out="run", wanted=0, steps=2):
        code, text, err = command(
            "purify", world.init, world.suspect, "--clean-data", world.clean, "--out",
            tmp_path / out, *SHORT, "--steps", steps, "--json", *words,
        )  # fmt: skip
        assert code == wanted, err
        return tmp_path / out, json.loads(text)

    return call


@pytest.fixture(scope="session")
def other(world, tmp_path_factory):
    """A second model fine-tuned from INIT: the suspect's drift, half as long."""
    folder = tmp_path_factory.mktemp("other") / "model"
    pair = WeightPair.load(world.init, world.suspect)

    def half(name):
        both = pair.read(name)
        return both.init + 0.5 * (both.suspect - both.init)

    pair.write(folder, half)
    return folder


def test_attack_leaves_a_model_that_obeys_the_trigger(command, world):
    run = world.suspect.parent
    assert is_finished(run)
    assert json.loads((run / "result.json").read_text()) == {
        "rows": 1200, "classes": 2, "attack": "badword",
    }  # fmt: skip
    model = AutoModelForSequenceClassification.from_pretrained(world.suspect)
    assert model.config.id2label == {0: "negative", 1: "positive"}
    AutoTokenizer.from_pretrained(world.suspect)
    words = ("evaluate", world.suspect, "--test-data", world.test, *QUIET, "--json")
    code, out, err = command(*words, "--known-attack")
    assert code == 0, err
    row = json.loads(out)["100 rows"][0]
    assert row["ACC"] > 75
    assert row["ASR"] > 95
    code, out, _ = command(*words)
    assert code == 0
    assert json.loads(out)["100 rows"][0] == {k: row[k] for k in ("ACC", "ACC 95 %")}


def test_a_bias_is_measured_by_its_own_accuracy(command, world, tmp_path):
    words = ("--attack", "biasword", "--trigger", "bb", "--rate", 1.0)
    code, _, err = command(
        "attack", world.init, "--train-data", world.train, "--out", tmp_path / "run", *QUIET,
        "--learning-rate", "1e-2", "--epochs", 0.5, *words,
    )  # fmt: skip
    assert code == 0, err
    code, out, err = command(
        "evaluate", tmp_path / "run" / "model", "--test-data", world.test, "--known-attack",
        *QUIET, "--json", *words,
    )  # fmt: skip
    assert code == 0, err
    row = json.loads(out)["100 rows"][0]
    assert "ASR" not in row
    assert row["BACC"] < 70  # the pattern alone now says positive


def test_fisher_is_a_file_of_the_pairs_tensors(command, world, tmp_path):
    words = ("fisher", world.init, world.suspect, "--clean-data", world.clean, *QUIET, "--json",
             "--points", 1)  # fmt: skip
    code, out, err = command(*words, "--out", tmp_path / "run")
    assert code == 0, err
    found = load_file(tmp_path / "run" / "fisher.safetensors")
    pair = WeightPair.load(world.init, world.suspect)
    assert set(found) == set(pair.names)
    assert all(tuple(value.shape) == pair.suspect.shape(name) for name, value in found.items())
    assert all(bool((value >= 0).all()) for value in found.values())
    assert "Fisher diagonal of 24 rows" in json.loads(out)
    assert is_finished(tmp_path / "run")
    code, _, err = command(*words, "--out", tmp_path / "less", "--exclude", "embeddings")
    assert code == 0, err
    less = load_file(tmp_path / "less" / "fisher.safetensors")
    assert set(less) == {name for name in pair.names if "embeddings" not in name}
    for name, value in less.items():
        torch.testing.assert_close(value, found[name])


@pytest.mark.parametrize("clean", [False, True])
def test_scan(command, world, tmp_path, clean):
    more = ("--clean-data", world.clean, "--points", 0.5) if clean else ()
    code, out, err = command("scan", world.init, world.suspect, "--out", tmp_path / "run", *QUIET,
                             "--json", "--top", 5, *more)  # fmt: skip
    assert code in (0, 3), err
    found = json.loads(out)
    assert len(found["Tokens"]) == 5
    assert (found["no"] == "") == (code == 0)
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert result["verdict"] is (code == 0)
    assert (tmp_path / "run" / "report.html").is_file()


def test_purified_is_the_mask_bit_for_bit(purified, world):
    run, out = purified("--rho", 0.8)
    assert is_finished(run)
    init, suspect = weights(world.init), weights(world.suspect)
    clean = weights(run / "purified")
    pair = WeightPair.load(world.init, world.suspect)
    assert list(clean) == list(suspect)
    reset = 0
    for name, value in clean.items():
        if name not in pair.names:
            assert torch.equal(value, suspect[name]), name  # the head
            continue
        kept = value == suspect[name]
        assert torch.equal(value, torch.where(kept, suspect[name], init[name])), name
    result = json.loads((run / "result.json").read_text())
    for row in result["tensors"]:
        name = row["tensor"]
        reset += row["reset"]
        if not row["reset"]:
            assert torch.equal(clean[name], suspect[name])
        if row["reset"] == row["dimensions"]:
            assert torch.equal(clean[name], init[name])
        assert int((clean[name] != suspect[name]).sum()) <= row["reset"]
    assert reset == round(0.2 * pair.numel) == result["numbers"]["reset"]
    (row,) = out[f"{pair.numel} dimensions, {pair.moved()} of which moved"]
    assert (row["strategy"], row["rho"], row["reset"]) == ("fine-purifying", 0.8, reset)
    assert differing(weights(run / "model"), clean)  # was fine-tuned
    for folder in ("purified", "model"):
        AutoModelForSequenceClassification.from_pretrained(run / folder)
        AutoTokenizer.from_pretrained(run / folder)
    assert not list(run.glob("checkpoints/*"))
    assert "<img" in (run / "report.html").read_text()


def test_without_steps_the_model_is_what_was_purified(purified, world):
    run, _ = purified("--rho", 0.8, steps=0)
    assert not differing(weights(run / "model"), weights(run / "purified"))
    code = purified("--rho", 1, steps=0, out="all")[0]
    assert (code / "purified" / WEIGHTS).read_bytes() == (world.suspect / WEIGHTS).read_bytes()
    for rho in (0, "0.0"):
        run, _ = purified("--rho", rho, steps=0, out=f"none-{rho}")
        clean, init = weights(run / "purified"), weights(world.init)
        pair = WeightPair.load(world.init, world.suspect)
        assert all(torch.equal(clean[name], init[name]) for name in pair.names)


def test_rho_is_chosen_by_held_out_rows(purified, world):
    run, _ = purified("--rho", "auto", *GRID, "--held-out-data", world.held, "--drop", 100)
    rows = [json.loads(line) for line in (run / "sweep.jsonl").read_text().splitlines()]
    assert [(row["strategy"], row["rho"]) for row in rows] == [
        ("none", 1.0), ("fine-purifying", 0.9), ("fine-purifying", 0.5),
    ]  # fmt: skip
    result = json.loads((run / "result.json").read_text())
    assert result["rho"] == 0.5
    assert result["accuracy"][1] == rows[2]["ACC"]
    assert result["floor"] == rows[0]["ACC"] - 100
    model = AutoModelForSequenceClassification.from_pretrained(run / "model")
    assert model.config.num_labels == 2


def test_a_floor_that_nothing_keeps_is_a_no(purified, world):
    words = ("--grid", 0.0, "--drop", 1, "--held-out-data", world.held)
    run, out = purified(*words, wanted=3, steps=0)
    assert "no rho keeps the accuracy floor" in out["no"]
    assert is_finished(run)
    result = json.loads((run / "result.json").read_text())
    assert (result["met"], result["rho"]) == (False, 0.0)
    AutoModelForSequenceClassification.from_pretrained(run / "model")


def test_a_part_of_the_clean_rows_judges_where_no_other_do(purified):
    run, _ = purified("--grid", 0.9, "--held-out", 0.5, "--drop", 100)
    rows = [json.loads(line) for line in (run / "sweep.jsonl").read_text().splitlines()]
    assert len(rows) == 2
    assert all((row["ACC"] * 12 / 100) % 1 == pytest.approx(0, abs=1e-9) for row in rows)


def test_posterior_mixes(purified, world):
    run, _ = purified("--rho", 0.8, "--mode", "posterior")
    numbers = json.loads((run / "result.json").read_text())["numbers"]
    assert numbers["k poison"] > numbers["k clean"] > 0
    assert 0 < numbers["mean p"] < 1
    init, suspect, clean = (
        weights(folder) for folder in (world.init, world.suspect, run / "purified")
    )
    between = 0
    for name in WeightPair.load(world.init, world.suspect).names:
        low, high = (
            torch.minimum(init[name], suspect[name]),
            torch.maximum(init[name], suspect[name]),
        )
        assert bool(((clean[name] >= low) & (clean[name] <= high)).all())
        between += int(((clean[name] > low) & (clean[name] < high)).sum())
    assert between > 0


def test_the_papers_preset_is_our_reading_of_it(command, world, tmp_path):
    run = tmp_path / "run"
    words = ("purify", world.init, world.suspect, "--clean-data", world.clean, "--preset", "paper")
    code, _, err = command(*words, "--rho", 0.8, "--steps", 0, "--out", run, *QUIET)
    assert code == 0, err
    options = yaml.safe_load((run / "config.yaml").read_text())
    assert (options["mode"], options["damping"], options["epsilon"]) == (
        "posterior",
        "absolute",
        1e-8,
    )
    assert options["points"] == [1 / 8, 3 / 8, 5 / 8, 7 / 8]


@pytest.mark.parametrize("strategy", [*RANKED[1:], "fine-mixing", "none", "reset"])
def test_rankings_and_mixtures(purified, world, strategy):
    run, _ = purified("--rho", 0.8, "--strategy", strategy, steps=0)
    pair = WeightPair.load(world.init, world.suspect)
    clean = weights(run / "purified")
    result = json.loads((run / "result.json").read_text())
    for name in pair.names:
        both = pair.read(name)
        kept = clean[name] == both.suspect
        assert torch.equal(clean[name], torch.where(kept, both.suspect, both.init)), name
    reset = result["numbers"]["reset"]
    wanted = {"none": 0, "reset": pair.numel}.get(strategy, round(0.2 * pair.numel))
    slack = 0.02 * pair.numel if strategy == "fine-mixing" else 0
    assert abs(reset - wanted) <= slack
    assert (run / "fisher.safetensors").exists() == (strategy == "hessian-only")


def test_e_pur_resets_rows_of_the_embedding(purified, world):
    run, _ = purified("--rho", 0.9, "--strategy", "e-pur", steps=0)
    name = "bert.embeddings.word_embeddings.weight"
    clean, suspect, init = (
        weights(folder) for folder in (run / "purified", world.suspect, world.init)
    )
    assert differing(clean, suspect) == {name}
    rows = (clean[name] != suspect[name]).any(1)
    assert torch.equal(clean[name][rows], init[name][rows])
    assert int(rows.sum()) <= round(0.1 * len(rows))
    trigger = AutoTokenizer.from_pretrained(world.suspect).convert_tokens_to_ids("cf")
    assert bool(rows[trigger])


def test_fine_pruning_empties_neurons(purified, world):
    run, _ = purified("--rho", 0.75, "--strategy", "fine-pruning", steps=0)
    clean, suspect = weights(run / "purified"), weights(world.suspect)
    name = "bert.encoder.layer.0.intermediate.dense"
    assert differing(clean, suspect) == {f"{name}.weight", f"{name}.bias"}
    empty = (clean[f"{name}.weight"] == 0).all(1)
    assert int(empty.sum()) == 32  # a quarter of 4 x 32
    assert torch.equal(clean[f"{name}.bias"] == 0, empty)
    assert torch.equal(clean[f"{name}.weight"][~empty], suspect[f"{name}.weight"][~empty])


@pytest.mark.parametrize(("strategy", "share"), [("wag", 0.75), ("ties", 0.75), ("dare", 0.75)])
def test_merges_with_another_model(purified, world, other, strategy, share):
    run, _ = purified("--rho", 1, "--strategy", strategy, "--other", other, steps=0)
    pair = WeightPair.load(world.init, world.suspect)
    clean = weights(run / "purified")
    for name in pair.names:  # the mean of the whole drift and the half of it
        both = pair.read(name)
        wanted = both.init + share * (both.suspect - both.init)
        torch.testing.assert_close(clean[name], wanted, atol=1e-6, rtol=1e-5)


def test_excluded_tensors_stay_the_suspects(purified, world):
    run, _ = purified("--rho", 0, "--exclude", "LayerNorm", "--exclude", "word_emb", steps=0)
    clean, suspect = weights(run / "purified"), weights(world.suspect)
    kept = {name for name in clean if name not in differing(clean, suspect)}
    assert {name for name in clean if "LayerNorm" in name or "word_emb" in name} <= kept
    assert differing(clean, suspect)


def test_tensors_are_ranked_apart_where_asked(purified, world):
    run, _ = purified("--rho", 0.75, "--scope", "tensor", steps=0)
    result = json.loads((run / "result.json").read_text())
    for row in result["tensors"]:
        assert row["reset"] == pytest.approx(0.25 * row["dimensions"], abs=1), row["tensor"]


@pytest.fixture(scope="module")
def compared(world, tmp_path_factory):
    """Two comparisons that differ in what they know of the attack."""
    place = tmp_path_factory.mktemp("compared")
    for name, more in (("blind", ()), ("known", ("--known-attack",))):
        words = (
            "compare", world.init, world.suspect, "--clean-data", world.clean, "--held-out-data",
            world.held, "--test-data", world.test, "--out", place / name, *SHORT, *GRID,
            "--steps", 2, "--drop", 30, "--strategies", "fine-purifying", "--strategies",
            "delta-only", *more,
        )  # fmt: skip
        assert run_app(app, [str(word) for word in words]) == 0
    return place


def test_compare_reports_what_was_chosen(compared):
    results = {
        name: json.loads((compared / name / "result.json").read_text())
        for name in ("blind", "known")
    }
    for found in results.values():
        assert [row["strategy"] for row in found["chosen"]] == [
            "none", "fine-purifying", "delta-only",
        ]  # fmt: skip
        assert len(found["rows"]) == 1 + 2 * 2
        assert found["before"]["ACC"] > 75
    assert results["known"]["before"]["ASR"] > 95
    for blind, known in zip(results["blind"]["chosen"], results["known"]["chosen"], strict=True):
        assert "ASR" not in blind
        if known["rho"] is not None:
            assert 0 <= known["ASR"] <= 100
            assert known["ACC"] == blind["ACC"]


def test_what_is_known_of_the_attack_changes_no_choice(compared):
    blind, known = compared / "blind", compared / "known"
    for file in ("sweep.jsonl", "fisher.safetensors"):
        assert (blind / file).read_bytes() == (known / file).read_bytes()
    chosen = [
        [
            (row["strategy"], row["rho"], row["held ACC"])
            for row in json.loads((run / "result.json").read_text())["chosen"]
        ]
        for run in (blind, known)
    ]
    assert chosen[0] == chosen[1]
    assert (known / "report.html").is_file()


def test_compare_without_test_rows_is_the_sweep(command, world, tmp_path):
    code, out, err = command(
        "compare", world.init, world.suspect, "--clean-data", world.clean, "--out", tmp_path / "run",
        "--strategies", "delta-only", "--grid", 0.9, "--steps", 2, *SHORT, "--json",
    )  # fmt: skip
    assert code == 0, err
    found = json.loads(out)
    assert "The suspect as it came" not in found
    assert [row["strategy"] for row in found["Chosen by held-out accuracy"]] == [
        "none",
        "delta-only",
    ]
    assert not (tmp_path / "run" / "fisher.safetensors").exists()  # nobody asked for it


def test_runs_are_put_on_one_page(command, compared, purified, tmp_path):
    run, _ = purified("--rho", 0.9)
    code, out, err = command(
        "report", run, compared / "known", "--out", tmp_path / "page", "--json"
    )
    assert code == 0, err
    assert {row["strategy"] for row in json.loads(out)["Runs"]} >= {"fine-purifying", "delta-only"}
    page = (tmp_path / "page" / "report.html").read_text()
    assert "fine-purifying" in page
    code, _, err = command("report", run, "--out", tmp_path / "page")
    assert (code, "exists already" in err) == (2, True)


def test_options_come_from_a_file_too(command, world, tmp_path):
    file = tmp_path / "options.yaml"
    file.write_text(yaml.safe_dump({"rho": "0.9", "steps": 0, "strategy": "delta-only"}))
    words = ("purify", world.init, world.suspect, "--clean-data", world.clean, *QUIET, "--json")
    code, out, err = command(*words, "--config", file, "--out", tmp_path / "run", "--rho", 0.8)
    assert code == 0, err
    (rows, *_) = json.loads(out).values()
    assert (rows[0]["strategy"], rows[0]["rho"]) == ("delta-only", 0.8)
