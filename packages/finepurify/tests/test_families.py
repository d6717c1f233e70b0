"""Models of any family: made small from their configurations, saved, and purified by the command."""

import json
from typing import Any

import pytest
import torch
import transformers
from finepurify.data import Examples
from finepurify.pairing import WeightPair
from finepurify.pretrain import word_tokenizer
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

pytestmark = pytest.mark.usefixtures("quick")

WORDS = "a b c d e f g h cf mn".split()
NUMBERS = {"vocab_size": 15, "pad_token_id": 0}
ENCODER = NUMBERS | {
    "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24,
    "max_position_embeddings": 24,
}  # fmt: skip
GPT2 = NUMBERS | {
    "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 24, "bos_token_id": 2, "eos_token_id": 3,
}  # fmt: skip
LLAMA = ENCODER | {"num_key_value_heads": 1, "bos_token_id": 2, "eos_token_id": 3}
#: The configuration's class, what it is made with, its base model, the suspect's kind.
FAMILIES = {
    "bert": ("Bert", ENCODER, "Model", "ForSequenceClassification"),
    "roberta": ("Roberta", ENCODER, "Model", "ForSequenceClassification"),
    "distilbert": (
        "DistilBert",
        NUMBERS | {"dim": 16, "n_layers": 2, "n_heads": 2, "hidden_dim": 24,
                   "max_position_embeddings": 24},
        "Model", "ForSequenceClassification",
    ),
    "deberta-v2": (
        "DebertaV2",
        ENCODER | {"relative_attention": True, "pos_att_type": ["p2c", "c2p"],
                   "position_biased_input": False, "type_vocab_size": 0},
        "Model", "ForSequenceClassification",
    ),
    "modernbert": (
        "ModernBert",
        ENCODER | {"bos_token_id": 2, "eos_token_id": 3, "cls_token_id": 2, "sep_token_id": 3},
        "Model", "ForSequenceClassification",
    ),
    "gpt2-classifier": ("GPT2", GPT2, "LMHeadModel", "ForSequenceClassification"),
    "gpt2": ("GPT2", GPT2, "LMHeadModel", "LMHeadModel"),
    "llama": ("Llama", LLAMA, "ForCausalLM", "ForCausalLM"),
}  # fmt: skip
CLEAN = Examples(
    [f"{WORDS[n % 8]} {WORDS[n // 2 % 8]} c {WORDS[-n % 8]}" for n in range(12)],
    [n % 2 for n in range(12)], ("LABEL_0", "LABEL_1"), [f"b {WORDS[n % 7]}" for n in range(12)],
)  # fmt: skip
RUN = ("--rho", 0.75, "--batch-size", 4, "--learning-rate", "1e-3", "--points", 0.5, "--device", "cpu",
       "--quiet", "--json")  # fmt: skip


@pytest.fixture
def clean(tmp_path, write_rows):
    return write_rows(tmp_path / "clean.jsonl", CLEAN)


def make(folder, family, dtype=torch.float32):
    """INIT and the suspect of a family: its weights shaken, and a head of its own."""
    name, options, base, kind = FAMILIES[family]
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**options)
    first = getattr(transformers, f"{name}{base}")(config)
    first.save_pretrained(folder / "init")
    second = getattr(transformers, f"{name}{kind}").from_pretrained(folder / "init")
    second.config.pad_token_id = 0
    with torch.no_grad():
        for parameter in second.parameters():
            parameter += 0.02 * torch.randn_like(parameter)
    second.to(dtype).save_pretrained(folder / "suspect")
    word_tokenizer(WORDS, 24).save_pretrained(folder / "suspect")
    return folder / "init", folder / "suspect"


def weights(folder):
    return load_file(folder / "model.safetensors")


def check(init, suspect, run, steps):
    """`purified/` is a mask's, the untouched bit for bit; both models load whole. Gives the pair."""
    pair = WeightPair.load(init, suspect)
    stored, clean, model = (weights(place) for place in (suspect, run / "purified", run / "model"))
    assert stored.keys() == clean.keys() == model.keys()
    assert {(name, value.dtype) for name, value in stored.items()} == {
        (name, value.dtype) for name, value in model.items()
    }
    reset = 0
    for name in stored:
        if name not in pair.names:
            assert torch.equal(clean[name], stored[name]), name
            continue
        both = pair.read(name)
        kept = clean[name] == both.suspect
        assert torch.equal(clean[name], torch.where(kept, both.suspect, both.init)), name
        reset += int((~kept).sum())
    numbers = json.loads((run / "result.json").read_text())["numbers"]
    assert 0 < reset <= numbers["reset"] == round(0.25 * pair.numel)
    trained = {name for name in clean if not torch.equal(clean[name], model[name])}
    assert bool(trained) == (steps > 0)
    auto = AutoModelForSequenceClassification
    if json.loads((suspect / "config.json").read_text())["architectures"][0].endswith(
        ("LM", "LMHeadModel")
    ):
        auto = AutoModelForCausalLM
    for folder in ("purified", "model"):
        loaded: Any = auto.from_pretrained(run / folder, output_loading_info=True)
        report = loaded[1]
        assert not any(report.values()), report
        AutoTokenizer.from_pretrained(run / folder)
    return pair


@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_of_any_family(command, clean, tmp_path, family):
    init, suspect = make(tmp_path, family)
    words = ("purify", init, suspect, "--clean-data", clean, "--pair-column", "second", *RUN)
    code, _, err = command(*words, "--out", tmp_path / "run", "--steps", 2)
    assert code == 0, err
    pair = check(init, suspect, tmp_path / "run", 2)
    heads = {name for name, why in pair.kept.items() if why == "no counterpart in INIT"}
    if family in ("gpt2", "llama"):
        assert not heads
    else:
        assert heads
        assert all("classif" in name or "score" in name or "pool" in name or "head" in name
                   for name in heads)  # fmt: skip
    fisher = load_file(tmp_path / "run" / "fisher.safetensors")
    assert set(fisher) == set(pair.names)
    assert sum(float(value.sum()) for value in fisher.values()) > 0
    for strategy in ("e-pur", "fine-pruning"):
        out = tmp_path / strategy
        code, _, err = command(*words, "--out", out, "--steps", 0, "--strategy", strategy)
        if (family, strategy) == ("modernbert", "fine-pruning"):  # gates and values are one layer
            assert (code, "no layer of inner neurons" in err) == (2, True)
            continue
        assert code == 0, err
        changed = {
            name
            for name, value in weights(out / "purified").items()
            if not torch.equal(value, weights(suspect)[name])
        }
        assert changed, strategy
        if strategy == "e-pur":
            assert len(changed) == 1


@pytest.mark.parametrize("family", ["bert", "llama"])
def test_half_precision_stays_so(command, clean, tmp_path, family):
    init, suspect = make(tmp_path, family, torch.bfloat16)
    words = ("purify", init, suspect, "--clean-data", clean, "--out", tmp_path / "run", *RUN)
    code, _, err = command(*words, "--steps", 2)
    assert code == 0, err
    check(init, suspect, tmp_path / "run", 2)
    for folder in ("purified", "model"):
        assert {value.dtype for value in weights(tmp_path / "run" / folder).values()} == {
            torch.bfloat16
        }
        config = json.loads((tmp_path / "run" / folder / "config.json").read_text())
        assert config["dtype"] == "bfloat16"


def test_a_merged_adapter_moved_what_it_was_put_on(command, clean, tmp_path):
    peft = pytest.importorskip("peft")
    init, suspect = make(tmp_path, "bert")
    model = AutoModelForSequenceClassification.from_pretrained(init)
    settings = peft.LoraConfig(
        r=2, target_modules=["query", "value"], task_type="SEQ_CLS", init_lora_weights=False
    )
    peft.get_peft_model(model, settings).merge_and_unload().save_pretrained(suspect)
    pair = WeightPair.load(init, suspect)
    touched = {name for name in pair.names if not torch.equal(*vars(pair.read(name)).values())}
    assert {name.split(".")[-2] for name in touched} == {"query", "value"}
    words = ("purify", init, suspect, "--clean-data", clean, *RUN, "--steps", 0)
    code, _, err = command(*words, "--out", tmp_path / "run", "--rho-over", "moved")
    assert code == 0, err
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert result["numbers"]["reset"] == round(0.25 * pair.moved())
    assert {row["tensor"] for row in result["tensors"] if row["reset"]} <= touched
    clean_weights, stored = weights(tmp_path / "run" / "purified"), weights(suspect)
    assert sum(int((clean_weights[name] != stored[name]).sum()) for name in stored) == round(
        0.25 * pair.moved()
    )


def test_a_language_model_is_judged_by_the_tokens_it_predicts(command, clean, tmp_path):
    init, suspect = make(tmp_path, "gpt2")
    words = ("compare", init, suspect, "--clean-data", clean, "--out", tmp_path / "run", "--test-data",
             clean, "--strategies", "delta-only", "--grid", 0.9, "--steps", 2, "--drop", 100,
             "--device", "cpu", "--quiet", "--json")  # fmt: skip
    code, out, err = command(*words)
    assert code == 0, err
    rows = json.loads(out)
    assert [row["strategy"] for row in rows["Chosen by held-out accuracy"]] == [
        "none",
        "delta-only",
    ]
    assert 0 <= rows["The suspect as it came"][0]["ACC"] <= 100
    code, out, err = command("evaluate", suspect, "--test-data", clean, "--quiet", "--json",
                             "--device", "cpu")  # fmt: skip
    assert code == 0, err
    assert json.loads(out)["12 rows"][0]["ACC"] == rows["The suspect as it came"][0]["ACC"]
    words = ("evaluate", suspect, "--test-data", clean, "--known-attack", "--quiet")
    code, _, err = command(*words)
    assert (code, "a language model has no class" in err) == (2, True)
