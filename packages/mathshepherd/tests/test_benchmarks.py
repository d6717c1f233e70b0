"""The benchmarks' ways agree on tiny input; nothing is timed."""

import json

import pytest
from mathshepherd.sft import open_generator
from mathshepherd.shop import FORMAT


@pytest.mark.parametrize(("profile", "name"), [("full", "demo.json"), ("quick", "quick.json")])
def test_a_demo_is_collected(benchmark_file, tmp_path, profile, name):
    (tmp_path / "config.yaml").write_text(f"profile: {profile}\nseeds: [3, 4]\n")
    (tmp_path / "environment.json").write_text("{}")
    (tmp_path / "claims.json").write_text('{"claims": [], "seconds": 1}')
    for seed in (3, 4):
        (tmp_path / f"seed-{seed}.json").write_text(
            json.dumps({"numbers": {"AUC": seed}, "tables": {}})
        )
    file = benchmark_file("bench_demo").keep(tmp_path, tmp_path / "results")
    assert file.name == name
    found = json.loads(file.read_text())
    assert found["command"] == f"mathshepherd demo --profile {profile} --seeds 3,4"
    assert found["numbers"] == [{"seed": 3, "AUC": 3}, {"seed": 4, "AUC": 4}]


def test_rollouts_are_measured_on_equal_texts(benchmark_file):
    bench = benchmark_file("bench_rollouts")
    found = bench.measure(bench.Size(32, 3, 2, 8, 6, 1, ((1, 16, 1, 16), (2, 32, 1, 16))))
    assert [row["what"].partition(":")[0] for row in found["ratios"]] == [
        f"Llama {shape}, {kind} lengths" for shape in ("1 x 16", "2 x 32")
        for kind in ("mixed", "equal")
    ]  # fmt: skip
    assert all(row["ratio"] > 0 for row in found["ratios"])


def test_scoring_is_measured_on_equal_scores(benchmark_file):
    found = benchmark_file("bench_scoring").measure(2, 32, 120, 3, 4, 100, 1)
    assert [row["bar"] for row in found["ratios"]] == ["3 or more (K)", "no bar"]
    assert found["memory"]["tokens of the largest batch"] <= 100


@pytest.fixture
def opened(generator):
    """The fixture's generator, in place of one that a benchmark would train."""
    return open_generator(str(generator / "model"), FORMAT)


def test_annotation_is_measured_on_equal_labels(benchmark_file, monkeypatch, opened, world):
    bench = benchmark_file("bench_annotate")
    monkeypatch.setattr(bench, "trained", lambda *given, **options: opened)
    found = bench.measure(0, 0, 6, 2, 4, 1, tokens=40, sizes=world.shop)
    assert found["ratios"][0]["ratio"] > 1
    assert found["cost"]["plain"] == 4 * found["cost"]["steps"]


def test_labels_are_measured_by_rollouts(benchmark_file, monkeypatch, opened, world):
    bench = benchmark_file("bench_labels")
    monkeypatch.setattr(bench, "trained", lambda *given, **options: opened)
    found = bench.measure(0, 0, 6, 2, 2, (0,), tokens=40, sizes=world.shop)
    assert [(row["clock"], row["rollouts"]) for row in found["means"]] == [
        (0, 1), (0, 2), (10, 1), (10, 2),
    ]  # fmt: skip


def test_training_is_measured_on_equal_losses(benchmark_file):
    found = benchmark_file("bench_training").measure(1, 32, 120, 6, 3, 1, (2, 4))
    assert [row["bar"] for row in found["ratios"]] == ["1.2 or more", "no bar"]
    assert "PRMTrainer" in found["ratios"][0]["what"]
