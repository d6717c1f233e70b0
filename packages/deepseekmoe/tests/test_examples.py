import torch
from deepseekmoe.hub import check_folder, save
from octavo.tiny import Shape, make_tokenizer
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM


def test_layer(example, capsys):
    assert example("layer").main() < 1.0
    assert "MaxVio" in capsys.readouterr().out


def test_pretrain(example, texts, tmp_path, capsys):
    example("pretrain").main(str(texts), tmp_path / "run", steps=3)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("layer 0:")
    assert (tmp_path / "run" / "model" / "model.safetensors").is_file()


def test_checkpoint(example, released, tmp_path, capsys):
    folder = released()
    example("checkpoint").main(str(folder), tmp_path / "copy")
    assert "8 routed experts in 1 layers" in capsys.readouterr().out
    one, two = (load_file(place / "model.safetensors") for place in (folder, tmp_path / "copy"))
    assert all(one[name].equal(two[name]) for name in one)


def test_tune_experts(example, trained, chats, tmp_path, capsys):
    out = tmp_path / "esft"
    example("tune_experts").main(str(trained / "model"), str(chats), out, epochs=0.5)
    assert "of 15 experts are trained" in capsys.readouterr().out
    assert (out / "model" / "model.safetensors").is_file()


def test_redundancy(example, trained, texts, capsys):
    example("redundancy").main(str(trained / "model"), str(texts), length=32)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "without the best 0/15: +0.000 nats"
    assert lines[-1].startswith("3 routed experts:")


def test_upcycle_dense(example, tmp_path, chats, capsys):
    torch.manual_seed(0)
    dense = LlamaForCausalLM(LlamaConfig(
        vocab_size=300, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=2, bos_token_id=2, eos_token_id=2,
    ))  # fmt: skip
    words = Shape(kind="llama", alphabet="bpe", vocabulary=300)
    tokenizer = make_tokenizer([chats.read_text(encoding="utf-8")], words)
    save(tmp_path / "dense", dense, tokenizer)
    assert example("upcycle_dense").main(str(tmp_path / "dense"), tmp_path / "moe") < 0.1
    assert "dense model's" in capsys.readouterr().out
    check_folder(tmp_path / "moe")
