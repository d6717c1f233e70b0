"""Each example runs on a small model and says what it is about."""

import importlib.util
from pathlib import Path

EXAMPLES = Path(__file__).parents[1] / "examples"


def example(name):
    spec = importlib.util.spec_from_file_location(f"{name}_example", EXAMPLES / f"{name}.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_see(saved, rows, tmp_path, capsys):
    example("see").main(str(saved), str(rows), tmp_path / "flow.html")
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("accuracy")
    assert sum("S_wp" in line for line in lines) == 3
    assert "<script>" in (tmp_path / "flow.html").read_text("utf-8")


def test_use(saved, rows, tmp_path, capsys):
    example("use").main(str(saved), str(rows), tmp_path)
    lines = capsys.readouterr().out.splitlines()
    assert "tokens kept as" in lines[0]
    before, after = (float(word) for word in lines[3].split()[-3::2])
    assert 0 < after <= before
    assert (tmp_path / "adapter" / "README.md").is_file()
