"""Squared per-example gradients of a whole batch in one backward pass.

A layer's gradient of one example is a sum over its positions: G_b = g_b^T a_b for a linear layer with
inputs a and output gradients g. Hooks catch both, G_b is formed example by example, squared and added
up; autograd itself computes no gradient of any parameter. An embedding adds only the rows that its
examples touch, so that its cost grows with the tokens and not with the vocabulary.

What hooks cannot see is refused, never guessed: `check` compares an example in a pair with autograd.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from jaxtyping import Float, Int
from octavo.errors import ModelError
from torch import Tensor, nn
from torch.func import functional_call
from transformers.pytorch_utils import Conv1D

#: The largest block of per-example gradients on an accelerator; a CPU's cache holds one example's.
BLOCK_BYTES = 256 * 2**20

Totals = dict[str, Tensor]
Rule = Callable[[nn.Module, Tensor, Tensor, Totals], None]


class Unseen(ModelError):
    """Hooks cannot see all that a model does with a parameter; the loop can."""


class Watch:
    """Hooks that add squared per-example gradients to totals during a backward pass.

    Attributes:
        model: the one that is watched.
        totals: float32 sums by the parameter's name in the model.
        batch: examples in the forward pass to come.
    """

    def __init__(self, model: nn.Module, parameters: dict[str, nn.Parameter]) -> None:
        self.totals = {
            name: torch.zeros_like(one, dtype=torch.float32, requires_grad=False)
            for name, one in parameters.items()
        }
        self.model = model
        self.batch = 0
        self._called: set[str] = set()
        self._resting = False
        self._plans = list(_plan(model, parameters))

    @contextmanager
    def watching(self) -> Iterator["Watch"]:
        """Catch what passes through the model's layers."""
        handles = [
            module.register_forward_hook(self._hook(name, rule, names), with_kwargs=True)
            for name, module, rule, names in self._plans
        ]
        try:
            yield self
        finally:
            for handle in handles:
                handle.remove()

    def expect(self, batch: int) -> None:
        """Say how many examples the next forward pass holds."""
        self.batch = batch
        self._called.clear()

    def _hook(self, name: str, rule: Rule, names: dict[str, str]) -> Callable[..., Tensor | None]:
        def caught(module: nn.Module, args: tuple, kwargs: dict, output: Tensor) -> Tensor | None:
            if self._resting:
                return None
            if name in self._called:
                raise Unseen(_refusal(name, module, "is called more than once in a forward pass"))
            self._called.add(name)
            inputs = (args[0] if args else next(iter(kwargs.values()))).detach()
            version = inputs._version
            if not output.requires_grad:
                # Where the graph begins; a copy, since models add to embeddings in place.
                output = output.detach().requires_grad_().clone()
            if len(inputs) == 1 < self.batch and isinstance(module, nn.Embedding):
                # Positions are looked up once for all examples: each gets a gradient of its own.
                inputs, output = (
                    one.expand(self.batch, *one.shape[1:]) for one in (inputs, output)
                )
            if len(inputs) != self.batch:
                raise Unseen(
                    _refusal(name, module, f"sees {len(inputs)} rows for {self.batch} examples")
                )

            def add(gradient: Tensor) -> None:
                if inputs._version != version:
                    raise Unseen(_refusal(name, module, "has its input overwritten in place"))
                self._resting = True  # a rule may call the module again
                try:
                    with torch.no_grad():
                        rule(
                            module, inputs, gradient.float(),
                            {short: self.totals[full] for short, full in names.items()},
                        )  # fmt: skip
                finally:
                    self._resting = False

            output.register_hook(add)
            return output

        return caught


def check(
    watch: Watch, parameters: dict[str, nn.Parameter], objective: Callable[[], Tensor]
) -> None:
    """Compare hooks with autograd on the first of two examples, run together.

    Args:
        watch: of the model; its totals are zero afterwards.
        parameters: by name, those watched.
        objective: runs the two examples and gives a term's [2] values.

    Raises:
        Unseen: a layer is used in a way that hooks do not see; it names the parameter.
    """
    with watch.watching(), _sparse(watch.model):
        watch.expect(2)
        value = objective()[0]
        gradients = torch.autograd.grad(value, list(parameters.values()), allow_unused=True)
    wanted = [0.0 if one is None else _squares(one) for one in gradients]
    full = all(one.dtype in (torch.float32, torch.float64) for one in parameters.values())
    # The second part is for key biases, whose gradients are rounding noise.
    relative, absolute = (1e-3, 1e-10 * sum(wanted)) if full else (0.1, 1e-4 * sum(wanted))
    for (name, total), one in zip(watch.totals.items(), wanted, strict=True):
        if not abs(total.sum().item() - one) <= relative * one + absolute:
            raise Unseen(
                f"hooks do not see every use of {name}; use engine='loop' or 'auto' for this model"
            )
        total.zero_()


@contextmanager
def frozen(parameters: dict[str, nn.Parameter]) -> Iterator[None]:
    """Autograd leaves the parameters alone: hooks square their gradients themselves."""
    for one in parameters.values():
        one.requires_grad_(False)
    try:
        yield
    finally:
        for one in parameters.values():
            one.requires_grad_(True)


@contextmanager
def _sparse(model: nn.Module) -> Iterator[None]:
    """Autograd gives embeddings' gradients as their touched rows."""
    tables = [one for one in model.modules() if isinstance(one, nn.Embedding) and not one.sparse]
    for one in tables:
        one.sparse = True
    try:
        yield
    finally:
        for one in tables:
            one.sparse = False


def _squares(gradient: Tensor) -> float:
    values = gradient.coalesce().values() if gradient.is_sparse else gradient
    flat = values.float().flatten()
    return flat.dot(flat).item()


def _refusal(name: str, module: nn.Module, why: str) -> str:
    return (
        f"hooks cannot take {name or 'the model itself'} ({type(module).__name__}): it {why}; "
        "use engine='loop' or 'auto'"
    )


def _plan(
    model: nn.Module, parameters: dict[str, nn.Parameter]
) -> Iterator[tuple[str, nn.Module, Rule, dict[str, str]]]:
    """Each layer with wanted parameters, its rule, and its parameters' names in the model."""
    names = {id(one): name for name, one in parameters.items()}
    owners: dict[int, str] = {}
    for path, module in model.named_modules():
        own = {
            short: one for short, one in module.named_parameters(recurse=False) if id(one) in names
        }
        for one in own.values():
            if id(one) in owners:
                raise Unseen(_refusal(path, module, f"shares a parameter with {owners[id(one)]}"))
            owners[id(one)] = path
        if own:
            rule = _rule(module)
            if rule is None:
                raise Unseen(_refusal(path, module, "is of a type without a rule"))
            yield path, module, rule, {short: names[id(one)] for short, one in own.items()}


def _rule(module: nn.Module) -> Rule | None:
    """How a layer's per-example gradients are formed; a subclass with its own forward has none."""
    forward = type(module).forward
    if forward is nn.Linear.forward:
        return _linear
    if forward is Conv1D.forward:
        return _conv1d
    if forward is nn.LayerNorm.forward:
        return _layer_norm
    if forward is nn.Embedding.forward:
        plain = module.max_norm is None and not module.scale_grad_by_freq
        return _embedding if plain else None
    only = [(name, one.dim()) for name, one in module.named_parameters()]
    return (
        _rms_norm if type(module).__name__.endswith("RMSNorm") and only == [("weight", 1)] else None
    )


def _linear(module: nn.Module, inputs: Tensor, gradient: Tensor, totals: Totals) -> None:
    if "weight" in totals:
        _add_products(totals["weight"], _places(gradient), _places(inputs).float(), 0)
    if "bias" in totals:
        _add_sums(totals["bias"], gradient)


def _conv1d(module: nn.Module, inputs: Tensor, gradient: Tensor, totals: Totals) -> None:
    if "weight" in totals:  # [in, out]: a linear layer's, transposed
        _add_products(totals["weight"], _places(inputs).float(), _places(gradient), 1)
    if "bias" in totals:
        _add_sums(totals["bias"], gradient)


def _layer_norm(module: nn.Module, inputs: Tensor, gradient: Tensor, totals: Totals) -> None:
    assert isinstance(module, nn.LayerNorm)
    if "weight" in totals:
        normal = nn.functional.layer_norm(inputs.float(), module.normalized_shape, eps=module.eps)
        _add_sums(totals["weight"], normal * gradient)
    if "bias" in totals:
        _add_sums(totals["bias"], gradient)


def _rms_norm(module: nn.Module, inputs: Tensor, gradient: Tensor, totals: Totals) -> None:
    # Outputs are affine in the weight, some families' being 1 + weight: a difference is the slope.
    weight = module.get_parameter("weight")
    at_one, at_zero = (
        functional_call(module, {"weight": fill(weight)}, (inputs,)).float()
        for fill in (torch.ones_like, torch.zeros_like)
    )
    _add_sums(totals["weight"], (at_one - at_zero) * gradient)


def _embedding(
    module: nn.Module, ids: Int[Tensor, "batch ..."], gradient: Tensor, totals: Totals
) -> None:
    assert isinstance(module, nn.Embedding)
    count, width = len(ids), module.embedding_dim
    examples = torch.arange(count, device=ids.device).repeat_interleave(ids[0].numel())
    keys = examples * module.num_embeddings + ids.reshape(-1)
    touched, places = keys.unique(return_inverse=True)
    sums = gradient.new_zeros(len(touched), width)
    sums.index_add_(0, places, gradient.reshape(-1, width))
    words = touched % module.num_embeddings
    if module.padding_idx is not None:  # autograd gives this row no gradient
        sums[words == module.padding_idx] = 0
    totals["weight"].index_add_(0, words, sums.square_())


def _places(values: Float[Tensor, "batch *time width"]) -> Float[Tensor, "batch places width"]:
    return values.reshape(len(values), -1, values.shape[-1])


def _add_sums(total: Tensor, values: Tensor) -> None:
    """Add each example's squared sum over positions."""
    sums = values.reshape(len(values), -1, *total.shape).sum(1)
    total.add_(sums.square_().sum(0))


def _add_products(
    total: Float[Tensor, "m n"],
    left: Float[Tensor, "batch places m"],
    right: Float[Tensor, "batch places n"],
    gradient: int,
) -> None:
    """Add each example's squared left^T right.

    Args:
        total: where to.
        left: inputs or output gradients.
        right: the other ones.
        gradient: which of the two are the gradients; padding's are zero, and in a classifier's last
            layer all but one position's, so that only the span between the outermost others counts.
    """
    live = (left, right)[gradient].any(-1)
    place = torch.arange(live.shape[1], device=live.device)
    first = torch.where(live, place, live.shape[1]).amin(1)
    last = torch.where(live, place, -1).amax(1)
    spans = [(a, b + 1) for a, b in torch.stack((first, last), 1).tolist()]
    if all(end - start <= 1 for start, end in spans):  # (g a^T)^2 = g^2 (a^2)^T
        each = torch.arange(len(live), device=live.device)
        at = first.clamp(max=live.shape[1] - 1)
        total.addmm_(left[each, at].square().T, right[each, at].square())
    elif total.device.type == "cpu":
        product = torch.empty_like(total)
        for x, y, (start, end) in zip(left, right, spans, strict=True):
            if start < end:
                torch.mm(x[start:end].T, y[start:end], out=product)
                total.addcmul_(product, product)
    else:
        start, end = min(a for a, _ in spans), max(b for _, b in spans)
        step = max(1, BLOCK_BYTES // (4 * total.numel()))
        for x, y in zip(
            left[:, start:end].split(step), right[:, start:end].split(step), strict=True
        ):
            total.add_(torch.bmm(x.transpose(1, 2), y).square_().sum(0))
