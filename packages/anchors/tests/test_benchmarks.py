"""The benchmark's ways agree on tiny input; nothing is timed."""

import json

import numpy as np
from anchors.saliency import saliency


def test_one_pass_equals_a_pass_a_layer(benchmark_file):
    bench = benchmark_file("bench_attention")
    model, prompts = bench.make_case(2, 32, 20, 3)
    ours, theirs = saliency(model, prompts, [0] * 3), bench.layer_by_layer(model, prompts)
    assert np.allclose(ours, theirs, rtol=1e-3, atol=1e-9)
    assert ours[:, 0].min() > 0


def test_a_demo_is_collected(benchmark_file, tmp_path):
    (tmp_path / "config.yaml").write_text("profile: full\nseeds: [3, 4]\n")
    (tmp_path / "environment.json").write_text("{}")
    (tmp_path / "claims.json").write_text('{"claims": [], "seconds": 1}')
    for seed in (3, 4):
        (tmp_path / f"seed-{seed}.json").write_text(
            json.dumps({"numbers": {"AUC": seed}, "tables": {}})
        )
    found = benchmark_file("bench_demo").collect(tmp_path)
    assert found["command"] == "anchors demo --profile full --seeds 3,4"
    assert found["numbers"] == [{"seed": 3, "AUC": 3}, {"seed": 4, "AUC": 4}]


def test_compressed_prompts_are_measured_on_equal_answers(benchmark_file):
    found = benchmark_file("bench_compress").measure(2, 32, 30, 3, 1)
    assert [row["what"] for row in found["ratios"]] == [
        "whole prompt / hidden anchors", "whole prompt, cached / hidden anchors",
        "re-weighted / eager",
    ]  # fmt: skip
    assert all(row["ratio"] > 0 for row in found["ratios"])
