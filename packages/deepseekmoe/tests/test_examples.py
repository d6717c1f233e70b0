import importlib.util
from pathlib import Path

from safetensors.torch import load_file

EXAMPLES = Path(__file__).parents[1] / "examples"


def example(name):
    spec = importlib.util.spec_from_file_location(f"{name}_example", EXAMPLES / f"{name}.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_layer(capsys):
    assert example("layer").main() < 1.0
    assert "MaxVio" in capsys.readouterr().out


def test_pretrain(texts, tmp_path, capsys):
    example("pretrain").main(str(texts), tmp_path / "run", steps=3)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("layer 0:")
    assert (tmp_path / "run" / "model" / "model.safetensors").is_file()


def test_checkpoint(released, tmp_path, capsys):
    folder = released()
    example("checkpoint").main(str(folder), tmp_path / "copy")
    assert "8 routed experts in 1 layers" in capsys.readouterr().out
    one, two = (load_file(place / "model.safetensors") for place in (folder, tmp_path / "copy"))
    assert all(one[name].equal(two[name]) for name in one)
