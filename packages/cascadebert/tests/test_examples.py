import importlib.util
from pathlib import Path

EXAMPLES = Path(__file__).parents[1] / "examples"


def test_the_example_answers(tmp_path, capsys):
    spec = importlib.util.spec_from_file_location("words_example", EXAMPLES / "words.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.main(tmp_path / "run", 400)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == [
        "making", "helped", "wanted", "lion", "unhappiness"
    ]  # fmt: skip
    assert all("syllables, stage" in line for line in lines)
