"""The scan: what stands out does, what does not does not, and the tables are right to the number."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from finepurify.config import IndicatorConfig
from finepurify.pairing import WeightPair
from finepurify.pretrain import SPECIAL, word_tokenizer
from finepurify.scan import EXPECTED, WARNING, ScanReport, deviations, location, scan, shrunk
from safetensors.torch import save_file
from scipy.stats import norm
from torch import Tensor

ROWS, WIDTH = 205, 8
TOKENIZER = word_tokenizer([f"w{number}" for number in range(ROWS - len(SPECIAL))], 16)
TABLE = "bert.embeddings.word_embeddings.weight"
DENSE = "bert.encoder.layer.1.output.dense.weight"


def steps(sizes: Tensor, seed: int = 0) -> Tensor:
    """Rows of the given lengths in random directions, [rows, width]."""
    directions = torch.randn(len(sizes), WIDTH, generator=torch.Generator().manual_seed(seed))
    return directions / directions.norm(dim=1, keepdim=True) * sizes[:, None]


def ordinary(spread: float = 1.0) -> Tensor:
    """Drifts whose logarithms are the quantiles of a normal distribution, in random order, [rows]."""
    quantiles = torch.tensor(norm.ppf((np.arange(ROWS) + 0.5) / ROWS), dtype=torch.float32)
    order = torch.randperm(ROWS, generator=torch.Generator().manual_seed(1))
    return 0.01 * (spread * quantiles[order]).exp()


@pytest.fixture
def init() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(5)
    return {
        TABLE: torch.randn(ROWS, WIDTH, generator=generator),
        DENSE: torch.randn(20, WIDTH, generator=generator),
    }


@pytest.fixture
def paired(init: dict[str, Tensor], tmp_path: Path) -> Any:
    """A function that makes a pair of the drift of the table and, where given, of the dense layer."""

    def make(table: Tensor, dense: Tensor | None = None, **options: Any) -> WeightPair:
        suspect = {TABLE: init[TABLE] + table, DENSE: init[DENSE] + (0 if dense is None else dense)}
        for name, tensors in (("init", init), ("suspect", suspect)):
            (tmp_path / name).mkdir(exist_ok=True)
            save_file(tensors, tmp_path / name / "model.safetensors")
        return WeightPair.load(tmp_path / "init", tmp_path / "suspect", **options)

    return make


def outstanding(report: ScanReport) -> list[str]:
    return [row["token"] for row in report.tokens if row["stands out"]]


def highest(scores: np.ndarray) -> float:
    """The largest z of 200 rows, by hand: of them the tenth largest ends at 95 %."""
    logs = np.sort(np.log(scores.astype(float)))
    assert len(logs) == 200
    median = logs[99]
    scales = [(np.quantile(logs, share) - median) / norm.ppf(share) for share in (0.9, 0.95)]
    return (logs[-1] - median) / max(scales)


def test_a_row_that_moved_far_is_first_and_fires(paired: Any) -> None:
    sizes = ordinary()
    sizes[100] = 5.0
    report = scan(paired(steps(sizes)), TOKENIZER)
    first = report.tokens[0]
    assert report.verdict
    assert outstanding(report) == ["w95"]
    assert (first["token"], first["id"], first["drift rank"], first["E-PUR rank"]) == (
        "w95",
        100,
        1,
        1,
    )
    assert first["drift"] == pytest.approx(5.0, rel=1e-4)
    assert first["E-PUR"] == pytest.approx(5.0 / np.log(20), rel=1e-4)
    assert first["count"] is None
    assert first["mean r"] is None
    assert first["r rank"] is None
    assert report.evidence == "drift"
    assert report.outstanding == 1
    assert report.reason.startswith("'w95': 1 of 200 moved tokens drifted further than z = 3.09; ")
    assert report.warning == WARNING
    # by hand: 200 judged rows, those of the special tokens are not
    assert first["z"] == pytest.approx(highest(sizes.numpy()[5:]), rel=1e-3)
    assert report.threshold == pytest.approx(norm.isf(0.2 / 200))


def test_rows_that_moved_as_rows_do_do_not_stand_out(paired: Any) -> None:
    report = scan(paired(steps(ordinary())), TOKENIZER, top=3)
    assert not report.verdict
    assert outstanding(report) == []
    assert len(report.tokens) == 3
    assert report.reason.startswith("none of 200 moved tokens drifted further")
    assert (report.rows, report.moved, report.judged, report.outstanding) == (205, 205, 200, 0)


def test_rows_that_moved_equally_are_alike_up_to_a_tenth(paired: Any) -> None:
    sizes = torch.full((ROWS,), 0.01)
    assert not scan(paired(steps(sizes)), TOKENIZER).verdict
    sizes[50] = 0.013  # less than threshold x 0.1 above the others in its logarithm
    assert not scan(paired(steps(sizes)), TOKENIZER).verdict
    sizes[50] = 0.02
    assert outstanding(scan(paired(steps(sizes)), TOKENIZER)) == ["w45"]


def test_special_tokens_are_told_and_not_judged(paired: Any) -> None:
    sizes = ordinary()
    sizes[TOKENIZER.convert_tokens_to_ids("[CLS]")] = 50.0
    report = scan(paired(steps(sizes)), TOKENIZER, top=ROWS)
    row = next(row for row in report.tokens if row["token"] == "[CLS]")
    assert not report.verdict
    assert row["z"] is None
    assert row["drift rank"] == 1
    assert report.tokens[-5] == row


#: Seven words of the task drift as far as the trigger, row 150; clean data is full of them.
TASK, TRIGGER = slice(20, 27), 150


@pytest.fixture
def task(paired: Any) -> WeightPair:
    sizes = ordinary(0.5)
    sizes[TASK] = sizes[TRIGGER] = 0.1
    return paired(steps(sizes))


def test_without_clean_data_words_of_the_task_stand_out_with_the_trigger(task: WeightPair) -> None:
    report = scan(task, TOKENIZER)
    assert report.outstanding == 8
    assert sorted(row["id"] for row in report.tokens[:8]) == [*range(20, 27), TRIGGER]


def test_counts_tell_a_trigger_from_the_words_of_the_task(task: WeightPair) -> None:
    count = torch.full((ROWS,), 10)
    count[TASK], count[TRIGGER] = 2000, 0
    report = scan(task, TOKENIZER, frequency=dict(enumerate(count.tolist())))
    assert outstanding(report) == ["w145"]
    assert report.tokens[0]["count"] == 0
    assert report.evidence == "drift per count"
    # by hand
    drift = ordinary(0.5).numpy().astype(float)
    drift[TASK] = drift[TRIGGER] = 0.1
    score = drift / np.sqrt(count.numpy() + 0.1 * count.numpy().mean())
    assert report.tokens[0]["z"] == pytest.approx(highest(score[5:]), rel=1e-3)


def test_curvature_tells_it_too(task: WeightPair) -> None:
    curvature = torch.full((ROWS, WIDTH), 1e-2)
    curvature[TASK], curvature[TRIGGER] = 1.0, 0.0
    fisher = {TABLE: curvature, DENSE: torch.ones(20, WIDTH)}
    config = IndicatorConfig(damping="absolute", epsilon=1e-3)
    report = scan(task, TOKENIZER, fisher=fisher, indicator_config=config)
    first = report.tokens[0]
    assert outstanding(report) == ["w145"]
    assert report.evidence == "indicator"
    assert first["r rank"] == 1
    # the r that is told is the configuration's: delta^2 = 0.01 over 8 dimensions, H = 0
    assert first["mean r"] == pytest.approx(0.01 / 8 / 1e-3, rel=1e-3)
    both = scan(task, TOKENIZER, fisher=fisher, frequency={30: 9})
    assert both.evidence == "drift per count"
    assert both.tokens[0]["mean r"] is not None


def test_rows_that_decayed_count_as_unmoved(paired: Any, init: dict[str, Tensor]) -> None:
    sizes = ordinary()
    drift = steps(sizes)
    drift[100:] = -0.01 * init[TABLE][100:]
    report = scan(paired(drift), TOKENIZER)
    assert (report.moved, report.judged) == (100, 95)
    assert report.threshold == pytest.approx(norm.isf(EXPECTED / 95))


def test_what_decay_is() -> None:
    row = torch.tensor([[3.0, 4.0]])
    decay, rounded = -0.05 * row, torch.tensor([[-0.10, -0.2]])
    for delta, wanted in (
        (decay, True),
        (rounded, True),
        (-decay, False),  # grown
        (-0.2 * row, False),  # too far
        (torch.tensor([[0.16, -0.12]]), False),  # across
        (0 * row, False),
    ):
        assert shrunk(delta, row).tolist() == [wanted]


def test_a_row_that_moved_alone_stands_out(paired: Any) -> None:
    sizes = torch.zeros(ROWS)
    sizes[[100, 101]] = torch.tensor([0.5, 0.7])
    report = scan(paired(steps(sizes)), TOKENIZER, top=1)
    assert report.verdict
    assert report.threshold is None
    assert report.tokens[0]["z"] is None
    assert report.outstanding == 2
    assert report.reason.startswith(
        "of all rows of the word embedding only these moved: 'w96' and others; "
    )


def test_few_rows_of_few_cannot_be_judged(init: dict[str, Tensor], tmp_path: Path) -> None:
    suspect = {TABLE: init[TABLE][:30].clone(), DENSE: init[DENSE]}
    suspect[TABLE][10:20] += 1.0
    for name, tensors in (("init", init | {TABLE: init[TABLE][:30]}), ("suspect", suspect)):
        (tmp_path / name).mkdir()
        save_file(
            {k: v.contiguous() for k, v in tensors.items()}, tmp_path / name / "model.safetensors"
        )
    report = scan(WeightPair.load(tmp_path / "init", tmp_path / "suspect"), TOKENIZER)
    assert not report.verdict
    assert report.reason.startswith("only 10 rows of the word embedding moved, too few")


def test_nothing_moved(paired: Any) -> None:
    report = scan(paired(torch.zeros(ROWS, WIDTH)), TOKENIZER, frequency={7: 3})
    assert not report.verdict
    assert report.reason == "INIT and the suspect are identical"
    assert report.tokens == []
    assert [row["top share"] for row in report.layers] == [0, 0]


def test_only_layers_moved(paired: Any) -> None:
    report = scan(paired(torch.zeros(ROWS, WIDTH), torch.ones(20, WIDTH)), TOKENIZER)
    assert not report.verdict
    assert report.judged == 0
    assert report.reason.startswith("only 0 rows")


def test_layers_without_a_word_embedding(paired: Any) -> None:
    dense = torch.zeros(20, WIDTH)
    dense[3, 4], dense[7, 0] = 2.0, -1.0
    report = scan(paired(torch.ones(ROWS, WIDTH), dense, exclude=["word_emb"]), TOKENIZER)
    assert not report.verdict
    assert report.evidence == "none"
    assert report.tokens == []
    assert report.reason.startswith(
        "tokens were not judged, for no word embedding is compared; 100%"
    )
    [row] = report.layers
    assert (row["tensor"], row["layer"], row["module"]) == (DENSE, 1, "output.dense")
    assert (row["dimensions"], row["moved"], row["share"]) == (160, 2, 1.0)
    assert row["k"] == pytest.approx(5.0 / 160, rel=1e-5)


def test_where_the_largest_drift_lies(paired: Any) -> None:
    # 1,800 dimensions, of which 18 are the top 1 %: 6 in the dense layer, 12 in the table
    dense = torch.full((20, WIDTH), 0.01)
    dense[0, :6] = 1.0
    table = torch.full((ROWS, WIDTH), 0.01)
    table[9, :], table[10, :4] = 0.5, 0.5
    layers = {row["tensor"]: row for row in scan(paired(table, dense), TOKENIZER).layers}
    assert layers[DENSE]["top share"] == pytest.approx(6 / 18)
    assert layers[TABLE]["top share"] == pytest.approx(12 / 18)
    assert layers[DENSE]["share"] == pytest.approx(160 / 1800)
    assert layers[DENSE]["concentration"] == pytest.approx((6 / 18) / (160 / 1800))
    # much curvature in the dense layer: there r is small, and all of the top is the table's
    fisher = {TABLE: torch.full((ROWS, WIDTH), 1e-3), DENSE: torch.full((20, WIDTH), 1e3)}
    report = scan(paired(table, dense), TOKENIZER, fisher=fisher)
    assert [row["top share"] for row in report.layers] == [
        1.0 if row["tensor"] == TABLE else 0.0 for row in report.layers
    ]
    assert f"100% of the largest 1 % of the drift lie in {TABLE}, which holds 91%" in report.reason


def test_rows_beyond_the_tokenizer_are_told_by_number(paired: Any) -> None:
    sizes = ordinary()
    sizes[204] = 5.0
    short = word_tokenizer([f"w{number}" for number in range(150)], 16)
    assert scan(paired(steps(sizes)), short).tokens[0]["token"] == "#204"


def test_as_many_stand_out_by_chance_as_the_threshold_says() -> None:
    rows, draws = 500, 400
    logs = torch.randn(draws, rows, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    everything = torch.ones(rows, dtype=torch.bool)
    threshold = norm.isf(EXPECTED / rows)
    found = [int((deviations((3 * log).exp(), everything) > threshold).sum()) for log in logs]
    # the scale is estimated, which adds a little to 0.2
    assert np.mean(found) == pytest.approx(EXPECTED, abs=0.09)


def test_the_end_of_a_heavy_tail_is_no_outlier() -> None:
    # as of common words of real text under SGD: above the 90th percentile drifts grow faster
    normal = torch.from_numpy(norm.ppf((np.arange(4000) + 0.5) / 4000))
    logs = normal + 0.3 * (normal - float(norm.ppf(0.9))).clamp(min=0)
    everything = torch.ones(len(logs), dtype=torch.bool)
    threshold = float(norm.isf(EXPECTED / len(logs)))
    assert int((logs > threshold).sum()) >= 2  # median 0 and, at the 90th percentile, scale 1
    assert int((deviations(logs.exp(), everything) > threshold).sum()) == 0
    logs[7] = 9.0
    found = deviations(logs.exp(), everything) > threshold
    assert found.nonzero().flatten().tolist() == [7]


def test_five_triggers_do_not_hide_each_other() -> None:
    score = torch.cat([ordinary(), torch.full((5,), 3.0)])
    z = deviations(score, torch.ones(len(score), dtype=torch.bool))
    assert (z > float(norm.isf(EXPECTED / len(score)))).nonzero().flatten().tolist() == list(
        range(ROWS, ROWS + 5)
    )


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("bert.encoder.layer.3.attention.self.query.weight", (3, "attention.self.query")),
        ("bert.embeddings.LayerNorm.gamma", (None, "embeddings.LayerNorm")),
        ("model.layers.11.mlp.up_proj.weight", (11, "mlp.up_proj")),
        ("h.0.ln_1.bias", (0, "ln_1")),
        ("wte.weight", (None, "wte")),
    ],
)
def test_location(name: str, wanted: tuple[int | None, str]) -> None:
    assert location(name) == wanted
