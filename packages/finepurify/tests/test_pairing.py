"""Pairs of checkpoints: what is compared, what is kept, what is refused, and what is written."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from finepurify.checkpoint import Checkpoint
from finepurify.pairing import WeightPair
from octavo.errors import ConfigError, ModelError
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForSequenceClassification,
    BertConfig,
    BertForPreTraining,
    BertForSequenceClassification,
    BertModel,
    DebertaV2Config,
    DebertaV2ForMaskedLM,
    DebertaV2ForSequenceClassification,
    DistilBertConfig,
    DistilBertForMaskedLM,
    DistilBertForSequenceClassification,
    GPT2Config,
    GPT2ForSequenceClassification,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    RobertaConfig,
    RobertaForMaskedLM,
    RobertaForSequenceClassification,
)

SMALL: dict[str, Any] = {
    "vocab_size": 40, "hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2,
    "intermediate_size": 16, "max_position_embeddings": 12,
}  # fmt: skip
FAMILIES: dict[str, tuple[Any, Any, Any]] = {
    "bert": (BertConfig(**SMALL), BertForPreTraining, BertForSequenceClassification),
    "roberta": (RobertaConfig(**SMALL), RobertaForMaskedLM, RobertaForSequenceClassification),
    "distilbert": (
        DistilBertConfig(
            vocab_size=40, dim=8, n_layers=2, n_heads=2, hidden_dim=16, max_position_embeddings=12
        ), DistilBertForMaskedLM, DistilBertForSequenceClassification,
    ),
    "deberta-v2": (
        DebertaV2Config(**SMALL, relative_attention=True, pos_att_type=["p2c", "c2p"]),
        DebertaV2ForMaskedLM, DebertaV2ForSequenceClassification,
    ),
    "gpt2": (
        GPT2Config(vocab_size=40, n_embd=8, n_layer=2, n_head=2, n_positions=12, pad_token_id=0),
        GPT2LMHeadModel, GPT2ForSequenceClassification,
    ),
    "llama": (
        LlamaConfig(**SMALL, num_key_value_heads=1, pad_token_id=0), LlamaForCausalLM,
        LlamaForSequenceClassification,
    ),
}  # fmt: skip


def shaken(model: Any, seed: int = 1) -> Any:
    """The model with every parameter moved, so that nothing is constant."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return model


def save(model: Any, folder: Path, **options: Any) -> Path:
    model.save_pretrained(folder, **options)
    return folder


@pytest.fixture
def init(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    return save(shaken(BertForPreTraining(FAMILIES["bert"][0])), tmp_path / "init")


@pytest.fixture
def suspect(tmp_path: Path, init: Path) -> Path:
    model = BertForSequenceClassification.from_pretrained(init)
    return save(shaken(model, 2), tmp_path / "suspect")


def edited(folder: Path, target: Path, change: Any) -> Path:
    """A copy of a folder whose state dict went through `change`."""
    shutil.copytree(folder, target)
    state = change(load_file(folder / "model.safetensors"))
    save_file(state, target / "model.safetensors", metadata={"format": "pt"})
    return target


@pytest.mark.parametrize("family", FAMILIES)
def test_a_classifier_is_matched_with_what_it_was_made_from(family, tmp_path):
    config, before, after = FAMILIES[family]
    base = save(shaken(before(config)), tmp_path / "init")
    model = shaken(after.from_pretrained(base), 2)
    pair = WeightPair.load(base, save(model, tmp_path / "suspect"))
    own, theirs = model.state_dict(), before.from_pretrained(base).state_dict()
    assert {*pair.names, *pair.kept} == set(own)
    assert set(pair.kept.values()) == {"no counterpart in INIT"}
    backbone = f"{model.base_model_prefix}."
    assert all(name.startswith(backbone) for name in pair.names)
    assert not any(name.startswith(f"{backbone}encoder.layer") for name in pair.kept)
    heads = {"pre_classifier.weight", "pre_classifier.bias", "pooler.dense.weight",
             "pooler.dense.bias", "score.weight"}  # fmt: skip
    assert all(name in heads or name.startswith("classifier") for name in pair.kept)
    for name in pair.names:
        both = pair.read(name)
        assert torch.equal(both.suspect, own[name])
        assert torch.equal(both.init, theirs[name])
        assert pair.model_name(name) in dict(model.named_parameters())
    assert pair.numel == sum(own[name].numel() for name in pair.names)
    assert 0.99 * pair.numel < pair.moved() <= pair.numel
    assert not pair.identical


def test_the_heads_of_pre_training_are_dropped(init, suspect):
    pair = WeightPair.load(init, suspect)
    assert pair.kept == dict.fromkeys(
        ["classifier.weight", "classifier.bias"], "no counterpart in INIT"
    )
    assert pair.dropped
    assert all(name.startswith("cls.") for name in pair.dropped)
    assert pair.grown == {}


def test_names_of_bare_models_are_matched_both_ways(init, suspect, tmp_path):
    bare = save(BertModel.from_pretrained(init), tmp_path / "bare")
    assert "embeddings.word_embeddings.weight" in Checkpoint(bare).names
    with_head, without = WeightPair.load(init, suspect), WeightPair.load(bare, suspect)
    assert with_head.names == without.names
    assert with_head.moved() == without.moved()
    turned = WeightPair.load(suspect, bare)
    assert sorted(f"bert.{name}" for name in turned.names) == sorted(with_head.names)
    assert sorted(turned.dropped) == ["classifier.bias", "classifier.weight"]


def test_a_name_with_several_counterparts_has_none(init, suspect, tmp_path):
    twice = edited(
        init, tmp_path / "twice",
        lambda state: {f"{way}.{name}": each.clone() for name, each in state.items() for way in "ab"},
    )  # fmt: skip
    with pytest.raises(ModelError, match=r"no tensor has a counterpart in .*fine-tuned from"):
        WeightPair.load(twice, suspect)


def test_gamma_and_beta_are_weight_and_bias(init, suspect, tmp_path):
    def old(state):
        old = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}
        return {
            re.sub(r"LayerNorm\.\w+$", lambda found: old[found[0]], name): each
            for name, each in state.items()
        }

    modern = WeightPair.load(init, suspect)
    assert WeightPair.load(edited(init, tmp_path / "old", old), suspect).moved() == modern.moved()
    pair = WeightPair.load(init, edited(suspect, tmp_path / "older", old))
    assert "bert.embeddings.LayerNorm.gamma" in pair.names
    assert pair.model_name("bert.embeddings.LayerNorm.gamma") == "bert.embeddings.LayerNorm.weight"
    assert pair.model_name("bert.embeddings.LayerNorm.beta") == "bert.embeddings.LayerNorm.bias"
    assert pair.model_name("encoder.layer_scale.gamma") == "encoder.layer_scale.gamma"
    assert pair.moved() == modern.moved()


def test_an_identical_pair_says_so(init, tmp_path):
    same = save(BertForSequenceClassification.from_pretrained(init), tmp_path / "same")
    pair = WeightPair.load(init, same)
    assert pair.identical
    assert pair.moved() == 0


def test_moved_dimensions_are_counted(init, tmp_path):
    model = BertForSequenceClassification.from_pretrained(init)
    with torch.no_grad():
        model.bert.embeddings.word_embeddings.weight[3, :5] += 1
    pair = WeightPair.load(init, save(model, tmp_path / "suspect"))
    assert pair.moved() == 5


def test_shards_are_read_and_written_as_they_lie(init, suspect, tmp_path):
    model = BertForSequenceClassification.from_pretrained(suspect)
    shards = save(model, tmp_path / "shards", max_shard_size="2KB")
    whole, pair = WeightPair.load(init, suspect), WeightPair.load(init, shards)
    assert len(list(shards.glob("*.safetensors"))) > 2
    assert sorted(pair.names) == sorted(whole.names)
    assert pair.moved() == whole.moved()
    pair.write(tmp_path / "out", lambda name: pair.read(name).init)
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == sorted(
        file.name for file in shards.iterdir()
    )
    found = BertForSequenceClassification.from_pretrained(tmp_path / "out").state_dict()
    for name in pair.names:
        assert torch.equal(found[name], pair.read(name).init)


def test_what_is_written_differs_from_the_suspect_in_what_was_given(init, suspect, tmp_path):
    (suspect / "vocab.txt").write_text("[PAD]\n")
    (suspect / "optimizer.pt").write_bytes(b"unpurified")
    (suspect / "checkpoint-5").mkdir()
    pair = WeightPair.load(init, suspect, exclude=[r"pooler"])
    asked = []

    def tensor(name):
        asked.append(name)
        both = pair.read(name)
        return torch.where(both.suspect > 0, both.suspect, both.init).double()

    pair.write(tmp_path / "out", tensor)
    assert asked == pair.names
    assert {file.name for file in (tmp_path / "out").iterdir()} == {
        "config.json", "model.safetensors", "vocab.txt"
    }  # fmt: skip
    for name in ("config.json", "vocab.txt"):
        assert (tmp_path / "out" / name).read_bytes() == (suspect / name).read_bytes()
    raw, before = (folder / "model.safetensors" for folder in (tmp_path / "out", suspect))
    assert raw.stat().st_size == before.stat().st_size
    found, old = (
        AutoModelForSequenceClassification.from_pretrained(tmp_path / "out"),
        load_file(before),
    )
    for name, each in found.state_dict().items():
        wanted = tensor(name).float() if name in pair.names else old[name]
        assert torch.equal(each, wanted), name
    assert {name for name, why in pair.kept.items() if why == "excluded"} == {
        "bert.pooler.dense.weight", "bert.pooler.dense.bias"
    }  # fmt: skip


def test_a_suspect_given_back_is_the_same_byte_for_byte(init, suspect, tmp_path):
    pair = WeightPair.load(init, suspect)
    pair.write(tmp_path / "out", lambda name: pair.read(name).suspect)
    for file in suspect.iterdir():
        assert (tmp_path / "out" / file.name).read_bytes() == file.read_bytes()


def test_a_failed_writing_leaves_nothing(init, suspect, tmp_path):
    pair = WeightPair.load(init, suspect)
    with pytest.raises(ValueError, match=r"given \[1\], stored"):
        pair.write(tmp_path / "out", lambda name: torch.zeros(1))
    assert {one.name for one in tmp_path.iterdir()} == {"init", "suspect"}
    for folder in (init, suspect):
        with pytest.raises(ConfigError, match="choose another folder"):
            pair.write(folder, lambda name: pair.read(name).init)


def test_half_precision_moved_only_where_it_was_not_just_rounded(init, tmp_path):
    model = BertForSequenceClassification.from_pretrained(init).bfloat16()
    same = WeightPair.load(init, save(model, tmp_path / "same"))
    assert same.identical
    with torch.no_grad():
        model.get_parameter("bert.pooler.dense.weight")[0] += 1
    pair = WeightPair.load(init, save(model, tmp_path / "suspect"))
    assert pair.moved() == 8
    assert pair.read("bert.pooler.dense.weight").init.dtype == torch.bfloat16
    pair.write(tmp_path / "out", lambda name: pair.read(name).init.float())
    out = load_file(tmp_path / "out" / "model.safetensors")
    assert {each.dtype for each in out.values()} == {torch.bfloat16}
    assert WeightPair.load(init, tmp_path / "out").identical


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("sharded", [False, True])
def test_a_pickle_is_refused_until_it_is_allowed(init, suspect, tmp_path, legacy, sharded):
    state = load_file(suspect / "model.safetensors")
    state["bert.pooler.dense.weight"] = state["bert.pooler.dense.weight"].T.contiguous().T
    folder = tmp_path / "pickled"
    folder.mkdir()
    shutil.copy(suspect / "config.json", folder)
    parts = {"pytorch_model.bin": state}
    if sharded:
        names = list(state)
        parts = {
            f"pytorch_model-0000{n}-of-00002.bin": {name: state[name] for name in some}
            for n, some in ((1, names[:9]), (2, names[9:]))
        }
        places = {name: file for file, part in parts.items() for name in part}
        (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": places}))
    for file, part in parts.items():
        torch.save(part, folder / file, _use_new_zipfile_serialization=not legacy)
    with pytest.raises(ModelError, match=r"holds only a pickle .*allow it"):
        WeightPair.load(init, folder)
    pair, plain = WeightPair.load(init, folder, allow_pickle=True), WeightPair.load(init, suspect)
    assert sorted(pair.names) == sorted(plain.names)
    assert pair.moved() == plain.moved()
    pair.write(tmp_path / "out", lambda name: pair.read(name).init)
    assert not list((tmp_path / "out").glob("*.bin*"))
    found = BertForSequenceClassification.from_pretrained(tmp_path / "out").state_dict()
    for name in found:
        assert torch.equal(
            found[name], plain.read(name).init if name in pair.names else state[name]
        )


def test_a_pickle_of_code_is_not_run(suspect, tmp_path):
    folder = tmp_path / "pickled"
    folder.mkdir()
    torch.save({"weight": Path("x")}, folder / "pytorch_model.bin")
    with pytest.raises(ModelError, match=r"cannot read pytorch_model\.bin"):
        Checkpoint(folder, allow_pickle=True)
    torch.save([torch.ones(1)], folder / "pytorch_model.bin")
    with pytest.raises(ModelError, match="not a plain dictionary of tensors"):
        Checkpoint(folder, allow_pickle=True)


@pytest.mark.parametrize("extra_rows", ["keep", "mean"])
def test_a_vocabulary_that_grew(init, tmp_path, extra_rows):
    model = BertForSequenceClassification.from_pretrained(init)
    model.resize_token_embeddings(43, mean_resizing=False)
    with torch.no_grad():
        model.bert.embeddings.word_embeddings.weight[7] += 1
    pair = WeightPair.load(init, save(model, tmp_path / "suspect"), extra_rows=extra_rows)
    name = "bert.embeddings.word_embeddings.weight"
    both = pair.read(name)
    assert pair.grown == {name: 3}
    assert both.init.shape == both.suspect.shape == (43, 8)
    delta = both.suspect - both.init
    assert set(delta[:40].any(1).nonzero().flatten().tolist()) == {7}
    if extra_rows == "keep":
        assert not delta[40:].any()
        assert pair.moved() == 8
    else:
        torch.testing.assert_close(both.init[40:], both.init[:40].mean(0).expand(3, 8))
        assert pair.moved() == 8 + 24
    pair.write(tmp_path / "out", lambda name: pair.read(name).init)
    found = BertForSequenceClassification.from_pretrained(tmp_path / "out")
    assert torch.equal(found.get_parameter(name), both.init)


def test_a_vocabulary_that_was_cut(init, tmp_path):
    model = BertForSequenceClassification.from_pretrained(init)
    model.resize_token_embeddings(30)
    pair = WeightPair.load(init, save(model, tmp_path / "suspect"))
    assert list(pair.grown.values()) == [-10]
    assert pair.identical


def test_tied_weights_are_counted_once_and_written_twice(tmp_path):
    config, kind, _ = FAMILIES["gpt2"]
    base = save(shaken(kind(config)), tmp_path / "init")
    clean = save(shaken(kind.from_pretrained(base), 2), tmp_path / "clean")

    def both(state):
        return state | {"lm_head.weight": state["transformer.wte.weight"].clone()}

    suspect = edited(clean, tmp_path / "suspect", both)
    for first in (base, edited(base, tmp_path / "both", both)):
        pair = WeightPair.load(first, suspect, exclude=["lm_head"])
        assert pair.kept == {"lm_head.weight": "tied to transformer.wte.weight"}
        assert pair.numel == WeightPair.load(base, clean).numel
    pair.write(tmp_path / "out", lambda name: pair.read(name).init)
    out = load_file(tmp_path / "out" / "model.safetensors")
    assert torch.equal(out["lm_head.weight"], out["transformer.wte.weight"])
    assert torch.equal(
        out["lm_head.weight"], load_file(base / "model.safetensors")["transformer.wte.weight"]
    )


def test_buffers_are_no_weights(init, suspect, tmp_path):
    def more(state):
        return state | {
            "bert.embeddings.position_ids": torch.arange(12)[None],
            "rotary.inv_freq": torch.ones(4),
            "h.0.attn.bias": torch.ones(1, 1, 4, 4),
            "h.0.attn.masked_bias": torch.tensor(float("-inf")),
        }

    pair = WeightPair.load(
        edited(init, tmp_path / "a", more), edited(suspect, tmp_path / "b", more)
    )
    assert {name for name, why in pair.kept.items() if why == "not a weight"} == set(more({}))
    assert pair.names == WeightPair.load(init, suspect).names


def test_another_width_is_refused_by_name(suspect, tmp_path):
    config = BertConfig(**{**SMALL, "hidden_size": 16})
    wide = save(BertForPreTraining(config), tmp_path / "wide")
    with pytest.raises(
        ModelError, match=r"bert\.\S+ is \[.*8.*\] in .*suspect but \[.*16.*\] in .*wide"
    ):
        WeightPair.load(wide, suspect)


def test_a_head_of_other_classes_is_refused_until_it_is_excluded(suspect, tmp_path):
    config = BertConfig(**SMALL)
    config.num_labels = 3
    three = save(BertForSequenceClassification(config), tmp_path / "three")
    with pytest.raises(ModelError, match=r"classifier\.\S+ is \[2.*but \[3.*or exclude it"):
        WeightPair.load(three, suspect)
    pair = WeightPair.load(three, suspect, exclude=["^classifier"])
    assert set(pair.kept.values()) == {"excluded"}


@pytest.mark.parametrize("side", ["init", "suspect"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_non_finite_values_are_counted(init, suspect, tmp_path, side, value):
    def spoil(state):
        state["bert.pooler.dense.weight"][0, :3] = value
        return state

    sides = {"init": init, "suspect": suspect}
    sides[side] = edited(sides[side], tmp_path / "spoilt", spoil)
    with pytest.raises(
        ModelError, match=r"spoilt: 3 of the 64 values of bert\.pooler\.dense\.weight"
    ):
        WeightPair.load(sides["init"], sides["suspect"])


def test_a_head_is_checked_too(init, suspect, tmp_path):
    def spoil(state):
        return state | {"classifier.bias": torch.tensor([0.0, float("nan")])}

    with pytest.raises(ModelError, match=r"1 of the 2 values of classifier\.bias"):
        WeightPair.load(init, edited(suspect, tmp_path / "spoilt", spoil))


def test_a_quantised_init_is_refused(init, suspect, tmp_path):
    def quantised(state):
        return state | {"bert.pooler.dense.weight": torch.ones(8, 8, dtype=torch.int8)}

    with pytest.raises(ModelError, match=r"stored as torch\.int8.*quantised"):
        WeightPair.load(edited(init, tmp_path / "int8", quantised), suspect)


def test_strangers_have_nothing_in_common(suspect, tmp_path):
    config, kind, _ = FAMILIES["gpt2"]
    with pytest.raises(ModelError, match="no tensor has a counterpart"):
        WeightPair.load(save(kind(config), tmp_path / "gpt2"), suspect)


def test_wrong_expressions_are_refused(init, suspect):
    with pytest.raises(ConfigError, match=r"exclude '\(': no regular expression"):
        WeightPair.load(init, suspect, exclude=["("])


def test_what_is_no_model_is_refused(init, tmp_path, monkeypatch):
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(ModelError, match=r"empty: holds no weights"):
        Checkpoint(empty)
    (empty / "adapter_config.json").write_text("{}")
    with pytest.raises(ModelError, match="is a LoRA adapter; merge it into its base first"):
        Checkpoint(empty)
    with pytest.raises(ModelError, match="no such folder"):
        Checkpoint(tmp_path / "nowhere")
    (empty / "model.safetensors").write_bytes(b"nothing")
    with pytest.raises(ModelError, match=r"cannot read model\.safetensors"):
        Checkpoint(empty)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ModelError, match="neither a folder here nor a model the hub gave"):
        Checkpoint("nobody/nothing-of-the-kind")


@pytest.mark.parametrize("text", ["{}", "[]", "?", '{"weight_map": {"a": "../a.safetensors"}}'])
def test_wrong_indices_are_refused(tmp_path, text):
    (tmp_path / "model.safetensors.index.json").write_text(text)
    with pytest.raises(ModelError, match=r"no weight_map|not beside it"):
        Checkpoint(tmp_path)


def test_a_hub_model_is_read_from_the_cache(init, suspect, tmp_path, monkeypatch):
    cache = tmp_path / "cache"
    repository = cache / "models--someone--bert"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("0" * 40)
    shutil.copytree(init, repository / "snapshots" / ("0" * 40))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    hub = Checkpoint("someone/bert")
    assert hub.source == "someone/bert"
    assert (
        WeightPair.load("someone/bert", suspect).moved() == WeightPair.load(init, suspect).moved()
    )
    (hub.folder / "model.safetensors").unlink()
    torch.save({"weight": torch.ones(2)}, hub.folder / "pytorch_model.bin")
    assert Checkpoint("someone/bert", allow_pickle=True).names == ["weight"]


def test_a_checkpoint_is_looked_at_without_reading(tmp_path):
    tensors = {
        "a": torch.zeros(2, 3, dtype=torch.float16),
        "b": torch.tensor(1.5),
        "c": torch.zeros(0),
    }
    save_file(tensors, tmp_path / "model.safetensors")
    checkpoint = Checkpoint(tmp_path)
    assert {name: checkpoint.shape(name) for name in "abc"} == {"a": (2, 3), "b": (), "c": (0,)}
    assert [checkpoint.dtype(name) for name in "ab"] == [torch.float16, torch.float32]
    assert [checkpoint.numel(name) for name in "abc"] == [6, 1, 0]
