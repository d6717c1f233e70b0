import json

import pytest
import torch
from octavo import tiny
from octavo.errors import ConfigError, ModelError
from octavo.models import count_parameters, flops, load_config, load_model, load_tokenizer
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    BertConfig,
    BertModel,
)

TEXTS = ["the cat sat on the mat", "a dog ran", "Ünïcode text: 123!"] * 3
NEW = [r"^classifier\.", r"pooler"]
HEADS = [r"^cls\.", r"^decoder\.", r"^head\."]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A small BERT as the hub would give it: a masked language model and its tokenizer."""
    place = tmp_path_factory.mktemp("bert") / "model"
    shape = tiny.Shape(kind="bert", layers=2, width=32, vocabulary=200)
    tokenizer = tiny.make_tokenizer(TEXTS, shape)
    tiny.make_model(shape, tokenizer).save_pretrained(place)
    tokenizer.save_pretrained(place)
    return place


def copy(folder, tmp_path, change=None, **config):
    """The checkpoint with some weights or settings changed."""
    place = tmp_path / "changed"
    place.mkdir()
    settings = json.loads((folder / "config.json").read_text()) | config
    (place / "config.json").write_text(json.dumps(settings))
    weights = load_file(folder / "model.safetensors")
    save_file((change or (lambda w: w))(weights), place / "model.safetensors", {"format": "pt"})
    return place


def test_what_may_be_new_or_unused_is_allowed_and_logged(folder, caplog):
    caplog.set_level("INFO", "octavo")
    model = load_model(
        AutoModelForSequenceClassification, folder, new=NEW, unused=HEADS, num_labels=3
    )
    assert model.config.num_labels == 3
    assert "new weights: " in caplog.text
    assert "classifier.weight" in caplog.text
    assert "cls.predictions" in caplog.text
    stored = load_file(folder / "model.safetensors")
    weight = model.state_dict()["bert.encoder.layer.1.output.dense.weight"]
    assert torch.equal(weight, stored["bert.encoder.layer.1.output.dense.weight"])


def test_a_missing_classifier_is_an_error_unless_it_may_be_new(folder):
    with pytest.raises(ModelError, match=r"the checkpoint lacks .*classifier.bias.*does not fit"):
        load_model(AutoModelForSequenceClassification, folder, unused=HEADS)
    with pytest.raises(ModelError, match=r"does not use: cls\.predictions"):
        load_model(AutoModelForSequenceClassification, folder, new=NEW)


def test_a_deeper_configuration_than_the_checkpoint_is_an_error(folder, tmp_path):
    deeper = copy(folder, tmp_path, num_hidden_layers=4)
    with pytest.raises(ModelError, match=r"lacks bert\.encoder\.layer\.2.* and \d+ more"):
        load_model(AutoModelForMaskedLM, deeper, new=NEW)


def test_other_shapes_than_the_configuration_are_an_error(folder, tmp_path):
    wider = copy(folder, tmp_path, intermediate_size=128)
    with pytest.raises(ModelError, match="has another shape for bert"):
        load_model(AutoModelForMaskedLM, wider, new=NEW)


def test_a_pickle_is_loaded_only_when_trusted(folder, tmp_path):
    place = tmp_path / "pickled"
    place.mkdir()
    (place / "config.json").write_text((folder / "config.json").read_text())
    torch.save(load_file(folder / "model.safetensors"), place / "pytorch_model.bin")
    with pytest.raises(ModelError, match=r"only a pickle \(pytorch_model.bin\)"):
        load_model(AutoModelForMaskedLM, place)
    model = load_model(AutoModelForMaskedLM, place, allow_pickle=True, new=NEW)
    assert count_parameters(model) > 0


def test_folders_and_names_that_hold_no_model(folder, tmp_path):
    with pytest.raises(ModelError, match="no such folder"):
        load_model(AutoModelForMaskedLM, "./nowhere")
    with pytest.raises(ModelError, match="neither a folder here nor a model the hub gave"):
        load_config("someone/nothing")
    with pytest.raises(ModelError, match="neither a folder here nor a model the hub gave"):
        load_tokenizer("someone/nothing")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ModelError, match=r"cannot read its config.json"):
        load_config(tmp_path / "empty")
    with pytest.raises(ModelError, match="holds no tokenizer"):
        load_tokenizer(tmp_path / "empty")
    broken = copy(folder, tmp_path)
    (broken / "model.safetensors").write_bytes(b"broken")
    with pytest.raises(ModelError, match="cannot read its weights"):
        load_model(AutoModelForMaskedLM, broken)


def test_a_wrong_architecture_is_named(folder, tmp_path):
    other = copy(folder, tmp_path, model_type="vit", architectures=["ViTModel"])
    with pytest.raises(ModelError, match="this architecture has no such head"):
        load_model(AutoModelForCausalLM, other)
    unknown = tmp_path / "unknown"
    unknown.mkdir()
    settings = {"model_type": "mine", "auto_map": {"AutoConfig": "code.Mine"}}
    (unknown / "config.json").write_text(json.dumps(settings))
    (unknown / "code.py").write_text("raise SystemExit('code of a checkpoint was run')")
    with pytest.raises(ModelError, match="needs code from its repository"):
        load_config(unknown)


def test_flops_of_bert_base_are_the_published_ones():
    layers, width, inner, length = 12, 768, 3072, 128
    by_hand = layers * (8 * length * width**2 + 4 * length**2 * width + 4 * length * width * inner)
    assert by_hand == pytest.approx(22.347e9, rel=1e-4)
    config = BertConfig(vocab_size=10, num_hidden_layers=1)
    one = flops(BertModel(config, add_pooling_layer=False), length)
    assert one * layers == by_hand


def test_parameters_count_tied_ones_once(folder):
    model = load_model(AutoModelForMaskedLM, folder, new=NEW)
    stored = load_file(folder / "model.safetensors")
    sizes = {name: weight.numel() for name, weight in stored.items()}
    assert count_parameters(model) == sum(sizes.values())


def test_impossible_shapes_are_refused():
    for words in ("3", "axb", "cnn-2x32", "2x"):
        with pytest.raises(ConfigError, match="write LAYERSxWIDTH"):
            tiny.parse_shape(words)
    for shape in (tiny.Shape(layers=0), tiny.Shape(width=7), tiny.Shape(width=40)):
        with pytest.raises(ConfigError):
            tiny.checkpoint(TEXTS, shape)
    with pytest.raises(ConfigError, match="needs texts"):
        tiny.checkpoint([" "], tiny.Shape())
