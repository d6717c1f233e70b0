"""Thresholds with a guarantee: what may go wrong on new items of the same kind, and how surely.

Four risks of leaving early, each a number an item: `error` (the cascade is wrong), `harm` (it is wrong
where the last stage is right), `disagreement` (it answers otherwise than the last stage; needs no
labels) and `gap` (harm minus help, from -1 to 1). Three ways to bound one:

- `ltt`, Learn-then-Test (Angelopoulos et al. 2021): walk from the threshold that lets nothing leave to
  lower ones and stop before the first that cannot be shown safe; exact binomial p-values for counts,
  Hoeffding-Bentkus for the gap. With probability 1 - delta over the calibration rows the risk is
  at most alpha.
- `ucb`: the same walk with the betting bound of Waudby-Smith and Ramdas (2023).
- `crc`, Conformal Risk Control (Angelopoulos et al. 2022): the risk is at most alpha on average. It is
  valid where the risk rises as the threshold falls, so it takes harm and disagreement alone; with
  three stages or more their monotone envelope.

`empirical` merely keeps the risk of the calibration rows and guarantees nothing.
"""

import math

import numpy as np
from octavo.errors import ConfigError

from cascadebert.config import Method, RiskKind

#: Thresholds declared before any data is seen, as the walk demands: log-odds from certainty downwards.
GRID = np.concatenate([[np.inf], np.arange(2000, -501, -1) / 50])


def min_calibration_size(alpha: float, delta: float, method: Method = "ltt") -> int:
    """Rows without a single failure that it takes to show a risk of at most alpha.

    For `ltt` ln(delta) / ln(1 - alpha), rounded up: 230 for 1 % with confidence 90 %. For `ucb` the
    smallest number at which the bet pays, about twice as many. `crc` takes 1 / alpha - 1, and
    `empirical` one.

    Args:
        alpha: the bound, between 0 and 1.
        delta: probability that the calibration rows mislead.
        method: how the risk is shown.
    """
    if method == "empirical":
        return 1
    if method == "crc":
        return math.ceil(1 / alpha) - 1
    binomial = math.ceil(math.log(delta) / math.log1p(-alpha))
    if method == "ltt":
        return binomial
    low, high = 0, binomial
    while betting_p(np.zeros(high), alpha, delta) > delta:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        enough = betting_p(np.zeros(middle), alpha, delta) <= delta
        low, high = (low, middle) if enough else (middle, high)
    return high


def item_losses(kind: RiskKind, answers: np.ndarray, labels: np.ndarray | None) -> np.ndarray:
    """The loss of each item if it left at each stage.

    Args:
        kind: of risk.
        answers: predicted classes, [stages, items].
        labels: the right classes, [items]; `disagreement` needs none.

    Returns:
        [stages, items], from 0 to 1, the gap from -1 to 1.

    Raises:
        ConfigError: labels are needed.
    """
    if kind == "disagreement":
        return (answers != answers[-1]).astype(float)
    if labels is None:
        raise ConfigError(f"--risk {kind}: needs labels; --risk disagreement does without")
    wrong = answers != labels
    if kind == "error":
        return wrong.astype(float)
    harm = wrong & ~wrong[-1]
    return harm.astype(float) if kind == "harm" else harm.astype(float) - (~wrong & wrong[-1])


def binomial_p(failures: np.ndarray, items: int, alpha: float) -> np.ndarray:
    """p-values that the risk of a 0/1 loss exceeds alpha: P(Bin(n, alpha) <= failures).

    Args:
        failures: how many items failed, at each threshold.
        items: how many there are.
        alpha: the bound.
    """
    from scipy.stats import binom

    return np.asarray(binom.cdf(failures, items, alpha))


def hoeffding_bentkus_p(mean: float, items: int, alpha: float) -> float:
    """p-value that the mean of losses in [0, 1] exceeds alpha (Bates et al. 2021, proposition 2)."""
    from scipy.stats import binom

    if mean >= alpha:
        return 1.0
    first = mean * math.log(mean / alpha) if mean > 0 else 0.0
    second = (1 - mean) * math.log((1 - mean) / (1 - alpha))
    count = math.ceil(items * mean - 1e-9)  # a sum of whole losses must not be rounded up
    return float(min(math.exp(-items * (first + second)), math.e * binom.cdf(count, items, alpha)))


def betting_p(losses: np.ndarray, alpha: float, delta: float) -> float:
    """p-value that the mean of losses in [0, 1] exceeds alpha, from a bet against it.

    The hedged capital process of Waudby-Smith and Ramdas (2023), one-sided; the order of the items must
    be random.
    """
    items = len(losses)
    counts = np.arange(1, items + 1)
    means = (0.5 + np.cumsum(losses)) / (counts + 1)
    spread = (0.25 + np.cumsum((losses - means) ** 2)) / (counts + 1)
    before = np.concatenate([[0.25], spread[:-1]])
    bets = np.minimum(np.sqrt(2 * math.log(1 / delta) / (items * before)), 0.5 / (1 - alpha))
    capital = np.cumsum(np.log1p(-bets * (losses - alpha)))
    return float(min(1.0, math.exp(-max(0.0, float(capital.max())))))


def walk(p_values: np.ndarray, delta: float) -> int:
    """How many thresholds a fixed sequence shows safe: it stops BEFORE the first p-value above delta."""
    above = np.flatnonzero(np.asarray(p_values) > delta)
    return int(above[0]) if len(above) else len(p_values)


def risk_sums(reach: np.ndarray, losses: np.ndarray, thresholds: np.ndarray = GRID) -> np.ndarray:
    """The summed loss of all items at each threshold, shared by all stages.

    Args:
        reach: running maximum of each item's scores, [stages - 1, items].
        losses: of each item if it left at each stage, [stages, items].
        thresholds: any number of them.
    """
    total = np.full(len(thresholds), losses[0].sum())
    for stage, change in enumerate(np.diff(losses, axis=0)):  # what going one stage further changes
        order = np.argsort(reach[stage], kind="stable")
        sums = np.concatenate([[0.0], np.cumsum(change[order])])
        total += sums[np.searchsorted(reach[stage][order], thresholds, side="right")]
    return total


def safe_threshold(
    reach: np.ndarray,
    losses: np.ndarray,
    alpha: float,
    *,
    kind: RiskKind = "harm",
    method: Method = "ltt",
    delta: float = 0.1,
    seed: int = 0,
) -> float:
    """The lowest threshold, shared by all stages, whose risk is shown to be at most alpha.

    Args:
        reach: running maximum of each item's scores, [stages - 1, items]; it leaves at the first
            stage whose reach lies above the threshold.
        losses: from `item_losses`, [stages, items].
        alpha: the wanted bound.
        kind: of risk.
        method: how it is shown.
        delta: probability that the calibration rows mislead (ltt and ucb).
        seed: of the order that `ucb` bets in.

    Returns:
        A threshold; infinite where nothing may leave early.

    Raises:
        ConfigError: a number is out of range, the method does not fit the risk, there are too few
            rows, or the last stage itself does not meet the bound.
    """
    items = losses.shape[1]
    low = -1.0 if kind == "gap" else 0.0
    if not max(low, 0.0) < alpha < 1:
        raise ConfigError(f"--max-risk {alpha}: must lie between 0 and 1")
    if not 0 < delta < 1:
        raise ConfigError(f"--delta {delta}: must lie between 0 and 1")
    if method == "crc" and kind not in ("harm", "disagreement"):
        raise ConfigError(f"--method crc: needs a risk that only rises; {kind} is none, use ltt")
    enough = 1 if kind == "gap" else min_calibration_size(alpha, delta, method)
    if items < enough:
        shown = (
            f"an expected risk of {alpha:g}"
            if method == "crc"
            else f"a risk of {alpha:g} with confidence {1 - delta:g}"
        )
        raise ConfigError(
            f"{items} calibration rows cannot show {shown}: it takes {enough} or more"
        )
    if method == "crc":
        losses = np.maximum.accumulate(losses[::-1], axis=0)[::-1]  # what any later exit would cost

    sums = risk_sums(reach, losses)
    if method == "empirical":
        p_values = np.where(sums / items <= alpha + 1e-12, 0.0, 1.0)
    elif method == "crc":
        p_values = np.where((sums + 1) / (items + 1) <= alpha + 1e-12, 0.0, 1.0)
    elif method == "ucb":
        order = np.random.default_rng(seed).permutation(items)
        p_values = _betting_walk(reach[:, order], losses[:, order], kind, alpha, delta)
    elif kind == "gap":  # scaled into [0, 1]
        means = (sums / items + 1) / 2
        p_values = np.array([hoeffding_bentkus_p(float(m), items, (alpha + 1) / 2) for m in means])
    else:
        p_values = binomial_p(np.rint(sums), items, alpha)
    safe = walk(p_values, delta)
    if safe == 0:
        raise ConfigError(
            f"--max-risk {alpha:g}: cannot be shown even where the last stage answers everything "
            f"({kind} {sums[0] / items:.4f} on {items} rows, method {method}); allow more, or give "
            "more rows"
        )
    return float(GRID[safe - 1])


def _betting_walk(
    reach: np.ndarray, losses: np.ndarray, kind: RiskKind, alpha: float, delta: float
) -> np.ndarray:
    """p-values along the grid up to the first that is too large, with 1 for all beyond."""
    p_values = np.ones(len(GRID))
    items, before, value = np.arange(losses.shape[1]), None, 1.0
    for step, threshold in enumerate(GRID):
        stage = (reach <= threshold).sum(axis=0)
        if before is None or (stage != before).any():
            here, bound = losses[stage, items], alpha
            if kind == "gap":  # scaled into [0, 1]
                here, bound = (here + 1) / 2, (alpha + 1) / 2
            value, before = betting_p(here, bound, delta), stage
        p_values[step] = value
        if value > delta:
            break
    return p_values


def guarantee_text(kind: RiskKind, alpha: float, delta: float, method: Method, items: int) -> str:
    """The guarantee in words, as it stands in the policy file."""
    meaning = {
        "error": "the cascade answers wrongly",
        "harm": "the cascade is wrong where the last stage is right",
        "disagreement": "the cascade answers otherwise than the last stage",
        "gap": "harm minus help: accuracy lost against the last stage",
    }[kind]
    valid = f"on rows drawn like the {items} calibration rows, for these models and this backend"
    if method == "empirical":
        return f"none: on the {items} calibration rows the {kind} ({meaning}) was at most {alpha:g}"
    if method == "crc":
        return f"expected {kind} ({meaning}) at most {alpha:g}, {valid}"
    return f"with probability {1 - delta:g} the {kind} ({meaning}) is at most {alpha:g}, {valid}"
