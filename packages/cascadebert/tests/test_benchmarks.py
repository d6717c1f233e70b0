import importlib.util
from pathlib import Path

import pytest

BENCHMARK = Path(__file__).parents[1] / "benchmarks" / "bench_engine.py"


def test_all_engines_answer_alike_on_a_tiny_input():
    spec = importlib.util.spec_from_file_location("bench_engine", BENCHMARK)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    rows = {row["engine"]: row for row in module.measure(items=48, width=64, tries=1)}
    assert set(rows) >= {"large alone", "pooled", "run-all", "compacted, batch 16", "bound"}
    assert rows["nominal (layers)"]["speed-up"] == pytest.approx(12 / (2 + 12 * 8 / 48))
