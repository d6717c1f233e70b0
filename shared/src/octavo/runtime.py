"""Where and how a command computes: seed, device, precision, threads, distributed rank."""

import os
import random
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from octavo.errors import ConfigError

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, kw_only=True)
class Runtime:
    """The options that every computing command has in common."""

    seed: int = 0
    """Seed of every random generator; the same seed gives the same result on the same machine."""

    device: str = "auto"
    """auto (cuda, else mps, else cpu), cpu, cuda, cuda:N or mps."""

    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Precision of the forward pass; auto is bfloat16 on a GPU that has it, else float32."""

    threads: int = 0
    """CPU threads for PyTorch; 0 leaves its own choice."""

    deterministic: bool = False
    """Use only deterministic kernels (slower on a GPU)."""

    def start(self) -> "torch.device":
        """Seed every generator, set threads and determinism, and return the device.

        Raises:
            ConfigError: the device is unknown or not here, or a number is out of range.
        """
        import torch

        self.check()
        device = self.torch_device()
        seed_everything(self.seed)
        if self.threads:
            torch.set_num_threads(self.threads)
        if self.deterministic:
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
            torch.use_deterministic_algorithms(True)
        return device

    def check(self) -> None:
        """Refuse a seed or a number of threads that cannot be.

        Raises:
            ConfigError: one is out of range.
        """
        if not 0 <= self.seed < 2**32:
            raise ConfigError(f"--seed {self.seed}: must be from 0 to {2**32 - 1}")
        if not 0 <= self.threads <= 1024:
            raise ConfigError(f"--threads {self.threads}: must be from 0 (automatic) to 1024")

    def wait_for_everyone(self) -> None:
        """Under torchrun, wait until every process has come here."""
        if world_size() > 1:
            from accelerate import PartialState

            PartialState(cpu=self.torch_device().type == "cpu").wait_for_everyone()

    def torch_device(self) -> "torch.device":
        """The device that `device` names, checked to be there; under torchrun each rank its own."""
        import torch

        name = self.device
        if name == "auto":
            available = {"cuda": torch.cuda.is_available, "mps": torch.backends.mps.is_available}
            name = next((kind for kind, there in available.items() if there()), "cpu")
        try:
            device = torch.device(name)
            if device.type not in ("cpu", "cuda", "mps"):
                raise RuntimeError
        except RuntimeError:
            raise ConfigError(
                f"--device {self.device}: no such device; use auto, cpu, cuda, cuda:N or mps"
            ) from None
        if device.type == "cuda":
            index = local_rank() if device.index is None else device.index
            if index >= torch.cuda.device_count():
                raise ConfigError(
                    f"--device {self.device}: this machine has {torch.cuda.device_count()} CUDA "
                    "devices; use --device cpu or auto"
                )
            device = torch.device("cuda", index)
        if device.type == "mps" and not torch.backends.mps.is_available():
            raise ConfigError("--device mps: not on this machine; use --device cpu or auto")
        return device

    def torch_dtype(self) -> "torch.dtype":
        """The precision that `dtype` names on the chosen device."""
        import torch

        if self.dtype != "auto":
            return getattr(torch, self.dtype)
        on_gpu = self.torch_device().type == "cuda"
        return torch.bfloat16 if on_gpu and torch.cuda.is_bf16_supported() else torch.float32


def seed_everything(seed: int) -> None:
    """Seed python's, numpy's and torch's generators, on all devices."""
    import numpy as np
    import torch

    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002 - libraries below us still draw from it
    torch.manual_seed(seed)


def rank() -> int:
    """This process's number among those that torchrun or accelerate started (0 alone)."""
    return int(os.environ.get("RANK", "0"))


def local_rank() -> int:
    """This process's number on its own machine."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def world_size() -> int:
    """How many processes torchrun or accelerate started (1 alone)."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_main() -> bool:
    """Whether this process is the one that writes and prints."""
    return rank() == 0
