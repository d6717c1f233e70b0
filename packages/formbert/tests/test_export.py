"""ONNX graphs answer as their model does, and are refused when they are not its own any more."""

import json
import shutil
import sys
from dataclasses import replace

import pytest
import torch
from formbert import export
from formbert.cache import GlossCache
from formbert.config import ModelOptions
from formbert.disambiguator import Disambiguator
from formbert.export import compare_answers, export_model, load_export
from formbert.lexicon import mini_instances, mini_inventory
from formbert.modeling import build, load
from formbert.predictions import Candidate, Prediction
from octavo.errors import ConfigError, DataError, ModelError
from octavo.models import save_model
from octavo.tiny import checkpoint, parse_shape

for package in ("onnx", "onnxruntime", "onnxscript"):
    pytest.importorskip(package, reason=f"the extra [onnx] is not installed: no {package}")


@pytest.fixture(scope="module", autouse=True)
def exporter_untraced():
    """Count no lines within the library's exporter, which is most of what an export takes."""
    plain = torch.onnx.export

    def call(*arguments, **options):
        trace = sys.gettrace()
        sys.settrace(None)
        try:
            return plain(*arguments, **options)
        finally:
            sys.settrace(trace)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.onnx, "export", call)
        yield


EVERYTHING = ("token", "agreement", "pooled_mlp", "bilinear", "matrix")


def saved(folder, options):
    """A model's folder; no weight is zero, so that each part shows in the answer."""
    inventory = mini_inventory()
    texts = [one.text for part in mini_instances().values() for one in part]
    texts += [sense.word + sense.gloss for sense in inventory.senses] + ["#："]
    encoder = checkpoint(texts, parse_shape("bert-1x32", alphabet="char", max_length=64))
    torch.manual_seed(0)
    model, tokenizer = build(encoder, options)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "formation" in name or "classifier" in name:
                weight.normal_(std=0.3)
    model.config.calibration = 1.7
    save_model(folder, model, tokenizer)
    return folder


@pytest.fixture(scope="module")
def cross(tmp_path_factory):
    """A cross-encoder with its float32 export."""
    folder = tmp_path_factory.mktemp("cross") / "model"
    saved(folder, ModelOptions(max_length=64, fusion=(*EVERYTHING, "pooled_add")))
    return folder, export_model(folder)


@pytest.fixture(scope="module")
def bi(tmp_path_factory):
    """A bi-encoder with its int8 export."""
    folder = tmp_path_factory.mktemp("bi") / "model"
    saved(folder, ModelOptions(max_length=64, arch="bi", fusion=EVERYTHING))
    return folder, export_model(folder, int8=True)


def test_a_cross_encoder_answers_alike(cross):
    folder, rows = cross
    assert [row["graph"] for row in rows] == ["pairs", "contexts"]
    assert all(row["difference"] <= 1e-4 for row in rows)
    assert {file.name for file in (folder / "onnx").iterdir()} == {
        "pairs.onnx", "contexts.onnx", "export.json",
    }  # fmt: skip
    inventory, asked = mini_inventory(), mini_instances()["test_words"][:40]
    plain, exported = load(folder), load_export(folder)
    for source in ("auto", "soft", "predicted"):  # resolved outside the graphs
        both = []
        for model, tokenizer in (plain, exported):
            model.options = replace(model.options, formation_source=source)
            both.append(Disambiguator(model, tokenizer, inventory).batch(asked))
        found = compare_answers(both[0], both[1], asked)
        assert found["instances"] == len(asked)
        assert found["agreement"] == 1
        assert found["difference"] < 1e-4
        for one, other in zip(*both, strict=True):
            assert other.candidates[0].agreement == pytest.approx(
                one.candidates[0].agreement, abs=1e-4
            )
    wsd = Disambiguator(*exported, inventory)
    items = wsd.reader.read(asked[:3])
    inputs = wsd.reader.cross(items, [(0, 0), (2, 5)], torch.tensor([True, False]))
    with torch.inference_mode():
        one, other = plain[0](**inputs), exported[0](**inputs)
    assert torch.allclose(one.logits, other.logits, atol=1e-4)
    assert torch.allclose(one.formation_logits, other.formation_logits, atol=1e-4)
    with pytest.raises(ConfigError, match="no vectors of contexts"):
        wsd.embed_contexts(asked[:1])


def test_a_bi_encoder_answers_nearly_alike_in_int8(bi, tmp_path):
    folder, rows = bi
    assert [row["graph"] for row in rows] == ["contexts", "glosses", "score"]
    assert (
        rows[0]["difference"] > 1e-4 > rows[2]["difference"]
    )  # the scores' graph stays in float32
    record = json.loads((folder / "onnx-int8" / "export.json").read_text())
    assert record["graphs"] == rows
    inventory, asked = mini_inventory(), mini_instances()["test_words"][:40]
    plain = Disambiguator(*load(folder), inventory)
    wsd = Disambiguator(*load_export(folder, int8=True), inventory, cache=tmp_path / "cache")
    assert wsd.cache_glosses() == len(inventory.senses)
    found = compare_answers(plain.batch(asked), wsd.batch(asked), asked)
    assert found["agreement"] >= 0.8
    assert 1e-4 < found["difference"] < 0.3
    vectors = plain.embed_contexts(asked), wsd.embed_contexts(asked)
    first, second = map(torch.from_numpy, vectors)
    assert torch.nn.functional.cosine_similarity(first, second).min() > 0.99
    contexts = wsd.reader.batch(wsd.reader.context_rows(wsd.reader.read(asked[:3])))
    assert isinstance(wsd.model, export.ExportedBi)
    _, logits = wsd.model.embed_contexts(contexts)
    assert logits is not None
    assert torch.equal(wsd.model.formation_logits(contexts), logits)
    # int8's glosses are kept apart from the model's own
    with pytest.raises(DataError, match="another model"):
        GlossCache(tmp_path / "cache", load(folder)[0])


def test_an_export_that_is_not_the_models_is_refused(cross, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(cross[0], folder)
    with pytest.raises(ConfigError, match="exists already; add --overwrite"):
        export_model(folder)
    with pytest.raises(
        ModelError, match=r"no export there; run `formbert export --model .* --int8`"
    ):
        load_export(folder, int8=True)
    config = json.loads((folder / "config.json").read_text())
    config["calibration"] = 3.0  # outside the graphs
    (folder / "config.json").write_text(json.dumps(config))
    assert load_export(folder)[0].config.calibration == 3
    (folder / "onnx" / "pairs.onnx").write_bytes(b"no graph")
    with pytest.raises(ModelError, match="cannot be read"):
        load_export(folder)
    model = load(folder)[0]
    with torch.no_grad():
        model.get_submodule("classifier").get_parameter("bias").add_(1)
    model.save_pretrained(folder)
    with pytest.raises(ModelError, match="not made from the model beside it"):
        load_export(folder)
    (folder / "onnx" / "export.json").write_text("{")
    with pytest.raises(ModelError, match="is damaged"):
        load_export(folder)
    (folder / "model.safetensors").unlink()
    with pytest.raises(ModelError, match="holds no weights"):
        export.weights_hash(folder)


def test_what_computes_otherwise_is_not_kept(bi, tmp_path, monkeypatch):
    folder = tmp_path / "model"
    shutil.copytree(bi[0], folder)
    monkeypatch.setattr(export, "_write", lambda model, graph, probe, file: file.touch())
    monkeypatch.setattr(export, "_compare", lambda graph, probes, file: 0.5)
    with pytest.raises(ModelError, match="'contexts' computes otherwise"):
        export_model(folder)
    assert not (folder / "onnx").exists()
    monkeypatch.setattr(export, "_quantise", lambda file: None)
    differences = iter([0.0, float("inf")])
    monkeypatch.setattr(export, "_compare", lambda graph, probes, file: next(differences))
    with pytest.raises(ModelError, match="not finite in int8"):
        export_model(folder, int8=True, overwrite=True)
    load_export(folder, int8=True)  # the earlier one is still there


def test_what_cannot_be_traced_is_told(cross, tmp_path, monkeypatch):
    folder = tmp_path / "model"
    shutil.copytree(cross[0], folder)

    def broken(*given, **options):
        raise RuntimeError("an operator of its own")

    monkeypatch.setattr(torch.onnx, "export", broken)
    with pytest.raises(ModelError, match=r"kind 'bert', cannot be exported .*operator of its own"):
        export_model(folder, overwrite=True)
    load_export(folder)


def test_without_the_extra(cross, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    for call in (export_model, load_export):
        with pytest.raises(ConfigError, match=r"pip install 'formbert\[onnx\]'"):
            call(cross[0])


def test_answers_are_compared_by_hand():
    instances = mini_instances()["test_words"][:3]
    right, wrong = instances[0].gold[0], "other"

    def answer(first, probability):
        second = wrong if first == right else right
        candidates = (Candidate(first, "", probability), Candidate(second, "", 1 - probability))
        return Prediction("", "", first, candidates)

    single = Prediction("", "", right, (Candidate(right, "", 1.0),))
    same = [replace(one, gold=(right,)) for one in instances]
    found = compare_answers(
        [answer(right, 0.75), answer(right, 0.5), single],
        [answer(right, 0.625), answer(wrong, 0.75), single],
        same,
    )
    assert found == {
        "instances": 2, "agreement": 0.5, "accuracy": 1.0, "accuracy_export": 0.5,
        "difference": 0.25,
    }  # fmt: skip
