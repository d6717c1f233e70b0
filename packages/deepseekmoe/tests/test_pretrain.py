"""Which model the options mean."""

import json
from types import SimpleNamespace
from typing import Any

import pytest
from deepseekmoe.architecture import DeepseekMoeConfig
from deepseekmoe.config import ModelConfig
from deepseekmoe.pretrain import make_config, make_model
from octavo.errors import ConfigError, ModelError
from octavo.runtime import Runtime


class Words(SimpleNamespace):
    """What a configuration needs of a tokenizer."""

    def __len__(self):
        return 300


WORDS = Words(bos_token_id=1, eos_token_id=2, pad_token_id=0)


def test_the_file_stands_in_for_the_preset_and_options_for_both(tmp_path):
    keys = tmp_path / "config.json"
    keys.write_text(json.dumps({"scoring_func": "sigmoid", "n_group": 8, "topk_group": 4,
                                "topk_method": "noaux_tc", "n_routed_experts": 32,
                                "num_experts_per_tok": 4, "model_type": "deepseek"}))  # fmt: skip
    config = make_config(ModelConfig(model_config=keys, active_experts=3), WORDS, 64)
    assert (config.scoring_func, config.n_group, config.topk_method) == ("sigmoid", 8, "noaux_tc")
    assert (config.n_routed_experts, config.num_experts_per_tok) == (32, 3)
    assert config.hidden_size == 64  # the preset tiny's
    assert config.vocab_size == 300
    model: Any = make_model(config, Runtime(device="cpu"))
    gate = model.model.layers[0].mlp.gate
    assert gate.groups is not None
    assert gate.groups.by == "top2"


def test_a_configuration_of_a_model_gives_the_same_model(tmp_path):
    shape = DeepseekMoeConfig.preset("tiny", z_loss_alpha=0.1, n_routed_experts=31)
    shape.save_pretrained(tmp_path)
    read = make_config(ModelConfig(model_config=tmp_path / "config.json"), WORDS, 64)
    given = make_config(shape, WORDS, 64)
    assert read.to_dict() == given.to_dict()
    assert given.n_routed_experts == 31
    assert given.z_loss_alpha == 0.1
    assert shape.vocab_size == 1024  # it stays as it was


def test_a_misspelt_key_is_told(tmp_path, caplog):
    keys = tmp_path / "keys.json"
    keys.write_text('{"aux_loss_alfa": 0.1, "torch_dtype": "bfloat16"}')
    make_config(ModelConfig(model_config=keys), WORDS, 64)
    assert "no model reads aux_loss_alfa" in caplog.text
    assert "torch_dtype" not in caplog.text


@pytest.mark.parametrize(
    ("text", "told"),
    [("[1]", "an object of keys"), ("{", "no JSON"), ('{"model_type": "llama"}', "another family")],
)
def test_a_file_that_is_none_of_it_is_refused(tmp_path, text, told):
    keys = tmp_path / "keys.json"
    keys.write_text(text)
    with pytest.raises(ModelError, match=told):
        make_config(ModelConfig(model_config=keys), WORDS, 64)


@pytest.mark.parametrize(
    ("keys", "told"),
    [
        ({"n_routed_experts": "64"}, "n_routed_experts '64': must be a whole number"),
        ({"num_attention_heads": "4"}, "num_attention_heads '4'"),
        ({"num_key_value_heads": 3}, "no multiple of num_key_value_heads 3"),
        ({"vocab_size": 0}, "vocab_size 0"),
        ({"intermediate_size": 0}, "intermediate_size 0"),
        ({"first_k_dense_replace": -1}, "first_k_dense_replace -1"),
        ({"rms_norm_eps": "a"}, "rms_norm_eps 'a': must be a number"),
        ({"hidden_size": 60}, "head_dim 15: must be even"),
        ({"n_shared_experts": True}, "n_shared_experts True"),
    ],
)
def test_keys_that_cannot_be_are_named(keys, told):
    with pytest.raises(ConfigError, match=told):
        DeepseekMoeConfig.preset("tiny", **keys)


def test_pieces_too_many_for_the_width_are_refused():
    with pytest.raises(ConfigError, match="moe_intermediate_size 0"):
        make_config(ModelConfig(granularity=300), WORDS, 64)


def test_devices_are_of_the_baselines_experts():
    config = make_config(ModelConfig(baseline="gshard", devices=4, device_alpha=0.05), WORDS, 64)
    assert (config.n_devices, config.device_loss_alpha) == (4, 0.05)
    assert config.n_routed_experts == 16


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"balance": "none", "aux_alpha": 0.1}, "--balance none and --aux-alpha"),
        ({"bias_rate": 0.1}, "--bias-rate is of --balance bias"),
    ],
)
def test_options_without_effect_are_refused(options, told):
    with pytest.raises(ConfigError, match=told):
        make_config(ModelConfig(**options), WORDS, 64)


def test_without_balance_the_files_bias_rests_too(tmp_path):
    keys = tmp_path / "keys.json"
    keys.write_text('{"bias_update_rate": 0.001}')
    rates = {
        balance: make_config(
            ModelConfig(model_config=keys, balance=balance), WORDS, 64
        ).bias_update_rate
        for balance in ("none", "loss")
    }
    assert rates == {"none": 0.0, "loss": 0.001}
