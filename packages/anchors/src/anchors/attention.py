"""Every intervention goes through here: a model's own eager attention, with edits around it.

The library lets an attention function be registered by name. Ours calls the eager function of the
model's own module, so that grouped queries, soft caps, sinks and scalings stay the model's; an `Edit`
may change the mask before it and the output after it. GPT-J and its kind do not use that interface:
there the attention module's own `_attn` is wrapped for as long as the context lasts.
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch
from octavo.errors import ModelError
from torch import Tensor, nn

if TYPE_CHECKING:
    from transformers import PreTrainedModel

NAME = "anchors"


#: Layer, queries [batch, heads, time, width] and the additive mask in; the mask to use out.
Before = Callable[[int, Tensor, Tensor], Tensor]

#: Layer, weights [batch, heads, time, time], values and output [batch, time, heads, width] in; the
#: output to use out.
After = Callable[[int, Tensor, Tensor, Tensor], Tensor]


#: Layer, queries [batch, heads, time, width] and keys [batch, key heads, time, width] in.
States = Callable[[int, Tensor, Tensor], None]


@dataclass(frozen=True)
class Edit:
    """What one intervention does; each part sees every layer.

    Attributes:
        before: changes the additive mask [batch, 1 or heads, time, time].
        after: sees weights after the softmax and gives the output to use.
        gradients: whether weights must carry gradients although no parameter does.
        states: sees queries and keys as attention compares them, rotary positions applied.
        cached: whether the edit also knows what to do in a pass over cached tokens, where there are more
            columns than rows; one that does not leaves steps of generation alone.
    """

    before: Before | None = None
    after: After | None = None
    gradients: bool = False
    states: States | None = None
    cached: bool = False


#: Attention module -> its layer, and the edits of the contexts around it.
_active: "WeakKeyDictionary[nn.Module, tuple[int, list[Edit]]]" = WeakKeyDictionary()

#: Models that have been found to be instrumented rightly, with their edits while a context lasts.
_models: "WeakKeyDictionary[nn.Module, list[Edit]]" = WeakKeyDictionary()


@contextmanager
def instrument(model: "PreTrainedModel", edit: Edit) -> Iterator[None]:
    """Apply an edit to every forward pass meanwhile; contexts can be nested, edits add up.

    Most edits are for passes over whole prompts: without a cache, or into an empty dynamic one. A later
    step of generation reads what they left in the cache and is not edited itself.

    Args:
        model: any causal language model whose attention can be replaced.
        edit: what to do around each layer's attention.

    Raises:
        ModelError: the model's attention cannot be instrumented; the reason is told.
    """
    with ExitStack() as stack:
        edits = _models.get(model)
        if edits is None:
            edits = stack.enter_context(_installed(model))
        edits.append(edit)
        stack.callback(edits.remove, edit)
        yield


@contextmanager
def _installed(model: "PreTrainedModel") -> Iterator[list[Edit]]:
    """Put our function in the place of the model's, and everything back at the end."""
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface, eager_mask

    AttentionInterface.register(NAME, _attend)
    AttentionMaskInterface.register(NAME, eager_mask)
    edits: list[Edit] = []
    modules = _attention_modules(model)
    with ExitStack() as stack:
        _models[model] = edits
        stack.callback(_models.pop, model)
        for layer, module in modules.items():
            _active[module] = layer, edits
            stack.callback(_active.pop, module)
            if _is_wrapped_kind(module):
                wrapper = _wrapper(module, module._attn)  # pyright: ignore[reportArgumentType]
                module.__dict__["_attn"] = wrapper
                stack.callback(module.__dict__.pop, "_attn")
        name = NAME if not any(map(_is_wrapped_kind, modules.values())) else "eager"
        configs: dict[int, Any] = {
            id(one.config): one.config for one in model.modules() if hasattr(one, "config")
        }
        for config in configs.values():
            if hasattr(config, "_attn_implementation_internal"):
                stack.callback(
                    setattr, config, "_attn_implementation_internal",
                    config._attn_implementation_internal,
                )  # fmt: skip
        model.set_attn_implementation(name)
        _probe(model, modules, edits)
        yield edits


def _attention_modules(model: "PreTrainedModel") -> dict[int, nn.Module]:
    """The module of each layer whose attention can be replaced."""
    name = type(model).__name__
    if getattr(model.config, "is_encoder_decoder", False):
        raise ModelError(f"{name}: is an encoder-decoder; a causal language model is needed")
    found: dict[int, nn.Module] = {}
    for module in model.modules():
        layer = getattr(module, "layer_idx", getattr(module, "layer_id", None))
        kind = "attention" in type(module).__name__.lower()
        if isinstance(layer, int) and kind and (_is_wrapped_kind(module) or _eager(type(module))):
            found[layer] = module
    wanted = model.config.get_text_config(decoder=True).num_hidden_layers
    if sorted(found) != list(range(wanted)):
        raise ModelError(
            f"{name}: {len(found)} of its {wanted} layers have an attention that can be replaced "
            "through the library's attention interface; this architecture cannot be instrumented"
        )
    return found


def _is_wrapped_kind(module: nn.Module) -> bool:
    return _eager(type(module)) is None and callable(getattr(type(module), "_attn", None))


def _eager(kind: type) -> Callable[..., Any] | None:
    """The eager attention of the file that a module's class was written in."""
    for base in kind.__mro__:
        function = getattr(sys.modules.get(base.__module__), "eager_attention_forward", None)
        if function is not None:
            return function
    return None


def _attend(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None,
    **options: Any,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """What the attention interface calls: the model's own eager attention between edits."""
    eager = _eager(type(module))
    assert eager is not None
    layer, edits = _active.get(module, (0, []))
    edits = _fitting(edits, query, key)
    if not edits:
        return eager(module, query, key, value, attention_mask, **options)
    query, mask = _prepared(edits, layer, query, key, attention_mask)
    output, weights = eager(module, query, key, value, mask, **options)
    for edit in edits:
        if edit.after:
            output = edit.after(layer, weights, value, output)
    return output, weights


def _wrapper(module: nn.Module, own: Callable[..., Any]) -> Callable[..., Any]:
    """The same for modules with an `_attn` of their own; its output has heads before time."""

    def attend(query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None = None):
        layer, edits = _active.get(module, (0, []))
        edits = _fitting(edits, query, key)
        if not edits:
            return own(query, key, value, attention_mask)
        query, mask = _prepared(edits, layer, query, key, attention_mask)
        output, weights = own(query, key, value, mask)
        for edit in edits:
            if edit.after:
                output = edit.after(layer, weights, value, output.transpose(1, 2)).transpose(1, 2)
        return output, weights

    return attend


def _fitting(edits: list[Edit], query: Tensor, key: Tensor) -> list[Edit]:
    """The edits that take part in a pass: over a whole prompt all, over a cache those made for it."""
    if query.shape[-2] == key.shape[-2]:
        return edits
    if query.shape[-2] > 1 and not all(edit.cached for edit in edits):
        raise ModelError(
            f"a pass of {query.shape[-2]} tokens over {key.shape[-2]} cached ones cannot be edited; run "
            "the whole prompt with use_cache=False or into an empty DynamicCache"
        )
    return [edit for edit in edits if edit.cached]


def _prepared(
    edits: list[Edit], layer: int, query: Tensor, key: Tensor, mask: Tensor | None
) -> tuple[Tensor, Tensor]:
    keys = key.shape[-2]
    if any(edit.gradients for edit in edits) and not query.requires_grad:
        query = query.detach().requires_grad_()
    if mask is None:
        lowest = torch.finfo(query.dtype).min
        rows = query.shape[-2]
        mask = torch.full((rows, keys), lowest, dtype=query.dtype, device=query.device)
        mask = mask.triu(1 + keys - rows)[None, None]
    assert mask is not None
    mask = mask[..., :keys]
    for edit in edits:
        if edit.states:
            edit.states(layer, query, key)
        if edit.before:
            mask = edit.before(layer, query, mask)
    return query, mask


def _probe(model: "PreTrainedModel", modules: dict[int, nn.Module], edits: list[Edit]) -> None:
    """Run a few tokens and see that every layer gave causal weights."""
    seen: dict[int, Tensor] = {}

    def watch(layer: int, weights: Tensor, value: Tensor, output: Tensor) -> Tensor:
        seen[layer] = weights
        return output

    ids = torch.arange(3, device=model.device)[None] % model.config.get_text_config().vocab_size
    edits.append(Edit(after=watch))
    training = model.training
    try:
        with torch.no_grad():
            model.eval()(input_ids=ids, use_cache=False)
    finally:
        model.train(training)
        edits.pop()
    blind = sorted(set(modules) - set(seen))
    if blind or any(weights is None or weights.shape[-2:] != (3, 3) for weights in seen.values()):
        raise ModelError(
            f"{type(model).__name__}: the attention weights of layer {(blind or [0])[0]} cannot be "
            "seen; this architecture cannot be instrumented"
        )
    if any(weights.triu(1).abs().sum() > 0 for weights in seen.values()):
        raise ModelError(f"{type(model).__name__}: a token sees later ones; not a causal model")


@contextmanager
def frozen(model: "PreTrainedModel") -> Iterator[None]:
    """Switch dropout and the parameters' gradients off meanwhile."""
    training, wanted = model.training, [one for one in model.parameters() if one.requires_grad]
    model.eval()
    for parameter in wanted:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in wanted:
            parameter.requires_grad_()
        model.train(training)
