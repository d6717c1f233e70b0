import random

import numpy as np
import pytest
import torch
from octavo.errors import ConfigError
from octavo.runtime import Runtime, is_main, local_rank, rank, world_size


def draws():
    return random.random(), np.random.rand(), torch.rand(1).item()  # noqa: NPY002


def test_the_same_seed_gives_the_same_draws():
    Runtime(seed=3).start()
    first = draws()
    Runtime(seed=3).start()
    assert draws() == first
    Runtime(seed=4).start()
    assert all(new != old for new, old in zip(draws(), first, strict=True))


def test_threads_and_determinism_take_effect():
    before = torch.get_num_threads()
    try:
        Runtime(threads=1, deterministic=True).start()
        assert torch.get_num_threads() == 1
        assert torch.are_deterministic_algorithms_enabled()
    finally:
        torch.set_num_threads(before)
        torch.use_deterministic_algorithms(False)


def test_device_and_dtype_choice(monkeypatch):
    assert Runtime(device="cpu").torch_device() == torch.device("cpu")
    assert Runtime(device="cpu").torch_dtype() == torch.float32
    assert Runtime(device="cpu", dtype="bfloat16").torch_dtype() == torch.bfloat16
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: True)
    assert Runtime().torch_device() == torch.device("cuda", 0)
    assert Runtime().torch_dtype() == torch.bfloat16
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert Runtime().torch_device() == torch.device("cuda", 1)
    with pytest.raises(ConfigError, match="2 CUDA devices; use --device cpu or auto"):
        Runtime(device="cuda:7").torch_device()


@pytest.mark.parametrize("wrong", [{"seed": -1}, {"seed": 2**32}, {"threads": -1}])
def test_numbers_out_of_range(wrong):
    with pytest.raises(ConfigError, match=f"--{next(iter(wrong))}"):
        Runtime(**wrong).start()


def test_unknown_devices_are_named(monkeypatch):
    with pytest.raises(ConfigError, match="--device gpu: no such device; use auto"):
        Runtime(device="gpu").start()
    with pytest.raises(ConfigError, match="--device meta: no such device"):
        Runtime(device="meta").start()
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    with pytest.raises(ConfigError, match="not on this machine"):
        Runtime(device="mps").start()


def test_ranks_come_from_the_launcher(monkeypatch):
    assert (rank(), local_rank(), world_size(), is_main()) == (0, 0, 1, True)
    for name, value in {"RANK": "3", "LOCAL_RANK": "1", "WORLD_SIZE": "4"}.items():
        monkeypatch.setenv(name, value)
    assert (rank(), local_rank(), world_size(), is_main()) == (3, 1, 4, False)
