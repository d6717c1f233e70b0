"""The demo's page: claims, the paper's figures beside ours, and the pictures behind them.

A verdict beside the paper's figure is of the direction alone; the claims have margins.
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float
from octavo.report import Claim, Report

from deepseekmoe.ablate import mean_rows

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from deepseekmoe.demo import Found

#: Pile loss after 100B tokens, tables 1 and 2 of the paper.
PAPER_LOSS = {
    "dense": 2.060, "hash": 1.932, "switch": 1.881, "gshard": 1.867, "gshard-x1.5": 1.808,
    "dense-x4": 1.908, "dense-x16": 1.806, "deepseekmoe": 1.808,
}  # fmt: skip

#: Pile loss of DeepSeekMoE 2B, whole and with a routed expert for the shared one (section 4.5).
PAPER_SWAP = 1.808, 2.414

#: Losses are level where one is no more than this above the other, in nats a token.
LEVEL = 0.005


def demo_report(
    intro: str, found: Sequence["Found"], claims: Sequence[Claim], limits: str
) -> Report:
    """The page of all seeds; tables are means, figures of the first seed.

    Args:
        intro: what was trained on what.
        found: of each seed.
        claims: judged on the means.
        limits: what this size cannot show.
    """
    first = found[0]
    report = Report("DeepSeekMoE: embedded demo")
    report.text(intro)
    report.claims(claims)
    report.text(limits)
    report.heading("1. Equal budgets (tables 1 and 2)")
    report.table("Held-out loss, cost and load", models_table(found))
    report.table("Beside the paper", beside_paper(found))
    report.figure("Training loss", loss_figure(first.curves["loss"]))
    for name, words in (("deepseekmoe", "with"), ("no balance loss", "without")):
        load = load_figure(first.curves[f"load {name}"])
        if load is not None:
            report.figure(f"Load of DeepSeekMoE's experts {words} its balance loss", load)
    report.heading("2. Without the best experts (figure 4)")
    rows = mean_table(found, "disabled")
    report.table("Loss when each token's best experts are masked", rows)
    report.table("Beside the paper", disabled_beside_paper(rows))
    report.figure("Rise of the loss", disabled_figure(rows))
    report.heading(
        "3. Without the shared expert, and with fewer routed ones (section 4.5, figure 5)"
    )
    swap = mean_table(found, "swap")
    report.table("The shared expert swapped for a routed one", swap)
    rows = mean_table(found, "active")
    report.table("Fewer routed experts a token", rows)
    gshard = float(np.mean([one.numbers["loss gshard"] for one in found]))
    beside = [swap_beside_paper(swap), active_beside_paper(rows, gshard)]
    report.table("Beside the paper", beside)
    report.figure("Loss over routed experts a token", active_figure(rows, gshard))
    report.heading("4. Which experts serve which domain")
    report.table("Divergence between the domains' loads", mean_table(found, "domains"))
    for name in ("gshard", "deepseekmoe"):
        curve = first.curves[f"domains {name}"]
        report.figure(f"Load of {name}, layer 1", domain_figure(curve["names"], curve["shares"]))
    report.heading("5. Which experts answer together, and with what weight")
    report.figure(
        "DeepSeekMoE's experts chosen together, times as often as by chance",
        lift_figure(first.curves["lifts deepseekmoe"]),
    )
    sums = {name: first.curves[f"sums {name}"] for name in ("gshard", "deepseekmoe")}
    report.figure("Sum of the gates that a token keeps", sums_figure(sums))
    return report


def mean_table(found: Sequence["Found"], name: str) -> list[dict[str, Any]]:
    """A table with the means over seeds."""
    return mean_rows([one.tables[name] for one in found])


def models_table(found: Sequence["Found"]) -> list[dict[str, Any]]:
    """The models with the means over seeds and, of several seeds, the loss's standard deviation."""
    return with_spread([one.tables["models"] for one in found])


def with_spread(tables: Sequence[Sequence[Mapping[str, Any]]]) -> list[dict[str, Any]]:
    """Rows of models, averaged over seeds; of several seeds with the loss's standard deviation.

    Args:
        tables: one a seed, with the same models in the same order.
    """
    rows = mean_rows(tables)
    if len(tables) == 1:
        return rows
    losses = [[row["loss"] for row in table] for table in tables]
    spread = np.std(losses, axis=0, ddof=1).tolist()
    return [
        {"model": row["model"], "loss": row["loss"], "sd over seeds": deviation} | row
        for row, deviation in zip(rows, spread, strict=True)
    ]


def beside_paper(found: Sequence["Found"]) -> list[dict[str, Any]]:
    """Each model's loss against GShard's, here and in the paper, and whether the sign is the same."""
    mean = {row["model"]: row["loss"] for row in mean_table(found, "models")}
    rows = []
    for name, loss in mean.items():
        if name not in PAPER_LOSS:
            continue
        here, there = loss - mean["gshard"], PAPER_LOSS[name] - PAPER_LOSS["gshard"]
        same = name == "gshard" or (here < 0) == (there < 0)
        rows.append(
            {
                "model": name,
                "loss here": loss,
                "against GShard here": here,
                "loss in the paper": PAPER_LOSS[name],
                "against GShard in the paper": there,
                "order": _verdict(same),
            }
        )
    return rows


def disabled_beside_paper(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Figure 4 of the paper beside ours: whose loss rises more at each share of masked experts.

    Args:
        rows: of DeepSeekMoE, then of its rival at the same shares.
    """
    ours = [row for row in rows if row["model"] == "deepseekmoe" and row["rate"]]
    theirs = [row for row in rows if row["model"] != "deepseekmoe" and row["rate"]]
    result = []
    for one, two in zip(ours, theirs, strict=True):
        comparable = two["model"] == "gshard-x1.5"
        row = {
            "setting": f"{16 * one['rate']:g}/16 of the experts masked",
            "paper": "rises more than GShard x1.5",
            "ours": f"{one['rise']:+.3f} against {two['rise']:+.3f} ({two['model']})",
            "verdict": _verdict(one["rise"] > two["rise"]) if comparable else "another rival",
        }
        result.append(row)
    return result


def swap_beside_paper(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The swap of section 4.5 in the paper and here."""

    def told(plain: float, swapped: float) -> str:
        return f"{plain:.3f} to {swapped:.3f} ({100 * (swapped / plain - 1):+.1f} %)"

    plain, swapped = (row["loss"] for row in rows)
    return {
        "setting": "a routed expert for the shared one",
        "paper": told(*PAPER_SWAP),
        "ours": told(plain, swapped),
        "verdict": _verdict(swapped > plain),
    }


def active_beside_paper(rows: Sequence[Mapping[str, Any]], gshard: float) -> dict[str, Any]:
    """The paper's reading of figure 5, 4 routed experts against GShard, and ours."""
    loss = next(row["loss"] for row in rows if row["active"] == 4)
    return {
        "setting": "4 routed experts a token, of 7 in training",
        "paper": "level with GShard",
        "ours": f"{loss:.3f} against {gshard:.3f} ({loss - gshard:+.3f})",
        "verdict": _verdict(loss <= gshard + LEVEL),
    }


def _verdict(same: bool) -> str:
    return "reproduced" if same else "not reproduced"


def _axes(width: float = 7, height: float = 4) -> tuple["Figure", Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height))
    return figure, figure.add_subplot()


def loss_figure(curves: Mapping[str, Sequence[Sequence[float]]]) -> "Figure":
    """Training loss over steps, a line a model."""
    figure, axes = _axes()
    for name, points in curves.items():
        axes.plot(*zip(*points, strict=True), label=name)
    axes.set_xlabel("step")
    axes.set_ylabel("nats a token")
    axes.legend(fontsize=8)
    return figure


def disabled_figure(rows: Sequence[Mapping[str, Any]]) -> "Figure":
    """Rise of the loss over the share of disabled experts."""
    figure, axes = _axes()
    for name in dict.fromkeys(row["model"] for row in rows):
        here = [row for row in rows if row["model"] == name]
        axes.plot([row["rate"] for row in here], [row["rise"] for row in here], "o-", label=name)
    axes.set_xlabel("share of routed experts that are disabled")
    axes.set_ylabel("rise of the loss, nats a token")
    axes.legend()
    return figure


def active_figure(rows: Sequence[Mapping[str, Any]], gshard: float) -> "Figure":
    """Loss over routed experts a token, beside GShard's."""
    figure, axes = _axes()
    axes.plot([row["active"] for row in rows], [row["loss"] for row in rows], "o-", label="ours")
    axes.axhline(gshard, color="gray", linestyle=":", label="GShard, top 2 of 16")
    axes.set_xlabel("routed experts a token (trained with the most)")
    axes.set_ylabel("loss, nats a token")
    axes.legend()
    return figure


def domain_figure(names: Sequence[str], shares: Sequence[Any]) -> "Figure":
    """Load of each expert of the first layer by domain."""
    values = np.asarray(shares)[:, 0]
    figure, axes = _axes(8, 0.8 + 0.35 * len(names))
    image = axes.imshow(values, aspect="auto", cmap="viridis")
    axes.set_yticks(range(len(names)), names)
    axes.set_xlabel("expert")
    figure.colorbar(image, ax=axes)
    return figure


def load_figure(lines: Sequence[Mapping[str, Any]]) -> "Figure | None":
    """Load of each expert over the training, a panel a layer; 1 is an even share.

    Args:
        lines: of metrics.jsonl; those without a "load" [layers][experts] are passed over.

    Returns:
        None where no line has one.
    """
    from matplotlib.figure import Figure

    lines = [line for line in lines if line.get("load")]
    if not lines:
        return None
    values = np.array([line["load"] for line in lines])  # [lines, layers, experts]
    _, layers, experts = values.shape
    figure = Figure(figsize=(8, 1 + 2 * layers))
    panels = figure.subplots(layers, 1, sharex=True, squeeze=False)[:, 0]
    for layer, axes in enumerate(panels):
        place = (lines[0]["step"], lines[-1]["step"] + 1, 0, experts)
        axes.imshow(
            values[:, layer].T, aspect="auto", origin="lower", extent=place, vmin=0,
            vmax=values.max(), interpolation="nearest",
        )  # fmt: skip
        axes.set_ylabel(f"layer {layer + 1}, expert")
    panels[-1].set_xlabel("step")
    figure.colorbar(panels[0].get_images()[0], ax=list(panels), label="load (1 is even)")
    return figure


def lift_figure(lifts: Sequence[Any]) -> "Figure":
    """How often the experts of each layer are chosen together, times as often as by chance.

    Args:
        lifts: [layers][experts][experts], as `analyze.lifts` gives them.
    """
    from matplotlib.figure import Figure

    values = np.array(lifts, dtype=float)
    figure = Figure(figsize=(4.5 * len(values), 4))
    for layer, (axes, here) in enumerate(
        zip(figure.subplots(1, len(values), squeeze=False)[0], values, strict=True)
    ):
        np.fill_diagonal(here, np.nan)  # an expert with itself tells nothing
        image = axes.imshow(here, cmap="viridis", vmin=0)
        axes.set_title(f"layer {layer + 1}")
        axes.set_xlabel("expert")
        figure.colorbar(image, ax=axes)
    return figure


def sums_figure(sums: Mapping[str, Sequence[Any]]) -> "Figure":
    """Share of the tokens over the sum of the gates they keep, a line a model, layers together.

    Args:
        sums: of each model tokens by bin, [layers][bins] from 0 to 1, as a trace counts them.
    """
    figure, axes = _axes()
    for name, counted in sums.items():
        here = np.sum(counted, axis=0)
        axes.stairs(100 * here / here.sum(), np.linspace(0, 1, len(here) + 1), label=name)
    axes.set_xlabel("sum of a token's kept gates (the rest of the softmax is dropped)")
    axes.set_ylabel("% of the tokens")
    axes.legend()
    return figure


def suite_report(suite: str, tables: Sequence[Sequence[Mapping[str, Any]]]) -> Report:
    """The page of a suite of models at equal budgets.

    Args:
        suite: its name.
        tables: rows of the models, a table a seed.
    """
    report = Report(f"DeepSeekMoE: {suite}")
    report.text(
        f"Mean of {len(tables)} seed{'s' * (len(tables) > 1)}. Every model sees the same windows in the "
        "same order; loss is of held-out windows, in nats a token."
    )
    report.table("Held-out loss, cost and load", with_spread(tables))
    names = [row["model"] for row in tables[0]]
    losses = [[row["loss"] for row in table] for table in tables]
    report.figure("Held-out loss; points are seeds", suite_figure(names, np.array(losses)))
    return report


def suite_figure(names: Sequence[str], losses: Float[np.ndarray, "seeds models"]) -> "Figure":
    """Losses of each model: its seeds as points, their mean as a bar."""
    figure, axes = _axes()
    places = np.arange(len(names))
    axes.bar(places, losses.mean(axis=0), color="tab:blue", alpha=0.4)
    for one in losses:
        axes.plot(places, one, "o", color="tab:blue", markersize=4)
    low, high = float(losses.min()), float(losses.max())
    room = max(0.02, 0.3 * (high - low))
    axes.set_ylim(low - room, high + room)  # an axis from 0 would hide the differences
    axes.set_xticks(places, names, rotation=30, ha="right")
    axes.set_ylabel("loss (the axis does not begin at 0)")
    figure.tight_layout()
    return figure
