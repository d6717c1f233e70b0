"""Expert-specialised fine-tuning: which experts are chosen, and that no other weight moves."""

import dataclasses
import json
from typing import Any

import numpy as np
import pytest
import torch
from deepseekmoe import esft, hub
from deepseekmoe.analyze import Trace
from deepseekmoe.esft import Selection, freeze_except, relevance, select_experts
from deepseekmoe.modeling import DeepseekMoeForCausalLM
from octavo.errors import ConfigError, DataError


def trace(counts, gates):
    """Of one domain, from [layers, experts]."""
    counts = np.array(counts)[None]
    pairs = np.zeros((counts.shape[1], counts.shape[2], counts.shape[2]), dtype=np.int64)
    return Trace(["task"], counts, np.array(gates, dtype=float)[None], pairs, [0, 1])


#: Slots and gates of two layers with four experts.
BY_HAND = trace([[10, 40, 20, 30], [97, 1, 1, 1]], [[4.0, 1.0, 3.0, 2.0], [0.1, 0.2, 0.3, 0.4]])


@pytest.mark.parametrize(
    ("score", "p", "experts"),
    [
        ("token", 0.2, {0: [1], 1: [0]}),
        ("token", 0.4, {0: [1], 1: [0]}),  # reached exactly
        ("token", 0.41, {0: [1, 3], 1: [0]}),
        ("token", 0.9, {0: [1, 2, 3], 1: [0]}),
        ("token", 1.0, {0: [0, 1, 2, 3], 1: [0, 1, 2, 3]}),
        ("gate", 0.1, {0: [0], 1: [3]}),
        ("gate", 0.7, {0: [0, 2], 1: [2, 3]}),
    ],
)
def test_selections_by_hand(score, p, experts):
    assert select_experts(BY_HAND, score, p) == Selection(experts)


def test_relevance_is_a_share_of_each_layer():
    assert relevance(BY_HAND, "token")[0].tolist() == pytest.approx([0.1, 0.4, 0.2, 0.3])
    assert relevance(BY_HAND, "gate").sum(axis=-1).tolist() == pytest.approx([1, 1])
    two = Trace(
        ["a", "b"], np.array([[[1, 3]], [[5, 1]]]), np.ones((2, 1, 2)), np.zeros((1, 2, 2)), [0]
    )
    assert relevance(two, "token").tolist() == [[0.6, 0.4]]


def test_layers_are_numbered_as_in_the_model():
    later = dataclasses.replace(BY_HAND, layers=[1, 2])
    assert list(select_experts(later).experts) == [1, 2]


@pytest.mark.parametrize("p", [0.0, -0.1, 1.1])
def test_p_is_a_share(p):
    with pytest.raises(ConfigError, match="must be above 0, and 1 at the most"):
        select_experts(BY_HAND, p=p)


def test_the_file_is_the_authors(tmp_path):
    selection = Selection({1: [3, 7], 2: [0]}, shared_experts=True)
    selection.save(tmp_path / "experts.json")
    assert json.loads((tmp_path / "experts.json").read_text()) == {
        "experts": {"1": [3, 7], "2": [0]}, "shared_experts": True, "non_expert_modules": False,
    }  # fmt: skip
    assert Selection.load(tmp_path / "experts.json") == selection
    for text in (
        "{",
        "[]",
        '{"experts": {"one": [1]}}',
        '{"experts": [1]}',
        '{"experts": {"1": 2}}',
    ):
        (tmp_path / "bad.json").write_text(text)
        with pytest.raises(DataError, match=r"bad\.json: is no selection of experts"):
            Selection.load(tmp_path / "bad.json")


def steps(model, many=3):
    """AdamW with a decay that would show, on whatever is trainable."""
    torch.manual_seed(1)
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=1e-2, weight_decay=0.5)
    for _ in range(many):
        ids = torch.randint(0, 300, (2, 16))
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return optimizer


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_frozen_weights_do_not_move_a_bit(small, dtype, checkpointing):
    torch.manual_seed(0)
    model: Any = DeepseekMoeForCausalLM(small(num_hidden_layers=3)).to(dtype).train()
    if checkpointing:
        model.gradient_checkpointing_enable()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    selection = Selection({1: [0, 5], 2: [2, 3, 7]})
    with freeze_except(model, selection):
        optimizer = steps(model)
        states = sum(
            value["exp_avg"].numel() for value in optimizer.state.values() if "exp_avg" in value
        )
    assert states == 5 * 3 * 16 * 32  # two and three experts of three matrices
    after = model.state_dict()
    assert list(after) == list(before)
    for name, value in before.items():
        if ".experts." not in name:
            assert after[name].equal(value), name
            continue
        chosen = selection.experts[int(name.split(".")[2])]
        for expert in range(8):
            assert after[name][expert].equal(value[expert]) == (expert not in chosen), (
                name,
                expert,
            )
    assert all(weight.requires_grad for weight in model.parameters())


def test_chosen_experts_move_as_if_all_were_trained(small):
    """The gradient that reaches them is the plain one."""
    torch.manual_seed(0)
    model: Any = DeepseekMoeForCausalLM(small()).train()
    ids = torch.randint(0, 300, (2, 16))
    model(input_ids=ids, labels=ids).loss.backward()
    bank = model.model.layers[1].mlp.experts
    plain = bank.gate_up_proj.grad[[2, 6]], bank.down_proj.grad[[2, 6]]
    with freeze_except(model, Selection({1: [6, 2]})):
        model(input_ids=ids, labels=ids).loss.backward()
        found = [weight.grad for weight in model.parameters() if weight.requires_grad]
    for one, two in zip(plain, found, strict=True):
        assert torch.allclose(one, two, atol=1e-7)


def test_shared_experts_and_the_rest_train_if_the_file_says_so(small):
    model: Any = DeepseekMoeForCausalLM(small())
    with freeze_except(model, Selection({}, shared_experts=True)):
        names = {name for name, weight in model.named_parameters() if weight.requires_grad}
        assert names == {
            f"model.layers.1.mlp.shared_experts.{kind}_proj.weight"
            for kind in ("gate", "up", "down")
        }
    with freeze_except(model, Selection({1: [0]}, non_expert_modules=True)):
        names = {name for name, weight in model.named_parameters() if weight.requires_grad}
    assert "model.layers.1.mlp.gate.weight" in names
    assert "lm_head.weight" in names
    assert "model.layers.1.mlp.experts.down" in names
    assert not any("shared_experts" in name or "bank" in name for name in names)


@pytest.mark.parametrize(
    ("experts", "words"),
    [
        ({0: [1]}, "names layer 0, which has no routed experts"),
        ({1: [8]}, "names expert 8 of layer 1; there are 8"),
        ({}, "names no expert"),
    ],
)
def test_a_selection_of_another_model_is_refused(small, experts, words):
    model: Any = DeepseekMoeForCausalLM(small())
    with pytest.raises(ConfigError, match=words), freeze_except(model, Selection(experts)):
        pass


def test_shared_experts_of_a_model_without_any_are_refused(small):
    model: Any = DeepseekMoeForCausalLM(small(n_shared_experts=0))
    for experts in ({}, {1: [0]}):
        selection = Selection(experts, shared_experts=True)
        with pytest.raises(ConfigError, match="shared experts, and the model has none"):
            freeze_except(model, selection).__enter__()


def test_a_layer_that_cannot_be_divided_does_not_hide_why(small, monkeypatch):
    model: Any = DeepseekMoeForCausalLM(small(first_k_dense_replace=0))
    banks = [layer.mlp.experts for layer in model.model.layers]

    class Broken(esft._PartlyTrained):
        def __init__(self, bank, chosen):
            if bank is banks[1]:
                raise MemoryError("no room for the second")
            super().__init__(bank, chosen)

    monkeypatch.setattr(esft, "_PartlyTrained", Broken)
    with (
        pytest.raises(MemoryError, match="no room for the second"),
        freeze_except(model, Selection({0: [1], 1: [2]})),
    ):
        pass
    assert [layer.mlp.experts for layer in model.model.layers] == banks
    assert all(weight.requires_grad for weight in model.parameters())


def test_select_and_tune_by_commands(command, trained, chats, tmp_path):
    file, out = tmp_path / "experts.json", tmp_path / "run"
    code, printed, err = command(
        "esft-select",
        trained / "model",
        "--data",
        chats,
        "--out",
        file,
        "--p",
        "0.3",
        "--length",
        "32",
    )
    assert code == 0, err
    selection = Selection.load(file)
    assert list(selection.experts) == [0, 1]
    assert all(0 < len(chosen) < 15 for chosen in selection.experts.values())
    assert f"{len(selection.experts[0])}/15" in printed
    code, _, err = command(
        "sft", trained / "model", "--data", chats, "--out", out, "--experts", file, "--length", "64",
        "--epochs", "2", "--learning-rate", "1e-2", "--quiet",
    )  # fmt: skip
    assert code == 0, err
    before, after = (hub.load(folder / "model")[0].state_dict() for folder in (trained, out))
    moved = {name for name, value in before.items() if not value.equal(after[name])}
    assert moved == {
        f"model.layers.{layer}.mlp.experts.{kind}_proj" for layer in (0, 1) for kind in
        ("gate_up", "down")
    }  # fmt: skip
    name = "model.layers.1.mlp.experts.down_proj"
    frozen = [expert for expert in range(15) if expert not in selection.experts[1]]
    assert before[name][frozen].equal(after[name][frozen])


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--p", "0"], "--p 0.0: must be above 0"),
        (["--p", "1.5"], "--p 1.5: must be above 0"),
        (["--sample", "0"], "--sample 0: must be 1 or more"),
        (["--length", "1"], "--length 1: must be 2 or more"),
    ],
)
def test_bad_options_are_told_in_one_line(command, trained, chats, tmp_path, options, words):
    code, out, err = command(
        "esft-select", trained / "model", "--data", chats, "--out", tmp_path / "x.json", *options
    )
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert words in err


def test_a_frozen_gate_keeps_its_selection_bias(small):
    from deepseekmoe.optimize import balance_bias

    model: Any = DeepseekMoeForCausalLM(small(bias_update_rate=0.1))
    load = torch.arange(8)[None]
    bias = model.model.layers[1].mlp.gate.e_score_correction_bias
    with freeze_except(model, Selection({1: [0]})):
        balance_bias(model, load)
    assert not bias.any()
    balance_bias(model, load)
    assert bias.any()


@pytest.mark.realdata
def test_tasks_use_other_experts(command, trained, data_folder, tmp_path):
    chosen = {}
    for task in ("law", "intent"):
        code, _, err = command(
            "esft-select", trained / "model", "--out", tmp_path / f"{task}.json", "--sample", "4000",
            "--data", data_folder / "sft" / f"esft_train_{task}.jsonl.gz", "--length", "128",
        )  # fmt: skip
        assert code == 0, err
        chosen[task] = Selection.load(tmp_path / f"{task}.json").experts
    assert chosen["law"] != chosen["intent"]
