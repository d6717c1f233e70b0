"""LoRA on attention and stacked experts, by peft."""

import json
import sys

import pytest
import torch
from deepseekmoe import hub
from deepseekmoe.lora import add_adapter, merge_adapter
from deepseekmoe.modeling import DeepseekMoeForCausalLM
from octavo.errors import ConfigError, ModelError

peft = pytest.importorskip("peft", reason="the extra [lora] is not installed")

IDS = torch.arange(5, 25)[None]


def test_every_expert_and_attention_gets_gradients(small):
    torch.manual_seed(0)
    model = DeepseekMoeForCausalLM(small()).train()
    model.gradient_checkpointing_enable()
    adapted = add_adapter(model, 2)
    ids = torch.randint(0, 300, (8, 32))
    for name, weight in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.1)
    model(input_ids=ids, labels=ids).loss.backward()
    found = {name: weight for name, weight in adapted.named_parameters() if weight.requires_grad}
    assert found
    assert all("lora_" in name for name in found)
    for name, weight in found.items():
        assert weight.grad is not None, name
        assert weight.grad.abs().sum() > 0, name
    experts = [weight for name, weight in found.items() if ".experts." in name]
    assert len(experts) == 4  # A and B of two stacked parameters, in the one layer that has them
    of_expert = next(
        weight for name, weight in found.items() if ".experts." in name and "lora_A" in name
    )
    assert len(of_expert) == 2 * 8
    assert (of_expert.grad.view(8, 2, -1).abs().sum(dim=(1, 2)) > 0).all()
    assert sum("self_attn" in name for name in found) == 2 * 4 * 2


def test_merged_logits_are_the_adapters(small, tmp_path):
    torch.manual_seed(0)
    hub.register()
    base = DeepseekMoeForCausalLM(small()).eval()
    base.save_pretrained(tmp_path / "base")
    adapted = add_adapter(base, 2)
    plain = base(input_ids=IDS).logits
    for name, weight in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.1)
    with torch.no_grad():
        logits = adapted(input_ids=IDS).logits
    assert not torch.allclose(plain, logits, atol=1e-2)
    adapted.save_pretrained(tmp_path / "adapter")
    again = peft.PeftModel.from_pretrained(
        hub.load(tmp_path / "base", tokenizer=False)[0], str(tmp_path / "adapter")
    ).eval()
    with torch.no_grad():
        assert torch.allclose(again(input_ids=IDS).logits, logits, atol=1e-5)
    merged = merge_adapter(
        hub.load(tmp_path / "base", tokenizer=False)[0], tmp_path / "adapter"
    ).eval()
    with torch.no_grad():
        assert torch.allclose(merged(input_ids=IDS).logits, logits, atol=1e-5)


def test_tune_an_adapter_and_merge_it_by_commands(command, trained, chats, tmp_path):
    base, out, merged = trained / "model", tmp_path / "run", tmp_path / "merged"
    code, printed, err = command(
        "sft", base, "--data", chats, "--out", out, "--lora-rank", "4", "--length", "64", "--epochs",
        "10", "--learning-rate", "5e-3", "--batch-size", "2", "--log-every", "5",
    )  # fmt: skip
    assert code == 0, err
    assert f"deepseekmoe convert {base} --adapter {out / 'adapter'}" in " ".join(printed.split())
    assert not (out / "model").exists()
    settings = json.loads((out / "adapter" / "adapter_config.json").read_text())
    assert settings["r"] == 4
    assert sorted(settings["target_parameters"]) == [
        "mlp.experts.down_proj", "mlp.experts.gate_up_proj",
    ]  # fmt: skip
    losses = [json.loads(line)["lm_loss"] for line in (out / "metrics.jsonl").open()]
    assert losses[-1] < 0.95 * losses[0]
    code, _, err = command("convert", base, "--adapter", out / "adapter", "--out", merged)
    assert code == 0, err
    hub.check_folder(merged)
    loaded = hub.load(base)[0]
    adapted = peft.PeftModel.from_pretrained(loaded, str(out / "adapter")).eval()
    with torch.no_grad():
        logits = adapted(input_ids=IDS).logits
        assert torch.allclose(hub.load(merged)[0](input_ids=IDS).logits, logits, atol=1e-4)


def test_a_bfloat16_model_takes_an_adapter(small):
    model = DeepseekMoeForCausalLM(small()).bfloat16().train()
    adapted = add_adapter(model, 2)
    model(input_ids=IDS, labels=IDS).loss.backward()
    trained = [weight for weight in adapted.parameters() if weight.requires_grad]
    assert {weight.dtype for weight in trained} == {torch.float32}
    assert all(weight.grad is not None for weight in trained)


def test_what_is_no_adapter_of_the_model_is_refused(command, trained, small, tmp_path):
    code, _, err = command(
        "convert", trained / "model", "--adapter", tmp_path / "none", "--out", tmp_path / "out"
    )
    assert code == 2
    assert "holds no adapter" in err
    other = add_adapter(DeepseekMoeForCausalLM(small()), 2)
    other.save_pretrained(tmp_path / "adapter")
    with pytest.raises(ModelError, match="the adapter does not fit the model"):
        merge_adapter(hub.load(trained / "model")[0], tmp_path / "adapter")


@pytest.mark.parametrize(
    ("trained", "merged", "told"),
    [
        ({}, {"num_hidden_layers": 3}, r"it lacks base_model.model.model.layers.2.*lora_A"),
        ({"num_hidden_layers": 3}, {}, r"has, and the model has no place for, .*layers.2.*lora_A"),
        ({}, {"first_k_dense_replace": 0}, r"it lacks .*layers.0.mlp.experts"),
        ({"n_routed_experts": 0, "num_experts_per_tok": 0}, {}, None),  # on attention alone
    ],
    ids=["deeper", "shallower", "other targets", "fewer targets"],
)
def test_an_adapter_of_another_depth_is_refused_by_a_name(
    small, tmp_path, recwarn, trained, merged, told
):
    add_adapter(DeepseekMoeForCausalLM(small(**trained)), 2).save_pretrained(tmp_path / "adapter")
    before = DeepseekMoeForCausalLM(small(**merged))
    if told is None:
        merge_adapter(before, tmp_path / "adapter")
        return
    with pytest.raises(ModelError, match=told):
        merge_adapter(before, tmp_path / "adapter")
    assert not [one for one in recwarn if "adapter keys" in str(one.message)]


def test_without_peft_the_extra_is_named(small, monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ConfigError, match=r"deepseekmoe\[lora\]"):
        add_adapter(DeepseekMoeForCausalLM(small()), 2)
