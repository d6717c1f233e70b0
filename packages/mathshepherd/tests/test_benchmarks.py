"""The benchmarks' ways agree on tiny input; nothing is timed."""

import json

import pytest


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
