"""Selection of the smallest values, against a stable sort of all of them."""

import math
import multiprocessing
import os

import numpy as np
import pytest
import torch
from finepurify.select import Cut, masks, threshold
from hypothesis import given
from hypothesis import strategies as st

INF = math.inf
NUMBERS = st.one_of(
    st.sampled_from([0.0, -0.0, 1.0, 1.5, INF, 1e-45, 1e-38, 3e38]),
    st.floats(0, width=32, allow_nan=False, allow_infinity=True),
)


def brute_force(tensors: dict[str, torch.Tensor], count: int) -> list[bool]:
    """Whether each value, in order, is of the count smallest by a stable sort."""
    flat = torch.cat([each.reshape(-1) for each in tensors.values()])
    keep = torch.zeros(len(flat), dtype=torch.bool)
    keep[torch.sort(flat, stable=True).indices[:count]] = True
    return keep.tolist()


@given(st.data())
def test_masks_are_those_of_a_stable_sort(data):
    rows = data.draw(st.lists(st.lists(NUMBERS, max_size=12), min_size=1, max_size=5))
    tensors = {f"t{n}": torch.tensor(row, dtype=torch.float32) for n, row in enumerate(rows)}
    total = sum(map(len, rows))
    count = data.draw(st.integers(0, total))
    found = dict(masks(list(tensors), tensors.__getitem__, count))
    assert list(found) == list(tensors)
    assert [bit for each in found.values() for bit in each.tolist()] == brute_force(tensors, count)
    cut = threshold(list(tensors), tensors.__getitem__, count)
    if count:
        ordered = torch.cat(list(tensors.values())).sort().values
        assert cut.value == ordered[count - 1].item()
        assert cut.ties == count - int((ordered < cut.value).sum())
    else:
        assert cut == Cut(0.0, 0)


@given(st.data())
def test_each_tensor_gives_its_share(data):
    rows = data.draw(st.lists(st.lists(NUMBERS, max_size=12), min_size=1, max_size=5))
    tensors = {f"t{n}": torch.tensor(row, dtype=torch.float32) for n, row in enumerate(rows)}
    total = sum(map(len, rows))
    count = data.draw(st.integers(0, total))
    found = dict(masks(list(tensors), tensors.__getitem__, count, scope="tensor"))
    assert sum(int(each.sum()) for each in found.values()) == count
    for name, each in found.items():
        share = int(each.sum())
        assert abs(share - count * len(each) / max(1, total)) < 1
        assert each.tolist() == brute_force({name: tensors[name]}, share)


def test_by_hand():
    tensors = {
        "a": torch.tensor([[3.0, 0.0], [2.0, 2.0]]),
        "empty": torch.zeros(0, 4),
        "b": torch.tensor([2.0, INF, 1.0]),
        "c": torch.tensor(2.0),
    }
    names, values = list(tensors), tensors.__getitem__
    assert threshold(names, values, 4) == Cut(2.0, 2)
    found = {name: each.tolist() for name, each in masks(names, values, 5)}
    assert found == {
        "a": [[False, True], [True, True]], "empty": [], "b": [True, False, True], "c": False
    }  # fmt: skip
    assert threshold(names, values, 8) == Cut(INF, 1)
    assert all(bool(each.all()) for _, each in masks(names, values, 8))
    assert not any(bool(each.any()) for _, each in masks(names, values, 0))
    assert threshold([], values, 0) == Cut(0.0, 0)
    with pytest.raises(ValueError, match="count 9: there are 8 values to choose from"):
        threshold(names, values, 9)
    with pytest.raises(ValueError, match="count -1"):
        list(masks(names, values, -1))
    with pytest.raises(ValueError, match="count 9: there are 8"):
        list(masks(names, values, 9, scope="tensor"))


def test_what_is_not_contiguous_is_masked_in_its_own_shape():
    tensor = torch.arange(12.0).reshape(3, 4).T
    ((_, found),) = masks(["a"], lambda name: tensor, 5)
    assert torch.equal(found, tensor < 5)
    ((_, found),) = masks(["a"], lambda name: torch.ones(3, 4).T, 5)
    assert found.reshape(-1).tolist() == [True] * 5 + [False] * 7


def test_values_over_many_steps_and_magnitudes():
    generator = torch.Generator().manual_seed(0)
    large = torch.randn(300_000, generator=generator).square() * torch.logspace(-30, 30, 300_000)
    tensors = {"a": large[:1000].reshape(10, 100), "b": large[1000:]}
    for count in (1, 777, 150_000, 299_999, 300_000):
        cut = threshold(["a", "b"], tensors.__getitem__, count)
        assert cut.value == np.partition(large.numpy(), count - 1)[count - 1]
        kept = sum(int(each.sum()) for _, each in masks(["a", "b"], tensors.__getitem__, count))
        assert kept == count


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ([1.0, math.nan, -math.nan], "x: 2 of 3 values are NaN"),
        ([1.0, -1e-30, INF], "x: 1 of 3 values are negative"),
        ([-INF], "x: 1 of 1 values are negative"),
    ],
)
def test_what_has_no_place_in_the_order_is_refused(bad, message):
    tensors = {"good": torch.ones(2), "x": torch.tensor(bad)}
    with pytest.raises(ValueError, match=message):
        threshold(["good", "x"], tensors.__getitem__, 1)


def test_a_nan_with_the_smallest_payload_is_refused():
    bits = torch.tensor([0x7F800001], dtype=torch.int32).view(torch.float32)
    with pytest.raises(ValueError, match="x: 1 of 1 values are NaN"):
        threshold(["x"], lambda name: bits, 1)


def test_other_precisions_are_refused():
    with pytest.raises(ValueError, match=r"x: values are torch\.float64, must be float32"):
        threshold(["x"], lambda name: torch.ones(2, dtype=torch.float64), 1)


PARTS = ([2.0, 1.0, 2.0, 0.0], [2.0, 2.0, 5.0, 0.5])


def process(number: int, file: str, results) -> None:
    os.environ |= {"RANK": str(number), "WORLD_SIZE": "2"}
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{file}", rank=number, world_size=2
    )
    part = torch.tensor(PARTS[number])
    found = []
    for scope in ("global", "tensor"):
        for count in range(9):
            chosen = masks(
                ["x"], lambda name: part, count, scope=scope, reduce=torch.distributed.all_reduce
            )
            found.append(next(chosen)[1].tolist())
    results.put((number, found))
    torch.distributed.destroy_process_group()


def test_two_processes_choose_as_one(tmp_path):
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    both = [context.Process(target=process, args=(n, str(tmp_path / "s"), results)) for n in (0, 1)]
    for each in both:
        each.start()
    found = dict(results.get(timeout=60) for _ in both)
    for each in both:
        each.join()
    whole = {"x": torch.tensor(PARTS[0] + PARTS[1])}
    for at, (one, other) in enumerate(zip(found[0], found[1], strict=True)):
        assert one + other == brute_force(whole, at % 9)


def test_the_benchmarks_ways_agree(benchmark_file):
    found = benchmark_file("bench_select").measure(3000, tries=1)
    assert [row["bar"] for row in found["ratios"]] == ["above 1", "above 1", "no bar"]
    assert all(row["ratio"] > 0 for row in found["ratios"])
