"""Copying pages between paged caches, within one, and to and from pinned host memory."""

from __future__ import annotations

from typing import Any

import hypothesis
import paged
import pytest
import ridgeline
import torch
from elementwise import Wrong, assert_raises, captured
from hypothesis import strategies as st
from torch import Tensor

DTYPES = (torch.float16, torch.float32, torch.float8_e4m3fn, torch.int8)


def copied(
    source: paged.Pool, target: paged.Pool, src_pages: list[int], dst_pages: list[int]
) -> paged.Pool:
    """A copy of the target with the pages that both pools have."""
    result = target.clone()
    for ours, theirs in zip(result.pair, source.clone().pair, strict=True):
        for src, dst in zip(src_pages, dst_pages, strict=True):
            if 0 <= src < theirs.shape[0] and 0 <= dst < ours.shape[0]:
                ours[dst].copy_(theirs[src])
    return result


def pools(
    rng: torch.Generator,
    *,
    inner: tuple[int, ...] = (16, 2, 64),
    num_pages: tuple[int, int] = (9, 12),
    kinds: tuple[str, str] = ("pair", "pair"),
    dtype: torch.dtype = torch.float16,
) -> tuple[paged.Pool, paged.Pool]:
    made = [
        paged.make_pool([(n, *inner)] * 2, dtype, kind, rng)
        for n, kind in zip(num_pages, kinds, strict=True)
    ]
    return made[0], made[1]


def some_pages(count: int, num_pages: int, rng: torch.Generator) -> list[int]:
    pages: list[int] = torch.randperm(num_pages, generator=rng)[:count].tolist()
    return pages


def check_copy(
    device: torch.device,
    source: paged.Pool,
    target: paged.Pool,
    src_pages: list[int],
    dst_pages: list[int],
    index_dtype: torch.dtype = torch.int32,
) -> None:
    expected = copied(source, target, src_pages, dst_pages)
    ours, theirs = source.to(device), target.to(device)
    pages = [torch.tensor(p, dtype=index_dtype, device=device) for p in (src_pages, dst_pages)]
    assert ridgeline.copy_pages(ours.cache, theirs.cache, *pages) is None
    assert theirs.same_bytes(expected)
    assert ours.same_bytes(source)


@pytest.mark.parametrize("kinds", [(a, b) for a in paged.POOL_KINDS for b in paged.POOL_KINDS])
@pytest.mark.parametrize("inner", [(16, 2, 64), (1, 8, 128), (2, 17, 40), (3, 5, 7)], ids=str)
def test_between_pools(
    device: torch.device,
    inner: tuple[int, ...],
    kinds: tuple[str, str],
    rng: torch.Generator,
) -> None:
    source, target = pools(rng, inner=inner, kinds=kinds)
    check_copy(device, source, target, some_pages(7, 9, rng), some_pages(7, 12, rng))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("inner", [(256, 8, 128), (1, 1, 1), (1, 1, 2048)], ids=str)
def test_sizes_and_dtypes(
    device: torch.device, inner: tuple[int, ...], dtype: torch.dtype, rng: torch.Generator
) -> None:
    source, target = pools(rng, inner=inner, num_pages=(4, 5), dtype=dtype)
    check_copy(device, source, target, [3, 3, 0], [4, 1, 0], torch.int64)


@pytest.mark.parametrize("kind", ["pair", "stacked", "layers"])
def test_within_one_pool(device: torch.device, kind: str, rng: torch.Generator) -> None:
    pool, _ = pools(rng, kinds=(kind, "pair"))
    src_pages, dst_pages = [1, 8, 1], [0, 3, 7]
    expected = copied(pool, pool, src_pages, dst_pages)
    ours = pool.to(device)
    cache = ours.cache
    ridgeline.copy_pages(
        cache, cache, torch.tensor(src_pages, device=device), torch.tensor(dst_pages, device=device)
    )
    assert ours.same_bytes(expected)


def test_mla_pools(device: torch.device, rng: torch.Generator) -> None:
    """3-D caches of different widths."""
    made = [paged.make_pool([(n, 4, 512), (n, 4, 64)], torch.bfloat16, "pair", rng) for n in (5, 6)]
    check_copy(device, made[0], made[1], [4, 0], [5, 2])


def test_garbage_is_skipped(device: torch.device, rng: torch.Generator) -> None:
    source, target = pools(rng)
    wild = [-1, 2**62, -(2**63), 9, 4]
    check_copy(device, source, target, wild, [0, 1, 2, 3, 4], torch.int64)
    check_copy(
        device, source, target, [0, 1, 2, 3, 4], [-1, 12, 2**31 + 1, 3, -(2**40)], torch.int64
    )
    check_copy(device, source, target, [0, 1], [2**31 - 1, -(2**31)])


@pytest.mark.parametrize("num_pages", [(0, 3), (3, 0), (3, 3)], ids=str)
def test_empty(device: torch.device, num_pages: tuple[int, int], rng: torch.Generator) -> None:
    source, target = pools(rng, num_pages=num_pages)
    check_copy(device, source, target, [], [])
    check_copy(device, source, target, [0] if 0 in num_pages else [], [2] if 0 in num_pages else [])
    source, target = pools(rng, inner=(4, 0, 8))
    check_copy(device, source, target, [1], [2])


@hypothesis.given(data=st.data())
@hypothesis.settings(max_examples=40, deadline=None)
def test_any_copy(device: torch.device, data: st.DataObject) -> None:
    rng = torch.Generator().manual_seed(data.draw(st.integers(0, 2**31), label="seed"))
    inner = tuple(data.draw(st.integers(1, n), label="inner") for n in (40, 9, 80))
    kinds = tuple(data.draw(st.sampled_from(paged.POOL_KINDS), label="kind") for _ in range(2))
    num_pages = tuple(data.draw(st.integers(1, 12), label="num_pages") for _ in range(2))
    source, target = pools(
        rng,
        inner=inner,
        kinds=(kinds[0], kinds[1]),
        num_pages=(num_pages[0], num_pages[1]),
        dtype=data.draw(st.sampled_from(DTYPES), label="dtype"),
    )
    count = data.draw(st.integers(0, num_pages[1]), label="copies")
    src_pages = torch.randint(-1, num_pages[0] + 1, (count,), generator=rng).tolist()
    check_copy(device, source, target, src_pages, some_pages(count, num_pages[1], rng))


@pytest.mark.gpu
@pytest.mark.parametrize("direction", ["out", "in", "host to host"])
@pytest.mark.parametrize("kind", ["stacked", "pair", "layers", "unaligned"])
def test_pinned_host_memory(kind: str, direction: str, rng: torch.Generator) -> None:
    """Pages leave the GPU and come back, on the current stream and without a synchronisation."""
    device = torch.device("cuda", 0)
    source, target = pools(rng, kinds=(kind, kind))
    src_pages, dst_pages = [8, 0, 4, -1], [0, 11, 3, 1]
    expected = copied(source, target, src_pages, dst_pages)

    def place(pool: paged.Pool, on_host: bool) -> paged.Pool:
        buffer = pool.buffer.pin_memory() if on_host else pool.buffer.to(device)
        return paged.Pool(buffer, pool.view)

    ours = place(source, direction != "out")
    theirs = place(target, direction != "in")
    pages = [torch.tensor(p, dtype=torch.int32, device=device) for p in (src_pages, dst_pages)]
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        ridgeline.copy_pages(ours.cache, theirs.cache, *pages)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.cuda.synchronize()
    assert theirs.same_bytes(expected)


@pytest.mark.gpu
def test_pageable_host_memory_is_refused(rng: torch.Generator) -> None:
    device = torch.device("cuda", 0)
    source, target = pools(rng)
    pages = torch.zeros(1, dtype=torch.int32, device=device)
    for caches in (
        (source.cache, target.to(device).cache),
        (source.to(device).cache, target.cache),
    ):
        with pytest.raises(RuntimeError, match=r"pinned host memory, got one in pageable"):
            ridgeline.copy_pages(*caches, pages, pages)
    with pytest.raises(RuntimeError, match="'src_pages': expected a tensor on a CUDA device"):
        ridgeline.copy_pages(source.to(device).cache, target.to(device).cache, pages.cpu(), pages)
    check_copy(device, source, target, [1], [2])


@pytest.mark.gpu
def test_cuda_graph(rng: torch.Generator) -> None:
    device = torch.device("cuda", 0)
    source, target = pools(rng)
    host = paged.Pool(target.buffer.pin_memory(), target.view)
    ours = source.to(device)
    cache, host_cache = ours.cache, host.cache
    pages = [torch.tensor(p, dtype=torch.int32, device=device) for p in ([1, 2], [3, 4])]
    graph = captured(lambda: ridgeline.copy_pages(cache, host_cache, *pages))
    for src_pages, dst_pages in (([1, 2], [3, 4]), ([5, -1], [0, 9]), ([0, 8], [11, 1])):
        host.buffer.copy_(target.buffer)
        pages[0].copy_(torch.tensor(src_pages))
        pages[1].copy_(torch.tensor(dst_pages))
        torch.cuda.synchronize()
        graph.replay()
        torch.cuda.synchronize()
        assert host.same_bytes(copied(source, target, src_pages, dst_pages))


@pytest.mark.gpu
def test_second_device(second_device: torch.device, rng: torch.Generator) -> None:
    source, target = pools(rng)
    check_copy(second_device, source, target, [1, 2], [3, 4])
    pages = torch.zeros(1, dtype=torch.int32, device=second_device)
    with pytest.raises(RuntimeError, match="'src_k_cache': expected a tensor on cuda:1"):
        ridgeline.copy_pages(
            source.to(torch.device("cuda", 0)).cache, target.to(second_device).cache, pages, pages
        )
    host = paged.Pool(target.buffer.pin_memory(), target.view)
    ridgeline.copy_pages(source.to(second_device).cache, host.cache, pages + 3, pages + 5)
    torch.cuda.synchronize(second_device)
    assert host.same_bytes(copied(source, target, [3], [5]))


def fork(cache: Tensor, src_pages: Tensor, dst_pages: Tensor) -> Tensor:
    """Pages for a branch of a request: copied within the pool, which is then read."""
    ridgeline.copy_pages(cache, cache, src_pages, dst_pages)
    return cache[dst_pages.long()].float().sum((1, 2, 3, 4))


def offload(
    cache: Tensor, other: tuple[Tensor, Tensor], src_pages: Tensor, dst_pages: Tensor
) -> Tensor:
    ridgeline.copy_pages(cache, other, src_pages, dst_pages)
    return src_pages + 1


@pytest.mark.parametrize("function", [fork, offload])
def test_compiled_copy_does_not_copy_the_pool(device: torch.device, function: Any) -> None:
    from torch._inductor.utils import run_and_get_code

    torch.manual_seed(0)
    pages = [torch.tensor(p, dtype=torch.int32, device=device) for p in ([1, 2], [3, 4])]
    cache = torch.randn(61, 2, 4, 2, 8, device=device)
    others = [torch.zeros(61, 4, 2, 8, device=device) for _ in range(2)]
    arguments = [cache, *pages] if function is fork else [cache, tuple(others), *pages]
    expected = [t.clone() for t in (cache, *others)]
    eager = [expected[0], *pages]
    if function is offload:
        eager = [expected[0], tuple(expected[1:]), *pages]
    result = function(*eager)
    torch._dynamo.reset()
    compiled, codes = run_and_get_code(torch.compile(function, fullgraph=True), *arguments)
    torch.testing.assert_close(compiled, result)
    for ours, theirs in zip((cache, *others), expected, strict=True):
        assert torch.equal(ours, theirs)
    code = "\n".join(codes)
    assert code.count("copy_pages") >= 1
    assert not [li for li in code.splitlines() if "empty_strided" in li and "(61," in li]


def good_call(device: torch.device) -> dict[str, Any]:
    return {
        "src_kv_cache": torch.ones(3, 2, 4, 2, 8, device=device),
        "dst_kv_cache": torch.zeros(5, 2, 4, 2, 8, device=device),
        "src_pages": torch.tensor([0, 1], dtype=torch.int32, device=device),
        "dst_pages": torch.tensor([2, 3], dtype=torch.int32, device=device),
    }


def floats(*shape: int) -> Any:
    return lambda device: torch.zeros(shape, device=device)


WRONG = [
    Wrong("form", {"dst_kv_cache": floats(5, 4, 2, 8)}, "'dst_kv_cache': expected a"),
    Wrong("page size", {"dst_kv_cache": floats(5, 2, 3, 2, 8)}, "'dst_k_cache': expected pages"),
    Wrong(
        "dtype",
        {"dst_kv_cache": lambda d: floats(5, 2, 4, 2, 8)(d).half()},
        "'dst_k_cache': expected dtype torch.float32",
    ),
    Wrong("rank", {"src_kv_cache": lambda d: (floats(3)(d),) * 2}, "'src_k_cache': expected 4 dim"),
    Wrong(
        "pages of values",
        {"src_kv_cache": lambda d: (floats(3, 4, 2, 8)(d), floats(4, 4, 2, 8)(d))},
        "'src_v_cache': expected 3 pages",
    ),
    Wrong(
        "expanded",
        {"dst_kv_cache": lambda d: floats(1, 2, 4, 2, 8)(d).expand(5, 2, 4, 2, 8)},
        "'dst_k_cache': expected a tensor whose elements are distinct",
    ),
    Wrong("counts", {"dst_pages": lambda d: torch.zeros(3, device=d).int()}, r"shape \[2\]"),
    Wrong("float pages", {"src_pages": floats(2)}, "'src_pages': expected dtype torch.int32"),
    Wrong("2-D pages", {"src_pages": lambda d: floats(2, 1)(d).int()}, "expected 1 dimensions"),
]


@pytest.mark.parametrize("wrong", WRONG, ids=lambda wrong: wrong.name)
def test_wrong_arguments(device: torch.device, wrong: Wrong) -> None:
    assert_raises(wrong, ridgeline.copy_pages, good_call(device), device)
