"""The pages say what they must, and their tables and figures hold the numbers they were given."""

import json
import math
from dataclasses import asdict, replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from finepurify.config import AttackConfig, IndicatorConfig, PurifyConfig, SweepConfig
from finepurify.figures import (
    calibration_figure,
    frontier_figure,
    heat_figure,
    histogram_figure,
    kind_of,
    rho_figure,
)
from finepurify.indicator import LOG_SD, MEDIAN, split_means
from finepurify.laws import EDGES, counted, laws_of, scales
from finepurify.pairing import WeightPair
from finepurify.report import (
    compare_report,
    joint_report,
    laws_rows,
    purify_report,
    scan_report,
)
from finepurify.stations import Cleaned, Comparison, Settings
from finepurify.strategies import Evidence, by_tensor, kept, purified, scores
from matplotlib.backends.backend_agg import FigureCanvasAgg
from octavo.errors import ConfigError
from safetensors.torch import save_file

WORDS, QUERY = "bert.embeddings.word_embeddings.weight", "bert.encoder.layer.0.attention.self.query"


def drawn(figure) -> Any:
    FigureCanvasAgg(figure).draw()
    return figure.axes


def labels(axes) -> list[str]:
    return [text.get_text() for text in axes.get_legend().get_texts()]


def line(axes, name):
    return next(each for each in axes.lines if each.get_label() == name).get_xydata().tolist()


def row(strategy, rho, accuracy, **more):
    return {"strategy": strategy, "rho": rho, "ACC": accuracy, "low": accuracy - 3,
            "high": accuracy + 2} | more  # fmt: skip


SWEEP = [
    row("none", 1.0, 96.0),
    row("fine-purifying", 0.9, 95.5, reset=5.0),
    row("fine-purifying", 0.5, 93.0, reset=12345.0),
]


@pytest.fixture
def pair(tmp_path):
    generator = torch.Generator().manual_seed(0)

    def noise(*shape):
        return torch.randn(shape, generator=generator)

    init = {WORDS: noise(10, 3), f"{QUERY}.weight": noise(3, 3), f"{QUERY}.bias": noise(3),
            "cls.predictions.bias": noise(10)}  # fmt: skip
    shared = {name: tensor for name, tensor in init.items() if name.startswith("bert")}
    suspect = {name: tensor + 0.1 * noise(*tensor.shape) for name, tensor in shared.items()}
    suspect[WORDS][:2] = init[WORDS][:2]
    suspect[WORDS] = torch.cat([suspect[WORDS], noise(1, 3)])
    suspect |= {"classifier.weight": noise(2, 3), "classifier.bias": noise(2)}
    for name, tensors in (("init", init), ("suspect", suspect)):
        (tmp_path / name).mkdir()
        save_file(tensors, tmp_path / name / "model.safetensors")
    return WeightPair.load(str(tmp_path / "init"), str(tmp_path / "suspect"))


@pytest.fixture
def evidence(pair):
    fisher = {name: torch.rand(pair.suspect.shape(name)) + 0.01 for name in pair.names}
    fisher[WORDS][5] = 0.0
    return Evidence(pair, fisher)


@pytest.fixture
def cleaned(evidence):
    config = PurifyConfig()
    return Cleaned(
        0.5, SWEEP, purified(evidence, config, 0.5).numbers,
        by_tensor(evidence, kept(evidence, config, 0.5)), asdict(laws_of(evidence)), (97.0, 93.0),
        92.0,
    )  # fmt: skip


def comparison(cleaned, metric="ASR", before=20.0):
    chosen = [
        {"strategy": "none", "rho": 1.0, "held ACC": 96.0, "ACC": 95.0, metric: 100.0},
        {"strategy": "fine-purifying", "rho": 0.5, "held ACC": 93.0, "ACC": 94.0, metric: 8.0,
         "p against fine-purifying": 0.125},
        {"strategy": "e-pur", "rho": None, "held ACC": None},
    ]  # fmt: skip
    return Comparison(SWEEP, chosen, {"ACC": 95.5, metric: before}, cleaned.laws)


def page(report):
    return "\n".join(report.markdown)


# --- the histogram -------------------------------------------------------------------------------


def test_counts_lie_between_their_edges():
    r = torch.tensor([0.0, 1.05, 1.2, 1.3, 99.0, 1e-30, 1e30])
    found = counted(r).tolist()
    assert len(found) == len(EDGES) - 1
    places = {n for n, count in enumerate(found) if count}
    one = EDGES.index(1.0)
    # 10^0.1 = 1.259
    assert places == {0, one, one + 1, one + 19, len(found) - 1}
    assert (found[one], found[one + 1], found[one + 19]) == (2, 1, 1)


def test_scales_are_those_of_a_split():
    r = torch.cat(
        [torch.zeros(100), torch.randn(900, generator=torch.Generator().manual_seed(1)) ** 2]
    )
    r[-50:] *= 1000
    for rho in (0.05, 0.5, 0.95):
        wanted = split_means(["all"], lambda _: r, rho)
        found = scales(counted(r).tolist(), 1000, rho)
        assert found == pytest.approx((wanted.k_clean, wanted.k_poison), rel=0.03)
    assert scales(counted(r).tolist(), 1000, 1.0)[1] == 0
    assert scales(counted(r).tolist(), 1000, 0.0)[0] == 0


def test_laws_hold_the_histogram_of_plain_r(evidence):
    laws = laws_of(replace(evidence, config=IndicatorConfig(damping="global-mean", exponent=0.5)))
    values = scores(evidence, PurifyConfig())
    r = torch.cat([values(name).flatten() for name in evidence.pair.names])
    assert laws.histogram == counted(r).tolist()
    assert sum(laws.histogram) == laws.dimensions - laws.unmoved == int((r > 0).sum())


def test_histogram_figure(cleaned):
    figure = histogram_figure(cleaned.laws, 0.5)
    (axes,) = drawn(figure)
    bars = next(each for each in axes.patches if each.get_label() == "measured").get_data()
    total = cleaned.laws["dimensions"]
    assert bars.values.tolist() == [100 * count / total for count in cleaned.laws["histogram"]]
    k_clean, k_poison = scales(cleaned.laws["histogram"], total, 0.5)
    for curve, k in zip(axes.lines, (k_clean, k_poison), strict=True):
        r, law = curve.get_data()
        # all of it is half of the dimensions; it is highest at k
        steps = torch.tensor(r).log10().diff()
        assert float((torch.tensor(law[1:]) * steps).sum()) * 10 == pytest.approx(50, rel=1e-3)
        assert r[law.argmax()] == pytest.approx(k, rel=0.02)
    assert len(drawn(histogram_figure(cleaned.laws, 1.0))[0].lines) == 1


# --- the other figures ---------------------------------------------------------------------------


def test_frontier_is_a_line_a_strategy_from_the_largest_rho():
    rows = [
        row("none", 1.0, 96.0, ASR=99.0) | {"test ACC": 95.0},
        row("fine-mixing", 0.5, 96.0, ASR=20.0) | {"test ACC": 94.0},
        row("fine-mixing", 0.9, 96.0, ASR=80.0) | {"test ACC": 94.5},
        row("wag", 1.0, 96.0),  # not measured
    ]
    left, right = drawn(frontier_figure(rows))
    assert line(left, "fine-mixing") == [[94.5, 80.0], [94.0, 20.0]]
    assert line(right, "fine-mixing") == [[0.9, 80.0], [0.5, 20.0]]
    assert line(left, "fine-tuning alone") == [[95.0, 99.0]]
    assert labels(right) == ["fine-mixing", "fine-tuning alone"]
    assert left.get_xlim()[1] - left.get_xlim()[0] >= 5  # chance is not blown up
    assert left.get_ylabel() == "ASR in %"
    assert "lower right" in left.get_title(loc="right")
    low, high = drawn(frontier_figure([rows[0] | {"BACC": 70.0}], "BACC"))[0].get_ylim()
    assert high - low < 20
    assert drawn(frontier_figure([]))[0].lines[:] == []


def test_rho_figure_shows_floor_choice_and_intervals():
    (axes,) = drawn(rho_figure(SWEEP, 94.0, {"fine-purifying": 0.9}))
    assert line(axes, "fine-purifying") == [[0.5, 93.0], [0.9, 95.5]]
    assert line(axes, "chosen") == [[0.9, 95.5]]
    assert [y for _, y in line(axes, "floor")] == [94.0, 94.0]
    assert [y for _, y in line(axes, "fine-tuning alone")] == [96.0, 96.0]
    bars = [part.tolist() for part in axes.collections[0].get_segments()]
    assert bars == [[[0.5, 90.0], [0.5, 95.0]], [[0.9, 92.5], [0.9, 97.5]]]
    (many,) = drawn(
        rho_figure([*SWEEP, row("fine-mixing", 0.9, 90.0)], None, {"fine-mixing": None})
    )
    assert labels(many) == ["fine-purifying", "fine-mixing", "fine-tuning alone"]


@pytest.mark.parametrize(
    ("name", "kind", "layer"),
    [
        ("bert.embeddings.word_embeddings.weight", "word embedding", None),
        ("bert.embeddings.LayerNorm.gamma", "norms", None),
        ("roberta.encoder.layer.11.attention.self.key.bias", "key", 11),
        ("bert.encoder.layer.3.attention.output.dense.weight", "attention output", 3),
        ("bert.encoder.layer.3.output.dense.weight", "output", 3),
        ("bert.encoder.layer.3.output.LayerNorm.weight", "norms", 3),
        ("bert.pooler.dense.weight", "other", None),
        ("distilbert.transformer.layer.1.attention.out_lin.weight", "attention output", 1),
        ("distilbert.transformer.layer.1.ffn.lin1.bias", "intermediate", 1),
        ("deberta.encoder.layer.0.attention.self.value_proj.weight", "value", 0),
        ("deberta.encoder.rel_embeddings.weight", "other embeddings", None),
        ("model.layers.2.mlp.Wo.weight", "output", 2),
        ("model.layers.2.attn.Wo.weight", "attention output", 2),
        ("model.layers.2.attn.Wqkv.weight", "query+key+value", 2),
        ("transformer.h.5.attn.c_proj.weight", "attention output", 5),
        ("transformer.h.5.mlp.c_proj.weight", "output", 5),
        ("transformer.h.5.ln_1.weight", "norms", 5),
        ("transformer.wte.weight", "word embedding", None),
        ("transformer.wpe.weight", "other embeddings", None),
        ("model.layers.10.self_attn.o_proj.weight", "attention output", 10),
        ("model.layers.10.mlp.gate_proj.weight", "intermediate", 10),
        ("gpt_neox.layers.7.mlp.dense_h_to_4h.weight", "intermediate", 7),
        ("gpt_neox.layers.7.mlp.dense_4h_to_h.weight", "output", 7),
        ("gpt_neox.layers.7.attention.dense.weight", "attention output", 7),
        ("decoder.layers.4.self_attn_layer_norm.weight", "norms", 4),
    ],
)
def test_kinds_of_many_architectures(name, kind, layer):
    assert kind_of(name) == (kind, layer)


def test_heat_is_the_share_of_kind_and_layer():
    layers = "bert.encoder.layer"
    rows = [
        {"tensor": WORDS, "dimensions": 30, "reset": 15},
        {"tensor": f"{layers}.10.attention.self.query.weight", "dimensions": 9, "reset": 1},
        {"tensor": f"{layers}.10.attention.self.query.bias", "dimensions": 1, "reset": 0},
        {"tensor": f"{layers}.2.attention.self.query.weight", "dimensions": 2000, "reset": 1},
        {"tensor": f"{layers}.2.output.dense.weight", "dimensions": 10, "reset": 0},
    ]
    (axes,) = drawn(heat_figure(rows))
    assert [text.get_text() for text in axes.get_xticklabels()] == ["none", "2", "10"]
    kinds = [text.get_text() for text in axes.get_yticklabels()]
    assert kinds == ["word embedding", "query", "output"]
    cells = {text.get_position(): text.get_text() for text in axes.texts}
    assert cells == {(0, 0): "50", (2, 1): "10", (1, 1): "<0.1", (1, 2): "0"}


def test_calibration():
    bins = [{"p": 0.1, "clean": 0.3, "dimensions": 5}, {"p": 0.5, "clean": 0.0, "dimensions": 0},
            {"p": 0.9, "clean": 0.8, "dimensions": 7000}]  # fmt: skip
    (axes,) = drawn(calibration_figure(bins))
    assert line(axes, "measured") == [[0.1, 0.3], [0.9, 0.8]]
    assert [text.get_text() for text in axes.texts] == ["5", "7,000"]


def test_legends_cover_nothing(cleaned):
    rows = [row(name, 0.9, 95.0, ASR=50.0) for name in ("none", "wag", "ties", "dare", "random")]
    for figure in (frontier_figure(rows, x="ACC"), rho_figure(rows, 90.0, {}),
                   histogram_figure(cleaned.laws, 0.9)):  # fmt: skip
        axes = drawn(figure)[-1]
        assert axes.get_legend().get_window_extent().x0 >= axes.get_window_extent().x1


# --- tables --------------------------------------------------------------------------------------


def test_laws_stand_beside_the_theory(cleaned):
    laws = cleaned.laws | {"spearman": 0.5, "unmoved": 9, "flat": 3, "neutral": 2,
                           "top_in_embedding": 0.97, "dimensions": 45}  # fmt: skip
    rows = {one["measure"]: one for one in laws_rows(laws)}
    assert rows["sd of log r"]["measured"] == laws["log_sd"]
    assert rows["sd of log r"]["theory"] == LOG_SD == pytest.approx(2.221, abs=1e-3)
    assert rows["median / mean of r"]["measured"] == laws["median_over_mean"]
    assert rows["median / mean of r"]["theory"] == MEDIAN
    assert rows["KS distance from Gamma"]["measured"] == laws["ks_distance"]
    assert rows["k, mean of r"]["measured"] == laws["k"]
    assert rows["dimensions that never moved"]["measured"] == 9
    assert rows["dimensions that never moved"]["meaning"].startswith("20 % of 45")
    assert rows["dimensions with H = 0"]["measured"] == 3
    assert rows["neutral dimensions"]["measured"] == 2
    assert rows["% of the top 1 % of r in the word embedding"]["measured"] == pytest.approx(97)
    told = [laws_rows(laws | {"spearman": x})[0]["meaning"] for x in (0.5, 0.0, math.nan)]
    assert "as under SGD" in told[0]
    assert "as under Adam" in told[1]
    assert "cannot be told" in told[2]
    assert laws_rows({}) == []


# --- pages ---------------------------------------------------------------------------------------


def test_purify_page(pair, cleaned):
    report = purify_report(cleaned, pair, Settings(), 48, 16)
    words = page(report)
    reset = sum(one["reset"] for one in cleaned.tensors)
    assert f"set {reset} of 45 compared dimensions" in words
    assert "on 48 clean rows" in words
    assert "on 16 held-out rows" in words
    assert "cannot know is how often an attack still succeeds (ASR)" in words
    # two rows of words never moved, and the one that INIT lacks is its own counterpart
    assert "9 of them (20.0 %) never moved" in words
    assert "no counterpart in INIT | 2 | 8 | classifier.bias, classifier.weight" in words
    assert "Of INIT alone, not looked at: cls.predictions.bias" in words
    assert f"| {WORDS} | 1 |" in words
    assert "INIT lacks, compared with nothing: they were kept" in words
    assert "is our reading of it" in words
    assert "The body of the paper was not available" in words
    inside = 100 * cleaned.tensors[pair.names.index(WORDS)]["reset"] / reset
    assert f"{inside:.1f} % of what was reset lie in the word embedding" in words
    assert "which holds 73.3 % of the dimensions" in words
    assert ("layers were cleaned would be wrong" in words) == (inside >= 50)
    assert len(report.images) == 3
    assert "| fine-purifying | 0.5 |" in words
    assert "| 97 | 93 | 92 | yes |" in words
    assert "| fine-purifying | 0.5 | 93 | 90 | 95 | 12345 |" in words
    assert "a little flattered" in words


def test_purify_page_of_a_given_rho_and_of_no_success(pair, cleaned):
    given = replace(cleaned, rows=[], accuracy=None, floor=None, laws={}, tensors=[])
    settings = Settings(purify=PurifyConfig(strategy="fine-mixing", rho_over="moved"))
    report = purify_report(given, pair, settings, 48, 0)
    words = page(report)
    assert "rho was given, not chosen" in words
    assert "rho is a share of those that moved" in words
    assert "premises" not in words
    assert not report.images
    failed = page(purify_report(replace(cleaned, met=False), pair, Settings(), 48, 16))
    assert "No rho that was tried keeps the accuracy floor of 92.0 %" in failed
    assert "| no |" in failed
    assert "flattered" not in failed
    elsewhere = replace(cleaned, tensors=[
        {"tensor": WORDS, "dimensions": 30, "reset": 0},
        {"tensor": f"{QUERY}.weight", "dimensions": 9, "reset": 9},
    ])  # fmt: skip
    words = page(purify_report(elsewhere, pair, Settings(), 48, 16))
    assert "0.0 % of what was reset lie in the word embedding" in words
    assert "would be wrong" not in words


def test_settings_are_told(pair, cleaned):
    settings = Settings(
        indicator=IndicatorConfig(damping="tensor-mean", damping_share=0.3, epsilon=1e-6),
        purify=PurifyConfig(mode="posterior"),
    )
    cleaned.numbers["mean p"] = 0.75
    words = page(purify_report(cleaned, pair, settings, 1, 1))
    assert "%) more than half of the way back to" in words
    assert "The posterior weighs every dimension" in words
    assert "epsilon 1e-06 and 0.3 of its tensor-mean added to H" in words
    assert "mode posterior, scope global" in words


def test_compare_page(pair, cleaned):
    found = comparison(cleaned)
    settings = Settings(sweep=SweepConfig(drop=3.5))
    attack = AttackConfig(trigger=("cf", "mn"), target=0)
    report = compare_report(found, pair, settings, attack)
    words = page(report)
    assert "(badword: 'cf', 'mn', class 0) was looked at only after" in words
    assert "| fine-purifying | 0.5 | 93 | 94 | 8 | 0.125 |" in words
    assert "| 95.5 | 20 |" in words
    assert "McNemar" in words
    assert len(report.images) == 3
    biased = page(compare_report(comparison(cleaned, "BACC"), pair, settings, attack))
    assert "Accuracy and BACC of each strategy" in biased


def test_compare_page_without_a_pattern(pair, cleaned):
    chosen = [SWEEP[0], SWEEP[1]]
    report = compare_report(Comparison(SWEEP, chosen, {}, {}), pair, Settings(), None)
    words = page(report)
    assert "cannot tell which strategy removes an attack" in words
    assert "The suspect as it came" not in words
    assert len(report.images) == 1


def test_scan_page(pair):
    layers = [{"tensor": WORDS, "dimensions": 30, "top share": 0.75},
              {"tensor": f"{QUERY}.weight", "dimensions": 9, "top share": 0.25}]  # fmt: skip
    found: Any = SimpleNamespace(
        tokens=[{"token": "cf", "drift": 1.5, "stands out": True}], layers=layers, verdict=True,
        reason="'cf' drifted", warning="An alarm proves nothing.",
    )  # fmt: skip
    report = scan_report(found, pair, "init-model", "suspect-model")
    words = page(report)
    assert "# Scan of suspect-model" in words
    assert "Something stands out: 'cf' drifted." in words
    assert "An alarm proves nothing." in words
    assert "Compared with init-model" in words
    assert "| cf | 1.5 | yes |" in words
    assert "75.0 % of that 1 % lie in the word embedding" in words
    assert "classifier.weight" in words
    assert len(report.images) == 1
    found.verdict, found.tokens, found.layers = False, [], []
    empty = scan_report(found, pair, "init-model", "suspect-model")
    assert "Nothing stands out" in page(empty)
    assert not empty.images


def test_everything_compared_and_tied(pair, cleaned):
    pair.kept = {"lm_head.weight": f"tied to {WORDS}"}
    pair.dropped, pair.grown = [], {}
    words = page(purify_report(cleaned, pair, Settings(), 1, 1))
    assert "Every tensor of the suspect has a counterpart" in words
    assert "being tied: lm_head.weight" in words
    pair.kept = {f"head.{n}": "excluded" for n in range(9)}
    pair.suspect = SimpleNamespace(numel=lambda name: 2, source="suspect")
    words = page(purify_report(cleaned, pair, Settings(), 1, 1))
    assert (
        "| excluded | 9 | 18 | head.0, head.1, head.2, head.3, head.4, head.5 and 3 more |" in words
    )


def test_pages_open_in_a_browser(pair, cleaned, tmp_path, visit):
    report = purify_report(cleaned, pair, Settings(), 48, 16)
    dom, said, asked = visit(report.save(tmp_path / "page"))
    assert "What was not touched" in dom
    assert (said, asked) == ([], [])


# --- several runs --------------------------------------------------------------------------------


def finished(folder, options, result, status="finished"):
    folder.mkdir()
    (folder / "config.yaml").write_text(yaml.safe_dump(options))
    (folder / "result.json").write_text(json.dumps(result))
    (folder / "environment.json").write_text(json.dumps({"status": status}))
    return folder


def test_joint_page(tmp_path, cleaned):
    options = {"init": "i", "suspect": "s", "strategy": "fine-purifying", "drop": 2.0, "seed": 0}
    one = finished(tmp_path / "one", options, asdict(cleaned))
    two = finished(tmp_path / "two", options | {"seed": 1}, asdict(comparison(cleaned)))
    given = replace(cleaned, rows=[], accuracy=None, floor=None, laws={})
    three = finished(tmp_path / "three", options, asdict(given))
    report, rows = joint_report((one, two, three))
    words = page(report)
    assert rows[0] == {
        "run": str(one), "suspect": "s", "strategy": "fine-purifying", "rho": 0.5,
        "reset": int(cleaned.numbers["reset"]), "held ACC": 93.0, "floor": 92.0, "floor kept": True,
    }  # fmt: skip
    assert [each["strategy"] for each in rows[1:4]] == ["none", "fine-purifying", "e-pur"]
    assert (rows[2]["ACC"], rows[2]["ASR"], rows[2]["run"]) == (94.0, 8.0, str(two))
    assert "held ACC" not in rows[4]
    assert "| seed | 0 | 1 | 0 |" in words
    assert "| drop |" not in words
    assert len(report.images) == 3
    assert "No curvature was computed." in words
    alike = page(joint_report((one,))[0])
    assert "Options in which" not in alike


def test_folders_that_are_no_run(tmp_path, cleaned):
    good, result = {"drop": 2.0}, asdict(cleaned)
    empty = tmp_path / "empty"
    empty.mkdir()
    bad = [
        tmp_path / "nowhere",
        empty,
        finished(tmp_path / "killed", good, result, "running"),
        finished(tmp_path / "scan", good, {"tokens": [], "layers": []}),
        finished(tmp_path / "list", good, []),
        finished(tmp_path / "text", ["a"], result),
    ]
    (finished(tmp_path / "broken", good, result) / "config.yaml").write_text("a: [")
    (finished(tmp_path / "half", good, result) / "result.json").write_text('{"rows": ')
    for folder in [*bad, tmp_path / "broken", tmp_path / "half"]:
        with pytest.raises(ConfigError, match="no finished run of `purify` or `compare`") as caught:
            joint_report((folder,))
        assert str(folder) in str(caught.value)
        assert "\n" not in str(caught.value)
    with pytest.raises(ConfigError, match="no run was named"):
        joint_report(())
