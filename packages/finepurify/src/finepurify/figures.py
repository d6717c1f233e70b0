"""The figures of pages and demo: what each strategy gets for its cost, where r lies, what was reset."""

import math
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from finepurify.laws import EDGES, scales

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Rows = Sequence[Mapping[str, Any]]

#: How names of tensors tell what a tensor does, across architectures; the first that fits.
KINDS: Mapping[str, str] = {
    "norms": r"norm|(^|\.)ln_",
    "word embedding": r"(word|tok)_embeddings|embed_tokens|(^|\.)(wte|shared)\.|embed_in\.",
    "other embeddings": r"embed|(^|\.)wpe\.",
    "query+key+value": r"query_key_value|c_attn|qkv",
    "query": r"query|q_proj|q_lin|\.q\.",
    "key": r"\bkey|k_proj|k_lin|\.k\.",
    "value": r"value|v_proj|v_lin|\.v\.",
    "attention output": r"att.*(output|dense|(out|o|c)_proj|out_lin|\bwo\b|\.o\.)",
    "intermediate": r"intermediate|up_proj|gate|lin1|c_fc|fc1|fc_in|h_to_4h|\bwi",
    "output": r"output|down_proj|lin2|c_proj|fc2|fc_out|4h_to_h|\bwo\b",
    "other": "",
}


def _axes(width: float = 6.5, height: float = 4.0) -> tuple["Figure", "Axes"]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height))
    return figure, figure.subplots()


def _legend(axes: "Axes") -> None:
    """Beside the axes, where it covers nothing."""
    if axes.get_legend_handles_labels()[0]:
        axes.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1.01, 1), borderaxespad=0)


def _style(number: int) -> dict[str, Any]:
    """Line and marker of a strategy, told apart without colours too."""
    return {
        "color": f"C{number % 10}",
        "marker": "osD^vPX*<>"[number % 10],
        "linestyle": ("-", "--", ":", "-.")[number // 3 % 4],
        "markersize": 5,
        "linewidth": 1.3,
    }


def frontier_figure(
    rows: Rows, metric: str = "ASR", x: str = "test ACC", alone: str = "none"
) -> "Figure":
    """What each strategy pays and gets over rho: accuracy against ASR, or accuracy under bias.

    Args:
        rows: with `strategy`, `rho`, the metric and the accuracy, in percent; others are left out.
        metric: `ASR` (low is good) or `BACC` (high is good).
        x: column of the accuracy.
        alone: the strategy drawn as a star: fine-tuning alone.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    there = [row for row in rows if row.get(metric) is not None and row.get(x) is not None]
    names = dict.fromkeys(row["strategy"] for row in there if row["strategy"] != alone)
    for number, name in enumerate(names):
        some = sorted((row for row in there if row["strategy"] == name), key=_rho, reverse=True)
        for axes, column in ((left, x), (right, "rho")):
            places = [row[column] for row in some]
            axes.plot(places, [row[metric] for row in some], label=name, **_style(number))
    for row in there:
        if row["strategy"] == alone:
            for axes, column in ((left, x), (right, "rho")):
                axes.plot(row[column], row[metric], "k*", markersize=13, linestyle="", zorder=3,
                          label="fine-tuning alone")  # fmt: skip
    if shares := [row[x] for row in there]:  # a narrower range would make much of chance
        middle, half = (min(shares) + max(shares)) / 2, max(2.5, 0.55 * (max(shares) - min(shares)))
        left.set_xlim(middle - half, middle + half)
    left.set(xlabel=f"{x} in %", ylabel=f"{metric} in %")
    right.set_xlabel("rho, the share that is kept")
    if metric == "ASR":
        left.set_ylim(-4, 106)
    corner = "lower right" if metric == "ASR" else "upper right"
    left.set_title(f"better: {corner}", fontsize=9, loc="right")
    for axes in (left, right):
        axes.grid(alpha=0.3)
    _legend(right)
    return figure


def _rho(row: Mapping[str, Any]) -> float:
    return row["rho"] if row["rho"] is not None else -math.inf


def rho_figure(rows: Rows, floor: float | None, chosen: Mapping[str, float | None]) -> "Figure":
    """Held-out accuracy over rho, the floor, and what was chosen: all that a defender sees.

    Args:
        rows: of a sweep: `strategy`, `rho`, `ACC` with `low` and `high`, in percent.
        floor: accuracy that had to be kept, in percent.
        chosen: rho by strategy; None where no rho kept the floor.
    """
    figure, axes = _axes()
    names = dict.fromkeys(row["strategy"] for row in rows if row["strategy"] != "none")
    circles = []
    for number, name in enumerate(names):
        some = sorted((row for row in rows if row["strategy"] == name), key=_rho)
        places, shares = [row["rho"] for row in some], [row["ACC"] for row in some]
        style = _style(number)
        axes.plot(places, shares, label=name, **style)
        low, high = ([row[end] for row in some] for end in ("low", "high"))
        if len(names) == 1:
            apart = [[y - a for y, a in zip(shares, low, strict=True)],
                     [b - y for y, b in zip(shares, high, strict=True)]]  # fmt: skip
            axes.errorbar(places, shares, apart, fmt="none", ecolor=style["color"], capsize=3)
        else:
            axes.fill_between(places, low, high, alpha=0.06, color=style["color"])
        best = next((row for row in some if row["rho"] == chosen.get(name)), None)
        if best:
            circles.append(best)
    if circles:
        axes.plot([row["rho"] for row in circles], [row["ACC"] for row in circles], "ko",
                  markersize=12, fillstyle="none", linestyle="", label="chosen")  # fmt: skip
    for row in rows:
        if row["strategy"] == "none":
            axes.axhline(row["ACC"], color="grey", linewidth=1, label="fine-tuning alone")
    if floor is not None:
        axes.axhline(floor, color="black", linestyle="--", linewidth=1, label="floor")
    axes.set(xlabel="rho, the share that is kept", ylabel="held-out ACC in %")
    axes.grid(alpha=0.3)
    _legend(axes)
    return figure


def histogram_figure(laws: Mapping[str, Any], rho: float) -> "Figure":
    """Where the indicators lie, and where they would if both parts followed Gamma(1/2, 2k).

    Args:
        laws: a `Laws` as a mapping.
        rho: the share of dimensions counted as clean; both scales follow from it.
    """
    import numpy as np

    figure, axes = _axes()
    counts, edges = np.array(laws["histogram"]), np.array(EDGES)
    share = 100 * counts / max(1, laws["dimensions"])
    axes.stairs(share, edges, fill=True, color="0.8", label="measured")
    k_clean, k_poison = scales(laws["histogram"], laws["dimensions"], rho)
    r = np.geomspace(edges[0], edges[-1], 4000)
    for name, k, weight, line in (
        ("clean", k_clean, rho, "C0-"), ("poisonous", k_poison, 1 - rho, "C3--")
    ):  # fmt: skip
        if k > 0 and weight > 0:
            # the density of log r is r times that of r; a bar is a bin wide
            law = np.sqrt(r / (2 * np.pi * k)) * np.exp(-r / (2 * k)) * np.log(edges[1] / edges[0])
            axes.plot(
                r, 100 * weight * law, line, label=f"{name}: {weight:.3g} of all, k = {k:.2g}"
            )
    there = np.flatnonzero(share > 0.01)
    first, last = (there[0], there[-1] + 1) if len(there) else (0, len(counts))
    axes.set_xscale("log")
    axes.set(xlabel="indicator r (no damping but epsilon)", ylabel="% of dimensions a tenth of a decade",
             xlim=(edges[max(0, first - 1)], edges[min(len(counts), last + 3)]))  # fmt: skip
    _legend(axes)
    return figure


def kind_of(name: str) -> tuple[str, int | None]:
    """What a tensor does (see `KINDS`), and its layer, by its name.

    Args:
        name: as in a checkpoint of any architecture.

    Returns:
        The kind, and the layer's number; None outside the layers.
    """
    kind = next(kind for kind, rule in KINDS.items() if re.search(rule, name, re.IGNORECASE))
    layer = re.search(r"(?:^|\.)(\d+)\.", name)
    return kind, int(layer[1]) if layer else None


def heat_figure(tensors: Rows, label: str = "reset") -> "Figure":
    """Which share of each kind of module is reset, layer by layer.

    Args:
        tensors: `tensor` (a name), `dimensions`, `reset` (a count).
        label: what the share is of.
    """
    import numpy as np

    cells: dict[tuple[str, int | None], list[float]] = {}
    for row in tensors:
        cell = cells.setdefault(kind_of(row["tensor"]), [0.0, 0.0])
        cell[0] += row["reset"]
        cell[1] += row["dimensions"]
    kinds = [kind for kind in KINDS if any(kind == each for each, _ in cells)]
    layers = sorted({layer for _, layer in cells}, key=lambda layer: -1 if layer is None else layer)
    shares = np.full((len(kinds), len(layers)), np.nan)
    for (kind, layer), (count, total) in cells.items():
        shares[kinds.index(kind), layers.index(layer)] = 100 * count / max(1, total)
    figure, axes = _axes(3.4 + 0.55 * len(layers), 1.2 + 0.34 * len(kinds))
    # a root, so that a hundredth can be seen beside a half
    top = max(1e-9, float(np.nanmax(shares)))
    image = axes.imshow(np.sqrt(shares / top), cmap="Reds", vmin=0, vmax=1, aspect="auto")
    for (line, column), share in np.ndenumerate(shares):
        if not np.isnan(share):
            dark = np.sqrt(share / top) > 0.6
            axes.text(column, line, _short(share), ha="center", va="center", fontsize=7,
                      color="white" if dark else "black")  # fmt: skip
    axes.set_yticks(range(len(kinds)), kinds, fontsize=8)
    axes.set_xticks(
        range(len(layers)), ["none" if n is None else str(n) for n in layers], fontsize=8
    )
    axes.set(xlabel="layer", title=f"% {label}")
    image.axes.tick_params(length=0)
    return figure


def _short(share: float) -> str:
    return (
        "0" if share == 0 else "<0.1" if share < 0.1 else f"{share:.2g}" if share < 99.5 else "100"
    )


def calibration_figure(bins: Rows) -> "Figure":
    """How many dimensions are truly clean among those of one posterior, where the truth is known.

    Args:
        bins: `p` (mean posterior p(clean | r)), `clean` (the true share), `dimensions`.
    """
    figure, axes = _axes(5.0, 4.0)
    there = [row for row in bins if row["dimensions"]]
    axes.plot([0, 1], [0, 1], color="grey", linewidth=0.8, label="calibrated")
    axes.plot(
        [row["p"] for row in there], [row["clean"] for row in there], "C0o-", label="measured"
    )
    for row in there:
        axes.annotate(f"{row['dimensions']:,}", (row["p"], row["clean"]), fontsize=7,
                      xytext=(4, -9), textcoords="offset points")  # fmt: skip
    axes.set(xlabel="posterior p(clean | r)", ylabel="share that is clean", xlim=(-0.03, 1.12),
             ylim=(-0.06, 1.04))  # fmt: skip
    _legend(axes)
    return figure
