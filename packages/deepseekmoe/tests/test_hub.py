"""Checkpoints in the released layout: read without remote code, refused with a name, written back."""

import json
import subprocess
import sys
from typing import Any

import huggingface_hub
import pytest
import torch
from deepseekmoe import hub
from deepseekmoe.hub import load, save
from deepseekmoe.layer import moe_layers
from deepseekmoe.modeling import DeepseekMoeForCausalLM
from octavo.errors import ModelError
from octavo.models import load_model, load_tokenizer
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM

EXPERT = "model.layers.1.mlp.experts.5.up_proj.weight"


def test_loads_natively_and_saves_back_byte_for_byte(released, tmp_path):
    folder = released()
    model: Any = hub.load(folder, tokenizer=False, dtype="auto")[0]
    assert type(model).__module__ == "deepseekmoe.modeling"
    assert model.dtype == torch.bfloat16
    raw = load_file(folder / "model.safetensors")
    gate = model.model.layers[1].mlp.experts.gate_up_proj[5]
    assert gate[16:].equal(raw[EXPERT])
    assert gate[:16].equal(raw[EXPERT.replace("up_proj", "gate_proj")])
    model.save_pretrained(tmp_path / "saved")
    first = (folder / "model.safetensors").read_bytes()
    assert (tmp_path / "saved" / "model.safetensors").read_bytes() == first
    config = json.loads((tmp_path / "saved" / "config.json").read_text())
    assert config["architectures"] == ["DeepseekForCausalLM"]
    assert config["model_type"] == "deepseek"
    assert config["a_key_of_the_future"] == 7
    assert config["rope_theta"] == 10000
    assert "auto_map" not in config


def test_shards_and_device_map(released):
    folder = released(shards=3)
    model, _ = hub.load(folder, tokenizer=False, device_map="cpu")
    ids = torch.arange(10)[None]
    with torch.no_grad():
        assert model(input_ids=ids).logits.isfinite().all()


def test_auto_classes_know_the_type_in_a_fresh_process(released):
    folder = released(dtype=torch.float32)
    script = (
        "import deepseekmoe, sys; deepseekmoe.register(); deepseekmoe.register()\n"
        "from transformers import AutoConfig, AutoModel, AutoModelForCausalLM\n"
        "print(type(AutoConfig.from_pretrained(sys.argv[1])).__name__)\n"
        "print(type(AutoModel.from_pretrained(sys.argv[1])).__name__)\n"
        "model, report = AutoModelForCausalLM.from_pretrained(sys.argv[1], output_loading_info=True)\n"
        "print(type(model).__name__, len(report['missing_keys']), len(report['unexpected_keys']))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(folder)], capture_output=True, text=True, check=False
    )
    assert done.stdout.split("\n")[:3] == [
        "DeepseekMoeConfig", "DeepseekMoeModel", "DeepseekMoeForCausalLM 0 0",
    ], done.stderr  # fmt: skip


def test_a_missing_expert_is_named(released):
    with pytest.raises(ModelError, match=rf"tensor {EXPERT} is missing$".replace(".", r"\.")):
        hub.load(released(drop=(EXPERT,)), tokenizer=False)


def test_a_tensor_in_two_shards_is_named(released):
    folder = released(shards=2)
    part = load_file(folder / "model-00001-of-00002.safetensors")
    other = load_file(folder / "model-00002-of-00002.safetensors")
    from safetensors.torch import save_file

    name = sorted(part)[0]
    save_file(other | {name: part[name]}, folder / "model-00002-of-00002.safetensors")
    with pytest.raises(
        ModelError, match=rf"tensor {name} stands in model-00001.* and in model-00002"
    ):
        hub.load(folder, tokenizer=False)


def test_a_tensor_of_another_shape_is_named(released):
    with pytest.raises(
        ModelError, match=rf"{EXPERT} is \[7, 32\], config.json makes it \[16, 32\]"
    ):
        hub.load(released(extra={EXPERT: torch.zeros(7, 32)}), tokenizer=False)


def test_an_expert_too_many_is_named(released):
    extra = {"model.layers.1.mlp.experts.8.up_proj.weight": torch.zeros(16, 32)}
    with pytest.raises(ModelError, match=r"experts.8.up_proj.weight, which is none of this model"):
        hub.load(released(extra=extra), tokenizer=False)


@pytest.fixture
def hub_of(monkeypatch):
    """Makes `snapshot_download` give a folder; what was asked for is in the list."""
    asked = []

    def serve(folder):
        def give(name, *, allow_patterns, **options):
            asked.append((name, allow_patterns, options))
            if isinstance(folder, Exception):
                raise folder
            return str(folder)

        monkeypatch.setattr(huggingface_hub, "snapshot_download", give)
        return asked

    return serve


def test_a_hub_id_is_checked_before_it_is_loaded(released, hub_of, monkeypatch):
    folder = released(drop=(EXPERT,))
    asked = hub_of(folder)
    monkeypatch.setattr(hub, "load_checked", None)
    with pytest.raises(ModelError, match=rf"tensor {EXPERT} is missing$".replace(".", r"\.")):
        hub.load("someone/moe", tokenizer=False, revision="first")
    assert [options for *_, options in asked] == [{"revision": "first"}] * 2


def test_a_hub_id_is_loaded_from_where_it_lies(released, hub_of):
    asked = hub_of(released())
    model, _ = hub.load("someone/moe", tokenizer=False, dtype="auto")
    assert model.dtype == torch.bfloat16
    assert model.name_or_path == model.config.name_or_path == "someone/moe"
    assert [name for name, *_ in asked] == ["someone/moe"] * 2


def test_weights_of_another_family_are_not_fetched(released, hub_of):
    asked = hub_of(released(settings={"model_type": "deepseek_v2"}))
    with pytest.raises(ModelError, match="latent attention"):
        hub.load("someone/other")
    assert [files for _, files, _ in asked] == ["config.json"]


def test_a_hub_that_gives_nothing_is_one_line(hub_of, command):
    hub_of(huggingface_hub.errors.LocalEntryNotFoundError("no network\nand more"))
    code, _, err = command("generate", "someone/moe", "the cat")
    assert (code, err.count("\n")) == (2, 1)
    assert "someone/moe: neither a folder here nor a model the hub gave" in err
    assert "(no network)" in err
    code, _, err = command("generate", "./nowhere", "the cat")
    assert (code, err.count("\n")) == (2, 1)
    assert "./nowhere: no such folder" in err


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (
            {"model_type": "deepseek_v2"},
            "model_type 'deepseek_v2' is DeepSeek-V2 .latent attention",
        ),
        ({"model_type": "llama"}, "a dense LLaMA"),
        ({"model_type": "mixtral"}, "model_type 'mixtral' is another architecture"),
        ({"kv_lora_rank": 512}, "kv_lora_rank .latent attention"),
    ],
)
def test_foreign_families_are_refused(released, settings, words):
    with pytest.raises(ModelError, match=words):
        hub.load(released(settings=settings), tokenizer=False)


def test_latent_attention_is_told_by_its_tensors(released):
    extra = {"model.layers.0.self_attn.kv_a_proj_with_mqa.weight": torch.zeros(4, 32)}
    with pytest.raises(ModelError, match=r"kv_a_proj_with_mqa.*latent attention"):
        hub.load(released(extra=extra), tokenizer=False)


def test_an_oversized_tokenizer_is_refused(released):
    from octavo.tiny import Shape, make_tokenizer

    folder = released()
    shape = Shape(kind="llama", alphabet="bpe", vocabulary=400)
    make_tokenizer(["some words of a text " * 9] * 9, shape).save_pretrained(folder)
    tokenizer = load_tokenizer(folder)
    assert len(tokenizer) <= 300
    tokenizer.add_tokens([f"<extra {number}>" for number in range(200)])
    tokenizer.save_pretrained(folder)
    with pytest.raises(
        ModelError, match=r"tokenizer has .* model.embed_tokens.weight has 300 rows"
    ):
        hub.load(folder)


def test_no_config_and_a_torn_file_are_told(released, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ModelError, match=r"no config.json"):
        hub.load(tmp_path / "empty")
    folder = released()
    (tmp_path / "empty" / "config.json").write_bytes((folder / "config.json").read_bytes())
    with pytest.raises(ModelError, match=r"holds no weights"):
        hub.check_folder(tmp_path / "empty")
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[:100])
    with pytest.raises(ModelError, match=r"model.safetensors: cannot be read"):
        hub.load(folder, tokenizer=False)


def test_plain_transformers_loads_what_is_saved(released, tmp_path):
    model, _ = hub.load(released(), tokenizer=False)
    model.save_pretrained(tmp_path / "saved")
    again = load_model(AutoModelForCausalLM, tmp_path / "saved")
    for one, two in zip(model.parameters(), again.parameters(), strict=True):
        assert one.equal(two)
    assert AutoConfig.from_pretrained(tmp_path / "saved").n_routed_experts == 8


@pytest.mark.parametrize(
    "changes",
    [
        {"tie_word_embeddings": True},
        {"bias_update_rate": 1e-3},
        {"n_hash_layers": 2, "num_experts_per_tok": 1},
        {"attention_bias": True, "mlp_bias": True},
        {"n_shared_experts": 0},
        {"n_routed_experts": 0, "num_experts_per_tok": 0},
    ],
)
def test_every_variant_round_trips(small, tmp_path, changes):
    from deepseekmoe.modeling import DeepseekMoeForCausalLM

    hub.register()
    model: Any = DeepseekMoeForCausalLM(small(**changes))
    if "bias_update_rate" in changes:
        model.model.layers[1].mlp.gate.e_score_correction_bias += 0.5
    model.save_pretrained(tmp_path / "saved")
    again, _ = hub.load(tmp_path / "saved", tokenizer=False)
    state = again.state_dict()
    for name, value in model.state_dict().items():
        assert state[name].equal(value), name


def test_the_chat_template_is_the_released_models(released):
    from octavo.tiny import Shape, make_tokenizer

    tokenizer = make_tokenizer(
        ["User: hello Assistant: yes " * 5], Shape(kind="llama", alphabet="bpe")
    )
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes"},
             {"role": "user", "content": "Go"}]  # fmt: skip
    text = tokenizer.apply_chat_template(
        turns, chat_template=hub.CHAT_TEMPLATE, tokenize=False, add_generation_prompt=True
    )
    end = tokenizer.eos_token
    assert text == f"{end}User: Hi\n\nAssistant: Yes{end}User: Go\n\nAssistant:"


def test_convert_writes_precision_and_shards(command, trained, tmp_path):
    out = tmp_path / "half"
    words = ["convert", trained / "model", "--out", out, "--dtype", "bfloat16"]
    code, printed, err = command(*words, "--max-shard-size", "100KB")
    assert code == 0, err
    assert "bfloat16" in printed
    assert len(list(out.glob("model-*.safetensors"))) > 1
    half, tokenizer = hub.load(out, dtype="auto")
    assert tokenizer is not None
    whole, _ = hub.load(trained / "model")
    for one, two in zip(half.parameters(), whole.parameters(), strict=True):
        assert one.equal(two.bfloat16())
    code, _, err = command(*words)
    assert (code, err.count("\n")) == (2, 1)
    assert "exists already" in err
    code, _, err = command(*words, "--overwrite", "--max-shard-size", "small")
    assert (code, err.count("\n")) == (2, 1)
    assert "--max-shard-size small: must be like 5GB" in err
    assert (out / "config.json").is_file()


def test_the_selection_bias_stays_exact_in_half_precision(small, tmp_path):
    model: Any = DeepseekMoeForCausalLM(small(bias_update_rate=1e-3))
    for layer in moe_layers(model):
        layer.gate.e_score_correction_bias += 1.001  # no number of bfloat16
    save(tmp_path / "model", model)
    half, _ = load(tmp_path / "model", tokenizer=False, dtype=torch.bfloat16)
    for layer in moe_layers(half):
        assert layer.gate.weight.dtype == torch.bfloat16
        assert float(layer.gate.e_score_correction_bias[0]) == pytest.approx(1.001, abs=1e-6)
    for layer in moe_layers(model.to(torch.bfloat16)):
        assert layer.gate.weight.dtype == torch.bfloat16
        assert float(layer.gate.e_score_correction_bias[0]) == pytest.approx(1.001, abs=1e-6)
