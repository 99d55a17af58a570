"""packbits and segment_packbits against numpy."""

from __future__ import annotations

import itertools
from typing import Any

import hypothesis
import numpy as np
import pytest
import ridgeline
import torch
from elementwise import Wrong, assert_raises, captured, without_recompilation
from hypothesis import strategies as st
from support import poisoned_call
from torch import Tensor

SIZES = (0, 1, 7, 8, 9, 15, 16, 17, 31, 4095, 4096, 4097, 100_003)
ORDERS = ("big", "little")


def some_bits(size: int, rng: torch.Generator, dtype: torch.dtype = torch.bool) -> Tensor:
    bits = torch.rand(size, generator=rng) < 0.5
    if dtype == torch.bool:
        return bits
    return torch.randint(1, 256, (size,), generator=rng).byte() * bits


def packed_by_numpy(x: Tensor, order: Any) -> Tensor:
    return torch.from_numpy(np.packbits((x.cpu() != 0).numpy(), bitorder=order))


def segments_by_numpy(x: Tensor, indptr: list[int], order: Any) -> tuple[Tensor, list[int]]:
    parts = [packed_by_numpy(x[a:b], order) for a, b in itertools.pairwise(indptr)]
    offsets = [0]
    for part in parts:
        offsets.append(offsets[-1] + len(part))
    return torch.cat([torch.zeros(0, dtype=torch.uint8), *parts]), offsets


def check_segments(device: torch.device, x: Tensor, indptr: list[int], order: str) -> None:
    packed, new_indptr = poisoned_call(
        device,
        ridgeline.segment_packbits,
        x,
        torch.tensor(indptr, dtype=torch.int32, device=device),
        order,
    )
    expected, offsets = segments_by_numpy(x, indptr, order)
    num_segments = len(indptr) - 1
    assert len(packed) == (((len(x) + 7 * num_segments) // 8 + 3) // 4 * 4 if num_segments else 0)
    assert new_indptr.dtype == torch.int32
    assert new_indptr.tolist() == offsets
    assert torch.equal(packed[: len(expected)].cpu(), expected)
    assert not packed[len(expected) :].any()


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8], ids=str)
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("size", SIZES)
def test_packbits(
    device: torch.device, size: int, order: str, dtype: torch.dtype, rng: torch.Generator
) -> None:
    x = some_bits(size, rng, dtype)
    packed = poisoned_call(device, ridgeline.packbits, x.to(device), order)
    assert packed.dtype == torch.uint8
    assert torch.equal(packed.cpu(), packed_by_numpy(x, order))


@pytest.mark.parametrize("order", ORDERS)
def test_every_byte(device: torch.device, order: str) -> None:
    """All 65,536 pairs of bytes at once, and the default order."""
    bits = torch.arange(65536)[:, None] >> torch.arange(16) & 1
    x = bits.flatten().bool().to(device)
    assert torch.equal(ridgeline.packbits(x, order).cpu(), packed_by_numpy(x, order))
    assert torch.equal(ridgeline.packbits(x), ridgeline.packbits(x, "big"))


@pytest.mark.parametrize("order", ORDERS)
def test_views(device: torch.device, order: str, rng: torch.Generator) -> None:
    x = some_bits(5000, rng).to(device)
    for view in (x[1:], x[3:-4], x[::2], x[5::7], x[:1].expand(99)):
        assert torch.equal(ridgeline.packbits(view, order).cpu(), packed_by_numpy(view, order))
        check_segments(device, view, [0, 5, len(view)], order)
    matrix = x.view(50, 100)
    for view in (matrix, matrix.t(), matrix[:, :33]):
        expected = packed_by_numpy(view.reshape(-1), order)
        assert torch.equal(ridgeline.packbits(view, order).cpu(), expected)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize(
    "indptr",
    [
        [0],
        [0, 0],
        [0, 0, 0, 1, 1],
        [0, 8, 16, 17, 40],
        [3, 5, 70, 70, 1000],
        [0, 33333, 33334, 99999],
        [i * i // 7 for i in range(800)],
        [i * 1111 for i in range(1200)],
        [0] * 1500 + list(range(0, 5000, 3)) + [5000] * 1100,
    ],
    ids=lambda indptr: f"{len(indptr) - 1} segments to {indptr[-1]}",
)
def test_segments(
    device: torch.device, indptr: list[int], order: str, rng: torch.Generator
) -> None:
    check_segments(device, some_bits(indptr[-1] + 9, rng).to(device), indptr, order)
    check_segments(device, some_bits(indptr[-1], rng, torch.uint8).to(device), indptr, order)


@pytest.mark.parametrize("order", ORDERS)
def test_long_segments(device: torch.device, order: str, rng: torch.Generator) -> None:
    """So many bits that a warp takes several rounds, from any address on."""
    x = some_bits(8_600_000, rng).to(device)
    for first in (0, 5):
        check_segments(device, x[first:], [0, 1, 3_000_005, 3_000_005, 8_599_990], order)


@hypothesis.given(data=st.data())
@hypothesis.settings(max_examples=80, deadline=None)
def test_any_segments(device: torch.device, data: st.DataObject) -> None:
    lengths = data.draw(st.lists(st.integers(0, 90), max_size=70), label="lengths")
    indptr = np.cumsum([data.draw(st.integers(0, 5), label="first"), *lengths]).tolist()
    rng = torch.Generator().manual_seed(data.draw(st.integers(0, 2**31), label="seed"))
    dtype = data.draw(st.sampled_from([torch.bool, torch.uint8]), label="dtype")
    x = some_bits(indptr[-1] + data.draw(st.integers(0, 9), label="rest"), rng, dtype).to(device)
    order = data.draw(st.sampled_from(ORDERS), label="bitorder")
    check_segments(device, x, indptr, order)
    assert torch.equal(ridgeline.packbits(x, order).cpu(), packed_by_numpy(x, order))


def test_garbage_is_safe(device: torch.device, rng: torch.Generator) -> None:
    """Any numbers in indptr: offsets are monotonic and within the result."""
    for size in (0, 1, 1000):
        x = some_bits(size, rng).to(device)
        for _ in range(10):
            indptr = torch.randint(-(2**31), 2**31, (300,), generator=rng).int()
            indptr[torch.rand(300, generator=rng) < 0.6] %= size + 50
            packed, new_indptr = ridgeline.segment_packbits(x, indptr.to(device))
            assert int(new_indptr[0]) == 0
            assert int(new_indptr[-1]) <= len(packed)
            assert bool((new_indptr.diff() >= 0).all())


@pytest.mark.gpu
def test_cuda_graph_and_no_synchronisation(rng: torch.Generator) -> None:
    device = torch.device("cuda", 0)
    x = some_bits(999, rng).to(device)
    indptr = torch.tensor([0, 10, 500, 999], dtype=torch.int32, device=device)
    results: dict[str, Any] = {}

    def step() -> None:
        results["packed"] = ridgeline.packbits(x)
        results["segments"] = ridgeline.segment_packbits(x, indptr, "little")

    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = captured(step)
    for offsets in ([0, 10, 500, 999], [3, 3, 7, 800]):
        x.copy_(some_bits(999, rng))
        indptr.copy_(torch.tensor(offsets))
        graph.replay()
        assert torch.equal(results["packed"].cpu(), packed_by_numpy(x, "big"))
        packed, new_indptr = results["segments"]
        expected, new_offsets = segments_by_numpy(x, offsets, "little")
        assert new_indptr.tolist() == new_offsets
        assert torch.equal(packed[: len(expected)].cpu(), expected)


def test_compile(device: torch.device, rng: torch.Generator) -> None:
    def step(x: Tensor, indptr: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        packed, new_indptr = ridgeline.segment_packbits(~x, indptr, "little")
        return ridgeline.packbits(x) + 1, packed, new_indptr

    calls = [
        (some_bits(n, rng).to(device), torch.tensor([0, n // 3, n], device=device).int())
        for n in (50, 51, 300)
    ]
    results = without_recompilation(step, calls, dynamic=[0])
    for result, call in zip(results, calls, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(result, step(*call), strict=True))


@pytest.mark.gpu
def test_second_device(second_device: torch.device, rng: torch.Generator) -> None:
    x = some_bits(1000, rng).to(second_device)
    assert torch.equal(ridgeline.packbits(x).cpu(), packed_by_numpy(x, "big"))
    check_segments(second_device, x, [0, 7, 1000], "little")
    assert torch.cuda.current_device() == 0


def floats(*shape: int) -> Any:
    return lambda device: torch.zeros(shape, device=device)


@pytest.mark.parametrize(
    "wrong",
    [
        Wrong("order", {"bitorder": "middle"}, "'bitorder': expected 'big' or 'little'"),
        Wrong("floats", {"x": floats(9)}, "'x': expected dtype torch.bool or torch.uint8"),
        Wrong("2-D", {"x": lambda d: floats(3, 3)(d).bool()}, "'x': expected 1 dimensions"),
        Wrong(
            "int64", {"indptr": lambda d: floats(2)(d).long()}, "'indptr': expected dtype torch.i"
        ),
        Wrong(
            "no indptr", {"indptr": lambda d: floats(0)(d).int()}, r"shape \[num_segments \+ 1\]"
        ),
        Wrong("indptr's rank", {"indptr": lambda d: floats(2, 1)(d).int()}, "1 dimensions"),
        Wrong("indptr's stride", {"indptr": lambda d: floats(4)(d).int()[::2]}, "stride 1"),
    ],
    ids=lambda wrong: wrong.name,
)
def test_wrong_arguments(device: torch.device, wrong: Wrong) -> None:
    good = {
        "x": torch.ones(9, dtype=torch.bool, device=device),
        "indptr": torch.tensor([0, 9], dtype=torch.int32, device=device),
        "bitorder": "big",
    }
    assert_raises(wrong, ridgeline.segment_packbits, good, device)
    if "indptr" in wrong.changes or wrong.name == "2-D":
        return
    del good["indptr"]
    assert_raises(wrong, ridgeline.packbits, good, device)
