"""Each benchmark on tiny input: the answers of all its rivals are equal, nothing is timed."""

import gzip
import json

import pytest


def test_all_engines_answer_alike_at_every_share(benchmark_file):
    found = benchmark_file("bench_engine").measure(items=48, width=64, tries=1, few=6)
    names = {"pooled", "compacted, batch 16", "run-all", "one at a time"}
    for number, nominal in enumerate((4, 3, 2)):
        rows = found["rows"][4 * number : 4 * number + 4]
        assert {row["engine"] for row in rows} == names
        for row in rows:
            assert row["nominal"] == pytest.approx(nominal)
            assert row["deferred %"] == pytest.approx(100 * (1 / nominal - 1 / 6))
            # what is deferred is as long as what is not: the bound is not beaten by short texts
            assert row["deferred tokens %"] == pytest.approx(row["deferred %"], rel=0.1)
            assert row["of the bound %"] == pytest.approx(100 * row["speed-up"] / row["bound"])
    assert [row["what"] for row in found["targets"]] == [
        "pooled, % of the bound", "pooled / compacted, batch 16", "pooled / run-all",
        *["pooled, % of the bound", "pooled / compacted, batch 16"] * 2,
    ]  # fmt: skip


def test_the_backends_answer_alike(benchmark_file):
    names = ["torch-float32", "torch-bfloat16", "onnx-float32", "onnx-int8"]
    rows = benchmark_file("bench_backends").measure_backends(
        items=24, layers=1, width=64, tries=1, names=names
    )
    assert [row["backend"] for row in rows] == names
    assert rows[2]["largest difference"] < 1e-4 < rows[3]["largest difference"]
    assert all(row["equal labels %"] > 60 for row in rows)


def test_padding_changes_no_answer(benchmark_file, tmp_path):
    module = benchmark_file("bench_backends")
    (tmp_path / "full").mkdir()
    lines = [json.dumps({"text_a": "a fine film " * (1 + n % 9)}) + "\n" for n in range(70)]
    with gzip.open(tmp_path / "full" / "sst2.validation.jsonl.gz", "wt") as file:
        file.writelines(lines)
    for folder in (None, tmp_path):
        rows = module.measure_padding(folder, items=64, layers=1, width=64, tries=1)
        assert len(rows) == 3
        assert rows[2]["speed-up"] == 1
    assert rows[0]["tokens a text"] == pytest.approx(2 + 3 * sum(1 + n % 9 for n in range(64)) / 64)


def test_the_searches_count_right(benchmark_file):
    rows = benchmark_file("bench_backends").measure_search(items=1000, tries=1)
    assert len(rows) == 4
