import json
import random
from typing import Any

import pytest
import torch
from deepseekmoe.accounting import tensors
from deepseekmoe.architecture import DeepseekMoeConfig
from deepseekmoe.cli import app
from octavo.cli import run
from safetensors.torch import save_file

WORDS = "the a cat dog sees runs over under red blue house tree and then it was far near old new".split()
DIGITS = [str(number) for number in range(40)]

#: A small model with one dense layer and one with experts, as the 16B has.
SMALL: dict[str, Any] = {
    "vocab_size": 300, "hidden_size": 32, "intermediate_size": 64, "moe_intermediate_size": 16,
    "num_hidden_layers": 2, "num_attention_heads": 2, "n_shared_experts": 2,
    "n_routed_experts": 8, "num_experts_per_tok": 3, "first_k_dense_replace": 1,
    "max_position_embeddings": 64, "bos_token_id": 1, "eos_token_id": 1,
}  # fmt: skip


@pytest.fixture
def small():
    """Makes a small configuration."""
    return lambda **changes: DeepseekMoeConfig(**(SMALL | changes))


def write_texts(folder, lines=400):
    folder.mkdir(parents=True, exist_ok=True)
    for name, words in (("words", WORDS), ("sums", DIGITS)):
        draw = random.Random(name)
        rows = [" ".join(draw.choices(words, k=8)) + ".\n" for _ in range(lines)]
        (folder / f"{name}.txt").write_text("".join(rows), encoding="utf-8")
    return folder


@pytest.fixture(scope="session")
def texts(tmp_path_factory):
    """A folder of two domains."""
    return write_texts(tmp_path_factory.mktemp("texts") / "texts")


@pytest.fixture(scope="session")
def trained(texts, tmp_path_factory):
    """A run of a few steps on them."""
    out = tmp_path_factory.mktemp("trained") / "run"
    code = run(app, [
        "train", "--data", str(texts), "--out", str(out), "--vocabulary", "300", "--steps", "30",
        "--width", "32", "--layers", "2", "--length", "32", "--batch-size", "8",
        "--routed-experts", "15", "--active-experts", "3", "--warmup-steps", "5", "--log-every", "10",
        "--device", "cpu", "--quiet",
    ])  # fmt: skip
    assert code == 0
    return out


@pytest.fixture(scope="session")
def chats(tmp_path_factory):
    """A file of short conversations, in which every question has one answer."""
    file = tmp_path_factory.mktemp("chats") / "chats.jsonl"
    draw = random.Random(0)
    rows = []
    for _ in range(60):
        word = draw.choice(WORDS)
        question = f"{word} {draw.choice(WORDS)} then"
        rows.append({"messages": [{"role": "user", "content": question},
                                  {"role": "assistant", "content": f"{word} {word}"}]})  # fmt: skip
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return file


@pytest.fixture
def released(tmp_path, small):
    """Writes a folder in the released layout: a tensor for each expert, bfloat16, remote-code names."""

    def write(config=None, drop=(), extra=None, settings=None, shards=1, dtype=torch.bfloat16):
        config = config or small()
        folder = tmp_path / "released"
        folder.mkdir()
        torch.manual_seed(0)
        found = {
            name: (torch.randn(shape) * 0.1).to(dtype)
            for name, shape in tensors(config).items()
            if name not in drop
        } | (extra or {})
        names = sorted(found)
        for shard in range(shards):
            part = {name: found[name] for name in names[shard::shards]}
            file = f"model-{shard + 1:05d}-of-{shards:05d}.safetensors" if shards > 1 else (
                "model.safetensors"
            )  # fmt: skip
            save_file(part, folder / file, metadata={"format": "pt"})
        if shards > 1:
            places = {
                name: f"model-{number % shards + 1:05d}-of-{shards:05d}.safetensors"
                for number, name in enumerate(names)
            }
            index = {"metadata": {}, "weight_map": places}
            (folder / "model.safetensors.index.json").write_text(json.dumps(index))
        written = config.to_dict()
        written.pop("rope_parameters")
        written |= {
            "architectures": ["DeepseekForCausalLM"], "rope_theta": 10000, "rope_scaling": None,
            "torch_dtype": str(dtype).removeprefix("torch."), "pretraining_tp": 1,
            "auto_map": {
                "AutoConfig": "configuration_deepseek.DeepseekConfig",
                "AutoModelForCausalLM": "modeling_deepseek.DeepseekForCausalLM",
            },
            "a_key_of_the_future": 7,
        } | (settings or {})  # fmt: skip
        (folder / "config.json").write_text(json.dumps(written))
        return folder

    return write
