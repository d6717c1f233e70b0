"""The benchmarks collect what they say, and agree on tiny input; nothing is timed."""

import json
from dataclasses import asdict

from finepurify.experiment import Found

ROWS = [
    {"strategy": "none", "rho": 1.0, "ACC": 95.0, "test ACC": 94.0, "ASR": 99.0},
    {"strategy": "fine-purifying", "rho": 0.98, "ACC": 95.0, "test ACC": 93.5, "ASR": 9.0},
    {"strategy": "fine-purifying", "rho": 0.9, "ACC": 90.0, "test ACC": 90.0, "ASR": 8.0},
    {"strategy": "fine-mixing", "rho": 0.9, "ACC": 94.0, "test ACC": 93.0, "ASR": 98.0},
    {"strategy": "delta-only", "rho": 0.9, "ACC": 80.0, "test ACC": 79.0, "ASR": 10.0},
]


def test_a_demo_is_collected(benchmark_file, tmp_path):
    for name, data in (("quick", ""), ("agnews", "/somewhere/agnews")):
        run = tmp_path / name
        run.mkdir()
        (run / "config.yaml").write_text(f"profile: quick\nseeds: [3]\ndata: '{data}'\n")
        (run / "environment.json").write_text("{}")
        (run / "claims.json").write_text('{"claims": [], "seconds": 1}')
        before = {"test ACC": 94.0, "ASR": 100.0}
        laws = {"spearman": 0.1}
        word = Found(before, ROWS, laws, rank=1, judged=600, fires=True)
        clean = Found(before | {"ASR": 5.0}, judged=600)
        found = {"clean-adamw": asdict(clean), "word-adamw": asdict(word)}
        (run / "seed-3.json").write_text(json.dumps(found))
        file = benchmark_file("bench_demo").keep(run, tmp_path / "results")
        assert file.name == f"{name}.json"
        kept = json.loads(file.read_text())
        what = "--data agnews" if data else "--profile quick"
        assert kept["command"] == f"finepurify demo {what} --seeds 3"
        assert kept["numbers"][0]["purify ASR"] == 9.0
        assert kept["word-adamw"][2] == {
            "defence": "fine-purifying", "kept the floor": 1.0, "rho": 0.98, "ACC": 93.5, "ASR": 9.0,
            "mean ASR over floors": 9.0,
        }  # fmt: skip
        assert len(kept["claims"]) == 6
        assert [row["alarm"] for row in kept["scans"]] == [False, True]


def test_a_whole_purify_is_measured(benchmark_file):
    found = benchmark_file("bench_purify").measure("tiny")
    assert found["reset"] == round(found["dimensions"] * 0.1)
    assert [row["stage"].split()[0] for row in found["stages"]][-1] == "all"
