"""Several processes: which holds what, and how gradients, norms and weights come together again.

Every process has its part of a batch, and its loss is that part's share of the batch's: gradients are
summed, never averaged. What a process holds of a model is one of three things:

- all of it (data parallelism);
- all but the routed experts, of which it holds a contiguous group (expert parallelism over n
  processes; experts p E/n to (p + 1) E/n lie on processes p, p + n, p + 2n ...);
- a slice of every tensor (FSDP2), put together layer by layer while it is needed. With both, a
  slice of its group of experts.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from octavo.errors import ConfigError, OctavoError
from octavo.runtime import Runtime, is_main, world_size
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from deepseekmoe.architecture import DeepseekMoeConfig
from deepseekmoe.config import OptimizeConfig
from deepseekmoe.layer import DeepseekMoeGate, ExpertBank

T = TypeVar("T")

#: The others wait for so long while rank 0 reads and tokenises texts.
PATIENCE = timedelta(hours=12)


class _Elsewhere(OctavoError):
    """Rank 0 met a user's error and tells it; the other processes only end."""


@contextmanager
def processes(runtime: Runtime) -> Iterator[None]:
    """Connect the processes that torchrun started, and part at the end; alone it does nothing.

    Where rank 0 stopped at a user's error within `main_first`, the others exit with its code in silence.

    Args:
        runtime: names the device; tensors on a GPU go by nccl, others by gloo.
    """
    if world_size() == 1 or dist.is_initialized():
        yield
        return
    device = runtime.torch_device()
    backend = "gloo"
    if device.type == "cuda":
        torch.cuda.set_device(device)
        backend = "cpu:gloo,cuda:nccl"
    dist.init_process_group(backend, timeout=PATIENCE)
    try:
        yield
    except _Elsewhere as error:
        dist.destroy_process_group()
        raise SystemExit(int(str(error))) from None
    except OctavoError:
        dist.destroy_process_group()
        raise
    dist.destroy_process_group()  # not behind a crash: it might wait for the others


def main_first(work: Callable[[], T]) -> T:
    """Do something on rank 0, then on the others, which find there what it wrote.

    Args:
        work: may stop at a user's error; the others then stop too, and need not be killed.
    """
    if world_size() == 1:
        return work()
    if not is_main():
        told: list[Any] = [None]
        dist.broadcast_object_list(told, src=0)
        if told[0] is not None:
            raise _Elsewhere(str(told[0]))
        return work()
    try:
        result = work()
    except OctavoError as error:
        dist.broadcast_object_list([error.exit_code], src=0)
        raise
    dist.broadcast_object_list([None], src=0)
    return result


def check_processes(config: OptimizeConfig, experts: int | None = None) -> None:
    """Refuse what these processes cannot do together.

    Args:
        config: of the training.
        experts: routed experts of a layer, once they are known.

    Raises:
        ConfigError: the experts or the processes cannot be divided so, or there is only one process.
    """
    many = config.expert_parallel
    if many < 1:
        raise ConfigError(f"--expert-parallel {many}: must be 1 or more")
    if world_size() % many:
        raise ConfigError(
            f"--expert-parallel {many} on {world_size()} process{'es' * (world_size() > 1)}: start "
            f"a multiple of {many}, as by torchrun --nproc-per-node {many} -m deepseekmoe ..."
        )
    if config.fsdp and world_size() == 1:
        raise ConfigError(
            "--fsdp on 1 process: start several, as by torchrun --nproc-per-node 2 -m deepseekmoe ..."
        )
    if many > 1 and experts is not None and (not experts or experts % many):
        raise ConfigError(
            f"--expert-parallel {many}: a layer's {experts} routed experts cannot be divided so; "
            "choose a divisor of their number (--routed-experts)"
        )


def without_weights(config: DeepseekMoeConfig) -> Any:
    """A model on the meta device, in which there are no numbers: `spread` gives it rank 0's."""
    from deepseekmoe.modeling import DeepseekMoeForCausalLM

    with torch.device("meta"):
        return DeepseekMoeForCausalLM(config)


def spread(
    model: Any, config: OptimizeConfig, device: torch.device, dtype: torch.dtype = torch.float32
) -> None:
    """Give every process its part of a model, in place and on its device; rank 0's weights win.

    Layer by layer, so that a process holds no more than its part and one whole layer.

    Args:
        model: whole, with the same configuration on every process; on those other than rank 0 it may
            be `without_weights`.
        config: says how it is divided.
        device: of this process.
        dtype: in which layers are computed under FSDP: their slices, float32, travel in it.

    Raises:
        ConfigError: it cannot be divided so.
    """
    check_processes(config, model.config.n_routed_experts)
    if world_size() == 1:
        model.to(device)
        return
    many, layers = config.expert_parallel, list(model.model.layers)
    shape, names = (world_size() // many, many), ("replicas", "peers")
    mesh = init_device_mesh(device.type, shape, mesh_dim_names=names)
    everyone = init_device_mesh(device.type, (world_size(),)) if config.fsdp else None
    policy = _policy(dtype)
    inside = {module for layer in layers for module in layer.modules()}
    for layer in layers:
        _receive(list(layer.modules()), device)
        banks = [part for part in layer.modules() if isinstance(part, ExpertBank) and many > 1]
        for bank in banks:
            bank.divide(mesh["peers"].get_group(), mesh["replicas"].get_group())
            if everyone is not None:
                fully_shard(bank, mesh=mesh["replicas"], mp_policy=policy)
        if everyone is not None:
            if dtype != torch.float32:
                fully_shard(_exact(layer), mesh=everyone)
            fully_shard(layer, mesh=everyone, mp_policy=policy)
    _receive([module for module in model.modules() if module not in inside], device)
    model.tie_weights()
    if everyone is not None:
        fully_shard(model, mesh=everyone)
        if dtype != torch.float32:  # for whoever calls it after the training, too
            model.forward = torch.autocast(device.type, dtype)(model.forward)
    for module in model.modules():
        if isinstance(module, FSDPModule):  # a sum: losses are shares already
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)


def _policy(dtype: torch.dtype) -> MixedPrecisionPolicy:
    """Weights in this precision and gradients in float32; what autocast computes stays the same."""
    if dtype == torch.float32:
        return MixedPrecisionPolicy()
    return MixedPrecisionPolicy(dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)


def _exact(layer: nn.Module) -> list[nn.Module]:
    """A layer's norms and gate, whose weights autocast leaves in float32."""
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    kinds = LlamaRMSNorm, DeepseekMoeGate
    return [module for module in layer.modules() if isinstance(module, kinds)]


def _receive(modules: list[nn.Module], device: torch.device) -> None:
    """Put rank 0's tensors into modules, on this process's device, each module's own alone."""
    for module in modules:
        if any(tensor.is_meta for tensor in _own(module)):
            module.to_empty(device=device, recurse=False)
        elif _own(module):
            module.to(device)
        for tensor in _own(module):
            dist.broadcast(tensor.detach(), src=0)


def _own(module: nn.Module) -> list[Tensor]:
    return [*module.parameters(recurse=False), *module.buffers(recurse=False)]


def local(tensor: Tensor) -> Tensor:
    """What this process holds of a tensor, sharing its memory."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def divided(model: nn.Module) -> dict[nn.Parameter, ExpertBank]:
    """The weights of experts that lie on several processes, and their banks."""
    return {
        weight: module
        for module in model.modules()
        if isinstance(module, ExpertBank) and module.peers is not None
        for weight in module.parameters()
    }


def sum_gradients(model: nn.Module) -> None:
    """Add gradients over all processes that hold the same weight.

    A weight that no token reached gets a gradient of 0, not none: it decays on every process alike.
    FSDP has added those of its weights in the backward pass.
    """
    if world_size() == 1:
        return
    banks = divided(model)
    for weight in model.parameters():
        if not weight.requires_grad:
            continue
        if weight.grad is None:
            weight.grad = torch.zeros_like(weight)
        if not isinstance(weight, DTensor):
            bank = banks.get(weight)
            dist.all_reduce(weight.grad, group=bank.replicas if bank else None)


def clip_gradients(model: nn.Module, most: float) -> float:
    """Scale gradients, once they are summed, so that the norm of them all is `most` or less.

    Returns:
        The norm before, over the weights of all processes, each counted once.
    """
    banks, whole, parts = divided(model), [], []
    group, sliced = None, False
    for weight in model.parameters():
        if weight.grad is not None:
            sliced |= isinstance(weight, DTensor)
            apart = isinstance(weight, DTensor) or weight in banks
            (parts if apart else whole).append(local(weight.grad))
    norm = nn.utils.get_total_norm(whole)
    if parts:
        if banks and not sliced:
            group = next(iter(banks.values())).peers
        square = nn.utils.get_total_norm(parts) ** 2
        dist.all_reduce(square, group=group)
        norm = (norm.to(square) ** 2 + square).sqrt()
    scale = (most / (norm + 1e-6)).clamp(max=1.0)
    for gradient in whole + parts:
        gradient.mul_(scale)
    return float(norm)


def whole_state(model: nn.Module) -> dict[str, Tensor] | None:
    """All weights and buffers of a divided model, put together on rank 0's CPU; None on the others.

    Every process calls it.
    """
    banks = {id(bank): bank for bank in divided(model).values()}
    owners = {
        f"{name}.{weight}": bank
        for name, module in model.named_modules()
        if (bank := banks.get(id(module))) is not None
        for weight, _ in bank.named_parameters()
    }
    found = {}
    for name, tensor in model.state_dict().items():
        if isinstance(tensor, DTensor):
            tensor = tensor.full_tensor()
        if name in owners:
            peers: Any = owners[name].peers
            parts = [torch.empty_like(tensor) for _ in range(peers.size())]
            dist.all_gather(parts, tensor.contiguous(), group=peers)
            tensor = torch.cat(parts)
        if is_main():
            found[name] = tensor.cpu()
    return found if is_main() else None


def whole_model(model: Any) -> Any:
    """A divided model as an ordinary one on rank 0's CPU; None on the others, which call it too.

    A model that nobody divided is given back as it is.
    """
    if not divided(model) and not any(isinstance(w, DTensor) for w in model.parameters()):
        return model
    state = whole_state(model)
    if state is None:
        return None
    from deepseekmoe.modeling import DeepseekMoeForCausalLM

    whole: Any = DeepseekMoeForCausalLM(model.config)
    whole.load_state_dict(state)
    whole.generation_config = model.generation_config
    return whole.eval()
