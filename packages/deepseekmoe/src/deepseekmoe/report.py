"""The demo's page: claims, the paper's figures beside ours, and the pictures behind them."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
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
    report.table("Held-out loss, cost and load", mean_table(found, "models"))
    report.table("Beside the paper", beside_paper(found))
    report.figure("Training loss", loss_figure(first.curves["loss"]))
    report.heading("2. Without the best experts (figure 4)")
    rows = mean_table(found, "disabled")
    report.table("Loss when each token's best experts are masked", rows)
    report.figure("Rise of the loss", disabled_figure(rows))
    report.heading(
        "3. Without the shared expert, and with fewer routed ones (section 4.5, figure 5)"
    )
    report.table("The shared expert swapped for a routed one", mean_table(found, "swap"))
    rows = mean_table(found, "active")
    report.table("Fewer routed experts a token", rows)
    gshard = float(np.mean([one.numbers["loss gshard"] for one in found]))
    report.figure("Loss over routed experts a token", active_figure(rows, gshard))
    report.heading("4. Which experts serve which domain")
    report.table("Divergence between the domains' loads", mean_table(found, "domains"))
    for name in ("gshard", "deepseekmoe"):
        curve = first.curves[f"domains {name}"]
        report.figure(f"Load of {name}, layer 1", domain_figure(curve["names"], curve["shares"]))
    return report


def mean_table(found: Sequence["Found"], name: str) -> list[dict[str, Any]]:
    """A table with the means over seeds."""
    return mean_rows([one.tables[name] for one in found])


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
                "order": "reproduced" if same else "not reproduced",
            }
        )
    return rows


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
