"""The paper's analyses of a trained model: which experts it needs, and which serve which domain.

Each takes any model of this package and held-out tokens, and gives rows of a table.
"""

import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
import torch
from jaxtyping import Float
from octavo import console
from octavo.errors import ConfigError, DataError
from octavo.rundir import atomic

from deepseekmoe.corpus import Tokens, Windows
from deepseekmoe.evaluate import evaluate_lm, filling, tell_break
from deepseekmoe.layer import intervene, moe_layers, record_routing
from deepseekmoe.routing import count_experts

Row = dict[str, Any]

#: Shares of the routed experts that Figure 4 disables.
RATES = (0, 1 / 16, 2 / 16, 3 / 16, 4 / 16)

#: Bins from 0 to 1 that the sums of a token's gates are counted in.
SUM_BINS = 50


def disable_top(
    model: Any, tokens: Tokens, length: int, rates: Sequence[float] = RATES, batch_size: int = 16
) -> list[Row]:
    """Loss when each token's most probable experts are masked before it chooses (Figure 4).

    Args:
        model: trained.
        tokens: held out.
        length: tokens of a window.
        rates: shares of the routed experts to mask, rounded to whole experts; 0 is measured first,
            asked for or not, and rises are from there.
        batch_size: windows at a time.

    Raises:
        ConfigError: so few experts remain that K' cannot be chosen.
    """
    experts = _routed(model)
    rows: list[Row] = []
    for rate in (0.0, *(rate for rate in rates if rate)):
        masked = round(rate * experts)
        with intervene(model, disable_top=masked):
            loss = evaluate_lm(model, tokens, length, batch_size)["loss"]
        rows.append({"disabled": f"{masked}/{experts}", "rate": rate, "loss": loss})
        rows[-1]["rise"] = loss - rows[0]["loss"]
    return rows


def swap_shared(model: Any, tokens: Tokens, length: int, batch_size: int = 16) -> list[Row]:
    """Loss when the shared experts fall silent and as many more routed ones answer (section 4.5).

    Raises:
        ConfigError: the model has no shared experts.
    """
    config = model.config
    _routed(model)
    if not config.n_shared_experts:
        raise ConfigError("the model has no shared experts to swap")
    active = config.num_experts_per_tok + config.n_shared_experts
    plain = evaluate_lm(model, tokens, length, batch_size)["loss"]
    with intervene(model, shared=False, active=active):
        swapped = evaluate_lm(model, tokens, length, batch_size)["loss"]
    shared = f"{config.n_shared_experts} shared + {config.num_experts_per_tok} routed"
    return [
        {"active": shared, "loss": plain, "rise": 0.0},
        {"active": f"0 shared + {active} routed", "loss": swapped, "rise": swapped - plain},
    ]


def sweep_active(
    model: Any, tokens: Tokens, length: int, active: Sequence[int] = (), batch_size: int = 16
) -> list[Row]:
    """Loss with fewer (or more) routed experts a token than were trained (Figure 5).

    Args:
        model: trained.
        tokens: held out.
        length: tokens of a window.
        active: values of K'; by default 1 to the trained number.
        batch_size: windows at a time.
    """
    trained = int(model.config.num_experts_per_tok)
    _routed(model)
    rows = []
    for count in active or range(1, trained + 1):
        with intervene(model, active=count):
            loss = evaluate_lm(model, tokens, length, batch_size)["loss"]
        rows.append({"active": count, "trained": count == trained, "loss": loss})
    return rows


@dataclass(frozen=True)
class Trace:
    """What a model's gates decided on tokens of several domains.

    Attributes:
        domains: names.
        counts: slots that chose each expert, [domains, layers, experts].
        gates: sums of the gates, alike.
        pairs: tokens that chose both of two experts, [layers, experts, experts].
        layers: numbers of the traced layers in the model, from 0.
        words: slots of each token of the vocabulary, [layers, vocabulary, experts] uint32, or None.
        sums: tokens by the sum of their kept gates, from 0 to 1 (and above), [layers, bins], or None.
    """

    domains: list[str]
    counts: np.ndarray
    gates: np.ndarray
    pairs: np.ndarray
    layers: list[int]
    words: np.ndarray | None = None
    sums: np.ndarray | None = None

    def save(self, file: Path) -> None:
        """Write it as npz, whole or not at all; a file that lies there is replaced."""
        arrays: dict[str, Any] = {
            "domains": np.array(self.domains), "counts": self.counts, "gates": self.gates,
            "pairs": self.pairs, "layers": np.array(self.layers),
        }  # fmt: skip
        for name, counted in (("words", self.words), ("sums", self.sums)):
            if counted is not None:
                arrays[name] = counted
        with atomic(file) as temporary, temporary.open("wb") as opened:
            np.savez_compressed(opened, **arrays)

    @classmethod
    def load(cls, file: Path) -> "Trace":
        """Read what `save` wrote.

        Raises:
            DataError: there is no such file, or it is cut off or something else.
        """
        try:
            with np.load(file, allow_pickle=False) as found:
                trace = cls(
                    [str(name) for name in found["domains"]],
                    found["counts"], found["gates"], found["pairs"],
                    found["layers"].tolist(), found.get("words"), found.get("sums"),
                )  # fmt: skip
            trace._check()
        except OSError as error:
            raise DataError(f"{file}: {error.strerror or error}") from None
        except (BadZipFile, zlib.error, EOFError, ValueError, KeyError, TypeError) as error:
            # a ValueError is numpy's advice on how to load pickles
            what = "" if isinstance(error, ValueError) else f" ({error})"
            raise DataError(f"{file}: is no routing trace, or cut off{what}") from None
        return trace

    def _check(self) -> None:
        domains, layers, experts = self.counts.shape
        wanted = [
            (self.gates, (domains, layers, experts)), (self.pairs, (layers, experts, experts)),
        ]  # fmt: skip
        if self.words is not None:
            wanted.append((self.words, (layers, *self.words.shape[1:2], experts)))
        if self.sums is not None:
            wanted.append((self.sums, (layers, *self.sums.shape[1:2])))
        fit = all(array.shape == shape for array, shape in wanted)
        if not fit or (len(self.domains), len(self.layers)) != (domains, layers):
            raise ValueError("its arrays do not fit each other")
        if any(array.dtype.kind not in "iuf" for array, _ in [(self.counts, ()), *wanted]):
            raise ValueError("its arrays are not of numbers")


@torch.no_grad()
def trace_routing(
    model: Any, tokens: Tokens, length: int, batch_size: int = 16, words: bool = False
) -> Trace:
    """Record where the tokens of each domain go.

    Args:
        model: trained.
        tokens: of one domain or several; each must fill a window.
        length: tokens of a window.
        batch_size: windows at a time.
        words: count by token of the vocabulary too.

    Raises:
        ConfigError: the model has no routed experts.
        DataError: no domain fills a window.
        ModelError: the model gives NaN or infinity.
    """
    experts, many = _routed(model), len(moe_layers(model))
    names, counts, gates = [], [], []
    pairs = np.zeros((many, experts, experts), dtype=np.int64)
    vocabulary = (
        np.zeros((many, model.config.vocab_size, experts), dtype=np.uint32) if words else None
    )
    sums = np.zeros((many, SUM_BINS), dtype=np.int64)
    device = next(model.parameters()).device
    for domain in filling(tokens, length):
        windows = Windows(tokens.of_domain(domain), length)
        here = np.zeros((many, experts), dtype=np.int64)
        weight = np.zeros((many, experts))
        with console.counter(f"tracing {domain}", len(windows), "windows") as advance:
            for begin in range(0, len(windows), batch_size):
                rows = windows.rows(range(begin, min(len(windows), begin + batch_size)))
                rows.pop("labels")
                rows = {name: value.to(device) for name, value in rows.items()}
                with record_routing(model) as found:
                    _run(model, rows)
                for layer, (routing,) in enumerate(found):
                    ids, kept = routing.ids.cpu(), routing.weights.cpu()
                    here[layer] += count_experts(ids, experts).numpy()
                    chosen = torch.zeros(len(ids), experts).scatter(1, ids, 1.0)
                    weight[layer] += (
                        torch.zeros(len(ids), experts).scatter(1, ids, kept).sum(0).numpy()
                    )
                    pairs[layer] += (chosen.T @ chosen).long().numpy()
                    kept_sums = kept.sum(dim=1).clamp(0, 1).numpy()
                    sums[layer] += np.histogram(kept_sums, SUM_BINS, (0, 1))[0]
                    if vocabulary is not None:
                        flat = rows["input_ids"].flatten().cpu().numpy()
                        np.add.at(vocabulary[layer], (flat[:, None], ids.numpy()), 1)
                advance(len(rows["input_ids"]))
        names.append(domain)
        counts.append(here)
        gates.append(weight)
    layers = [layer.gate.layer for layer in moe_layers(model)]
    return Trace(names, np.stack(counts), np.stack(gates), pairs, layers, vocabulary, sums)


def specialization(trace: Trace) -> list[Row]:
    """How unlike the domains' expert loads are: mean pairwise Jensen-Shannon divergence, in bits.

    A row a layer, with the share of the domain's slots that its four favourite experts take.

    Raises:
        ConfigError: there are fewer than two domains.
    """
    if len(trace.domains) < 2:
        raise ConfigError("specialisation compares domains: give texts of two or more")
    shares = trace.counts / trace.counts.sum(axis=-1, keepdims=True)
    rows = []
    for layer in range(shares.shape[1]):
        here = shares[:, layer]
        pairs = [
            jensen_shannon(here[i], here[j])
            for i in range(len(here))
            for j in range(i)
        ]  # fmt: skip
        row: Row = {"layer": trace.layers[layer], "JS divergence (bits)": float(np.mean(pairs))}
        for name, share in zip(trace.domains, here, strict=True):
            row[f"{name}: 4 favourites %"] = 100 * float(np.sort(share)[-4:].sum())
        rows.append(row)
    return rows


def jensen_shannon(first: np.ndarray, second: np.ndarray) -> float:
    """Jensen-Shannon divergence of two distributions, in bits, from 0 to 1."""
    mean = (first + second) / 2

    def entropy(share: np.ndarray) -> float:
        share = share[share > 0]
        return float(-(share * np.log2(share)).sum())

    return entropy(mean) - (entropy(first) + entropy(second)) / 2


def coactivation(trace: Trace, most: int = 8) -> list[Row]:
    """Pairs of experts that a token chooses together more often than their loads alone would give.

    Args:
        trace: of a model.
        most: pairs to name a layer.

    Returns:
        Rows of layer, experts, tokens and lift (observed over expected under independence).
    """
    rows = []
    for layer, (pairs, lift) in enumerate(zip(trace.pairs, lifts(trace), strict=True)):
        ones, twos = np.triu_indices(len(pairs), k=1)
        for place in np.argsort(lift[ones, twos])[::-1][:most]:
            first, second = int(ones[place]), int(twos[place])
            rows.append(
                {
                    "layer": trace.layers[layer],
                    "experts": f"{first} + {second}",
                    "tokens": int(pairs[first, second]),
                    "lift": float(lift[first, second]),
                }
            )
    return rows


def lifts(trace: Trace) -> Float[np.ndarray, "layers experts experts"]:
    """How many times as often two experts are chosen together as their loads alone would give."""
    found = np.zeros(trace.pairs.shape)
    for layer, pairs in enumerate(trace.pairs):
        load = np.diag(pairs).astype(float)
        tokens = trace.counts[:, layer].sum() / _slots_a_token(trace, layer)
        expected = np.outer(load, load) / max(1.0, tokens)
        np.divide(pairs, expected, out=found[layer], where=expected > 0)
    return found


def vocabulary_specialization(trace: Trace, decode: Any, most: int = 5) -> list[Row]:
    """For every expert the tokens of which it takes the largest share (of those seen 20 times or more).

    Args:
        trace: recorded with `words`.
        decode: a token's text by its id.
        most: tokens to name an expert.

    Raises:
        ConfigError: the trace does not count words.
    """
    if trace.words is None:
        raise ConfigError("this trace counts no words: record it with words=True (trace --words)")
    rows = []
    for layer, words in enumerate(trace.words):
        seen = words.sum(axis=1, dtype=np.int64)
        times = seen / _slots_a_token(trace, layer)
        enough = np.flatnonzero(times >= 20)
        share = words[enough] / np.maximum(times[enough, None], 1)
        for expert in range(words.shape[1]):
            best = np.argsort(share[:, expert])[::-1][:most] if len(enough) else []
            named = [f"{decode(int(enough[i]))!r} {100 * share[i, expert]:.0f} %" for i in best]
            rows.append(
                {"layer": trace.layers[layer], "expert": expert, "tokens": ", ".join(named)}
            )
    return rows


@torch.no_grad()
def saturation(
    earlier: Any, later: Any, tokens: Tokens, length: int, batch_size: int = 16
) -> list[Row]:
    """Which share of a token's experts a checkpoint chose already as a later one does (OLMoE).

    Args:
        earlier: a checkpoint.
        later: another one of the same training.
        tokens: of any text.
        length: tokens of a window.
        batch_size: windows at a time.

    Raises:
        ConfigError: the models have other numbers of layers or experts.
        ModelError: a model gives NaN or infinity.
    """
    if _routed(earlier) != _routed(later) or len(moe_layers(earlier)) != len(moe_layers(later)):
        raise ConfigError("the two models have other layers or experts: compare one training's")
    windows = Windows(tokens, length)
    device = next(later.parameters()).device
    same = np.zeros(len(moe_layers(later)))
    total = 0
    for begin in range(0, len(windows), batch_size):
        rows = windows.rows(range(begin, min(len(windows), begin + batch_size)))
        rows.pop("labels")
        rows = {name: value.to(device) for name, value in rows.items()}
        with record_routing(earlier) as first, record_routing(later) as second:
            _run(earlier, rows)
            _run(later, rows)
        for layer, ((one,), (two,)) in enumerate(zip(first, second, strict=True)):
            both = (one.ids[:, :, None] == two.ids[:, None, :]).any(dim=-1)
            same[layer] += float(both.double().mean(dim=-1).sum())
        total += rows["input_ids"].numel()
    return [
        {"layer": layer.gate.layer, "saturation %": 100 * value / max(1, total)}
        for layer, value in zip(moe_layers(later), same, strict=True)
    ]


def _run(model: Any, rows: dict[str, Any]) -> None:
    """Call a model, for what is recorded meanwhile.

    Raises:
        ModelError: it gives NaN or infinity.
    """
    logits = model(**rows).logits
    if not all(bool(end.isfinite()) for end in logits.aminmax()):
        tell_break(model, rows)


def _slots_a_token(trace: Trace, layer: int) -> int:
    """K' as it was traced: every token chooses K' x K' ordered pairs and K' experts."""
    pairs = trace.pairs[layer]
    return max(1, round(float(pairs.sum() / max(1, np.diag(pairs).sum()))))


def _routed(model: Any) -> int:
    experts = int(getattr(model.config, "n_routed_experts", 0) or 0)
    if not experts or not moe_layers(model):
        raise ConfigError("the model has no routed experts to look at")
    return experts
