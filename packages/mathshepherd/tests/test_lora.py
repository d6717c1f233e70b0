"""Adapters: what was trained is what is merged, nothing else is changed, and a killed run goes on."""

import sys
from typing import Any

import pytest
import torch
from mathshepherd import shop
from mathshepherd.config import RewardConfig
from mathshepherd.lora import merged, narrow, with_adapter
from mathshepherd.records import Solution, StepLabels
from mathshepherd.reward_model import Reading, Readout, StepRewardModel
from mathshepherd.sft import finetune
from mathshepherd.train_rm import train_reward
from octavo.errors import ConfigError
from octavo.models import save_model
from octavo.rundir import RunDir
from octavo.runtime import Runtime
from octavo.training import TrainOptions
from safetensors.torch import load_file
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

SHOP = shop.Shop(events=(1, 2), highest=9, operand=3)
TOKENIZER = shop.make_tokenizer(SHOP)
ROWS = [(one.question, one.steps) for one in shop.make_world(SHOP, 16, 4, 0, 3, 0).demonstrations]
CPU = Runtime(device="cpu")
OPTIONS = TrainOptions(learning_rate=1e-2, epochs=2, batch_size=4, save_every=3)
IDS = torch.tensor([[1, 5, 9, 3, 7, 11]])

FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {}, "qwen2": {"tie_word_embeddings": True}, "gpt2": {}, "gpt_neox": {},
    "gemma2": {"head_dim": 8}, "phi": {},
}  # fmt: skip


def make(kind: str = "llama") -> Any:
    torch.manual_seed(0)
    sizes = {"vocab_size": len(TOKENIZER), "hidden_size": 16, "num_hidden_layers": 2,
             "num_attention_heads": 2, "num_key_value_heads": 2, "intermediate_size": 24,
             "max_position_embeddings": 128, "bos_token_id": 2, "eos_token_id": 2, "pad_token_id": 0,
             "initializer_range": 0.3}  # fmt: skip
    config = AutoConfig.for_model(kind, **(sizes | FAMILIES[kind]))
    return AutoModelForCausalLM.from_config(config).eval()


def weights_of(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: weight.clone() for name, weight in model.state_dict().items()}


def moved(adapted: Any) -> Any:
    """An adapter that has learnt something."""
    with torch.no_grad():
        for weight in adapted.parameters():
            if weight.requires_grad:
                weight.add_(torch.randn_like(weight) * 0.1)
    return adapted


@torch.no_grad()
def logits_of(model: Any, ids: torch.Tensor = IDS) -> torch.Tensor:
    return model(input_ids=ids).logits.float()


# Merging


@pytest.mark.parametrize("new_words", [(), (5, 9)])
@pytest.mark.parametrize("kind", FAMILIES)
def test_what_was_trained_is_what_is_merged(kind, new_words, tmp_path):
    model = make(kind)
    before, plain = logits_of(model), weights_of(model)
    if kind == "phi" and new_words:
        with pytest.raises(ConfigError, match=r"--add-words, --lora-rank: .* has a bias"):
            with_adapter(model, 2, new_words)
        return
    adapted = with_adapter(model, 2, new_words)
    assert torch.equal(logits_of(adapted), before)
    trained = logits_of(moved(adapted))
    assert (trained - before).abs().max() > 0.1
    whole = merged(adapted)
    assert torch.allclose(logits_of(whole), trained, atol=1e-5)
    assert whole.state_dict().keys() == plain.keys()  # no adapter is left in it
    assert all(one.requires_grad for one in whole.parameters())
    save_model(tmp_path / "model", whole, TOKENIZER)
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert torch.allclose(logits_of(again), trained, atol=1e-5)


@pytest.mark.parametrize("kind", ["llama", "qwen2", "gpt2"])
def test_only_linear_layers_and_new_rows_change(kind):
    model = make(kind)
    ends = {id(one.weight) for one in (model.get_input_embeddings(), model.get_output_embeddings())}
    plain = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    rows = [name for name, weight in model.named_parameters() if id(weight) in ends]
    whole = merged(moved(with_adapter(model, 2, [5, 9])))
    for name, weight in whole.named_parameters():
        change = (weight - plain[name]).detach()
        if name in rows:
            assert change.abs().amax(1).nonzero().flatten().tolist() == [5, 9]
        elif change.dim() == 2 and "wpe" not in name:
            assert torch.linalg.matrix_rank(change, atol=1e-5) == 2
        else:
            assert not change.any()


def test_narrow_layers_give_what_autocast_gives():
    wide, thin = (moved(with_adapter(make(), 2)) for _ in range(2))
    thin.load_state_dict(wide.state_dict())
    narrow(thin, torch.bfloat16)
    kinds = {name: one.dtype for name, one in thin.named_parameters()}
    assert {kind for name, kind in kinds.items() if "lora" in name} == {torch.float32}
    assert {kind for name, kind in kinds.items() if "base_layer" in name} == {torch.bfloat16}
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(logits_of(wide), logits_of(thin))
    assert {one.dtype for one in merged(thin).parameters()} == {torch.float32}


# Training


def sft(folder, options=OPTIONS, rank=2, new_words=(), runtime=CPU, kind="llama"):
    with RunDir.open(folder, {}) as run:
        model, _ = finetune(
            make(kind), TOKENIZER, ROWS, shop.FORMAT, run, options, runtime, lora_rank=rank,
            new_words=new_words,
        )  # fmt: skip
    return model


def prm(folder, readout: Readout = "tokens", options=OPTIONS, runtime=CPU):
    """The second of two steps is the bad one."""
    rows = [Solution("1", n, question, (*steps[:1], *steps[:1]), labels=StepLabels((1, 0)))
            for n, (question, steps) in enumerate(ROWS)]  # fmt: skip
    reward = StepRewardModel(make(), TOKENIZER, Reading(readout=readout, form=shop.FORMAT))
    with RunDir.open(folder, {}) as run:
        train_reward(reward, rows, RewardConfig(), run, options, runtime, lora_rank=2)
    return reward


TRAININGS: dict[str, Any] = {
    "sft": sft,
    "sft, new words": lambda folder: sft(folder, new_words=(5, 9), kind="qwen2"),
    "tokens": prm,
    "head": lambda folder: prm(folder, "head"),
}


@pytest.mark.parametrize("name", TRAININGS)
def test_a_killed_training_goes_on(name, tmp_path, monkeypatch):
    train, plain, losses = TRAININGS[name], torch.Tensor.backward, []
    whole = train(tmp_path / "whole")
    (checkpoint,) = (tmp_path / "whole" / "checkpoints").glob("*/checkpoint-*")
    (file,) = checkpoint.glob("*model.safetensors")
    size = sum(one.numel() for one in load_file(file).values())
    assert size < 0.5 * sum(one.numel() for one in whole.parameters())  # of what is trained alone

    def backward(self, *given, **options):
        losses.append(1)
        if len(losses) == 6:
            raise KeyboardInterrupt
        return plain(self, *given, **options)

    with monkeypatch.context() as patch:
        patch.setattr(torch.Tensor, "backward", backward)
        with pytest.raises(KeyboardInterrupt):
            train(tmp_path / "run")
    resumed = train(tmp_path / "run")
    steps, others = ([line["step"] for line in RunDir(tmp_path / run).metrics() if "loss" in line]
                     for run in ("run", "whole"))  # fmt: skip
    assert steps == others
    begun = weights_of(make("qwen2" if "words" in name else "llama"))
    states = [
        weights_of(one.model if name in ("tokens", "head") else one) for one in (whole, resumed)
    ]
    changes = {key: (states[0][key] - begun[key]).abs().max() for key in begun}
    assert max(changes.values()) > 1e-3
    for key, weight in states[0].items():
        assert torch.equal(weight, states[1][key])
    assert ("model.embed_tokens.weight" in {k for k in changes if changes[k] > 1e-4}) == (
        "words" in name
    )
    if name == "head":
        assert torch.equal(whole.head.weight, resumed.head.weight)
        assert whole.head.weight.abs().max() > 1e-3


def test_activations_computed_twice_change_nothing(tmp_path):
    twice = TrainOptions(
        learning_rate=1e-2, epochs=2, batch_size=4, save_every=3, gradient_checkpointing=True
    )
    for train in (sft, prm):
        one, other = (train(tmp_path / f"{train.__name__} {n}", options=options)
                      for n, options in enumerate((OPTIONS, twice)))  # fmt: skip
        for weight, same in zip(one.parameters(), other.parameters(), strict=True):
            assert torch.allclose(weight, same, atol=1e-6)


def test_half_precision_learns_too(tmp_path):
    half = sft(tmp_path / "half", new_words=(5,), runtime=Runtime(device="cpu", dtype="bfloat16"))
    assert {one.dtype for one in half.parameters()} == {torch.float32}
    whole, plain = sft(tmp_path / "whole", new_words=(5,)), make()
    alike = torch.cosine_similarity(
        *(torch.cat([(one - two).flatten() for one, two in zip(model.parameters(), start, strict=True)])
          for model, start in ((half, rounded(plain)), (whole, list(plain.parameters())))), dim=0
    )  # fmt: skip
    assert alike > 0.9


@pytest.mark.parametrize("readout", ["tokens", "head"])
def test_a_reward_model_does_too_and_of_the_output_two_rows_alone(readout, tmp_path):
    reward = prm(tmp_path / "run", readout, runtime=Runtime(device="cpu", dtype="bfloat16"))
    assert {one.dtype for one in reward.parameters()} == {torch.float32}
    before = make().get_output_embeddings().weight.bfloat16().float()
    changed = (reward.model.get_output_embeddings().weight != before).any(1)  # pyright: ignore
    words = sorted([reward.words.good, reward.words.bad]) if readout == "tokens" else []
    assert changed.nonzero().flatten().tolist() == words


def rounded(model: Any) -> list[torch.Tensor]:
    narrow(model.requires_grad_(False), torch.bfloat16)
    return [one.float() for one in model.parameters()]


def test_what_cannot_be_is_refused(tmp_path, monkeypatch):
    with pytest.raises(ConfigError, match="--lora-rank -1: must be 0 or more"):
        sft(tmp_path / "run", rank=-1)
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ConfigError, match=r"--lora-rank: needs peft; .*mathshepherd\[lora\]"):
        sft(tmp_path / "run")
