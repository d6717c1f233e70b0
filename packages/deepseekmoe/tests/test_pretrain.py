"""Which model the options mean."""

import json
from types import SimpleNamespace

import pytest
from deepseekmoe.architecture import DeepseekMoeConfig
from deepseekmoe.config import ModelConfig
from deepseekmoe.pretrain import make_config, make_model
from octavo.errors import ModelError
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
    gate = make_model(config, Runtime(device="cpu")).model.layers[0].mlp.gate
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
