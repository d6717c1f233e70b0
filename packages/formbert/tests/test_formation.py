"""The formation predictor: lexicon before model, any subset of sources, saving, and real accuracy."""

import json

import numpy as np
import pytest
import torch
from formbert.data import Instance, by_word
from formbert.formation import (
    SOURCES,
    FormationConfig,
    FormationModel,
    FormationPredictor,
    features,
    train_predictor,
)
from formbert.formations import NAMES, Formation
from formbert.inventory import Inventory, Sense
from formbert.lexicon import HELD_OUT, mini_instances, mini_inventory
from octavo.errors import DataError, ModelError
from octavo.rundir import RunDir
from octavo.runtime import Runtime
from octavo.training import TrainOptions
from safetensors.torch import load_file

CPU = Runtime(device="cpu")
SMALL = FormationConfig(buckets=2**12, width=16, hidden_size=32, source_dropout=0.3)
VERB, NOUN = Formation.VERB_OBJECT, Formation.MODIFIER_HEAD
ADVERBIAL = Formation.ADVERBIAL_HEAD


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A predictor of the bundled words, each sense with one of its sentences; without a lexicon."""
    first = {one.gold[0]: one for one in reversed(mini_instances()["train"])}
    senses = [sense for sense in mini_inventory().senses if sense.word not in HELD_OUT]
    run = RunDir.open(tmp_path_factory.mktemp("formation") / "run", {})
    options = TrainOptions(learning_rate=1e-2, epochs=40, batch_size=16)
    contexts = [first[sense.sense_id] for sense in senses]
    predictor = train_predictor(senses, run, contexts, SMALL, options, CPU)
    assert set(predictor.lexicon) == {sense.word for sense in senses}
    return FormationPredictor(predictor.model)


def untrained(lexicon=None):
    torch.manual_seed(0)
    model = FormationModel(SMALL)
    torch.nn.init.normal_(model.bags.weight)
    return FormationPredictor(model, lexicon)


def test_unseen_features_say_nothing():
    torch.manual_seed(0)
    predictor = FormationPredictor(FormationModel(SMALL))
    one, two = predictor.probabilities(["存款", "白花"])
    assert np.array_equal(one, two)  # every row of the table is zero before training


def test_the_lexicon_is_asked_first():
    lexicon = {"存款": {VERB: 0.25, NOUN: 0.75}, "白花": {ADVERBIAL: 1.0}, "空": {}}
    predictor = untrained(lexicon)
    plain = untrained()
    words = ["存款", "白花", "没有", "空"]
    found = predictor.predict(words, top_k=18)
    assert [one.source for one in found] == ["lexicon", "lexicon", "model", "model"]
    assert found[0].ranked == ((NOUN, 0.75), (VERB, 0.25))
    assert (found[1].formation, found[1].probability) == (ADVERBIAL, 1.0)
    table = plain.probabilities(words)
    assert np.allclose(predictor.probabilities(words)[2:], table[2:])
    # with a gloss the model weighs what the lexicon allows
    given = ["把钱存起来。", "没有效果地花掉。", "", ""]
    table = plain.probabilities(words, glosses=given)
    weighed = np.array([0.25 * table[0, VERB], 0.75 * table[0, NOUN]])
    both = predictor.probabilities(words, glosses=given)
    assert np.allclose(both[0, [VERB, NOUN]], weighed / weighed.sum())
    assert both[0].sum() == pytest.approx(1)
    assert both[1, ADVERBIAL] == 1
    assert np.allclose(both[2], table[2])


def test_answers_do_not_hang_on_the_batch():
    predictor = untrained()
    senses = mini_inventory().senses
    columns = [[getattr(sense, name) for sense in senses] for name in ("word", "gloss", "pos")]
    words, glosses, pos = columns
    table = predictor.probabilities(words, None, glosses, pos)
    assert table.shape == (130, 18)
    assert np.allclose(table.sum(1), 1, atol=1e-5)
    parts = predictor.probabilities(words, None, glosses, pos, batch_size=7)
    assert np.allclose(table, parts, atol=1e-6)
    for n in (0, 77):
        alone = predictor.probabilities(words[n : n + 1], None, glosses[n : n + 1], pos[n : n + 1])
        assert np.allclose(alone[0], table[n], atol=1e-6)
    ranked = predictor.predict(words, None, glosses, pos, top_k=2)
    for one, row in zip(ranked, table, strict=True):
        best = sorted(row, reverse=True)[:2]
        assert [share for _, share in one.ranked] == pytest.approx(best)
        assert one.ranked[0][0] == row.argmax()
    assert predictor.predict([]) == []


def test_bags_are_sums_and_layers_follow():
    """The logits of one word, worked out from the weights."""
    predictor = untrained()
    model = predictor.model
    bags = features("存款", "存的钱。", "名", "  。 ", buckets=2**12)
    assert len(bags) == len(SOURCES)
    table = model.bags.weight.detach()
    row = torch.cat([table[list(bag)].sum(0) for bag in bags])
    _, first, activation, _, second = model.layers
    expected = second(activation(first(row))).softmax(-1).detach().numpy()
    context = [Instance("存款。", 0, 2, "存款")]
    found = predictor.probabilities(["存款"], context, ["存的钱。"], ["名"])[0]
    assert np.allclose(found, expected, atol=1e-6)


def test_features():
    bags = features("存款", buckets=2**15)
    assert [len(bag) for bag in bags] == [3, 0, 0, 0]
    assert all(0 <= one < 2**15 for bag in bags for one in bag)
    first, last, shape = bags[0]
    assert features("存折", buckets=2**15)[0][0] == first
    assert features("借款", buckets=2**15)[0][1] == last
    assert features("借债", buckets=2**15)[0][2] == shape
    assert features("白白", buckets=2**15)[0][2] != shape
    assert features("款存", buckets=2**15)[0][:2] != [first, last]
    assert len(features("研究生", buckets=2**15)[0]) == 7
    # the punctuation at a gloss's end is no head
    with_stop, without = (features("存款", gloss, buckets=2**15)[1] for gloss in ("的钱。", "的钱"))
    assert with_stop == without
    # order in the gloss tells "put money in" from "money put in"
    one, other = (set(features("存款", gloss, buckets=2**15)[1]) for gloss in ("存了款", "款了存"))
    assert one != other
    # characters rarely meet in one bucket
    alone = {features(chr(0x4E00 + n), buckets=2**15)[0][0] for n in range(3000)}
    assert len(alone) > 2800


def test_training_learns_from_every_source(trained):
    senses = [sense for sense in mini_inventory().senses if sense.word not in HELD_OUT]
    truth = np.array([int(sense.formation or 0) for sense in senses])
    words = [sense.word for sense in senses]
    first = {one.gold[0]: one for one in reversed(mini_instances()["train"])}

    def accuracy(**given):
        return (trained.probabilities(words, **given).argmax(1) == truth).mean()

    alone = accuracy()
    assert alone <= (29 + 2 * 19) / 96  # two senses of a word get one answer
    assert accuracy(pos=[sense.pos for sense in senses]) >= alone + 0.1
    assert accuracy(glosses=[sense.gloss for sense in senses]) >= alone + 0.1
    assert accuracy(contexts=[first[sense.sense_id] for sense in senses]) >= alone + 0.1


def test_contexts_may_be_texts_or_instances(trained):
    text = "他去银行存款了。"
    there = Instance(text, 4, 6, "存款")
    words = ["存款"] * 4
    table = trained.probabilities(words, [there, text, "他去银行#存款#了。", None])
    assert np.array_equal(table[0], table[1])
    assert np.array_equal(table[0], table[2])
    assert np.allclose(table[3], trained.probabilities(["存款"])[0], atol=1e-6)
    # only two characters on either side count
    near = trained.probabilities(["存款"], ["银行存款了。"])[0]
    assert np.allclose(near, table[0], atol=1e-6)
    far = trained.probabilities(["存款"], ["这笔存款很大。"])[0]
    assert not np.allclose(far, table[0], atol=1e-3)


def test_sources_are_hidden_in_training_only():
    model = untrained().model
    one = {"features": torch.arange(4), "offsets": torch.arange(4)}
    model.eval()
    full = model(**one).logits
    assert torch.equal(model(**one).logits, full)
    model.train()
    for layer in model.layers:
        if isinstance(layer, torch.nn.Dropout):
            layer.p = 0.0
    torch.manual_seed(0)
    outcomes = {tuple(model(**one).logits[0].tolist()) for _ in range(200)}
    assert len(outcomes) == 8  # each of three sources there or not
    model.config.source_dropout = 1.0
    alone = {"features": torch.tensor([0]), "offsets": torch.tensor([0, 1, 1, 1])}
    assert torch.allclose(model(**one).logits, model(**alone).logits, atol=1e-6)


def test_it_is_saved_and_loaded_whole(trained, tmp_path):
    lexicon = mini_inventory().formation_lexicon()
    before = FormationPredictor(trained.model, lexicon)
    before.save_pretrained(tmp_path / "saved")
    after = FormationPredictor.from_pretrained(tmp_path / "saved")
    assert {file.name for file in (tmp_path / "saved").iterdir()} == {
        "config.json", "lexicon.json", "model.safetensors"
    }  # fmt: skip
    assert after.lexicon == lexicon
    assert after.model.config.id2label == dict(enumerate(NAMES))
    assert not after.model.training
    words = ["存款", "没有", "白花"]
    assert np.allclose(before.probabilities(words), after.probabilities(words), atol=1e-6)
    pairs = zip(before.predict(words), after.predict(words), strict=True)
    assert all(one.formation == other.formation for one, other in pairs)
    table = load_file(tmp_path / "saved" / "model.safetensors")["bags.weight"]
    assert torch.equal(table, trained.model.bags.weight)
    (tmp_path / "saved" / "lexicon.json").unlink()
    assert FormationPredictor.from_pretrained(tmp_path / "saved").lexicon == {}


def test_what_cannot_be_loaded(trained, tmp_path):
    with pytest.raises(ModelError, match="no such folder"):
        FormationPredictor.from_pretrained(tmp_path / "nothing")
    trained.save_pretrained(tmp_path / "saved")
    place = tmp_path / "saved" / "config.json"
    config = json.loads(place.read_text(encoding="utf-8"))
    swapped = {**config["id2label"], "0": NAMES[1], "1": NAMES[0]}
    place.write_text(json.dumps(config | {"id2label": swapped}), encoding="utf-8")
    with pytest.raises(ModelError, match="official order"):
        FormationPredictor.from_pretrained(tmp_path / "saved")
    place.write_text(json.dumps(config | {"width": 8}), encoding="utf-8")
    with pytest.raises(ModelError, match="shape"):
        FormationPredictor.from_pretrained(tmp_path / "saved")


def test_wrong_input(tmp_path):
    predictor = untrained()
    with pytest.raises(DataError, match="2 words and 1 glosses"):
        predictor.predict(["存款", "白花"], glosses=["钱"])
    with pytest.raises(DataError, match="1 words and 2 pos"):
        predictor.predict(["存款"], pos=["名", "动"])
    with pytest.raises(DataError, match="word 2 of 2 is empty"):
        predictor.predict(["存款", ""])
    with pytest.raises(DataError, match="is not in"):
        predictor.predict(["存款"], ["他去银行。"])
    with pytest.raises(DataError, match="the context of '存款' is of '银行'"):
        predictor.predict(["存款"], [Instance("银行", 0, 2, "银行")])
    run = RunDir.open(tmp_path / "run", {})
    plain = Sense("存款_01", "存款", "钱")
    with pytest.raises(DataError, match="no sense has a formation"):
        train_predictor([plain], run)
    with pytest.raises(DataError, match="1 senses and 2 contexts"):
        train_predictor([plain], run, [None, None])


def test_the_benchmark_on_the_bundled_words(benchmark_file, monkeypatch):
    benchmark = benchmark_file("bench_formation")
    monkeypatch.setattr(benchmark, "HASHED", 2**8)
    monkeypatch.setattr(benchmark, "STRENGTHS", (1.0,))
    found = benchmark.measure(
        mini_inventory().senses, (0,), TrainOptions(learning_rate=1e-2, epochs=2), words=64, tries=1
    )
    assert [row["given"] for row in found["means"]] == ["word", "+ gloss", "+ pos", "+ both"]
    for row in found["accuracy"]:
        assert row["tested"] == 12
        assert all(0 <= row[name] <= 100 for name in ("majority", "ours", "logistic regression"))
    # of a word alone two different senses cannot both be right
    assert found["means"][0]["logistic regression"] <= 75


@pytest.mark.realdata
@pytest.mark.untraced
def test_new_words_of_a_real_lexicon(data_folder, tmp_path):
    """Words that training did not see: beside always saying modifier-head, at least ten points."""
    inventory = Inventory.load(data_folder / "micls" / "inventory.jsonl.gz")
    known = [sense for sense in inventory.senses if sense.formation is not None]
    assert len(known) == 13_766
    places = [Instance(sense.word, 0, 2, sense.word, key=sense.sense_id) for sense in known]
    senses = inventory.by_id
    train, test = ([senses[one.key] for one in part] for part in by_word(places, 0.2, seed=5))
    assert not {sense.word for sense in train} & {sense.word for sense in test}
    run = RunDir.open(tmp_path / "run", {})
    options = TrainOptions(learning_rate=1e-2, epochs=5, batch_size=128)
    config = FormationConfig(buckets=2**13, width=32, hidden_size=128, dropout=0.3)
    predictor = FormationPredictor(train_predictor(train, run, None, config, options, CPU).model)
    words, glosses = [sense.word for sense in test], [sense.gloss for sense in test]
    truth = np.array([int(sense.formation or 0) for sense in test])

    def accuracy(**given):
        return (predictor.probabilities(words, **given).argmax(1) == truth).mean()

    majority = (truth == NOUN).mean()
    pos = [sense.pos for sense in test]
    alone, both = accuracy(), accuracy(glosses=glosses, pos=pos)
    assert alone >= majority + 0.10
    assert both >= alone + 0.04
