"""Compression, calibration and error diagnosis against numbers by hand and plain references."""

from typing import Any

import numpy as np
import pytest
import torch
from anchors.cache import beginning, prefill
from anchors.calibrate import calibrated, log_mean_probability, random_texts
from anchors.comparisons import accuracy_rows, compress_rows, diagnose_tables
from anchors.compress import best_random, compress, kept_places, random_places
from anchors.diagnose import (
    diagnose,
    key_distances,
    look,
    pair_areas,
    rank_correlation,
    reading_weights,
    weighted_distances,
)  # fmt: skip
from anchors.evaluate import Predictions, label_loyalty, predict
from anchors.prompts import build_prompt
from octavo.errors import ConfigError
from scipy.special import softmax
from sklearn.decomposition import PCA
from sklearn.metrics import roc_auc_score

LABELS = [0, 1, 2, 0, 1]


def labels_of(prompt):
    return {place for places in prompt.labels for place in places}


def test_what_is_kept(prompts, tokenizer, reviews):
    prompt = prompts[0]
    assert prompt.special == ()
    hidden = kept_places(prompt, "anchors+format")
    assert hidden == sorted({*prompt.format} | labels_of(prompt))
    assert kept_places(prompt, "anchors") == sorted(labels_of(prompt))
    assert kept_places(prompt, "text") == hidden
    assert kept_places(prompt, "all") == list(range(prompt.query))
    random = random_places(prompt, 0)
    assert len(random) == 3
    assert not random & (labels_of(prompt) | {*prompt.format})
    assert random_places(prompt, 0) == random
    assert len({frozenset(random_places(prompt, seed)) for seed in range(20)}) > 5
    begin = 0
    for places in prompt.labels:  # one of each demonstration
        assert sum(begin <= place < places[0] for place in random) == 1
        begin = places[-1] + 1
    assert len(kept_places(prompt, "random")) == len(hidden)
    nothing = build_prompt(reviews, tokenizer, [("", 0), ("", 1)], "a")
    assert len(random_places(nothing, 0)) == 2


def test_text_anchors_are_a_prompt_of_their_own(family, prompts):
    model, prompt = family("llama"), prompts[0]
    cache = compress(model, prompt, "text")
    words = [prompt.input_ids[place] for place in kept_places(prompt, "text")]
    ids = torch.tensor([[*words, *prompt.input_ids[prompt.query :]]])
    with torch.no_grad():
        own = model(ids).logits[0, -1, list(prompt.answers)].log_softmax(-1).numpy()
    assert cache.start == len(cache) == len(words)
    assert np.allclose(predict(model, [prompt], cache=cache).scores[0], own, atol=1e-5)


def test_positions(family, prompts):
    model, prompt = family("llama"), prompts[0]
    original = compress(model, prompt)
    compact = compress(model, prompt, positions="compact")
    assert original.start == prompt.query
    assert compact.start == len(compact) == len(original)
    assert all(torch.equal(a, b) for a, b in zip(original.keys, compact.keys, strict=True))
    one, other = (predict(model, prompts, cache=one).scores for one in (original, compact))
    assert not np.allclose(one, other, atol=1e-3)


def test_the_best_random_draw_is_the_best_of_its_draws(family, prompts):
    model = family("gpt2")
    whole = prefill(model, beginning(prompts))
    before = predict(model, prompts, cache=whole)
    loyal = [
        label_loyalty(
            before, predict(model, prompts, cache=whole.keep(kept_places(prompts[0], "random", n)))
        ).mean()
        for n in range(6)
    ]
    best = best_random(model, prompts, 6)
    found = label_loyalty(before, predict(model, prompts, cache=best)).mean()
    assert found == max(loyal)
    assert best.positions == tuple(kept_places(prompts[0], "random", int(np.argmax(loyal))))
    assert best.about["kept"] == "best of 6 random"


def test_the_table_of_compression(family, prompts):
    model = family("llama")
    rows, kept = compress_rows(model, prompts, LABELS, prompts[:2], draws=2)
    names = [row["kept"] for row in rows]
    assert names[:3] == ["whole prompt", "whole prompt, cached", "hidden anchors"]
    assert rows[1]["label loyalty"] == rows[1]["word loyalty"] == 1
    assert len(kept) == rows[2]["tokens"] == len(kept_places(prompts[0], "anchors+format"))
    whole = sum(map(len, prompts))
    assert rows[2]["token ratio"] == whole / sum(len(one) - one.query for one in prompts)
    assert rows[2]["KiB"] == kept.bytes / 1024 > rows[3]["KiB"]
    assert len(compress_rows(model, prompts, LABELS, [])[0]) == len(rows) - 1


def test_calibration_by_hand():
    predictions = Predictions(np.log([[0.6, 0.4], [0.9, 0.1]]), np.zeros((2, 5), int))
    prior = log_mean_probability(predictions)
    assert np.allclose(np.exp(prior), [0.75, 0.25])
    found = calibrated(predictions, prior)
    assert np.allclose(softmax(found.scores, -1), [[0.8 / 2.4, 1.6 / 2.4], [1.2 / 1.6, 0.4 / 1.6]])
    assert found.classes.tolist() == [1, 0]
    uniform = calibrated(predictions, np.log([0.5, 0.5]))
    assert np.allclose(uniform.scores, predictions.scores)


def test_a_class_that_is_never_likely_does_not_win_by_that():
    predictions = Predictions(np.array([[0, -200], [0, -150]], np.float32), np.zeros((2, 5), int))
    found = calibrated(predictions, log_mean_probability(predictions))
    assert np.isfinite(found.scores).all()
    assert found.classes.tolist() == [0, 1]


def test_random_texts_are_of_the_domain():
    texts = random_texts(["a b c", "d e f g h"], 0)
    assert len(texts) == 20
    assert all(len(text.split()) == 4 for text in texts)
    assert {word for text in texts for word in text.split()} <= set("abcdefgh")
    assert texts == random_texts(["a b c", "d e f g h"], 0) != random_texts(["a b c d"], 1)


def test_accuracy_rows():
    right = Predictions(np.eye(3), np.zeros((3, 5), int))
    wrong = Predictions(np.eye(3)[[0, 0, 0]], np.zeros((3, 5), int))
    rows = accuracy_rows({"one": right, "none": "left out: why", "other": wrong}, [0, 1, 2])
    assert [row.get("accuracy") for row in rows] == [1, None, pytest.approx(1 / 3)]
    assert rows[2]["macro F1"] == pytest.approx(0.5 / 3)
    assert rows[2]["p against the first"] == 0.5
    assert rows[1]["interval"] == "left out: why"


def test_distances_are_those_of_principal_components():
    draw = np.random.default_rng(0)
    queries = draw.normal(size=(40, 1, 5)) * np.array([3, 2, 1, 0.1, 0.01])
    keys = draw.normal(size=(1, 4, 5))
    pca = PCA().fit(queries[:, 0])
    count = int(np.searchsorted(np.cumsum(pca.explained_variance_ratio_), 0.9)) + 1
    assert count == 2
    components: Any = pca.components_
    inside = keys[0] @ components[:count].T
    apart = np.linalg.norm(inside[:, None] - inside[None], axis=-1)
    assert np.allclose(key_distances(queries, keys, 0.9), apart / apart.max())
    everything = np.linalg.norm(keys[0][:, None] - keys[0][None], axis=-1)
    assert np.allclose(key_distances(queries, keys, 1.0), everything / everything.max())
    twice = key_distances(queries.repeat(2, 1), keys.repeat(2, 0), 0.9)
    assert np.allclose(twice, apart / apart.max())


def test_real_confusion_is_the_area_of_each_pair():
    draw = np.random.default_rng(0)
    scores, labels = np.log(softmax(draw.normal(size=(60, 3)), -1)), draw.integers(0, 3, 60)
    areas = pair_areas(Predictions(scores, np.zeros((60, 5), int)), labels, 3)
    for i, j in ((0, 1), (0, 2), (1, 2)):
        chosen = np.isin(labels, (i, j))
        own = roc_auc_score(labels[chosen] == i, (scores[:, i] - scores[:, j])[chosen])
        assert areas[i, j] == areas[j, i] == pytest.approx(own)


def test_queries_and_keys_make_the_models_attention(family, prompts):
    """Their products over all keys are the scores that the softmax is taken of."""
    model = family("llama")
    model.set_attn_implementation("eager")
    queries, keys, attention = look(model, prompts, 3, 2)
    assert queries.shape == (5, 3, 4, 8)
    assert keys.shape == (3, 4, 3, 8)
    prompt = prompts[0]
    with torch.no_grad():
        own = model(torch.tensor([prompt.input_ids]), output_attentions=True).attentions
    places = [prompt.labels[prompt.classes.index(kind)][0] for kind in range(3)]
    for layer in range(3):
        scores = np.einsum("hw,hcw->hc", queries[0, layer], keys[layer]) / 8**0.5
        weights = own[layer][0, :, -1, places].numpy()
        assert np.allclose(softmax(scores, -1), weights / weights.sum(-1, keepdims=True), atol=1e-4)
        assert np.allclose(attention[0, layer], weights, atol=1e-6)


def test_heads_count_by_what_they_tell():
    """Head 0 of layer 0 tells the prediction, the others nothing or the contrary."""
    predicted = np.array([0, 0, 1, 1])
    attention = np.full((4, 2, 2, 2), 0.5)
    attention[:, 0, 0] = np.eye(2)[predicted]
    attention[:, 1, 1] = 1 - np.eye(2)[predicted]
    weights = reading_weights(attention, predicted)
    assert weights.tolist() == [[0.5, 0], [0, 0]]
    assert (reading_weights(attention, np.zeros(4, int)) == 1).all()
    draw = np.random.default_rng(0)
    queries, keys = draw.normal(size=(9, 2, 2, 4)), draw.normal(size=(2, 2, 3, 4))
    found = weighted_distances(queries, keys, weights)
    assert np.allclose(found, key_distances(queries[:, 0, :1], keys[0, :1]))


def test_rank_correlation():
    one = np.array([[0, 0.1, 0.5], [0.1, 0, 1.0], [0.5, 1.0, 0]])
    assert rank_correlation(one, one) == 1
    assert rank_correlation(one, 1 - one) == -1
    assert np.isnan(rank_correlation(one, np.ones((3, 3))))


def test_diagnosis(family, prompts):
    model = family("llama")
    many, labels = [*prompts] * 3, LABELS * 3
    found = diagnose(model, many, labels, resamples=20)
    assert found.predicted.shape == (3, 3, 3)
    assert found.overall.max() == found.predicted[0].max() == 1
    assert np.allclose(found.overall, found.overall.T)
    tables = diagnose_tables(found, (" good", " bad", " middling"))
    pairs, ranks = tables.values()
    assert {(row["one"], row["other"]) for row in pairs} == {
        ("good", "bad"), ("good", "middling"), ("bad", "middling"),
    }  # fmt: skip
    assert [row["layers"] for row in ranks] == ["all, weighted by reading", "0", "1", "2"]
    with pytest.raises(ConfigError, match="no text of class 2"):
        diagnose(model, prompts[:2], [0, 1])
    with pytest.raises(ConfigError, match="--variance"):
        diagnose(model, many, labels, variance=0)


def test_two_classes_cannot_be_ranked(family, tokenizer):
    from anchors.config import Task

    task = Task("Review: {text}\nMood:{label}", (" good", " bad"))
    prompt = build_prompt(task, tokenizer, [("a", 0), ("b", 1)], "c")
    with pytest.raises(ConfigError, match="three classes"):
        diagnose(family("gpt2"), [prompt], [0])
