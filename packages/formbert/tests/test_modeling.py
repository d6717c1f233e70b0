"""The authors' model against an independent few lines of its formulas; families; saving and loading."""

import json
import subprocess
import sys
from dataclasses import asdict

import numpy as np
import pytest
import torch
from formbert.authors import convert, ours, theirs
from formbert.config import ModelOptions, with_preset
from formbert.data import locate
from formbert.disambiguator import Disambiguator
from formbert.formations import Formation
from formbert.lexicon import mini_instances, mini_inventory
from formbert.modeling import FormBertCross, FormBertCrossConfig, build, load
from formbert.objectives import pair_loss
from octavo.errors import ModelError
from octavo.models import save_model
from safetensors.torch import save_file
from torch import nn
from transformers import AutoConfig, AutoModel, BertConfig, BertModel

SOME = mini_instances()["test_words"][::9]
PAPER = asdict(with_preset(ModelOptions(), "paper")) | {"max_length": 48}


class Independent(nn.Module):
    """Sections 1.3 and 1.4 of the method page, written from its formulas, with the authors' names."""

    def __init__(self, config):
        super().__init__()
        width = config.hidden_size
        self.bert = BertModel(config)
        self.classifier = nn.Linear(width, 2)
        self.formation_embedding = nn.Embedding(18, width)
        self.formation_predictor = nn.ModuleDict(
            {"mlp": nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width)),
             "classifier": nn.Linear(width, 18)}
        )  # fmt: skip

    def forward(self, pairs, contexts, formation):
        pooled = self.bert(**pairs).pooler_output
        u = self.bert.embeddings(contexts["input_ids"], contexts["token_type_ids"])
        q = self.formation_predictor["classifier"](self.formation_predictor["mlp"](u).mean(1))
        f = formation if self.training else q.argmax(-1)
        return self.classifier(pooled + self.formation_embedding(f)), q


@pytest.fixture(scope="module")
def theirs_and_ours(tmp_path_factory, make):
    made = make(**{name: value for name, value in PAPER.items() if name != "dropout"}, dropout=0.0)
    config = BertConfig(**made.model.config.encoder)
    other = Independent(config)
    other.load_state_dict(theirs(made.model))
    return made, other


def rows(made, instances):
    """Padded to the maximal length, every candidate a row."""
    pairs, contexts, formation, gold = [], [], [], []
    for one in instances:
        for sense in mini_inventory()[one.word]:
            word = f"{one.text[: one.start]}#{one.word}#{one.text[one.end :]}"
            pairs.append((word, f"{sense.word}：{sense.gloss}"))
            contexts.append(word)
            formation.append(int(sense.formation or 0))
            gold.append(sense.sense_id in one.gold)
    options = {
        "padding": "max_length",
        "max_length": 48,
        "truncation": True,
        "return_tensors": "pt",
    }
    return (
        made.tokenizer([a for a, _ in pairs], [b for _, b in pairs], **options),
        made.tokenizer(contexts, **options), torch.tensor(formation), torch.tensor(gold),
    )  # fmt: skip


@torch.no_grad()
def test_answers_are_the_authors(theirs_and_ours):
    made, other = theirs_and_ours
    pairs, contexts, formation, _ = rows(made, SOME)
    logits, q = other.eval()(pairs, contexts, formation)
    items = made.reader.read(SOME)
    listed = [(at, sense) for at, item in enumerate(items) for sense in item.candidates]
    none = torch.zeros(len(listed), dtype=torch.bool)
    found = made.model.eval()(**made.reader.cross(items, listed, none))
    assert torch.allclose(found.logits, logits, atol=1e-5)
    text = [at for at, _ in listed]
    assert torch.allclose(found.formation_logits[text], q, atol=1e-5)


def test_the_loss_and_its_gradients_are_the_authors(theirs_and_ours):
    from formbert.config import ObjectiveOptions
    from formbert.training import Lessons
    from octavo.runtime import Runtime

    made, other = theirs_and_ours
    pairs, contexts, formation, gold = rows(made, SOME)
    other.train()
    other.bert.eval()  # no dropout in either
    logits, q = other(pairs, contexts, formation)
    wanted = nn.functional.cross_entropy(logits, gold.long())
    wanted = wanted + 0.5 * nn.functional.cross_entropy(q, formation)
    wanted.backward()
    objective = ObjectiveOptions(objective="pair", annotation_drop=0.0)
    lessons = Lessons(made.reader, made.reader.read(SOME), objective, Runtime(device="cpu"))
    made.model.eval().zero_grad()
    loss = lessons.loss(made.model, lessons.batch(range(len(SOME))))
    loss.backward()
    assert loss.item() == pytest.approx(wanted.item(), abs=1e-5)
    for name, weight in other.named_parameters():
        mine = made.model.get_parameter("encoder." + name[5:] if name[:5] == "bert." else name)
        if weight.grad is not None:
            assert torch.allclose(mine.grad[: len(weight)], weight.grad, atol=1e-5), name


@pytest.mark.parametrize("pickled", [False, True])
def test_their_checkpoint_is_converted(theirs_and_ours, tmp_path, pickled):
    made, other = theirs_and_ours
    folder = tmp_path / "theirs"
    made.tokenizer.save_pretrained(folder)
    BertConfig(**made.model.config.encoder).save_pretrained(folder)
    if pickled:
        torch.save(other.state_dict(), folder / "pytorch_model.bin")
        with pytest.raises(ModelError, match="--allow-pickle"):
            convert(folder, tmp_path / "ours")
    else:
        save_file({k: v.contiguous() for k, v in other.state_dict().items()},
                  folder / "model.safetensors")  # fmt: skip
    convert(folder, tmp_path / "ours", allow_pickle=pickled)
    model, _ = load(tmp_path / "ours")
    state = model.state_dict()
    assert all(
        torch.equal(weight, state[name]) for name, weight in ours(other.state_dict()).items()
    )
    assert model.options.authors


def test_weights_of_another_model_are_refused(tmp_path, encoder):
    with pytest.raises(ModelError, match="no formation_embedding"):
        convert(encoder, tmp_path / "out")
    with pytest.raises(ModelError, match="neither"):
        convert(tmp_path, tmp_path / "out")


def test_only_the_papers_model_has_the_authors_form(make):
    with pytest.raises(ModelError, match="--preset paper"):
        theirs(make().model)


FAMILIES = {
    "bert": {}, "roberta": {"max_position_embeddings": 80},
    "distilbert": {"dim": 32, "n_layers": 2, "n_heads": 2, "hidden_dim": 48},
    "deberta-v2": {"relative_attention": True, "pos_att_type": ["p2c", "c2p"]},
    "electra": {"embedding_size": 16}, "modernbert": {},
}  # fmt: skip


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("arch", ["cross", "bi"])
def test_families(tmp_path, encoder, make, family, arch):
    """Any encoder: built, saved, loaded, and the answers are the same."""
    tokenizer = make().tokenizer
    settings = {
        "vocab_size": len(tokenizer), "hidden_size": 32, "num_hidden_layers": 2,
        "num_attention_heads": 2, "intermediate_size": 48, "max_position_embeddings": 64,
        "pad_token_id": tokenizer.pad_token_id,
    } | FAMILIES[family]  # fmt: skip
    torch.manual_seed(0)
    model = AutoModel.from_config(AutoConfig.for_model(family, **settings))
    save_model(tmp_path / "encoder", model, tokenizer)
    options = ModelOptions(
        arch=arch, max_length=64, fusion=("token", "agreement", "pooled_add", "matrix")
    )
    made, tokenizer = build(tmp_path / "encoder", options)
    before = Disambiguator(made, tokenizer, mini_inventory()).batch(SOME)
    save_model(tmp_path / "model", made, tokenizer)
    after = Disambiguator.from_pretrained(tmp_path / "model", "mini").batch(SOME)
    for a, b in zip(before, after, strict=True):
        assert a.probability == pytest.approx(b.probability, abs=1e-5)
        assert a.sense_id == b.sense_id


def test_special_marks_are_new_tokens(encoder):
    made, tokenizer = build(encoder, ModelOptions(marking="special", max_length=64))
    assert made.encoder.get_input_embeddings().num_embeddings == len(tokenizer)
    wsd = Disambiguator(made, tokenizer, mini_inventory())
    (span,) = wsd.reader.encoding.spans([locate("他去银行存款。", "存款")])
    assert tokenizer.convert_ids_to_tokens(list(span.ids))[4] == "[TGT]"
    assert wsd("他去银行存款。", "存款").sense_id


def test_the_auto_classes_know_the_models_in_a_fresh_process(taught):
    """`register` is all that a stranger's script needs."""
    script = (
        "import formbert, sys; from transformers import AutoModel; formbert.register();"
        "print(type(AutoModel.from_pretrained(sys.argv[1])).__name__)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(taught["bi"])],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == "FormBertBi"


def test_a_model_of_another_kind_is_refused(encoder, tmp_path):
    with pytest.raises(ModelError, match="is no FormBERT model but bert"):
        load(encoder)


def test_new_parts_are_initialised_and_the_config_survives(make, tmp_path):
    made = make(fusion=("token", "bilinear", "matrix"))
    save_model(tmp_path / "m", made.model, made.tokenizer)
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    assert config["options"]["fusion"] == ["token", "bilinear", "matrix"]
    fresh = FormBertCross(FormBertCrossConfig(**{k: config[k] for k in ("encoder", "options")}))
    assert all(weight.isfinite().all() for weight in fresh.parameters())
    assert fresh.formation_token.weight.std() < 0.5


def test_unknown_formations_have_a_share_of_their_own(make):
    made = make(formation_source="annotation")
    known = torch.zeros(2, 18)
    known[0, Formation.VERB_OBJECT] = 1
    shares = made.model.shares(known, torch.tensor([True, True]), None)
    assert shares[:, -1].tolist() == [0, 1]
    soft = make(formation_source="soft")
    logits = torch.randn(2, 18)
    shares = soft.model.shares(known, torch.tensor([True, False]), logits)
    assert torch.allclose(shares[1, :-1], logits[1].softmax(0))
    hard = make(formation_source="predicted")
    shares = hard.model.shares(known, torch.tensor([False, False]), logits)
    assert np.array_equal(shares[:, :-1].argmax(1), logits.argmax(1))
    assert shares.sum(1).tolist() == [1, 1]
    assert pair_loss(torch.zeros(3, 2), torch.tensor([True, False, True])).item() == pytest.approx(
        np.log(2)
    )
