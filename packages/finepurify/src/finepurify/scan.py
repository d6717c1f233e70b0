"""What fine-tuning left behind: tokens and layers whose drift from INIT is out of the ordinary.

Scanners of model files look for code in pickles; this one looks at behaviour, as far as weights show
it. A trigger word has a row of its own in the word embedding. The attack moves that row far, and clean
data hardly excites it. So each row gets one score, its drift against what clean data lets expect:

- with token counts, drift / sqrt(count + a tenth of the mean count): the drift of clean dimensions
  grows with the root of their curvature, and a row's curvature with how often its token occurs;
- with a Fisher diagonal but no counts, the root of the row's mean indicator r;
- without clean data, the drift itself, which tells little: the task's words may drift as far as a
  trigger, and under SGD the commonest words further than all.

The rule: a row stands out if the logarithm of its score lies so far above the median that of as many
normally distributed values `EXPECTED` would lie there. The scale is read off at the 90th and the 99th
percentile, and the larger one holds; not at the quartiles, for the words that carry a task, or are very
common, drift more than all others, and are no outliers.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from scipy.stats import norm
from torch import Tensor

from finepurify import select
from finepurify.config import IndicatorConfig, PurifyConfig
from finepurify.pairing import WeightPair
from finepurify.strategies import Evidence, difference, row_scores, scores, word_embedding

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

#: How many of the judged rows would stand out by chance, were the logarithms of their scores normal.
EXPECTED = 0.2

#: Fewer moved rows have no distribution that one of them could be an outlier of.
FEWEST_ROWS = 20

#: Where the scale is read off, though never with fewer rows above than triggers may have.
UPPER, ABOVE = (0.9, 0.99), 10

#: The least scale: drifts within a tenth of each other are alike.
LEAST_SCALE = 0.1

#: Of the mean count, or curvature, of a row: what every row is granted.
SHARE = 0.1

#: Share of all dimensions that the layers' table follows.
TOP = 0.01

WARNING = (
    "A scan that finds nothing proves nothing: triggers and biases made of common words share their "
    "rows with clean text and are usually missed, and so is an attacker who keeps the drift small. Nor "
    "does an alarm prove an attack: a task's own words drift too, and stand out where the clean data "
    "lacks them (some hundred texts help) or there is none, and so do tokens added on purpose. Look at "
    "the tokens that stand out, and try them."
)

Row = dict[str, Any]


@dataclass(frozen=True)
class ScanReport:
    """What a scan found.

    Attributes:
        verdict: whether something stands out.
        reason: why, in words.
        warning: what that tells, and what it does not.
        evidence: what tokens were judged by: `drift per count`, `indicator`, `drift`, or `none`.
        threshold: the z from which a row stands out; None where no row was measured against others.
        rows: of the word embedding.
        moved: of these, rows that moved, by more than weight decay.
        judged: of these, rows whose tokens are not special.
        outstanding: how many of these stand out.
        tokens: the most suspicious rows, the first first: `token`, `id`, `drift` (||delta||), `drift
            rank`, `E-PUR`, `E-PUR rank`, `mean r` and `r rank` (None without a Fisher diagonal), `count`
            in clean data (None without), `z` (None where not judged), `stands out`.
        layers: a row a compared tensor, in file order: `tensor`, `layer` (None outside the layers),
            `module`, `dimensions`, `moved`, `share` of all dimensions, `top share` of the 1 % of
            dimensions with the largest r (delta^2 without a Fisher diagonal), `concentration` (the one
            share by the other), `k` (mean r, or mean delta^2).
    """

    verdict: bool
    reason: str
    warning: str
    evidence: str
    threshold: float | None
    rows: int
    moved: int
    judged: int
    outstanding: int
    tokens: list[Row]
    layers: list[Row]


def scan(
    pair: WeightPair,
    tokenizer: "PreTrainedTokenizerBase",
    *,
    frequency: Mapping[int, int] | None = None,
    fisher: Mapping[str, Tensor] | None = None,
    indicator_config: IndicatorConfig = IndicatorConfig(),
    architecture: Any = None,
    top: int = 20,
) -> ScanReport:
    """Look for rows and layers that drifted further than fine-tuning on clean data explains.

    Args:
        pair: INIT and the suspect.
        tokenizer: the suspect's own, for the tokens' texts and which of them are special.
        frequency: how often each token id stands in clean data (see `bench.frequencies`).
        fisher: the Fisher diagonal on clean data under the pair's names, [shape of the tensor] each.
        indicator_config: of the r that is told. Rows are judged with a tenth of the tensor's mean
            curvature for damping in any case: an epsilon alone would set apart all words that the
            clean data lacks.
        architecture: the model's configuration, which tells where key biases are neutral.
        top: how many tokens to list at most.

    Returns:
        The evidence, and a verdict by the rule of this module. Rows that only shrank by weight decay
        count as unmoved. Where fewer than 20 rows moved, and less than a tenth of all, each of them
        stands out: fine-tuning moves the rows of all the words that it reads, or none.
    """
    values = _indicators(pair, fisher, indicator_config, architecture)
    layers = _layers(pair, values)
    name = word_embedding(pair)
    if name is None or pair.identical:
        reason = (
            "INIT and the suspect are identical"
            if pair.identical
            else f"tokens were not judged, for no word embedding is compared; {_drift(layers)}"
        )
        return ScanReport(False, reason, WARNING, "none", None, 0, 0, 0, 0, [], layers)
    both = pair.read(name)
    delta = difference(both)
    moved = (delta != 0).any(1) & ~shrunk(delta, both.init.float())
    judged = moved & ~_special(tokenizer, len(delta))
    evidence, score = _row_scores(pair, name, delta, frequency, fisher, indicator_config)
    count = int(judged.sum())
    few = count < FEWEST_ROWS
    threshold = None if few else float(norm.isf(EXPECTED / count))
    z = None if few else deviations(score, judged)
    if threshold is None or z is None:
        stands_out = judged & (10 * count < len(delta))
    else:
        stands_out = judged & (z > threshold)
    columns = {
        "drift": delta.norm(dim=1),
        "E-PUR": row_scores(pair, name, frequency or {}),
        "mean r": None if fisher is None else values(name).double().mean(1),
    }
    order = score.argsort(descending=True, stable=True)
    order = torch.cat([order[judged[order]], order[~judged[order]]])
    tokens = _tokens(tokenizer, order[:top].tolist(), columns, frequency, z, judged, stands_out)
    found = int(stands_out.sum())
    reason = _reason([row["token"] for row in tokens if row["stands out"]], found, count, threshold)
    return ScanReport(
        found > 0, f"{reason}; {_drift(layers)}", WARNING, evidence, threshold,
        len(delta), int(moved.sum()), count, found, tokens, layers,
    )  # fmt: skip


# --- tokens --------------------------------------------------------------------------------------


def _row_scores(
    pair: WeightPair,
    name: str,
    delta: Tensor,
    frequency: Mapping[int, int] | None,
    fisher: Mapping[str, Tensor] | None,
    config: IndicatorConfig,
) -> tuple[str, Tensor]:
    """What rows are judged by, and each row's score, [rows] of the size of a drift."""
    drift = delta.double().norm(dim=1)
    if frequency is not None:
        count = torch.tensor([float(frequency.get(row, 0)) for row in range(len(delta))]).double()
        expected = count + SHARE * count.mean()
        return "drift per count", drift / expected.clamp(min=1e-12).sqrt()
    if fisher is not None:
        damped = replace(config, damping="tensor-mean", damping_share=SHARE)
        return "indicator", _indicators(pair, fisher, damped, None)(name).double().mean(1).sqrt()
    return "drift", drift


def deviations(score: Tensor, judged: Tensor) -> Tensor:
    """How far above the median each row's score lies, in standard deviations of its logarithm.

    The scale is the distance from the median to the 90th percentile over a normal distribution's, 1.28,
    or the like of the 99th (of the tenth largest, where that is lower) if larger, and at least 0.1: a
    few rows do not change it, however far out, but a heavy tail does.

    Args:
        score: [rows], 0 or more.
        judged: [rows] of bool, true for one row at least: those that median and percentile are of.

    Returns:
        [rows] of float64; meaningless where a row is not judged.
    """
    log = score.double().clamp(min=torch.finfo(torch.float64).tiny).log()
    known = log[judged]
    median, scale = known.median(), LEAST_SCALE
    for share in UPPER:
        share = max(UPPER[0], min(share, 1 - ABOVE / len(known)))
        scale = max(scale, float((known.quantile(share) - median) / norm.ppf(share)))
    return (log - median) / scale


def shrunk(delta: Tensor, init: Tensor) -> Tensor:
    """Rows whose drift is weight decay and nothing else: towards zero, and less than a tenth of the way.

    Args:
        delta: [rows, width] w_ft - w_init.
        init: [rows, width] w_init.

    Returns:
        [rows] of bool. Rounding leaves a decayed row's direction inexact: a cosine of 0.9 is enough.
    """
    towards_zero = torch.cosine_similarity(delta, -init, dim=1) > 0.9
    return towards_zero & (delta.norm(dim=1) < 0.1 * init.norm(dim=1))


def _special(tokenizer: "PreTrainedTokenizerBase", rows: int) -> Tensor:
    """Which rows are of special tokens, [rows] of bool: in every text, they drift like no word."""
    found = torch.zeros(rows, dtype=torch.bool)
    found[[row for row in tokenizer.all_special_ids if row < rows]] = True
    return found


def _tokens(
    tokenizer: "PreTrainedTokenizerBase",
    rows: list[int],
    columns: Mapping[str, Tensor | None],
    frequency: Mapping[int, int] | None,
    z: Tensor | None,
    judged: Tensor,
    stands_out: Tensor,
) -> list[Row]:
    """The table of some rows, in the order given."""
    ranks = {
        name: None if values is None else values.argsort(descending=True, stable=True).argsort() + 1
        for name, values in columns.items()
    }

    def at(values: Tensor | None, row: int) -> Any:
        return None if values is None else values[row].item()

    return [
        {
            # a vocabulary is often padded: rows beyond it are no token's
            "token": tokenizer.convert_ids_to_tokens(row) if row < len(tokenizer) else f"#{row}",
            "id": row,
            "drift": at(columns["drift"], row),
            "drift rank": at(ranks["drift"], row),
            "E-PUR": at(columns["E-PUR"], row),
            "E-PUR rank": at(ranks["E-PUR"], row),
            "mean r": at(columns["mean r"], row),
            "r rank": at(ranks["mean r"], row),
            "count": None if frequency is None else frequency.get(row, 0),
            "z": at(z, row) if judged[row] else None,
            "stands out": bool(stands_out[row]),
        }
        for row in rows
    ]


def _reason(names: list[str], found: int, judged: int, threshold: float | None) -> str:
    """The verdict in words."""
    listed = ", ".join(map(repr, names)) + (" and others" if found > len(names) else "")
    if threshold is None:
        if found:
            return f"of all rows of the word embedding only these moved: {listed}"
        return f"only {judged} rows of the word embedding moved, too few to judge them"
    if found:
        return (
            f"{listed}: {found} of {judged} moved tokens drifted further than z = {threshold:.2f}"
        )
    return f"none of {judged} moved tokens drifted further than z = {threshold:.2f}"


# --- layers --------------------------------------------------------------------------------------


def _indicators(
    pair: WeightPair,
    fisher: Mapping[str, Tensor] | None,
    config: IndicatorConfig,
    architecture: Any,
) -> Callable[[str], Tensor]:
    """What gives r of each dimension of a tensor, or delta^2 without a Fisher diagonal."""
    evidence = Evidence(pair, fisher=fisher or {}, config=config, architecture=architecture)
    strategy = "delta-only" if fisher is None else "fine-purifying"
    return scores(evidence, PurifyConfig(strategy=strategy))


def _layers(pair: WeightPair, values: Callable[[str], Tensor]) -> list[Row]:
    """How the largest r lie over the tensors."""
    largest = max(1, round(TOP * pair.numel))
    keep = {} if pair.identical else select.masks(pair.names, values, pair.numel - largest)
    in_top = {name: int((~mask).sum()) for name, mask in dict(keep).items()}
    rows = []
    for name in pair.names:
        tensor = values(name)
        share = tensor.numel() / pair.numel
        top_share = in_top.get(name, 0) / largest
        layer, module = location(name)
        rows.append(
            {
                "tensor": name,
                "layer": layer,
                "module": module,
                "dimensions": tensor.numel(),
                "moved": int((difference(pair.read(name)) != 0).sum()),
                "share": share,
                "top share": top_share,
                "concentration": top_share / share,
                "k": float(tensor.double().mean()),
            }
        )
    return rows


def location(name: str) -> tuple[int | None, str]:
    """A tensor's layer, and its module within that.

    Args:
        name: `bert.encoder.layer.3.output.dense.weight` lies in layer 3, module `output.dense`;
            `bert.embeddings.LayerNorm.bias` in no layer, module `embeddings.LayerNorm`.
    """
    path = re.sub(r"\.(weight|bias|gamma|beta)$", "", name)
    if found := re.search(r"(?:^|\.)(\d+)\.(.+)", path):
        return int(found[1]), found[2]
    return None, path.partition(".")[2] or path


def _drift(layers: list[Row]) -> str:
    """Where most of the largest r lie, in words."""
    most = max(layers, key=lambda row: row["top share"])
    return (
        f"{most['top share']:.0%} of the largest 1 % of the drift lie in {most['tensor']}, "
        f"which holds {most['share']:.0%} of the dimensions"
    )
