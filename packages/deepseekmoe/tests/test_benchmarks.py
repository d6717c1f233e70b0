"""Each benchmark on tiny input: all rivals agree, nothing is timed."""

import pytest
import torch
from deepseekmoe.architecture import DeepseekMoeConfig


def test_all_ways_to_run_a_layer_agree(benchmark_file):
    module = benchmark_file("bench_layer")
    found = module.measure((40, 32, 61, 8, 3), "cpu", torch.float32, tries=1)
    names = {row["way"] for row in found["rows"]}
    assert names == {
        "ours, auto", "ours, sorted", "transformers, eager", "transformers, grouped_mm",
        "indexing loop",
    }  # fmt: skip
    assert [row["what"] for row in found["targets"]] == [
        "share of the dense bound", "over transformers eager",
    ]  # fmt: skip


def test_a_way_that_disagrees_is_found(benchmark_file):
    module = benchmark_file("bench_layer")
    given = module.make((10, 8, 4, 4, 2), "cpu", torch.float32)
    ways = {
        "one": lambda: module.indexing_loop(given),
        "two": lambda: 1.01 * module.indexing_loop(given),
    }
    with pytest.raises(AssertionError, match="two"):
        module.compare(ways, [given["x"]], torch.ones(10, 8), 1e-4)


def test_a_model_is_decoded_and_trained_beside_its_bounds(benchmark_file):
    module = benchmark_file("bench_model")
    config = DeepseekMoeConfig.preset("tiny", vocab_size=64)
    rows = module.decode(config, "cpu", torch.float32, tokens=4, tries=1)
    rows += module.step(config, "cpu", torch.float32, batch=2, length=16, tries=1)
    assert [row["what"] for row in rows] == [
        "decoding, dynamic cache", "decoding, static cache", "training step, 2 x 16 tokens",
    ]  # fmt: skip
    for row in rows:
        assert row["share"] == pytest.approx(row["tokens a second"] / row["bound"])
