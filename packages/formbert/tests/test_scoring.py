"""Answers do not depend on what they are batched with; caches; what is asked of a model at all."""

import json
import random
from dataclasses import replace

import numpy as np
import pytest
import torch
from formbert.cache import GlossCache
from formbert.config import AnswerOptions, ModelOptions
from formbert.data import Instance, locate
from formbert.disambiguator import MONOSEMOUS, UNKNOWN, Disambiguator, Second, choose_margin, gap
from formbert.formation import FormationPredictor
from formbert.formations import Formation
from formbert.inventory import Inventory, Sense
from formbert.lexicon import mini_instances, mini_inventory
from formbert.predictions import Candidate, Prediction
from formbert.sources import Sources
from octavo.errors import ConfigError, DataError

SOME = mini_instances()["test_words"][::11]
FUSIONS = ("token", "agreement", "pooled_add", "pooled_mlp", "bilinear", "matrix")


def system(made, **options):
    return Disambiguator(
        made.model, made.tokenizer, made.reader.inventory, options=AnswerOptions(**options)
    )


@pytest.mark.parametrize("arch", ["cross", "bi"])
def test_answers_do_not_depend_on_the_batch_or_the_order(make, arch):
    made = make(arch=arch, fusion=FUSIONS)
    whole = system(made).batch(SOME)
    single = [system(made, batch_tokens=1).batch([one])[0] for one in SOME]
    order = list(range(len(SOME)))
    random.Random(1).shuffle(order)
    mixed = system(made, batch_tokens=90).batch([SOME[at] for at in order])
    for at, one in enumerate(order):
        for other in (single[one], mixed[at]):
            assert other.sense_id == whole[one].sense_id
            assert other.probability == pytest.approx(whole[one].probability, abs=1e-5)


def test_a_forward_pass_of_training_is_what_is_scored(make):
    """The model's own forward with contexts equals the engine, which asks the predictor first."""
    made = make(fusion=FUSIONS)
    items = made.reader.read(SOME)
    pairs = [(at, sense) for at, item in enumerate(items) for sense in item.candidates]
    known = made.reader.known[[sense for _, sense in pairs]]
    with torch.no_grad():
        found = made.model(**made.reader.cross(items, pairs, known)).scores.numpy()
    wsd = system(made)
    for item, answer, scores in zip(items, wsd.batch(SOME), found.reshape(-1, 2), strict=True):
        best = made.reader.senses[item.candidates[scores.argmax()]]
        assert answer.sense_id == best.sense_id
        odds = 1 / (1 + np.exp(-abs(scores[0] - scores[1])))
        assert answer.probability == pytest.approx(odds, abs=1e-5)


def test_one_call(make):
    wsd = system(make())
    answer = wsd("他去银行存款。", word="存款")
    assert answer.sense_id in ("存款_01", "存款_02")
    assert sum(one.probability for one in answer.candidates) == pytest.approx(1)
    assert answer.candidates[0].probability >= answer.candidates[1].probability
    assert {one.formation for one in answer.candidates} == {"述宾", "定中"}
    assert all(0 <= (one.agreement or 0) <= 1 for one in answer.candidates)
    assert wsd("他去银行#存款#。").probability == answer.probability
    again = Prediction.of(json.loads(json.dumps(answer.row())))
    assert again.row() == answer.row()


def test_every_form_of_a_question(make):
    wsd = system(make())
    text = "他去银行存款。"
    answers = wsd.batch(
        [locate(text, "存款"), {"text": text, "word": "存款", "id": "x"}, (text, "存款"),
         (text, "存款", 4), "他去银行#存款#。"]
    )  # fmt: skip
    assert len({one.probability for one in answers}) == 1
    assert [one.key for one in answers] == ["", "x", "3", "4", "5"]
    assert [one.key for one in wsd.stream(iter([(text, "存款")] * 5), chunk=2)] == list("12345")
    with pytest.raises(DataError, match="question 2: '存款' is not in"):
        wsd.batch([(text, "存款"), ("他去银行。", "存款")])


class Counting:
    """Counts the rows that a model is run on."""

    def __init__(self, model):
        self.rows, self.run = 0, model.run
        model.run = self

    def __call__(self, rows, *arguments, **options):
        self.rows += len(rows["input_ids"])
        return self.run(rows, *arguments, **options)


def test_the_model_is_asked_as_little_as_can_be(make):
    senses = [*mini_inventory().senses, Sense("门_01", "门", "出入的地方。", "名")]
    made = make(inventory=Inventory(senses), predictor="none", fusion=())
    wsd = system(made)
    count = Counting(wsd.model)
    one = locate("他去银行存款。", "存款")
    questions = [one, one, locate("门开了。", "门"), locate("我去市场。", "市场"), one]
    answers = wsd.batch(questions)
    assert count.rows == 2  # two senses of one question
    assert (answers[2].reason, answers[2].probability) == (MONOSEMOUS, 1)
    assert (answers[3].reason, answers[3].sense_id) == (UNKNOWN, None)
    assert answers[0].probability == answers[4].probability


def test_top_k_and_abstaining(make):
    made = make()
    sure = system(made, top_k=1).batch(SOME)
    assert all(len(one.candidates) == 1 and not one.abstained for one in sure)
    wary = system(made, abstain_below=0.9).batch(SOME)
    assert [one.abstained for one in wary] == [one.probability < 0.9 for one in wary]
    assert any(one.abstained for one in wary)


def test_cached_glosses_are_not_computed_again(make, tmp_path):
    made = make(arch="bi", fusion=FUSIONS)
    plain = system(made).batch(SOME)
    inventory = mini_inventory()
    first = Disambiguator(made.model, made.tokenizer, inventory, cache=tmp_path / "glosses")
    assert first.cache_glosses() == len(inventory.senses)
    second = Disambiguator(made.model, made.tokenizer, inventory, cache=tmp_path / "glosses")
    count = Counting(second.model)
    answers = second.batch(SOME)
    del made.model.run
    assert count.rows == len(SOME)
    for a, b in zip(plain, answers, strict=True):
        assert a.sense_id == b.sense_id
        assert a.probability == pytest.approx(b.probability, abs=1e-5)


def test_a_changed_gloss_or_formation_is_another_vector(make, tmp_path):
    made = make(arch="bi")
    cache = GlossCache(tmp_path / "c", made.model)
    key = cache.key(made.reader, 0)
    senses = made.reader.senses
    for changed in (
        replace(senses[0], gloss="别的意思。"),
        replace(senses[0], formation=Formation.PARALLEL),
        replace(senses[0], formation=None),
    ):
        other = make(arch="bi", inventory=Inventory([changed, *senses[1:]]))
        assert cache.key(other.reader, 0) != key
    assert cache.key(make(arch="bi").reader, 0) == key


def test_foreign_and_damaged_caches_are_refused(make, tmp_path):
    made, other = make(arch="bi"), make(arch="bi", seed=1)
    wsd = Disambiguator(made.model, made.tokenizer, mini_inventory(), cache=tmp_path / "c")
    wsd.cache_glosses()
    with pytest.raises(DataError, match="another model"):
        GlossCache(tmp_path / "c", other.model)
    (tmp_path / "c" / "vectors.npy").write_bytes(b"cut")
    with pytest.raises(DataError, match="damaged"):
        GlossCache(tmp_path / "c", made.model)
    with pytest.raises(ConfigError, match="only a bi-encoder"):
        cross = make()
        Disambiguator(cross.model, cross.tokenizer, mini_inventory(), cache=tmp_path / "d")


def test_a_second_model_is_asked_where_the_first_is_unsure(make):
    fast, slow = system(make(arch="bi", seed=1)), system(make(seed=2))
    alone, other = fast.batch(SOME), slow.batch(SOME)
    margin = float(np.median([gap(one) for one in alone]))
    both = Disambiguator(
        fast.model, fast.reader.encoding.tokenizer, mini_inventory(), second=Second(slow, margin)
    ).batch(SOME)
    for a, b, c in zip(alone, other, both, strict=True):
        wanted = b if gap(a) < margin else a
        assert c.sense_id == wanted.sense_id
        assert c.probability == pytest.approx(wanted.probability, abs=1e-5)


def answer(key, chance, right):
    two = (Candidate("a", "", chance), Candidate("b", "", 1 - chance))
    return Prediction(key, "存款", "a" if right else "b", two)


def test_the_margin_is_the_smallest_that_costs_nothing():
    """The first errs on its two least sure answers, which the second has right."""
    chances = [0.95, 0.9, 0.8, 0.7, 0.6]
    first = [answer(str(k), p, k < 3) for k, p in enumerate(chances)]
    second = [answer(str(k), 0.9, True) for k in range(5)]
    instances = [Instance("存款", 0, 2, "存款", ("a",), str(k)) for k in range(5)]
    margin = choose_margin(first, second, instances)
    assert [gap(one) < margin for one in first] == [False, False, False, True, True]
    assert choose_margin(second, first, instances) == 0.0


class Glosses(FormationPredictor):
    """A predictor that says the same of every gloss."""

    def __init__(self):
        pass

    def probabilities(self, words, contexts=None, glosses=None, pos=None, batch_size=0):
        rows = np.zeros((len(words), 18), np.float32)
        rows[:, Formation.PARALLEL] = 1
        return rows


def test_where_formations_come_from():
    senses = [
        Sense("1", "存款", "把钱存进银行。", "动", Formation.VERB_OBJECT),
        Sense("2", "存款", "存在银行里的钱。", "名"),
        Sense("3", "市场", "买卖的地方。", "名"),
    ]
    lexicon = {"存款": {Formation.MODIFIER_HEAD: 0.75, Formation.VERB_OBJECT: 0.25}}
    sources = Sources(lexicon, Glosses())

    def found(source, sources=sources):
        options = ModelOptions(formation_source=source)
        shares, known = sources.table(senses, options, [one.zh for one in Formation])
        best = [Formation(int(row.argmax())) if row.any() else None for row in shares]
        return best, known.tolist()

    verb, noun, parallel = Formation.VERB_OBJECT, Formation.MODIFIER_HEAD, Formation.PARALLEL
    assert found("annotation") == ([verb, None, None], [True, False, False])
    assert found("lexicon") == ([noun, noun, None], [True, True, False])
    assert found("gloss") == ([parallel] * 3, [True] * 3)
    assert found("auto") == ([verb, noun, parallel], [True] * 3)
    assert found("auto", Sources()) == ([verb, None, None], [True, False, False])
    assert found("soft")[1] == [False] * 3
    shares, known = sources.table(senses, ModelOptions(signal="pos"), ("动", "名"))
    assert shares.tolist() == [[1, 0], [0, 1], [0, 1]]
    assert known.all()


def test_context_vectors_and_formations(make):
    wsd = system(make())
    vectors = wsd.embed_contexts(SOME)
    assert vectors.shape == (len(SOME), 32)
    assert np.allclose(vectors[3], wsd.embed_contexts([SOME[3]])[0], atol=1e-5)
    assert set(wsd.formations(SOME)) <= {one.zh for one in Formation}
    with pytest.raises(ConfigError, match="tells no formations"):
        system(make(predictor="none", fusion=())).formations(SOME)


def test_glosses_stay_in_memory_without_a_folder(make):
    made = make(arch="bi")
    wsd = system(made)
    first = wsd.batch(SOME)
    count = Counting(wsd.model)
    again = wsd.batch(SOME)
    del made.model.run
    assert count.rows == len(SOME)
    assert [one.row() for one in again] == [one.row() for one in first]
