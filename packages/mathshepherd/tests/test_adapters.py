"""Public reward models: their layouts in small, scored as their own evaluation code does it."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from mathshepherd.adapters import FAMILIES, FamilyScorer, load_tensors, open_scorer
from mathshepherd.reward_model import StepRewardModel
from octavo.errors import ConfigError, DataError, ModelError
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedTokenizerFast,
)

LLAMA = (
    "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m['role'] }}<|end_header_id|>\n\n"
    "{{ m['content'] | trim }}<|eot_id|>{% endfor %}"
)
MISTRAL = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}[INST] {{ m['content'] }} "
    "[/INST]{% else %} {{ m['content'] }}</s>{% endif %}{% endfor %}"
)
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
)
SYSTEM = "Please reason step by step, and put your final answer within \\boxed{}."

QUESTIONS = ["Ann has 3 pens - and buys 4. How many?", "What is\n2 + 2 - 1?", "What is\n2 + 2 - 1?"]
SOLUTIONS = [
    ["3 + 4 = 7.", "So - for sure - 7.", "The answer is: 7"],
    ["2 + 2 = 4", "4 - 1 = 3"],
    ["2 + 2 = 5"],
]


def make_tokenizer(begin, end, special=(), template=None, pieces=False):
    """BPE over bytes, as Llama 3's and Qwen's; or over pieces with a blank before, as Mistral's."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>" if pieces else None))
    text = "Step 1: 3 + 4 = 7. ки\nStep 2: 4 - 1 = 3 ки\nThe answer is: 7 ки\n ки\n + -\n[INST] [/INST]"
    lines = pre_tokenizers.Split("\n", "isolated")
    blank = pre_tokenizers.Sequence([lines, pre_tokenizers.Metaspace(prepend_scheme="first")])
    tokenizer.pre_tokenizer = blank if pieces else pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.Metaspace() if pieces else decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=380,
        special_tokens=[token for token in ("<unk>" if pieces else None, begin, end) if token],
        initial_alphabet=[] if pieces else pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([text] * 20 + QUESTIONS + [SYSTEM], trainer)
    tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in special])
    found = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=begin, eos_token=end, chat_template=template,
        clean_up_tokenization_spaces=False,
    )  # fmt: skip
    if pieces:  # a text begins with <s>
        from tokenizers.processors import TemplateProcessing

        ids = [(begin, tokenizer.token_to_id(begin))]
        tokenizer.post_processor = TemplateProcessing(single=f"{begin} $A", special_tokens=ids)
        found = PreTrainedTokenizerFast(
            tokenizer_object=tokenizer, bos_token=begin, eos_token=end, unk_token="<unk>",
            chat_template=template, clean_up_tokenization_spaces=False,
        )  # fmt: skip
    return found


def make_model(kind, tokenizer, **changes):
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        kind, **{
            "vocab_size": len(tokenizer) + 3, "hidden_size": 32, "num_hidden_layers": 2,
            "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 48,
            "max_position_embeddings": 256, "initializer_range": 0.25, "bos_token_id": 0,
            "eos_token_id": 1, "pad_token_id": None, "tie_word_embeddings": False,
        } | changes,
    )  # fmt: skip
    return AutoModelForCausalLM.from_config(config).eval()


def save(folder, model, tokenizer, head=None, output=True, **config):
    """A public checkpoint's layout: the head's weights lie among the model's."""
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    if head is not None:
        weights = load_file(folder / "model.safetensors")
        if not output:
            del weights["lm_head.weight"]
        save_file(weights | head, folder / "model.safetensors", {"format": "pt"})
    content = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(content | config))
    return AutoTokenizer.from_pretrained(folder)  # Qwen2's makes tokens of its own


def qwen_tokenizer(**options):
    special = ["<|im_start|>", "<|im_end|>", "<extra_0>"]
    options = {"special": special, "template": CHATML} | options
    return make_tokenizer("<|endoftext|>", "<|end|>", **options)


class Made:
    """A checkpoint of a family on the disk, and what its own evaluation makes of a solution."""

    def __init__(self, folder, model, tokenizer, reference):
        self.folder, self.model, self.tokenizer, self.reference = (
            folder,
            model,
            tokenizer,
            reference,
        )


def make_shepherd(folder):
    tokenizer = make_tokenizer("<s>", "</s>", pieces=True)
    model = make_model("mistral", tokenizer, sliding_window=64)
    tokenizer = save(folder, model, tokenizer)

    @torch.no_grad()
    def reference(question, steps):  # the model card's snippet
        lines = [f"Step {n}: {step} ки" for n, step in enumerate(steps, 1)]
        text = f"{question} " + "\n".join(lines)
        candidates = tokenizer.encode("+ -")[1:]
        ids = torch.tensor([tokenizer.encode(text)])
        scores = model(ids).logits[:, :, candidates].softmax(-1)[:, :, 0]
        return scores[ids == tokenizer.encode("ки")[-1]]

    return Made(folder, model, tokenizer, reference)


def make_rlhflow(folder, template=LLAMA, pieces=False, kind="llama", **changes):
    special = {LLAMA: ["<|start_header_id|>", "<|end_header_id|>"], MISTRAL: []}
    special = special.get(template, ["<|im_start|>", "<|im_end|>"])
    ends = ("<s>", "</s>") if pieces else ("<|begin_of_text|>", "<|eot_id|>")
    tokenizer = make_tokenizer(*ends, special, template, pieces)
    model = make_model(kind, tokenizer, **changes)
    tokenizer = save(folder, model, tokenizer)
    candidates = [tokenizer.encode(verdict)[-1] for verdict in "+-"]
    behind = 4 if template == CHATML else 3  # +, the turn's end and, in ChatML, a line break

    @torch.no_grad()
    def reference(question, steps):  # one pass a step, read three from the end
        chat, found = [], []
        for n, step in enumerate(steps):
            chat += [{"role": "user", "content": step if n else f"{question} {step}"},
                     {"role": "assistant", "content": "+"}]  # fmt: skip
            ids = tokenizer.apply_chat_template(chat, return_tensors="pt", return_dict=False)
            found.append(model(ids).logits[0, -behind, candidates].softmax(-1)[0])
        return torch.stack(found)

    return Made(folder, model, tokenizer, reference)


def make_skywork(folder):
    tokenizer = qwen_tokenizer(template=None)
    model = make_model("qwen2", tokenizer)
    head = nn.Linear(32, 1)
    nn.init.normal_(head.weight)
    weights = {f"v_head.summary.{name}": value for name, value in head.state_dict().items()}
    tokenizer = save(folder, model, tokenizer, weights, architectures=["Qwen2ForPrmModel"])

    @torch.no_grad()
    def reference(question, steps):  # prepare_input, and the value head on the last hidden state
        ids, flags = tokenizer.encode(tokenizer.bos_token + question + "\n"), []
        for step in steps:
            ids += [*tokenizer.encode(step), tokenizer.encode("\n")[-1]]
            flags.append(len(ids) - 1)
        states = model(torch.tensor([ids]), output_hidden_states=True).hidden_states[-1]
        return head(states).squeeze(-1).sigmoid()[0, flags]

    return Made(folder, model, tokenizer, reference)


def make_qwen(folder, output=False):
    tokenizer = qwen_tokenizer()
    model = make_model("qwen2", tokenizer)
    last = nn.Linear(32, 2)
    nn.init.normal_(last.weight)
    head = nn.Sequential(nn.Linear(32, 32), nn.ReLU(), last)
    weights = {f"score.{name}": value for name, value in head.state_dict().items()}
    code = {"AutoConfig": "configuration_x.X", "AutoModel": "modeling_x.X"}  # never fetched or run
    tokenizer = save(folder, model, tokenizer, weights, output, auto_map=code,
                     architectures=["Qwen2ForProcessRewardModel"])  # fmt: skip

    @torch.no_grad()
    def reference(question, steps):  # the model card's make_step_rewards
        chat = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": question},
                {"role": "assistant", "content": "<extra_0>".join(steps) + "<extra_0>"}]  # fmt: skip
        text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=False)
        ids = torch.tensor([tokenizer.encode(text)])
        probabilities = head(model.model(ids).last_hidden_state).softmax(-1)
        masked = probabilities * (ids == tokenizer.encode("<extra_0>")[0]).unsqueeze(-1)
        return masked[masked != 0].view(-1, 2)[:, 1]

    return Made(folder, model, tokenizer, reference)


MAKERS = {"math-shepherd": make_shepherd, "rlhflow": make_rlhflow, "skywork": make_skywork,
          "qwen": make_qwen}  # fmt: skip


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    assert set(MAKERS) == set(FAMILIES)
    root = tmp_path_factory.mktemp("families")
    return {name: maker(root / name) for name, maker in MAKERS.items()}


def same(found, expected):
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5, rtol=0)
        assert one.dtype == np.float32


@pytest.mark.parametrize("name", MAKERS)
def test_scores_are_those_of_the_familys_own_evaluation(name, made):
    one = made[name]
    expected = [one.reference(*pair) for pair in zip(QUESTIONS, SOLUTIONS, strict=True)]
    assert np.concatenate(expected).std() > 0.05  # they tell something
    scorer = open_scorer(str(one.folder), name, "cpu", torch.float32)
    same(scorer.step_scores(QUESTIONS, SOLUTIONS), expected)


@pytest.mark.parametrize("name", MAKERS)
def test_scores_do_not_depend_on_batch_and_order(name, made):
    scorer = open_scorer(str(made[name].folder), name)
    rows = []
    scorer.model.get_decoder().register_forward_hook(
        lambda module, inputs, options, output: rows.append(len(options["input_ids"])),
        with_kwargs=True,
    )
    expected = scorer.step_scores(QUESTIONS, SOLUTIONS)
    assert rows == [3]  # one pass
    same(scorer.step_scores(QUESTIONS, SOLUTIONS, batch_tokens=1), expected)
    assert rows == [3, 1, 1, 1]
    twice = scorer.step_scores([*QUESTIONS[::-1], *QUESTIONS], [*SOLUTIONS[::-1], *SOLUTIONS])
    assert rows == [3, 1, 1, 1, 3]  # the same text once
    same(twice, [*expected[::-1], *expected])
    assert scorer.step_scores([], []) == []


@pytest.mark.parametrize(
    ("template", "pieces", "kind", "changes"),
    [
        (CHATML, False, "llama", {}),
        (MISTRAL, True, "mistral", {}),
        (LLAMA, False, "cohere", {"logit_scale": 0.25}),  # its logits are scaled: all are read
    ],
)
def test_verdicts_are_found_in_any_chat_template(template, pieces, kind, changes, tmp_path):
    made = make_rlhflow(tmp_path / "model", template, pieces, kind, **changes)
    scorer = open_scorer(str(made.folder), "rlhflow")
    assert isinstance(scorer, FamilyScorer)
    assert scorer.exact == (kind != "cohere")
    expected = [made.reference(*pair) for pair in zip(QUESTIONS, SOLUTIONS, strict=True)]
    same(scorer.step_scores(QUESTIONS, SOLUTIONS), expected)


def test_without_a_family_it_is_this_projects_own(made):
    shepherd = made["math-shepherd"]
    scorer = open_scorer(str(shepherd.folder))
    assert isinstance(scorer, StepRewardModel)
    same(scorer.step_scores(QUESTIONS[:1], SOLUTIONS[:1]),
         [shepherd.reference(QUESTIONS[0], SOLUTIONS[0])])  # fmt: skip


def test_heads_lie_in_several_files_and_in_half_precision(made, tmp_path):
    one = made["qwen"]
    folder, weights = tmp_path / "model", load_file(one.folder / "model.safetensors")
    one.tokenizer.save_pretrained(folder)
    config = (one.folder / "config.json").read_text()
    (folder / "config.json").write_text(config.replace("float32", "bfloat16"))
    places = {name: f"model-{'score.0' in name:d}.safetensors" for name in weights}
    for file in set(places.values()):
        part = {name: value.bfloat16() for name, value in weights.items() if places[name] == file}
        save_file(part, folder / file, {"format": "pt"})
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": places}))
    scorer = open_scorer(str(folder), "qwen")  # in the checkpoint's own precision
    assert scorer.model.dtype == torch.bfloat16
    found = np.concatenate(scorer.step_scores(QUESTIONS, SOLUTIONS))
    expected = np.concatenate([*map(one.reference, QUESTIONS, SOLUTIONS)])
    np.testing.assert_allclose(found, expected, atol=0.1)
    plain = open_scorer(str(folder), "qwen", dtype=torch.float32)
    assert plain.model.dtype == torch.float32
    same(plain.step_scores(["1"], [["2"]]), plain.step_scores([" 1"], [["2\n"]]))  # stripped
    index.write_text(json.dumps({"weight_map": places | {"score.0.bias": "gone.safetensors"}}))
    with pytest.raises(ModelError, match=r"has no gone\.safetensors"):
        open_scorer(str(folder), "qwen")
    index.write_text("{")
    with pytest.raises(ModelError, match=r"cannot read its weights"):
        open_scorer(str(folder), "qwen")


@pytest.mark.parametrize("name", MAKERS)
def test_pickles_need_the_users_word(name, made, tmp_path):
    one, folder = made[name], tmp_path / "model"
    shutil.copytree(one.folder, folder)
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises(ModelError, match=r"pickle|has no model"):
        open_scorer(str(folder), name)
    scorer = open_scorer(str(folder), name, dtype=torch.float32, allow_pickle=True)
    expected = [one.reference(*pair) for pair in zip(QUESTIONS, SOLUTIONS, strict=True)]
    same(scorer.step_scores(QUESTIONS, SOLUTIONS), expected)


def test_a_pickle_that_is_more_than_weights_is_refused(made, tmp_path):
    class Code:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "ran",))

    torch.save({"v_head.summary.weight": Code()}, tmp_path / "pytorch_model.bin")
    with pytest.raises(ModelError, match="cannot read its weights"):
        load_tensors(str(tmp_path), ["v_head.summary.weight"], allow_pickle=True)
    assert not (tmp_path / "ran").exists()


def test_a_checkpoint_may_hold_the_output_matrix_too(tmp_path):
    made = make_qwen(tmp_path / "model", output=True)
    scorer = open_scorer(str(made.folder), "qwen")
    same(scorer.step_scores(QUESTIONS, SOLUTIONS), [*map(made.reference, QUESTIONS, SOLUTIONS)])


def test_what_cannot_be_scored_is_refused(made):
    for name in ("rlhflow", "skywork", "qwen"):
        scorer = open_scorer(str(made[name].folder), name)
        for solution, message in (
            ([], "solution 1: has no steps to score"),
            (["2", " \n"], "solution 1, step 2 of 2: is blank"),
            (["2" * 600], "does not fit the model's context"),
        ):
            with pytest.raises(DataError, match=message):
                scorer.step_scores(["1", "1"], [["2"], solution])
        with torch.no_grad():
            next(scorer.model.parameters()).fill_(torch.nan)
        with pytest.raises(ModelError, match="a score is NaN"):
            scorer.step_scores(["1"], [["2"]])
    skywork, qwen = (open_scorer(str(made[name].folder), name) for name in ("skywork", "qwen"))
    same(skywork.step_scores(["1"], [["2\n3"]]), skywork.step_scores(["1"], [["2 3"]]))
    with pytest.raises(DataError, match=r"step 1 of 1: holds '<extra_0>'"):
        qwen.step_scores(["1"], [["2 <extra_0>"]])
    with pytest.raises(DataError, match=r"a question holds '<extra_0>'"):
        qwen.step_scores(["<extra_0>"], [["2"]])


@pytest.mark.parametrize(
    ("made_as", "declared", "message"),
    [
        ("rlhflow", "qwen", r"has no weight 'score\.0\.weight'; is it of another --family"),
        ("rlhflow", "skywork", r"has no weight 'v_head\.summary\.weight'"),
        ("skywork", "qwen", r"has no weight 'score\.0\.weight'"),
        ("skywork", "rlhflow", r"does not use: v_head\.summary\.bias, v_head"),
        ("qwen", "rlhflow", r"lacks lm_head\.weight"),
        ("qwen", "math-shepherd", "must be one|lacks lm_head"),
        ("skywork", None, "must be one|does not use"),
    ],
)
def test_weights_of_another_family_are_told_in_one_line(made_as, declared, message, made):
    with pytest.raises(ModelError, match=message) as caught:
        open_scorer(str(made[made_as].folder), declared)
    assert "\n" not in str(caught.value)


def test_heads_that_do_not_fit_are_refused(made, tmp_path):
    one = made["qwen"]
    weights = {"score.0.weight": torch.zeros(32, 32), "score.0.bias": torch.zeros(32),
               "score.2.weight": torch.zeros(2, 32), "score.2.bias": torch.zeros(2)}  # fmt: skip
    for number, (changes, message) in enumerate((
        ({"score.2.weight": torch.zeros(2, 16)}, r"score\.2 has an unknown shape \(2, 16\)"),
        ({"score.2.weight": torch.zeros(3, 32), "score.2.bias": torch.zeros(3)}, "3 outputs"),
        ({"score.0.weight": torch.zeros(32, 8)}, r"score\.0 does not fit the model"),
    )):  # fmt: skip
        folder = tmp_path / str(number)
        save(folder, one.model, one.tokenizer, weights | changes)
        with pytest.raises(ModelError, match=message):
            open_scorer(str(folder), "qwen")
    (tmp_path / "0" / "model.safetensors").write_bytes(b"no weights")
    with pytest.raises(ModelError, match="cannot read its weights"):
        load_tensors(str(tmp_path / "0"), ["score.0.weight"])


def test_tokenizers_that_cannot_write_it_are_refused(tmp_path):
    def scorer(name, tokenizer, kind="qwen2"):
        model = make_model(kind, tokenizer)
        family = FAMILIES[name]
        base = model.model if family.head else model
        return FamilyScorer(base, tokenizer, family, nn.Linear(32, 1) if family.head else None)

    without = make_tokenizer("<s>", "</s>")
    with pytest.raises(ModelError, match="chat template cannot write this"):
        scorer("rlhflow", without)
    without.bos_token = None
    with pytest.raises(ModelError, match="names no bos_token"):
        scorer("skywork", without).step_scores(["1"], [["2"]])
    with pytest.raises(ModelError, match="'<extra_0>' is not one token"):
        scorer("qwen", make_tokenizer("<s>", "</s>", template=CHATML)).step_scores(["1"], [["2"]])
    silent = make_tokenizer("<s>", "</s>", template="{{ messages[0]['content'] }}")
    with pytest.raises(ModelError, match="0 places tell"):
        scorer("rlhflow", silent)
    silent.add_tokens("<extra_0>")
    with pytest.raises(ModelError, match="1 steps and 0 marks"):
        scorer("qwen", silent).step_scores(["1"], [["2"]])


def test_an_unknown_family_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="--family prm: is none of math-shepherd, rlhflow"):
        open_scorer(str(tmp_path), "prm")
    with pytest.raises(ModelError):
        open_scorer(str(tmp_path / "none"), "qwen")
