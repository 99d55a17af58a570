"""Appending to paged caches, bit for bit, and the numbers that go with a page table."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import hypothesis
import paged
import pytest
import ridgeline
import torch
from elementwise import Wrong, assert_raises, assert_refuses_grad, captured, view_of
from hypothesis import strategies as st
from support import normal, poisoned_call
from torch import Tensor

LENS, NEW = (5, 0, 37, 1, 300), (2, 0, 37, 1, 20)
FLOAT8 = (torch.float8_e4m3fn, torch.float8_e5m2)
CONVERSIONS = [
    (source, target)
    for source in (torch.float16, torch.bfloat16, torch.float32)
    for target in FLOAT8
] + [(torch.float32, torch.float16), (torch.float32, torch.bfloat16)]


def rounded(x: Tensor, dtype: torch.dtype) -> Tensor:
    """float32 to the nearest number of an 8-bit dtype, ties to even, by looking at all of them;
    beyond the largest is the largest."""
    if dtype not in FLOAT8:
        return x.to(dtype)
    codes = torch.arange(128, dtype=torch.uint8)  # the numbers from 0 on
    values = codes.view(dtype).double()
    codes, values = codes[values.isfinite()], values[values.isfinite()]
    magnitude = x.double().abs().clamp(max=values[-1].item())
    above = torch.searchsorted(values, magnitude.nan_to_num(0.0)).clamp(max=len(values) - 1)
    below = (above - 1).clamp(min=0)
    to_above, to_below = values[above] - magnitude, magnitude - values[below]
    even_above = codes[above] % 2 == 0
    up = (to_above < to_below) | ((to_above == to_below) & even_above)
    code = torch.where(up, codes[above], codes[below]) + 128 * torch.signbit(x).to(torch.uint8)
    result = code.view(dtype).clone()
    result.view(torch.uint8)[x.isnan()] = 0x7F
    return result


def some_values(shape: tuple[int, ...], dtype: torch.dtype, rng: torch.Generator) -> Tensor:
    """Random numbers of a dtype: floats of many sizes, random bytes for other types."""
    if dtype.is_floating_point and dtype not in FLOAT8:
        values = torch.randn(shape, generator=rng) * 2.0 ** torch.randint(
            -12, 11, shape, generator=rng
        )
        return values.to(dtype)
    numel = torch.Size(shape).numel()
    return paged.random_bytes(numel * dtype.itemsize, rng).view(dtype).view(shape)


def check_append(
    device: torch.device,
    rng: torch.Generator,
    *,
    page_size: int = 16,
    heads: int = 2,
    dims: tuple[int, int] = (64, 64),
    kv_layout: str = "NHD",
    kind: str = "pair",
    dtype: torch.dtype = torch.float16,
    kv_dtype: torch.dtype | None = None,
    lens: tuple[int, ...] = LENS,
    new: tuple[int, ...] = NEW,
    source_kind: str = "contiguous",
    index_dtype: torch.dtype = torch.int32,
    change: Callable[[Tensor, Tensor, paged.Table], None] = lambda *_: None,
    scales: tuple[Any, Any] = (None, None),
) -> None:
    kv_dtype = kv_dtype or dtype
    table = paged.make_table(lens, page_size, rng)
    shapes = [
        tuple(paged.pool_shape(kv_layout, table.num_pages, page_size, heads, d)) for d in dims
    ]
    pool = paged.make_pool(shapes, kv_dtype, kind, rng)
    requests, positions = (t.to(index_dtype) for t in paged.tokens_of(lens, new))
    change(requests, positions, table)
    new_values = [some_values((len(requests), heads, d), dtype, rng) for d in dims]

    stored = []
    for x, scale in zip(new_values, scales, strict=True):
        if kv_dtype != dtype:
            divisor = torch.as_tensor(1.0 if scale is None else scale).float().reshape(-1, 1)
            x = rounded((x.double() * (1 / divisor).double()).float(), kv_dtype)
        stored.append(x)
    expected = paged.written(pool, *stored, requests, positions, table, kv_layout)

    actual = pool.to(device)
    on_device = [
        x.to(device) if source_kind == "contiguous" else view_of(x.to(device), source_kind)
        for x in new_values
    ]
    k_scale, v_scale = (s.to(device) if isinstance(s, Tensor) else s for s in scales)
    ridgeline.append_paged_kv_cache(
        *on_device,
        requests.to(device),
        positions.to(device),
        actual.cache,
        *table.to(device),
        kv_layout,
        k_scale=k_scale,
        v_scale=v_scale,
    )
    assert actual.same_bytes(expected)
    assert pool.same_bytes(expected) == (not list(paged.places(requests, positions, table)))


@pytest.mark.parametrize("kind", paged.POOL_KINDS)
@pytest.mark.parametrize("kv_layout", ["NHD", "HND"])
@pytest.mark.parametrize("page_size", paged.PAGE_SIZES)
def test_append(
    device: torch.device, page_size: int, kv_layout: str, kind: str, rng: torch.Generator
) -> None:
    check_append(device, rng, page_size=page_size, kv_layout=kv_layout, kind=kind)


@pytest.mark.parametrize("kind", ["pair", "unaligned"])
@pytest.mark.parametrize("heads", [1, 8, 13])
@pytest.mark.parametrize("dims", [(128, 128), (64, 40), (7, 1), (192, 128), (1000, 3)], ids=str)
def test_head_dims(
    device: torch.device, dims: tuple[int, int], heads: int, kind: str, rng: torch.Generator
) -> None:
    check_append(device, rng, dims=dims, heads=heads, kind=kind, kv_layout="HND")


@pytest.mark.parametrize("kind", ["pair", "unaligned", "gaps"])
@pytest.mark.parametrize(
    "dtype",
    [torch.float32, torch.float16, torch.bfloat16, *FLOAT8, torch.int8, torch.uint8],
    ids=str,
)
def test_dtypes(device: torch.device, dtype: torch.dtype, kind: str, rng: torch.Generator) -> None:
    """What has the cache's dtype is copied bit for bit, NaN payloads too."""
    check_append(device, rng, dtype=dtype, kind=kind, dims=(72, 72))


@pytest.mark.parametrize("kind", ["pair", "layers", "unaligned", "gaps"])
@pytest.mark.parametrize(("dtype", "kv_dtype"), CONVERSIONS, ids=str)
def test_lower_precision(
    device: torch.device,
    dtype: torch.dtype,
    kv_dtype: torch.dtype,
    kind: str,
    rng: torch.Generator,
) -> None:
    check_append(device, rng, dtype=dtype, kv_dtype=kv_dtype, kind=kind)
    dims = (9, 9) if kind == "layers" else (9, 130)
    check_append(device, rng, dtype=dtype, kv_dtype=kv_dtype, kind=kind, dims=dims)


@pytest.mark.parametrize(
    "scales",
    [
        (0.5, 3.0),
        (torch.tensor(0.7), torch.tensor([1.9])),
        (torch.tensor([0.25, 1.3, 7.0]), 0.01),
        (None, torch.tensor([[5.0, 1.1, 0.3], [1.0, 1.0, 1.0]]).t()[:, 0]),
    ],
    ids=["numbers", "tensors", "heads", "strided"],
)
def test_scales(device: torch.device, scales: tuple[Any, Any], rng: torch.Generator) -> None:
    for dtype, kv_dtype in CONVERSIONS:
        check_append(device, rng, heads=3, dtype=dtype, kv_dtype=kv_dtype, scales=scales)


@pytest.mark.parametrize("kv_dtype", FLOAT8, ids=str)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_every_number_saturates_and_rounds(
    device: torch.device, dtype: torch.dtype, kv_dtype: torch.dtype
) -> None:
    """All 16-bit numbers (as upper halves for float32), with infinities and NaN, into 8 bits."""
    codes = torch.arange(2**16, dtype=torch.int32)
    if dtype == torch.float32:
        x = ((codes << 16) + 0x8000).view(dtype)
    else:
        x = codes.to(torch.int16).view(dtype)
    x = x.view(256, 1, 256)
    index = torch.zeros(1, dtype=torch.int32, device=device)
    indptr = torch.tensor([0, 1], dtype=torch.int32, device=device)
    cache = torch.zeros(1, 2, 256, 1, 256, device=device).to(kv_dtype)
    positions = torch.arange(256, device=device)
    ridgeline.append_paged_kv_cache(
        x.to(device), x.to(device), torch.zeros_like(positions), positions, cache, index, indptr,
        index + 1,
    )  # fmt: skip
    expected = rounded(x.float(), kv_dtype).squeeze(1).float()
    for stored in cache[0].squeeze(2).float().cpu():
        assert torch.equal(stored.isnan(), expected.isnan())
        assert torch.equal(stored.nan_to_num(0), expected.nan_to_num(0))
        assert torch.equal(stored.signbit() | stored.isnan(), expected.signbit() | stored.isnan())


@pytest.mark.parametrize("source_kind", ["strided", "unaligned", "odd stride"])
def test_source_views(device: torch.device, source_kind: str, rng: torch.Generator) -> None:
    check_append(device, rng, source_kind=source_kind)
    check_append(device, rng, source_kind=source_kind, kv_dtype=torch.float8_e4m3fn)


def test_fused_projection(device: torch.device, rng: torch.Generator) -> None:
    """Keys and values as views of one QKV buffer, and an expanded value."""
    qkv = normal((6, 8, 64), torch.float16, device, rng)
    table = paged.make_table([6], 4, rng)
    pool = torch.zeros(table.num_pages, 2, 4, 2, 64, dtype=torch.float16, device=device)
    requests, positions = (t.to(device) for t in paged.tokens_of([6], [6]))
    one = normal((1, 1, 64), torch.float16, device, rng)
    ridgeline.append_paged_kv_cache(
        qkv[:, 4:6], one.expand(6, 2, 64), requests, positions, pool, *table.to(device)
    )
    for row, page, slot in paged.places(requests, positions, table):
        assert torch.equal(pool[page, 0, slot], qkv[row, 4:6])
        assert torch.equal(pool[page, 1, slot], one[0].expand(2, 64))


@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64], ids=str)
def test_padding_is_skipped(
    device: torch.device, index_dtype: torch.dtype, rng: torch.Generator
) -> None:
    def pad(requests: Tensor, positions: Tensor, _: paged.Table) -> None:
        requests[::3] = -1
        positions[::5] = -1

    check_append(device, rng, change=pad, index_dtype=index_dtype)


@pytest.mark.parametrize("what", ["requests", "positions", "indices", "indptr", "all"])
def test_garbage_is_safe(device: torch.device, what: str, rng: torch.Generator) -> None:
    """Numbers of any size in the index tensors write nothing but existing places."""

    def spoil(tensor: Tensor) -> None:
        count = len(tensor) // 2 + 1
        info = torch.iinfo(tensor.dtype)
        at = torch.randperm(len(tensor), generator=rng)[:count]
        wild = torch.randint(info.min, info.max, (count,), generator=rng, dtype=tensor.dtype)
        near = torch.randint(-3, 400, (count,), generator=rng).to(tensor.dtype)
        tensor[at] = torch.where(torch.rand(count, generator=rng) < 0.5, wild, near)

    def change(requests: Tensor, positions: Tensor, table: paged.Table) -> None:
        tensors = {
            "requests": requests,
            "positions": positions,
            "indices": table.indices,
            "indptr": table.indptr,
        }
        for name, tensor in tensors.items():
            if what in (name, "all"):
                spoil(tensor)
        # One row alone writes to each place, so that the result is defined.
        seen = set()
        for row, page, slot in list(paged.places(requests, positions, table)):
            if (page, slot) in seen:
                requests[row] = -1
            seen.add((page, slot))

    for index_dtype in (torch.int32, torch.int64):
        for page_size in (1, 16):
            check_append(device, rng, page_size=page_size, change=change, index_dtype=index_dtype)


def test_pool_above_2_31_elements(device: torch.device) -> None:
    """Only the pages that are written are touched, so the CPU needs no memory either."""
    page_size, heads, dim = 16, 8, 128
    num_pages = 2**31 // (page_size * heads * dim) + 3
    pool = torch.empty(2, num_pages, page_size, heads, dim, dtype=torch.uint8, device=device)
    last = torch.tensor([num_pages - 1], dtype=torch.int32, device=device)
    pool[:, -2:] = 7
    key = torch.arange(heads * dim, device=device).to(torch.uint8).view(1, heads, dim)
    zero = torch.zeros(1, dtype=torch.int32, device=device)
    indptr = torch.tensor([0, 1], dtype=torch.int32, device=device)
    ridgeline.append_paged_kv_cache(
        key, key + 1, zero, zero + 5, (pool[0], pool[1]), last, indptr, zero + 6
    )
    expected = torch.full_like(pool[:, -2:], 7)
    expected[0, 1, 5], expected[1, 1, 5] = key[0], key[0] + 1
    assert torch.equal(pool[:, -2:], expected)
    stacked = pool.view(num_pages, 2, page_size, heads, dim)
    stacked[-1] = 9
    ridgeline.append_paged_kv_cache(key, key + 1, zero, zero + 5, stacked, last, indptr, zero + 6)
    assert torch.equal(stacked[-1, 1, 5], key[0] + 1)
    assert int((stacked[-1] != 9).sum()) == int((key != 9).sum() + (key + 1 != 9).sum())


@pytest.mark.parametrize("kv_dtype", [torch.bfloat16, torch.float8_e4m3fn], ids=str)
@pytest.mark.parametrize("kind", ["pair", "unaligned", "gaps"])
@pytest.mark.parametrize("page_size", [1, 5, 64])
def test_mla(
    device: torch.device, page_size: int, kind: str, kv_dtype: torch.dtype, rng: torch.Generator
) -> None:
    table = paged.make_table(LENS, page_size, rng)
    shapes = [(table.num_pages, page_size, 512), (table.num_pages, page_size, 64)]
    pool = paged.make_pool(shapes, kv_dtype, kind, rng)
    requests, positions = paged.tokens_of(LENS, NEW)
    ckv, kpe = (some_values((len(requests), n), torch.bfloat16, rng) for n in (512, 64))
    scales = (1.0, 1.0) if kv_dtype == torch.bfloat16 else (2.0, 0.3)
    stored = [
        rounded((x.double() * (1 / torch.tensor(s)).double()).float(), kv_dtype)
        for x, s in zip((ckv, kpe), scales, strict=True)
    ]
    expected = paged.written(pool, *stored, requests, positions, table)
    actual = pool.to(device)
    ridgeline.append_paged_mla_kv_cache(
        ckv.to(device), kpe.to(device), requests.to(device), positions.to(device), *actual.cache,
        *table.to(device), ckv_scale=scales[0], kpe_scale=scales[1],
    )  # fmt: skip
    assert actual.same_bytes(expected)


@pytest.mark.parametrize("what", ["tokens", "batch", "pages", "heads", "head_dim"])
def test_empty(device: torch.device, what: str) -> None:
    size = {"tokens": 3, "batch": 2, "pages": 4, "heads": 2, "head_dim": 8, what: 0}
    shape = (size["pages"], 2, 16, size["heads"], size["head_dim"])
    cache = torch.ones(shape, device=device)
    key = torch.zeros(size["tokens"], size["heads"], size["head_dim"], device=device)
    numbers = torch.zeros(size["tokens"], dtype=torch.int32, device=device)
    table = [torch.zeros(n, dtype=torch.int32, device=device) for n in (0, size["batch"] + 1)]
    last = torch.zeros(size["batch"], dtype=torch.int32, device=device)
    assert ridgeline.append_paged_kv_cache(key, key, numbers, numbers, cache, *table, last) is None
    assert bool((cache == 1).all())


@hypothesis.given(data=st.data())
@hypothesis.settings(max_examples=60, deadline=None)
def test_any_append(device: torch.device, data: st.DataObject) -> None:
    draw = data.draw
    lens = tuple(draw(st.lists(st.integers(0, 70), max_size=6), label="lens"))
    new = tuple(draw(st.integers(0, n), label="new") for n in lens)
    dtype, kv_dtype = draw(
        st.sampled_from([*CONVERSIONS, (torch.float16,) * 2, (torch.uint8,) * 2]), label="dtypes"
    )
    kind = draw(st.sampled_from(paged.POOL_KINDS), label="pool")
    dim = draw(st.integers(1, 80), label="head_dim")
    other = dim if kind in ("stacked", "layers") else draw(st.integers(1, 80), label="head_dim_vo")
    check_append(
        device,
        torch.Generator().manual_seed(draw(st.integers(0, 2**31), label="seed")),
        page_size=draw(st.integers(1, 40), label="page_size"),
        heads=draw(st.integers(1, 9), label="heads"),
        dims=(dim, other),
        kv_layout=draw(st.sampled_from(["NHD", "HND"]), label="kv_layout"),
        kind=kind,
        dtype=dtype,
        kv_dtype=kv_dtype,
        lens=lens,
        new=new,
        index_dtype=draw(st.sampled_from([torch.int32, torch.int64]), label="index_dtype"),
    )


def expected_batch_indices(
    indptr: list[int], seq_lens: list[int], nnz: int
) -> tuple[list[int], list[int]]:
    rows = [(-1, -1)] * nnz
    for request, length in enumerate(seq_lens):
        begin, end = indptr[request], indptr[request + 1]
        for token in range(begin, min(end, nnz)):
            rows[token] = request, length - end + token
    return [row[0] for row in rows], [row[1] for row in rows]


@hypothesis.given(
    new=st.lists(st.integers(0, 50), max_size=40),
    old=st.lists(st.integers(0, 1000), min_size=40, max_size=40),
    first=st.integers(0, 5),
    extra=st.integers(-20, 200),
)
@hypothesis.settings(max_examples=60, deadline=None)
def test_batch_indices_positions(
    device: torch.device, new: list[int], old: list[int], first: int, extra: int
) -> None:
    indptr = [first]
    for count in new:
        indptr.append(indptr[-1] + count)
    seq_lens = [a + b for a, b in zip(new, old, strict=False)]
    nnz = max(indptr[-1] + extra, 0)
    batch_indices, positions = poisoned_call(
        device,
        ridgeline.get_batch_indices_positions,
        torch.tensor(indptr, dtype=torch.int32, device=device),
        torch.tensor(seq_lens, dtype=torch.int32, device=device),
        nnz,
    )
    assert batch_indices.dtype == positions.dtype == torch.int32
    expected = expected_batch_indices(indptr, seq_lens, nnz)
    assert (batch_indices.tolist(), positions.tolist()) == expected


def test_batch_indices_of_garbage(device: torch.device, rng: torch.Generator) -> None:
    """Any contents: it ends, and requests are of the batch or -1."""
    for _ in range(20):
        indptr = torch.randint(-(2**31), 2**31, (33,), generator=rng).int()
        seq_lens = torch.randint(-(2**31), 2**31, (32,), generator=rng).int()
        indptr[torch.rand(33, generator=rng) < 0.5] %= 500
        requests, _ = ridgeline.get_batch_indices_positions(
            indptr.to(device), seq_lens.to(device), 777
        )
        assert bool(((requests >= -1) & (requests < 32)).all())


@hypothesis.given(
    counts=st.lists(st.integers(0, 300), max_size=300),
    page_size=st.sampled_from(paged.PAGE_SIZES),
    seed=st.integers(0, 2**31),
)
@hypothesis.settings(max_examples=30, deadline=None)
def test_seq_lens(device: torch.device, counts: list[int], page_size: int, seed: int) -> None:
    rng = torch.Generator().manual_seed(seed)
    last = torch.randint(1, page_size + 1, (len(counts),), generator=rng).int()
    indptr = torch.tensor([0, *counts]).cumsum(0).int()
    lens = poisoned_call(
        device, ridgeline.get_seq_lens, indptr.to(device), last.to(device), page_size
    )
    assert lens.dtype == torch.int32
    expected = [
        (n - 1) * page_size + m if n else 0 for n, m in zip(counts, last.tolist(), strict=True)
    ]
    assert lens.tolist() == expected


def test_seq_lens_of_garbage(device: torch.device) -> None:
    """A last page holds at most page_size tokens, and no request has less than none."""
    indptr = torch.tensor([0, 2, 1, 3], dtype=torch.int32, device=device)
    last = torch.tensor([99, 5, -4], dtype=torch.int32, device=device)
    assert ridgeline.get_seq_lens(indptr, last, 16).tolist() == [32, 0, 16]


def good_call(device: torch.device) -> dict[str, Any]:
    def numbers(*values: int) -> Tensor:
        return torch.tensor(values, dtype=torch.int32, device=device)

    key = torch.ones(3, 2, 8, dtype=torch.float16, device=device)
    return {
        "append_key": key,
        "append_value": 2 * key,
        "batch_indices": numbers(0, 0, 1),
        "positions": numbers(0, 1, 0),
        "paged_kv_cache": torch.zeros(4, 2, 16, 2, 8, dtype=torch.float16, device=device),
        "kv_indices": numbers(3, 1),
        "kv_indptr": numbers(0, 1, 2),
        "kv_last_page_len": numbers(2, 1),
        "kv_layout": "NHD",
        "k_scale": None,
        "v_scale": None,
    }


def halves(*shape: int) -> Callable[[torch.device], Tensor]:
    return lambda device: torch.zeros(shape, dtype=torch.float16, device=device)


def ints(*shape: int) -> Callable[[torch.device], Tensor]:
    return lambda device: torch.zeros(shape, dtype=torch.int32, device=device)


WRONG = [
    Wrong("layout", {"kv_layout": "NDH"}, "'kv_layout': expected 'NHD' or 'HND', got 'NDH'"),
    Wrong("4-D cache", {"paged_kv_cache": halves(4, 16, 2, 8)}, "'paged_kv_cache': expected a"),
    Wrong("3 of 2", {"paged_kv_cache": halves(4, 3, 16, 2, 8)}, "'paged_kv_cache': expected a"),
    Wrong("three caches", {"paged_kv_cache": (1, 2, 3)}, "got 3 of them"),
    Wrong("no pages", {"paged_kv_cache": halves(4, 2, 0, 2, 8)}, "at least 1 token"),
    Wrong("head_dim", {"append_key": halves(3, 2, 9)}, r"'append_key': expected shape \[3, 2, 8\]"),
    Wrong("heads", {"append_value": halves(3, 1, 8)}, "'append_value': expected shape"),
    Wrong("rank", {"append_key": halves(3, 16)}, "'append_key': expected 3 dimensions"),
    Wrong("nnz", {"append_key": halves(4, 2, 8)}, r"'append_key': expected shape \[3, 2, 8\]"),
    Wrong("positions", {"positions": ints(4)}, r"'batch_indices': expected shape \[4\]"),
    Wrong("positions' rank", {"positions": ints(3, 1)}, "'positions': expected 1 dimensions"),
    Wrong("float positions", {"positions": halves(3)}, "'positions': expected dtype torch.int32"),
    Wrong(
        "strided positions",
        {"positions": lambda d: ints(6)(d)[::2]},
        "'positions': expected a last dimension of stride 1",
    ),
    Wrong(
        "int64 indptr", {"kv_indptr": lambda d: ints(3)(d).long()}, "'kv_indptr': expected dtype"
    ),
    Wrong("no indptr", {"kv_indptr": ints(0)}, r"'kv_indptr': expected shape \[batch_size \+ 1\]"),
    Wrong("int64 pages", {"kv_indices": lambda d: ints(2)(d).long()}, "'kv_indices': expected dt"),
    Wrong("last", {"kv_last_page_len": ints(3)}, r"'kv_last_page_len': expected shape \[2\]"),
    Wrong(
        "wider cache",
        {"paged_kv_cache": lambda d: halves(4, 2, 16, 2, 8)(d).float()},
        "'k_cache': expected dtype torch.float16 .* or a lower precision",
    ),
    Wrong(
        "two dtypes",
        {"append_value": lambda d: halves(3, 2, 8)(d).float()},
        "'append_value': expected dtype torch.float16",
    ),
    Wrong(
        "two caches",
        {"paged_kv_cache": lambda d: (halves(4, 16, 2, 8)(d), halves(5, 16, 2, 8)(d))},
        "'v_cache': expected the shape of 'k_cache'",
    ),
    Wrong(
        "one cache",
        {"paged_kv_cache": lambda d: (halves(4, 16, 2, 8)(d),) * 2},
        "'v_cache': expected memory of its own",
    ),
    Wrong(
        "expanded cache",
        {"paged_kv_cache": lambda d: halves(1, 2, 16, 2, 8)(d).expand(4, 2, 16, 2, 8)},
        "'k_cache': expected a tensor whose elements are distinct",
    ),
    Wrong(
        "transposed cache",
        {"paged_kv_cache": lambda d: halves(4, 2, 16, 8, 2)(d).transpose(3, 4)},
        "'k_cache': expected a last dimension of stride 1",
    ),
    Wrong("scale", {"k_scale": 0.5}, "'k_scale': expected None or 1"),
    Wrong("scale 0", {"v_scale": 0.0}, "'v_scale': expected"),
]


@pytest.mark.parametrize("wrong", WRONG, ids=lambda wrong: wrong.name)
def test_wrong_arguments(device: torch.device, wrong: Wrong) -> None:
    assert_raises(wrong, ridgeline.append_paged_kv_cache, good_call(device), device)


@pytest.mark.parametrize(
    ("scale", "message"),
    [
        (float("nan"), "a finite number > 0"),
        (-1.0, "a finite number > 0"),
        (torch.ones(3), "1 number or one for each of the 2 heads"),
        (torch.ones(2).double(), "dtype torch.float32"),
        (torch.ones(2, 1), "0 or 1 dimensions"),
    ],
    ids=str,
)
def test_wrong_scales(device: torch.device, scale: Any, message: str) -> None:
    arguments = good_call(device)
    arguments["paged_kv_cache"] = arguments["paged_kv_cache"].to(torch.float8_e4m3fn)
    if isinstance(scale, Tensor):
        scale = scale.to(device)
    wrong = Wrong("scale", {"k_scale": scale}, f"'k_scale': expected {message}")
    assert_raises(wrong, ridgeline.append_paged_kv_cache, arguments, device)


def test_wrong_numbers(device: torch.device) -> None:
    indptr, lens = ints(3)(device), ints(2)(device)
    batch = {"append_indptr": indptr, "seq_lens": lens, "nnz": 4}
    for change, message in (
        ({"nnz": -1}, "'nnz': expected a number of tokens"),
        ({"seq_lens": ints(3)}, r"'seq_lens': expected shape \[2\]"),
        ({"append_indptr": ints(0)}, r"'append_indptr': expected shape \[batch_size \+ 1\]"),
        ({"append_indptr": lambda d: ints(3)(d).long()}, "'append_indptr': expected dtype"),
    ):
        wrong = Wrong("numbers", change, message)
        assert_raises(wrong, ridgeline.get_batch_indices_positions, batch, device)
    pages = {"kv_indptr": indptr, "kv_last_page_len": lens, "page_size": 16}
    for change, message in (
        ({"page_size": 0}, "'page_size': expected a number of tokens from 1"),
        ({"kv_last_page_len": ints(1)}, r"'kv_last_page_len': expected shape \[2\]"),
    ):
        assert_raises(Wrong("lens", change, message), ridgeline.get_seq_lens, pages, device)


def test_refuses_grad(device: torch.device) -> None:
    good = good_call(device)
    tensors = [good["append_key"], good["append_value"]]

    def call(key: Tensor, value: Tensor) -> None:
        ridgeline.append_paged_kv_cache(**{**good, "append_key": key, "append_value": value})

    assert_refuses_grad(call, tensors)


def decode_step(
    key: Tensor,
    cache: Any,
    append_indptr: Tensor,
    kv_indices: Tensor,
    kv_indptr: Tensor,
    kv_last_page_len: Tensor,
) -> Tensor:
    """Numbers, append and a read of the cache, as a layer of a model has them."""
    page_size = (cache if isinstance(cache, Tensor) else cache[0]).shape[-3]
    seq_lens = ridgeline.get_seq_lens(kv_indptr, kv_last_page_len, page_size)
    batch_indices, positions = ridgeline.get_batch_indices_positions(
        append_indptr, seq_lens, key.shape[0]
    )
    ridgeline.append_paged_kv_cache(
        key * 2, key + 1, batch_indices, positions, cache, kv_indices, kv_indptr, kv_last_page_len
    )
    first = cache[:, 0] if isinstance(cache, Tensor) else cache[0]
    return first[kv_indices.clamp(0, first.shape[0] - 1)] + 1


def step_inputs(
    device: torch.device, rng: torch.Generator, new: tuple[int, ...]
) -> tuple[Tensor, ...]:
    lens = tuple(n + 5 for n in new)
    table = paged.make_table(lens, 4, rng)
    key = normal((sum(new) + 2, 2, 16), torch.float16, device, rng)
    append_indptr = torch.tensor([0, *new], device=device).cumsum(0).int()
    return key, append_indptr, *table.to(device)


@pytest.mark.parametrize("form", ["stacked", "pair"])
def test_compiled_append_does_not_copy_the_pool(
    device: torch.device, form: str, rng: torch.Generator
) -> None:
    """The generated code calls the op on the pool itself, and no buffer is as large as the pool."""
    from torch._inductor.utils import run_and_get_code

    key, append_indptr, *table = step_inputs(device, rng, (3, 1))
    pages = 61  # a size that nothing else has
    pool = torch.zeros(pages, 2, 4, 2, 16, dtype=torch.float16, device=device)
    cache = pool if form == "stacked" else tuple(torch.zeros_like(pool[:, 0]) for _ in range(2))
    other = pool.clone() if form == "stacked" else tuple(t.clone() for t in cache)
    expected = decode_step(key, other, append_indptr, *table)
    torch._dynamo.reset()
    compiled = torch.compile(decode_step, fullgraph=True)
    result, codes = run_and_get_code(compiled, key, cache, append_indptr, *table)
    torch.testing.assert_close(result, expected)
    assert any(bool(t.any()) for t in cache)
    for ours, theirs in zip(cache, other, strict=True):
        assert torch.equal(ours, theirs)
    code = "\n".join(codes)
    lines = [line for line in code.splitlines() if not line.lstrip().startswith("#")]
    calls = [line for line in lines if "append_paged_kv_cache.default" in line]
    assert len(calls) == 1
    assert "arg" in calls[0]
    made = [line for line in lines if "empty_strided" in line and f"({pages}," in line]
    assert not made, made


def test_compile_with_dynamic_lengths(device: torch.device, rng: torch.Generator) -> None:
    from torch._dynamo.testing import CompileCounterWithBackend

    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(decode_step, fullgraph=True, dynamic=True, backend=counter)
    for new in ((3, 1), (2, 2, 9), (4, 0, 0, 7), (1, 1)):
        key, append_indptr, *table = step_inputs(device, rng, new)
        cache = torch.zeros(64, 2, 4, 2, 16, dtype=torch.float16, device=device)
        other = cache.clone()
        result = compiled(key, cache, append_indptr, *table)
        assert torch.equal(result, decode_step(key, other, append_indptr, *table))
        assert torch.equal(cache, other)
    assert counter.frame_count <= 2


@pytest.mark.gpu
def test_cuda_graph(rng: torch.Generator) -> None:
    """Captured once; lengths, tables and the number of live tokens change in place."""
    device = torch.device("cuda", 0)
    batches = [(3, 1, 4), (0, 0, 2), (5, 1, 1)]
    inputs = [step_inputs(device, rng, new) for new in batches]
    rows, indices = (max(len(t[i]) for t in inputs) for i in (0, 2))

    def padded(t: Tensor, size: int) -> Tensor:
        result = torch.full((size, *t.shape[1:]), -1, dtype=t.dtype, device=device)
        result[: len(t)] = t
        return result

    inputs = [(padded(i[0], rows), i[1], padded(i[2], indices), *i[3:]) for i in inputs]
    cache = torch.zeros(64, 2, 4, 2, 16, dtype=torch.float16, device=device)
    static = [t.clone() for t in inputs[0]]
    graph = captured(lambda: decode_step(static[0], cache, *static[1:]))
    for arguments in inputs:
        for target, source in zip(static, arguments, strict=True):
            target.copy_(source)
        cache.zero_()
        graph.replay()
        expected = torch.zeros_like(cache)
        decode_step(arguments[0], expected, *arguments[1:])
        assert torch.equal(cache, expected)
        assert bool(cache.any())


@pytest.mark.gpu
def test_no_synchronisation(rng: torch.Generator) -> None:
    device = torch.device("cuda", 0)
    key, *rest = step_inputs(device, rng, (3, 1))
    cache = torch.zeros(64, 2, 4, 2, 16, dtype=torch.float16, device=device)
    decode_step(key, cache, *rest)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        torch.cuda._sleep(1_000_000_000)
        decode_step(key, cache, *rest)
        done = torch.cuda.Event()
        done.record()
        assert not done.query()
    finally:
        torch.cuda.set_sync_debug_mode("default")
        torch.cuda.synchronize()


@pytest.mark.gpu
def test_second_device(second_device: torch.device, rng: torch.Generator) -> None:
    check_append(second_device, rng)
    check_append(second_device, rng, kv_dtype=torch.float8_e5m2)
    assert torch.cuda.current_device() == 0
    arguments = good_call(torch.device("cuda", 0))
    arguments["positions"] = arguments["positions"].to(second_device)
    with pytest.raises(RuntimeError, match="'positions': expected device cuda:0"):
        ridgeline.append_paged_kv_cache(**arguments)


@pytest.mark.gpu
def test_index_tensors_on_the_host() -> None:
    arguments = good_call(torch.device("cuda", 0))
    arguments["kv_indptr"] = arguments["kv_indptr"].cpu()
    with pytest.raises(RuntimeError, match="'kv_indptr': expected device cuda:0"):
        ridgeline.append_paged_kv_cache(**arguments)


def test_supports() -> None:
    for op in ("append_paged_kv_cache", "append_paged_mla_kv_cache"):
        answer = ridgeline.supports(op, device="sm_90a", dtype="bfloat16", kv_dtype="float8_e4m3fn")
        assert answer.ok
        assert answer.kernel.endswith("<Convert<__nv_bfloat16, __nv_fp8_e4m3, 8>>")
        assert ridgeline.supports(op, device="sm_75").kernel.endswith("<Copy<16>>")
        refused = ridgeline.supports(op, device="sm_90a", dtype="float16", kv_dtype="float32")
        assert not refused.ok
        assert "lower precision" in refused.reasons[0]
