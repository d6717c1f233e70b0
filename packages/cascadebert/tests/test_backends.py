import json
import shutil
import sys

import pytest
import torch
from cascadebert import onnx as onnx_backend
from cascadebert.cascade import Cascade
from cascadebert.data import Examples
from cascadebert.onnx import PLAIN, export_cascade, export_stage
from cascadebert.policy import Policy
from cascadebert.scores import log_odds
from cascadebert.stage import load_stage
from octavo.errors import ConfigError, ModelError
from octavo.runtime import Runtime
from torch._dynamo.utils import counters
from torch._inductor import cpp_builder
from transformers import AutoModelForSequenceClassification

WORDS = "one two three four five six seven eight nine ten".split()
LABELS = ["no", "yes", "maybe"]
FAMILIES = {
    "bert": {},
    # a window that is shorter than the texts, and layers with and without it
    "modernbert": {"local_attention": 8, "global_attn_every_n_layers": 2, "num_hidden_layers": 3},
    "roberta": {},
    "distilbert": {},
    "deberta-v2": {  # as the published ones are
        "relative_attention": True, "pos_att_type": ["p2c", "c2p"], "position_buckets": 8,
        "share_att_key": True, "norm_rel_ebd": "layer_norm", "position_biased_input": False,
    },
}  # fmt: skip


def plain(folder):
    return load_stage(str(folder), None, None, runtime=PLAIN)


@pytest.fixture(scope="module")
def zoo(tmp_path_factory, classifier):
    """A folder for each family, in which the tests below find what is exported so far."""
    folder = tmp_path_factory.mktemp("zoo")
    for seed, (kind, settings) in enumerate(FAMILIES.items()):
        turned = LABELS if seed % 2 else LABELS[::-1]
        sizes = {"layers": 1 if kind == "distilbert" else 2, "width": 32, "initializer_range": 0.3}
        classifier(folder / kind, kind, labels=turned, seed=seed, **(sizes | settings))
    return folder


@pytest.fixture(scope="module")
def exported(zoo):
    """A function that exports a family once."""

    def folder_of(kind):
        if not (zoo / kind / "onnx" / "model.onnx").exists():
            export_stage(plain(zoo / kind), zoo / kind)
        return zoo / kind

    return folder_of


@pytest.fixture(scope="module")
def cascade_folder(zoo, tmp_path_factory):
    """A trained cascade's folder, as `train` leaves it."""
    folder = tmp_path_factory.mktemp("cascade") / "cascade"
    for number, kind in enumerate(["distilbert", "bert"], 1):
        shutil.copytree(
            zoo / kind, folder / f"stage-{number}", ignore=shutil.ignore_patterns("onnx")
        )
    content = {"stages": ["stage-1", "stage-2"], "labels": LABELS, "max_length": 48}
    (folder / "cascade.json").write_text(json.dumps(content))
    return folder


def halving(cascade, examples):
    """A policy that defers half of the examples."""
    scores = log_odds(cascade.logits(0, examples)).sort().values
    return Policy([float(scores[len(scores) // 2 - 1] + scores[len(scores) // 2]) / 2])


def assert_alike(got, wanted, cascade, examples, policy):
    """Equal labels and stages, but where the score lies within 1e-4 of its threshold."""
    scores = policy.score_of(0, cascade.logits(0, examples))
    clear = ((scores - policy.thresholds[0]).abs() > 1e-4).tolist()
    for mine, theirs, sure in zip(
        zip(got.labels, got.stages.tolist(), strict=True),
        zip(wanted.labels, wanted.stages.tolist(), strict=True),
        clear,
        strict=True,
    ):
        assert mine == theirs or not sure
    assert 0 < int(got.stages.sum()) < len(examples)


@pytest.mark.parametrize("kind", FAMILIES)
def test_every_family_answers_alike_in_onnx(zoo, kind, capfd, recwarn, texts):
    stage = plain(zoo / kind)
    capfd.readouterr()
    done = export_stage(stage, zoo / kind)
    assert capfd.readouterr() == ("", "")
    assert not list(recwarn)
    assert done.difference <= 1e-4
    assert done.agreement == 1
    assert {file.name for file in (zoo / kind / "onnx").iterdir()} == {"model.onnx", "model.json"}
    assert done.megabytes == pytest.approx(done.file.stat().st_size / 1e6)
    other = load_stage(str(zoo / kind), LABELS, None, "onnx", runtime=Runtime(threads=1))
    assert other.backend == "onnx-float32"
    for examples in (Examples(texts), Examples(texts, pairs=texts[::-1]), Examples(["one"])):
        rows = stage.encode(examples)
        reordered = stage.run(rows, 64)[:, [stage.labels.index(label) for label in LABELS]]
        assert torch.allclose(other.run(rows, 256), reordered, atol=1e-4)


def test_a_cascade_answers_alike_in_onnx(exported, texts):
    folders = [exported("modernbert"), exported("bert")]
    examples = Examples(texts)
    torch_cascade = Cascade.from_pretrained(folders, runtime=PLAIN)
    policy = halving(torch_cascade, examples)
    wanted = torch_cascade.predict(examples, policy)
    cascade = Cascade.from_pretrained(folders, backend="onnx", runtime=PLAIN)
    assert cascade.backend == "onnx-float32"
    assert cascade.hashes == torch_cascade.hashes
    for pool in (0, 1, 16):
        got = cascade.predict(examples, policy, pool=pool)
        assert_alike(got, wanted, torch_cascade, examples, policy)


def test_int8_needs_a_policy_of_its_own(cascade_folder, tmp_path, command, monkeypatch, texts):
    rows = [
        json.dumps({"text": text, "label": LABELS[number % 3]}) + "\n"
        for number, text in enumerate(texts)
    ]
    dev, test = tmp_path / "dev.jsonl", tmp_path / "test.jsonl"
    dev.write_text("".join(rows[:30]))
    test.write_text("".join(rows[30:]))
    model = ("--model", cascade_folder, "--device", "cpu", "--quiet")
    int8 = (*model, "--backend", "onnx-int8")
    monkeypatch.setattr(onnx_backend, "SINGLE_FILE", 60_000)  # between the two models' sizes
    left_over = cascade_folder / "stage-1" / "onnx" / "model-int8.onnx.data"
    left_over.parent.mkdir()
    left_over.touch()
    code, out, err = command("export", "--model", cascade_folder, "--int8", "--quiet")
    assert (code, err) == (0, "")
    assert f"Next: cascadebert calibrate --model {cascade_folder} --backend onnx-int8" in out
    names = {"model-int8.onnx", "model-int8.json"}
    for number, wanted in ((1, names), (2, names | {"model-int8.onnx.data"})):
        here = cascade_folder / f"stage-{number}" / "onnx"
        assert {file.name for file in here.iterdir()} == wanted
        record = json.loads((here / "model-int8.json").read_text())
        assert 1e-4 < record["difference"] < 1
        assert record["agreement"] > 0.7
        assert str(here / "model-int8.onnx") in out

    assert command("calibrate", *model, "--dev-data", dev, "--target-speedup", "1.1")[0] == 0
    policy = cascade_folder / "policy.json"
    assert json.loads(policy.read_text())["backend"] == "torch-float32"
    code, _, err = command("evaluate", *int8, "--test-data", test)
    assert code == 2
    assert "made for backend torch-float32, and this is onnx-int8, whose confidences differ" in err
    again = ("--dev-data", dev, "--target-speedup", "1.1", "--overwrite")
    assert command("calibrate", *int8, *again)[0] == 0
    assert json.loads(policy.read_text())["backend"] == "onnx-int8"
    assert command("evaluate", *int8, "--test-data", test)[0] == 0

    code, _, err = command("export", "--model", cascade_folder, "--int8")
    assert code == 2
    assert "model-int8.onnx exists already" in err
    cascade = Cascade.from_pretrained(cascade_folder, backend="onnx-int8", runtime=PLAIN)
    exact = Cascade.from_pretrained(cascade_folder, runtime=PLAIN)
    for number in (0, 1):
        near, far = (one.logits(number, Examples(texts)) for one in (cascade, exact))
        assert not torch.allclose(near, far, atol=1e-4)
        assert (near.argmax(dim=-1) == far.argmax(dim=-1)).float().mean() > 0.7


def test_exports_that_are_missing_stale_or_broken(exported, tmp_path):
    folder = shutil.copytree(exported("bert"), tmp_path / "bert")
    missing = r"model-int8.onnx: no export there; run `cascadebert export --model DIR --int8`"
    with pytest.raises(ModelError, match=missing):
        load_stage(str(folder), None, None, "onnx-int8", runtime=PLAIN)
    load_stage(str(folder), None, None, "onnx", runtime=PLAIN)

    file = folder / "onnx" / "model.onnx"
    content = file.read_bytes()
    file.write_bytes(content[:1000])
    with pytest.raises(ModelError, match=r"model.onnx: cannot be read .*; run `cascadebert export"):
        load_stage(str(folder), None, None, "onnx", runtime=PLAIN)
    file.write_bytes(content)

    model = AutoModelForSequenceClassification.from_pretrained(folder)
    model.get_parameter("classifier.bias").data += 1  # trained on
    model.save_pretrained(folder)
    stale = "not made from the weights beside it; run `cascadebert export` again"
    with pytest.raises(ModelError, match=stale):
        load_stage(str(folder), None, None, "onnx", runtime=PLAIN)
    (folder / "onnx" / "model.json").unlink()  # some other program's export
    with pytest.raises(ModelError, match=stale):
        load_stage(str(folder), None, None, "onnx", runtime=PLAIN)
    with pytest.raises(ConfigError, match=r"model.onnx exists already; .* add --overwrite"):
        export_cascade([plain(folder)], [folder])


def test_an_export_that_answers_otherwise_is_not_kept(exported, tmp_path, monkeypatch):
    folder = shutil.copytree(exported("distilbert"), tmp_path / "one")
    stage = plain(folder)
    graph = (folder / "onnx" / "model.onnx").rename(tmp_path / "graph.onnx")
    (folder / "onnx" / "model.json").unlink()

    def fail(*args, **kwargs):
        raise RuntimeError("no such operator\nand a long story")

    monkeypatch.setattr(torch.onnx, "export", fail)
    reason = r"one: DistilBertForSequenceClassification cannot be exported to ONNX \(no such op"
    with pytest.raises(ModelError, match=reason):
        export_stage(stage, folder)
    monkeypatch.setattr(onnx_backend, "_write_graph", lambda _, file: shutil.copy(graph, file))
    stage.model.get_parameter("classifier.bias").data += 0.1
    with pytest.raises(ModelError, match=r"answers otherwise .*nothing was written"):
        export_stage(stage, folder)
    assert not list((folder / "onnx").iterdir())


def test_what_the_backends_cannot_do(exported, monkeypatch, command, tmp_path):
    folder = str(exported("bert"))
    half = Runtime(device="cpu", dtype="bfloat16")
    with pytest.raises(ConfigError, match="--dtype bfloat16: --backend onnx has its own precision"):
        load_stage(folder, None, None, "onnx", runtime=half)
    with pytest.raises(ModelError, match="an export lies in its model's folder, and this is none"):
        export_cascade([plain(folder)], [tmp_path / "owner/name"])
    for package in ("onnx", "onnxruntime", "onnxscript"):
        with monkeypatch.context() as patch:
            patch.setitem(sys.modules, package, None)
            with pytest.raises(ConfigError, match=r'pip install "cascadebert\[onnx\]"'):
                load_stage(folder, None, None, "onnx", runtime=PLAIN)
            with pytest.raises(ConfigError, match=package):
                export_stage(plain(folder), tmp_path)

    def no_compiler():
        raise FileNotFoundError("g++")

    monkeypatch.setattr(cpp_builder, "get_cpp_compiler", no_compiler)
    with pytest.raises(ConfigError, match="--backend compile: PyTorch needs a C\\+\\+ compiler"):
        load_stage(folder, None, None, "compile", runtime=PLAIN)


def test_half_precision_is_a_backend_of_its_own(zoo, tmp_path, texts):
    folders = [zoo / "distilbert", zoo / "bert"]
    half = Cascade.from_pretrained(folders, runtime=Runtime(device="cpu", dtype="bfloat16"))
    full = Cascade.from_pretrained(folders, runtime=PLAIN)
    assert (half.backend, full.backend) == ("torch-bfloat16", "torch-float32")
    assert half.hashes == full.hashes
    full.calibrate(Examples(texts), 1.1).save(tmp_path / "policy.json")
    with pytest.raises(ConfigError, match="made for backend torch-float32, and this is torch-bf"):
        Policy.load(tmp_path / "policy.json", half.hashes, half.backend)
    near, far = (one.logits(1, Examples(texts)) for one in (half, full))
    assert torch.allclose(near, far, atol=0.5)
    assert near.dtype == torch.float32


def has_compiler():
    try:
        return bool(cpp_builder.get_cpp_compiler())
    except Exception:
        return False


@pytest.mark.skipif(not has_compiler(), reason="torch.compile needs a C++ compiler")
def test_compiled_models_answer_alike_and_are_compiled_twice_at_most(zoo, texts):
    """Any number of survivors, of any length, goes through one graph; a single one has its own."""
    examples = Examples([*texts, *(" ".join(WORDS[i : i + 6]) for i in range(5)), *["one"] * 3])
    wanted = Cascade.from_pretrained([zoo / "bert", zoo / "distilbert"], runtime=PLAIN)
    large = load_stage(str(zoo / "distilbert"), wanted.labels, None, "compile", runtime=PLAIN)
    assert large.backend == "compile-float32"
    assert large.multiple == 1  # of use on a GPU only
    torch._dynamo.reset()
    counters.clear()
    square = large.encode(Examples(["one two three four five six"] * 8))
    assert square.lengths == [8] * 8
    large.run(square, 64)
    cascade = Cascade([wanted.stages[0], large], wanted.labels)
    scores = log_odds(wanted.logits(0, examples)).sort().values
    survivors = set()
    for place in (1, 2, 3, 5, 8, 13, 21, 34, 50):
        policy = Policy([float(scores[place - 1] + scores[place]) / 2])
        got = cascade.predict(examples, policy)
        assert_alike(got, wanted.predict(examples, policy), wanted, examples, policy)
        survivors.add(int(got.stages.sum()))
    assert len(survivors) > 5
    for budget in (8, 40, 300):  # batches of one, of few, of many
        near, far = (one.run(one.encode(examples), budget) for one in (large, wanted.stages[1]))
        assert torch.allclose(near, far, atol=1e-4)
    assert counters["stats"]["unique_graphs"] == 2
    assert not counters["graph_break"]
