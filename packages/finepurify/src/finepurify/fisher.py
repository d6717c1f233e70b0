"""The diagonal of the Fisher matrix on clean data: H of the indicator.

H_i is the mean over examples of the squared derivative of log p(y|x, w) by w_i, one example at a
time. Squaring a batch's mean derivative is something else: it keeps the cross terms between examples
and goes to zero at a minimum, whatever the curvature.
"""

import itertools
import logging
from collections.abc import Callable, Iterable
from typing import Any, Literal, get_args
from weakref import WeakKeyDictionary

import torch
from octavo.errors import ConfigError, DataError, ModelError
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from finepurify.hooks import Unseen, Watch, check, frozen
from finepurify.hutchinson import hessian_diagonal
from finepurify.likelihood import (
    Batch,
    Kind,
    Terms,
    evaluating,
    log_likelihood,
    make_terms,
    read_logits,
    rows,
    sample,
    size_of,
    to_device,
    trainable,
)  # fmt: skip

Engine = Literal["auto", "hooks", "loop", "vmap"]
Prepare = Callable[[Tensor, Batch, int], Terms]
Parameters = dict[str, nn.Parameter]

logger = logging.getLogger(__name__)

#: By model: the parameters and inputs for which hooks were seen to agree with autograd.
_checked: WeakKeyDictionary[nn.Module, set[tuple[frozenset[str], frozenset[str]]]] = (
    WeakKeyDictionary()
)


def diagonal(
    model: nn.Module,
    batches: Iterable[Batch],
    *,
    kind: Kind = "empirical",
    engine: Engine = "auto",
    seed: int = 0,
    probes: int = 16,
) -> dict[str, Tensor]:
    """The Fisher diagonal at the model's present weights.

    The model runs in eval mode and gets its modes back. Derivatives are squared and added up in float32
    on the model's device; load the model in float32, since small derivatives of half precision are
    lost before they arrive here.

    Args:
        model: a sequence classifier or causal language model, or any module that takes a batch's tensors
            by name and returns logits (or has them as `.logits`): [batch, classes], or
            [batch, time, words], where log p is the sum over the tokens that are predicted (labels
            shifted by one, -100 and padding left out).
        batches: dicts of tensors as the model takes them, `labels` among them; read once. Results do not
            depend on how examples are put into batches.
        kind: "empirical" takes the given labels; "exact" the expectation over the classifier's own
            distribution, one backward pass a class (for a softmax also the Gauss-Newton diagonal);
            "sampled" a label, or every predicted token at its real context, from that distribution;
            "hutchinson" estimates the Hessian of -log p, with negative estimates set to 0 (see
            `hutchinson.hessian_diagonal` for the signed ones).
        engine: "hooks" squares a batch's gradients in one backward pass; "loop" takes an example at a
            time and any model; "vmap" is torch.func's, a cross-check; "auto" is hooks where they can see
            all uses of all parameters, found out on two examples, else the loop.
        seed: of "sampled", whose draws are keyed by an example's place among all, and of "hutchinson".
        probes: of "hutchinson", random vectors a batch.

    Returns:
        float32 by the name in `model.named_parameters()`, of the parameter's shape: zeros for one that
        the forward pass never uses; frozen ones (requires_grad=False) are left out.

    Raises:
        ConfigError: unknown `kind` or `engine`, an engine for "hutchinson", no probes, or "exact" for a
            language model.
        DataError: no examples, or labels that are missing, of the wrong shape or out of range.
        ModelError: no trainable parameter, no log p(y|x), logits that are not finite, or an engine that
            cannot take the model; it names the layer.

    Source: the diagonal H(D_clean) of the paper, in our reading.
    """
    for name, value, known in (("kind", kind, Kind), ("engine", engine, Engine)):
        if value not in get_args(known):
            raise ConfigError(f"{name}={value!r} is none of {', '.join(get_args(known))}")
    if kind == "hutchinson":
        if engine != "auto":
            raise ConfigError('kind="hutchinson" has an engine of its own; leave engine="auto"')
        found = hessian_diagonal(model, batches, probes=probes, seed=seed)
        return {name: one.clamp_(min=0) for name, one in found.items()}
    parameters = trainable(model)
    device = next(iter(parameters.values())).device
    placed = (to_device(batch, device) for batch in batches)
    start = next(placed, None)
    if start is None:
        raise DataError("there are no examples to take the Fisher diagonal over")
    placed = itertools.chain([start], placed)

    def prepare(logits: Tensor, batch: Batch, first: int) -> Terms:
        return make_terms(kind, logits, batch, first, seed)

    with evaluating(model):
        watch = None
        if engine in ("auto", "hooks"):
            try:
                watch = _watch(model, parameters, start, prepare)
            except Unseen as error:
                if engine == "hooks":
                    raise
                logger.info("an example at a time: %s", error)
        if watch:
            totals, count = _by_hooks(model, parameters, placed, prepare, watch)
        else:
            run = _by_vmap if engine == "vmap" else _by_loop
            totals, count = run(model, parameters, placed, prepare)
    return {name: total.div_(count) for name, total in totals.items()}


def _watch(model: nn.Module, parameters: Parameters, batch: Batch, prepare: Prepare) -> Watch:
    """Hooks that agree with autograd on two examples; one model is checked once for all its points."""
    pair = sample(batch)

    def objective() -> Tensor:
        logits = read_logits(model, pair)
        return next(prepare(logits, pair, 0).values(logits))

    watch = Watch(model, parameters)
    case = (frozenset(parameters), frozenset(batch))
    if case not in _checked.setdefault(model, set()):
        check(watch, parameters, objective)
        _checked[model].add(case)
    return watch


def _by_hooks(
    model: nn.Module,
    parameters: Parameters,
    batches: Iterable[Batch],
    prepare: Prepare,
    watch: Watch,
) -> tuple[dict[str, Tensor], int]:
    count = 0
    with frozen(parameters), watch.watching():
        for batch in batches:
            size = size_of(batch)
            watch.expect(size)
            logits = read_logits(model, batch)
            terms = prepare(logits, batch, count)
            for number, values in enumerate(terms.values(logits), 1):
                values.sum().backward(retain_graph=number < len(terms.weights))
            count += size
    return watch.totals, count


def _by_loop(
    model: nn.Module, parameters: Parameters, batches: Iterable[Batch], prepare: Prepare
) -> tuple[dict[str, Tensor], int]:
    count = 0
    totals = {name: torch.zeros_like(one, dtype=torch.float32) for name, one in parameters.items()}
    for batch in batches:
        for number in range(size_of(batch)):
            example = rows(batch, [number])
            logits = read_logits(model, example)
            terms = prepare(logits, example, count)
            for place, value in enumerate(terms.values(logits), 1):
                gradients = torch.autograd.grad(
                    value.sum(), list(parameters.values()), allow_unused=True,
                    retain_graph=place < len(terms.weights),
                )  # fmt: skip
                for total, gradient in zip(totals.values(), gradients, strict=True):
                    if gradient is not None:
                        gradient = gradient.float()
                        total.addcmul_(gradient, gradient)
            count += 1
    return totals, count


def _by_vmap(
    model: nn.Module, parameters: Parameters, batches: Iterable[Batch], prepare: Prepare
) -> tuple[dict[str, Tensor], int]:
    weights: dict[str, Tensor] = {name: one.detach() for name, one in parameters.items()}

    def value(
        weights: dict[str, Tensor], inputs: dict[str, Any], label: Tensor, weight: Tensor
    ) -> Tensor:
        row = {name: one[None] for name, one in inputs.items()}
        output = functional_call(model, weights, (), row)
        logits = output if isinstance(output, Tensor) else output.logits
        return weight * log_likelihood(logits.float(), label[None])[0]

    gradients = vmap(grad(value), in_dims=(None, 0, 0, 0))
    count = 0
    totals = {name: torch.zeros_like(one, dtype=torch.float32) for name, one in parameters.items()}
    for batch in batches:
        inputs = {
            name: one for name, one in batch.items() if isinstance(one, Tensor) and name != "labels"
        }
        with torch.no_grad():
            terms = prepare(read_logits(model, batch), batch, count)
        for labels, sizes in zip(terms.labels, terms.weights, strict=True):
            try:
                found = gradients(weights, inputs, labels, sizes)
            except RuntimeError as error:
                raise ModelError(
                    f"torch.func.vmap cannot run {type(model).__name__} on these inputs "
                    f"({str(error).splitlines()[0]}); use engine='hooks'"
                ) from error
            for name, gradient in found.items():
                totals[name].add_(gradient.float().square().sum(0))
        count += size_of(batch)
    return totals, count
