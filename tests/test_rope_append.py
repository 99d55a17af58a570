"""rope_append_paged_kv_cache against norm and rotation in float64, place by place."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import hypothesis
import paged
import pytest
import ridgeline
import torch
from elementwise import (
    DTYPES,
    FLOAT32_UNIT,
    Wrong,
    assert_raises,
    assert_refuses_grad,
    assert_rounded,
    captured,
    half_ulp,
    view_of,
    without_recompilation,
)
from hypothesis import strategies as st
from rope_oracle import Angles, Llama31, exact_rope, frequencies
from support import normal, poisoned_call
from torch import Tensor

LENS, NEW = (5, 0, 37, 1, 300), (2, 0, 37, 1, 20)
MANY = (700, 0, 3)  # more tokens than one head a thread is for
FLOAT8 = (torch.float8_e4m3fn, torch.float8_e5m2)
CACHES = [(d, d) for d in DTYPES] + [(d, f) for d in DTYPES for f in FLOAT8]
CACHES += [(torch.float32, torch.float16), (torch.float32, torch.bfloat16)]
NORM_LOSS = 32 * FLOAT32_UNIT  # a sum of squares, a root and three products
Llama31Options = ("low_freq_factor", "high_freq_factor", "old_context_len")


@dataclass(frozen=True)
class Case:
    """A call: what varies, at its most common value."""

    heads: tuple[int, int] = (4, 2)
    dims: tuple[int, int] = (64, 64)
    rotary_dim: int | None = None
    interleave: bool = False
    page_size: int = 16
    kv_layout: str = "NHD"
    kind: str = "pair"
    dtype: torch.dtype = torch.float16
    kv_dtype: torch.dtype | None = None
    lens: tuple[int, ...] = LENS
    new: tuple[int, ...] = NEW
    norm: torch.dtype | None = None  # of the weights
    eps: float = 1e-6
    scale_theta: tuple[float, float] = (1.0, 1e4)
    llama31: Llama31 | None = None
    table: bool = False
    own_pos_ids: bool = False
    scales: tuple[Any, Any] = (None, None)
    q_out: str = "fresh"
    source: str = "contiguous"
    index_dtype: torch.dtype = torch.int32
    change: Callable[[Tensor, Tensor, paged.Table], None] = lambda *_: None

    @property
    def rotary(self) -> int:
        return self.rotary_dim or self.dims[0]


def normed(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    x = x.double()
    if weight is None:
        return x
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight.double()


def exact_heads(x: Tensor, weight: Tensor | None, angles: Angles, case: Case) -> Any:
    exact, slack = exact_rope(normed(x, weight, case.eps), angles, case.interleave)
    if weight is not None:
        # The rotation's own loss is 12 units of both elements of a pair.
        slack = slack * 4 + exact.abs() * NORM_LOSS
    return exact, slack


def assert_stored(actual: Tensor, exact: Tensor, slack: Tensor) -> None:
    """As assert_rounded, and for 8 bits too, which saturate."""
    if actual.dtype not in FLOAT8:
        assert_rounded(actual, exact, slack)
        return
    limit = torch.finfo(actual.dtype).max
    stored, exact = actual.float().double(), exact.clamp(-limit, limit)
    assert torch.equal(stored.isnan(), exact.isnan())
    bound = half_ulp(exact.abs() + slack, actual.dtype) + slack
    assert bool(((stored - exact).abs() <= bound)[~exact.isnan()].all())


def sources(
    q: Tensor, k: Tensor, v: Tensor, kind: str, device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    """On the device: as they are, as slices of one projection's output, or other views."""
    if kind == "fused":
        parts = [x.flatten(1) for x in (q, k, v)]
        qkv = torch.cat(parts, dim=1).to(device)
        views = qkv.split([part.shape[1] for part in parts], dim=1)
        q, k, v = (view.unflatten(1, x.shape[1:]) for view, x in zip(views, (q, k, v), strict=True))
        return q, k, v
    q, k, v = (view_of(x.to(device), kind) for x in (q, k, v))
    return q, k, v


def check(device: torch.device, rng: torch.Generator, case: Case) -> None:
    kv_dtype = case.kv_dtype or case.dtype
    table = paged.make_table(case.lens, case.page_size, rng)
    shapes = [
        tuple(paged.pool_shape(case.kv_layout, table.num_pages, case.page_size, case.heads[1], dim))
        for dim in case.dims
    ]
    pool = paged.make_pool(shapes, kv_dtype, case.kind, rng)
    requests, positions = (t.to(case.index_dtype) for t in paged.tokens_of(case.lens, case.new))
    case.change(requests, positions, table)
    nnz, cpu = len(requests), torch.device("cpu")
    q = normal((nnz, case.heads[0], case.dims[0]), case.dtype, cpu, rng)
    k = normal((nnz, case.heads[1], case.dims[0]), case.dtype, cpu, rng)
    v = normal((nnz, case.heads[1], case.dims[1]), case.dtype, cpu, rng)

    options: dict[str, Any] = {"interleave": case.interleave}
    if case.rotary_dim is not None:
        options["rotary_dim"] = case.rotary_dim
    pos_ids = positions
    if case.own_pos_ids:
        pos_ids = torch.randint(0, 2**24, (nnz,), generator=rng)
        options["pos_ids"] = pos_ids.to(device)
    if case.table:
        cache = torch.randn(400, case.rotary, generator=rng)
        angles = Angles.table(pos_ids.clamp(0, 399), cache)
        options["cos_sin_cache"] = cache.to(device)
    else:
        scale, theta = case.scale_theta
        frequency = frequencies(case.rotary, scale, theta, case.llama31)
        angles = Angles.of(pos_ids, frequency)
        options |= {"rope_scale": scale, "rope_theta": theta}
        options |= dict(zip(Llama31Options, case.llama31 or (), strict=False))
    weights: list[Tensor | None] = [None, None]
    if case.norm is not None:
        weights = [normal((case.dims[0],), case.norm, cpu, rng) for _ in range(2)]
        options |= {"q_weight": weights[0].to(device), "k_weight": weights[1].to(device)}
        options["norm_eps"] = case.eps
    k_scale, v_scale = (s.to(device) if isinstance(s, Tensor) else s for s in case.scales)
    inputs = sources(q, k, v, case.source, device)
    before = [x.clone() for x in inputs]
    if case.q_out != "fresh":
        options["q_out"] = inputs[0] if case.q_out == "in place" else inputs[0].clone().fill_(7)

    actual = pool.to(device)
    q_out = poisoned_call(
        device, ridgeline.rope_append_paged_kv_cache, *inputs, requests.to(device),
        positions.to(device), actual.cache, *table.to(device)[:2], case.kv_layout,
        k_scale=k_scale, v_scale=v_scale, **options,
    )  # fmt: skip
    assert case.q_out == "fresh" or q_out is options["q_out"]
    assert case.q_out != "fresh" or q_out.is_contiguous()
    for i, (after, x) in enumerate(zip(inputs, before, strict=True)):
        assert (i == 0 and case.q_out == "in place") or torch.equal(after, x)

    assert_rounded(q_out.cpu(), *exact_heads(q, weights[0], angles, case))
    new_k = exact_heads(k, weights[1], angles, case)
    new_v = v.double(), torch.zeros(v.shape, dtype=torch.float64)
    expected = pool.clone()
    host = actual.to(cpu)
    at = list(paged.places(requests, positions, table))
    for cache, stored, (exact, slack), scale in zip(
        expected.pair, host.pair, (new_k, new_v), case.scales, strict=True
    ):
        divisor = torch.as_tensor(1.0 if scale is None else scale).double().reshape(-1, 1)
        exact, slack = exact / divisor, slack / divisor
        if scale is not None:
            slack = slack + exact.abs() * 4 * FLOAT32_UNIT
        tokens, new_tokens = (
            c.transpose(1, 2) if case.kv_layout == "HND" else c for c in (cache, stored)
        )
        for _, page, slot in at:
            tokens[page, slot].copy_(new_tokens[page, slot])
        if at:
            rows = [row for row, _, _ in at]
            # As bytes: torch stacks no 8-bit floats.
            written = [new_tokens[page, slot].view(torch.uint8) for _, page, slot in at]
            assert_stored(torch.stack(written).view(kv_dtype), exact[rows], slack[rows])
    # Nothing else of the pool's bytes has changed.
    assert host.same_bytes(expected)


@pytest.mark.parametrize("interleave", [False, True], ids=["half-split", "interleaved"])
@pytest.mark.parametrize("norm", [False, True], ids=["plain", "norm"])
@pytest.mark.parametrize(("dtype", "kv_dtype"), CACHES, ids=str)
def test_dtypes(
    device: torch.device,
    dtype: torch.dtype,
    kv_dtype: torch.dtype,
    norm: bool,
    interleave: bool,
    rng: torch.Generator,
) -> None:
    case = Case(dtype=dtype, kv_dtype=kv_dtype, norm=dtype if norm else None, interleave=interleave)
    check(device, rng, case)
    check(device, rng, replace(case, source="unaligned", norm=torch.float32 if norm else None))


@pytest.mark.parametrize("norm", [None, torch.float32], ids=["plain", "norm"])
@pytest.mark.parametrize(
    ("dims", "rotary_dim"),
    [
        ((128, 128), None),
        ((256, 256), None),
        ((256, 64), 248),
        ((192, 128), 64),
        ((80, 80), None),
        ((96, 40), 32),
        ((72, 256), 16),
        ((6, 3), 2),
        ((255, 255), 254),
        ((255, 1), 2),
    ],
    ids=str,
)
def test_head_dims(
    device: torch.device,
    dims: tuple[int, int],
    rotary_dim: int | None,
    norm: torch.dtype | None,
    rng: torch.Generator,
) -> None:
    for dtype in (torch.bfloat16, torch.float32):
        for interleave in (False, True):
            case = Case(dims=dims, dtype=dtype, norm=norm, interleave=interleave)
            check(device, rng, replace(case, rotary_dim=rotary_dim, lens=(9, 30), new=(9, 4)))


@pytest.mark.parametrize("heads", [(1, 1), (32, 8), (7, 1), (5, 5), (0, 2), (64, 8)], ids=str)
@pytest.mark.parametrize("lens", [(1,), (64,), MANY], ids=["1", "64", "703"])
def test_heads(
    device: torch.device, heads: tuple[int, int], lens: tuple[int, ...], rng: torch.Generator
) -> None:
    dims = (16, 16) if lens == MANY else (128, 128)
    case = Case(heads=heads, dims=dims, dtype=torch.bfloat16, norm=torch.bfloat16)
    check(device, rng, replace(case, lens=lens, new=lens))


def test_many_whole_heads(device: torch.device, rng: torch.Generator) -> None:
    for norm in (None, torch.float32):
        case = Case(heads=(18, 5), dims=(128, 128), dtype=torch.bfloat16, norm=norm)
        check(device, rng, replace(case, lens=MANY, new=MANY))


@pytest.mark.parametrize("interleave", [False, True], ids=["half-split", "interleaved"])
@pytest.mark.parametrize("norm", [False, True], ids=["plain", "norm"])
@pytest.mark.parametrize(
    ("dtype", "kv_dtype"),
    [c for c in CACHES if c[0] != torch.float32],
    ids=str,
)
def test_heads_of_128(
    device: torch.device,
    dtype: torch.dtype,
    kv_dtype: torch.dtype,
    norm: bool,
    interleave: bool,
    rng: torch.Generator,
) -> None:
    """The calls that have a kernel of their own, and those next to them."""

    def pad(requests: Tensor, positions: Tensor, table: paged.Table) -> None:
        requests[::3] = -1
        positions[::5] = 2**31 - 1
        table.indices[::4] = -5

    own = Case(
        heads=(12, 3),
        dims=(128, 128),
        dtype=dtype,
        kv_dtype=kv_dtype,
        norm=dtype if norm else None,
        interleave=interleave,
        source="fused",
        lens=(9, 0, 70),
        new=(5, 0, 33),
    )
    check(device, rng, own)
    check(device, rng, replace(own, change=pad, own_pos_ids=True, q_out="in place"))
    check(device, rng, replace(own, heads=(9, 9), kv_layout="HND", kind="gaps", page_size=5))
    check(device, rng, replace(own, heads=(0, 2), kind="layers", lens=(1,), new=(1,)))
    if kv_dtype != dtype:
        check(device, rng, replace(own, scales=(0.5, 3.0)))
        check(device, rng, replace(own, scales=(torch.tensor([0.25, 1.3, 2.0]), 3.0)))
    for change in (
        {"index_dtype": torch.int64},
        {"source": "odd stride"},
        {"rotary_dim": 64},
        {"dims": (128, 64)},
        {"table": True},
        {"norm": torch.float32 if norm else None, "source": "strided"},
    ):
        check(device, rng, replace(own, **change))


@pytest.mark.parametrize("heads", [(32, 8), (5, 1)], ids=str)
@pytest.mark.parametrize("interleave", [False, True], ids=["half-split", "interleaved"])
def test_index_dtypes_agree(
    device: torch.device, heads: tuple[int, int], interleave: bool, rng: torch.Generator
) -> None:
    """The same bits from both kernels for heads of 128."""
    inputs, pool, table = call_inputs((40, 3), heads, 128, torch.bfloat16, device, rng)
    weights = [normal((128,), torch.bfloat16, device, rng) for _ in range(2)]
    for options in ({}, {"q_weight": weights[0], "k_weight": weights[1]}):
        results = []
        for dtype in (torch.int32, torch.int64):
            cache = torch.zeros_like(pool)
            q = ridgeline.rope_append_paged_kv_cache(
                *inputs[:3], *(x.to(dtype) for x in inputs[3:]), cache, *table,
                interleave=interleave, **options,
            )  # fmt: skip
            results.append((q, cache))
        assert all(torch.equal(x, y) for x, y in zip(*results, strict=True))


def test_unaligned_weights(device: torch.device, rng: torch.Generator) -> None:
    """The same numbers at an odd address: another kernel, another order of the sum of squares."""
    for dtype in (torch.bfloat16, torch.float32):
        q, k, v = (normal((5, n, 64), torch.bfloat16, device, rng) for n in (4, 2, 2))
        cache = torch.zeros(2, 2, 8, 2, 64, dtype=torch.bfloat16, device=device)
        table = (torch.arange(2, device=device).int(), torch.tensor([0, 2], device=device).int())
        positions = torch.arange(5, device=device)
        weights = [normal((65,), dtype, device, rng) for _ in range(2)]
        results = []
        for q_weight, k_weight in (
            [w[1:] for w in weights],
            [w[1:].clone() for w in weights],
        ):
            out = ridgeline.rope_append_paged_kv_cache(
                q, k, v, positions * 0, positions, cache, *table, q_weight=q_weight,
                k_weight=k_weight,
            )  # fmt: skip
            results.append(out.double())
        assert bool((results[0] - results[1]).abs().max() <= 2**-7 * results[1].abs().max())


@pytest.mark.parametrize("kind", paged.POOL_KINDS)
@pytest.mark.parametrize("kv_layout", ["NHD", "HND"])
@pytest.mark.parametrize("page_size", [1, 3, 16, 17, 256])
def test_pools(
    device: torch.device, page_size: int, kv_layout: str, kind: str, rng: torch.Generator
) -> None:
    case = Case(page_size=page_size, kv_layout=kv_layout, kind=kind, source="fused")
    check(device, rng, case)
    check(device, rng, replace(case, kv_dtype=torch.float8_e4m3fn, scales=(0.5, None)))


@pytest.mark.parametrize("source", ["fused", "strided", "unaligned", "odd stride"])
@pytest.mark.parametrize("q_out", ["fresh", "given", "in place"])
def test_sources_and_outputs(
    device: torch.device, q_out: str, source: str, rng: torch.Generator
) -> None:
    for norm in (None, torch.float16):
        check(device, rng, Case(source=source, q_out=q_out, norm=norm))
        check(device, rng, Case(source=source, q_out=q_out, norm=norm, rotary_dim=32))


ANGLES = {
    "scale": {"scale_theta": (4.0, 1e6)},
    "llama31": {"scale_theta": (8.0, 5e5), "llama31": (1.0, 4.0, 8192.0)},
    "llama31 low 0": {"scale_theta": (2.0, 1e4), "llama31": (0.0, 2.0, 500.0)},
    "far": {"own_pos_ids": True},
    "far llama31": {
        "own_pos_ids": True,
        "scale_theta": (8.0, 5e5),
        "llama31": (1.0, 4.0, 8192.0),
    },
    "table": {"table": True},
    "table by pos_ids": {"table": True, "own_pos_ids": True},
}


@pytest.mark.parametrize("rotary_dim", [None, 48])
@pytest.mark.parametrize("name", ANGLES)
def test_angles(
    device: torch.device, name: str, rotary_dim: int | None, rng: torch.Generator
) -> None:
    for dtype in DTYPES:
        case = Case(dtype=dtype, rotary_dim=rotary_dim, **ANGLES[name])
        check(device, rng, case)
        check(device, rng, replace(case, norm=dtype, interleave=True, eps=1e-5))


@pytest.mark.parametrize(
    "scales",
    [(0.5, 3.0), (torch.tensor(0.7), torch.tensor([1.9])), (torch.tensor([0.25, 1.3]), 0.01)],
    ids=["numbers", "tensors", "heads"],
)
@pytest.mark.parametrize(("dtype", "kv_dtype"), CACHES[3:], ids=str)
def test_scales(
    device: torch.device,
    dtype: torch.dtype,
    kv_dtype: torch.dtype,
    scales: tuple[Any, Any],
    rng: torch.Generator,
) -> None:
    check(device, rng, Case(dtype=dtype, kv_dtype=kv_dtype, scales=scales, norm=dtype))


@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64], ids=str)
def test_padding_is_skipped(
    device: torch.device, index_dtype: torch.dtype, rng: torch.Generator
) -> None:
    """Rows of -1 are not appended; their q is written."""

    def pad(requests: Tensor, positions: Tensor, _: paged.Table) -> None:
        requests[::3] = -1
        positions[::5] = -1

    for lens, dims in ((LENS, (64, 64)), (MANY, (16, 16))):
        case = Case(change=pad, index_dtype=index_dtype, lens=lens, dims=dims)
        check(device, rng, replace(case, new=NEW if lens == LENS else MANY))


def test_garbage_is_safe(device: torch.device, rng: torch.Generator) -> None:
    """Numbers of any size in the index tensors write nothing but existing places."""

    def spoil(tensor: Tensor) -> None:
        count = len(tensor) // 2 + 1
        info = torch.iinfo(tensor.dtype)
        at = torch.randperm(len(tensor), generator=rng)[:count]
        tensor[at] = torch.randint(info.min, info.max, (count,), generator=rng, dtype=tensor.dtype)

    def change(requests: Tensor, positions: Tensor, table: paged.Table) -> None:
        for tensor in (requests, positions, table.indices, table.indptr):
            spoil(tensor)
        seen = set()
        for row, page, slot in list(paged.places(requests, positions, table)):
            if (page, slot) in seen:
                requests[row] = -1
            seen.add((page, slot))

    for page_size in (1, 16):
        check(device, rng, Case(page_size=page_size, change=change, own_pos_ids=True))


def call_inputs(
    lens: tuple[int, ...],
    heads: tuple[int, int],
    head_dim: int,
    dtype: torch.dtype,
    device: torch.device,
    rng: torch.Generator,
) -> tuple[list[Tensor], Tensor, tuple[Tensor, Tensor]]:
    """q, k, v, batch_indices, positions; a pool of zeros; the page table."""
    table = paged.make_table(lens, 16, rng)
    requests, positions = (t.to(device) for t in paged.tokens_of(lens, lens))
    shape = (table.num_pages, 2, 16, heads[1], head_dim)
    q, k, v = (
        normal((sum(lens), n, head_dim), dtype, device, rng) for n in (heads[0], *heads[1:] * 2)
    )
    pool = torch.zeros(shape, dtype=dtype, device=device)
    return [q, k, v, requests, positions], pool, table.to(device)[:2]


def test_tokens_do_not_depend_on_the_batch(device: torch.device, rng: torch.Generator) -> None:
    """The same bits whether a thread takes one head or several."""
    inputs, pool, table = call_inputs((600,), (4, 2), 64, torch.bfloat16, device, rng)
    weight = normal((64,), torch.bfloat16, device, rng)
    options = {"q_weight": weight, "k_weight": weight}
    together = ridgeline.rope_append_paged_kv_cache(*inputs, pool, *table, **options)
    alone = torch.zeros_like(pool)
    for begin, end in ((0, 1), (1, 40), (40, 400), (400, 600)):
        part = [x[begin:end] for x in inputs]
        q = ridgeline.rope_append_paged_kv_cache(*part, alone, *table, **options)
        assert torch.equal(q, together[begin:end])
    assert torch.equal(alone, pool)


def test_separate_ops(device: torch.device, rng: torch.Generator) -> None:
    """In float32 it is what the four ops do one after the other, a few roundings apart."""
    inputs, pool, table = call_inputs((40, 3), (4, 2), 64, torch.float32, device, rng)
    q, k, v, requests, positions = inputs
    weights = [normal((64,), torch.float32, device, rng) for _ in range(2)]
    fused = pool.clone()
    q_fused = ridgeline.rope_append_paged_kv_cache(
        *inputs, fused, *table, q_weight=weights[0], k_weight=weights[1]
    )
    q, k = ridgeline.rmsnorm(q, weights[0]), ridgeline.rmsnorm(k, weights[1])
    ridgeline.apply_rope_pos_ids_inplace(q, k, positions)
    last = torch.zeros(2, dtype=torch.int32, device=device)
    ridgeline.append_paged_kv_cache(k, v, requests, positions, pool, *table, last)
    torch.testing.assert_close(q_fused, q, rtol=1e-6, atol=4e-6)
    torch.testing.assert_close(fused, pool, rtol=1e-6, atol=4e-6)


def test_special_values(device: torch.device) -> None:
    """NaN and infinities spread to their pair without norm, to their head with it."""
    ones, one = torch.ones(1, 2, 16, device=device), torch.ones(1, dtype=torch.int32, device=device)
    for norm, expected in ((False, [3, 4, 11, 12]), (True, list(range(16)))):
        q, k, v = ones.half(), ones.half(), ones.half()
        for x in (q, k, v):
            x[0, 0, 3], x[0, 0, 12] = float("nan"), float("inf")
        cache = torch.zeros(1, 2, 4, 2, 16, dtype=torch.float16, device=device)
        weight = torch.ones(16, device=device) if norm else None
        result = ridgeline.rope_append_paged_kv_cache(
            q, k, v, one - 1, one, cache, one - 1, torch.arange(2, device=device).int(),
            q_weight=weight, k_weight=weight,
        )  # fmt: skip
        for x in (result[0], cache[0, 0, 1]):
            wrong = ~x.isfinite()
            assert wrong[0].nonzero().flatten().tolist() == expected
            assert not bool(wrong[1].any())
        assert torch.equal(cache[0, 1, 1].isfinite(), v[0].isfinite())


@pytest.mark.parametrize("what", ["tokens", "batch", "pages", "heads", "kv heads"])
def test_empty(device: torch.device, what: str) -> None:
    sizes = {"tokens": 3, "batch": 2, "pages": 4, "heads": 2, "kv heads": 2, what: 0}
    cache = torch.ones(sizes["pages"], 2, 16, sizes["kv heads"], 8, device=device)
    q = torch.ones(sizes["tokens"], sizes["heads"], 8, device=device)
    k = torch.ones(sizes["tokens"], sizes["kv heads"], 8, device=device)
    numbers = torch.zeros(sizes["tokens"], dtype=torch.int32, device=device)
    table = [torch.zeros(n, dtype=torch.int32, device=device) for n in (0, sizes["batch"] + 1)]
    result = ridgeline.rope_append_paged_kv_cache(q, k, k, numbers, numbers, cache, *table)
    assert torch.equal(result, q)
    assert bool((cache == 1).all())


def test_qwen3(device: torch.device, rng: torch.Generator) -> None:
    """The projections, norms and rotation of Qwen3's own attention, near positions only."""
    qwen3 = pytest.importorskip("transformers.models.qwen3.modeling_qwen3")
    from transformers import Qwen3Config

    head_dim, theta, tokens = 128, 1e6, 40
    config = Qwen3Config(
        hidden_size=256,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=head_dim,
        rope_parameters={"rope_type": "default", "rope_theta": theta},
        rope_theta=theta,
    )
    layer = qwen3.Qwen3Attention(config, layer_idx=0).to(device)
    rotary = qwen3.Qwen3RotaryEmbedding(config).to(device)
    with torch.no_grad():
        for norm in (layer.q_norm, layer.k_norm):
            norm.weight.copy_(normal((head_dim,), torch.float32, device, rng))
        x = normal((1, tokens, 256), torch.float32, device, rng)
        positions = torch.arange(tokens, device=device) + 500
        q, k, v = (
            p(x).view(tokens, -1, head_dim) for p in (layer.q_proj, layer.k_proj, layer.v_proj)
        )
        cos, sin = rotary(x, positions[None])
        theirs = qwen3.apply_rotary_pos_emb(
            layer.q_norm(q).transpose(0, 1)[None], layer.k_norm(k).transpose(0, 1)[None], cos, sin
        )
        cache = torch.zeros(40, 2, 16, 2, head_dim, device=device)
        ours = ridgeline.rope_append_paged_kv_cache(
            q, k, v, torch.zeros_like(positions), positions, cache,
            torch.arange(40, device=device).int(), torch.tensor([0, 40], device=device).int(),
            q_weight=layer.q_norm.weight, k_weight=layer.k_norm.weight,
            norm_eps=config.rms_norm_eps, rope_theta=theta,
        )  # fmt: skip
    stored = cache.transpose(1, 2).flatten(0, 1)[500 : 500 + tokens]
    for mine, other in ((ours, theirs[0]), (stored[:, 0], theirs[1])):
        expected = other[0].transpose(0, 1)
        # Their float32 angles are off by 540 * 2^-23 radians.
        assert float((mine - expected).abs().max()) <= 1.5e-4 * float(expected.abs().max())
    assert torch.equal(stored[:, 1], v)


@hypothesis.given(data=st.data())
@hypothesis.settings(max_examples=60, deadline=None)
def test_any(device: torch.device, data: st.DataObject) -> None:
    pick = data.draw
    dtype, kv_dtype = pick(st.sampled_from(CACHES), label="dtypes")
    dims = pick(st.tuples(st.integers(2, 256), st.integers(1, 256)), label="dims")
    lens = tuple(pick(st.lists(st.integers(0, 20), max_size=5), label="lens"))
    case = Case(
        heads=pick(st.tuples(st.integers(0, 9), st.integers(1, 5)), label="heads"),
        dims=dims,
        rotary_dim=2 * pick(st.integers(1, dims[0] // 2), label="rotary_dim / 2"),
        interleave=pick(st.booleans(), label="interleave"),
        page_size=pick(st.integers(1, 20), label="page_size"),
        kv_layout=pick(st.sampled_from(["NHD", "HND"]), label="kv_layout"),
        kind=pick(st.sampled_from(["pair", "unaligned", "gaps"]), label="kind"),
        dtype=dtype,
        kv_dtype=kv_dtype,
        lens=lens,
        new=tuple(min(n, pick(st.integers(0, 20), label="new")) for n in lens),
        norm=pick(st.sampled_from([None, dtype, torch.float32]), label="norm"),
        table=pick(st.booleans(), label="table"),
        q_out=pick(st.sampled_from(["fresh", "given", "in place"]), label="q_out"),
        source=pick(st.sampled_from(["fused", "strided", "unaligned"]), label="source"),
    )
    check(device, torch.Generator().manual_seed(pick(st.integers(0, 2**31), label="seed")), case)


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.parametrize("in_place", [False, True], ids=["fresh", "in place"])
def test_compile(device: torch.device, in_place: bool, backend: str, rng: torch.Generator) -> None:
    """Mutates the pool inside a graph, with and without the options of the full op."""

    def step(
        q: Tensor, k: Tensor, v: Tensor, requests: Tensor, positions: Tensor, pool: Tensor,
        indices: Tensor, indptr: Tensor, weight: Tensor,
    ) -> Tensor:  # fmt: skip
        q = q * 2
        arguments = (requests, positions, pool, indices, indptr)
        q = ridgeline.rope_append_paged_kv_cache(
            q, k, v, *arguments, q_weight=weight, k_weight=weight, q_out=q if in_place else None
        )
        return ridgeline.rope_append_paged_kv_cache(q, k, v * 2, *arguments) + 1

    weight = normal((64,), torch.float32, device, rng)
    calls = []
    for tokens in (3, 8, 15):  # in pools of one size
        inputs, pool, table = call_inputs((tokens,), (4, 2), 64, torch.float32, device, rng)
        calls.append((*inputs, pool, *table, weight))
    copies = [tuple(x.clone() for x in call) for call in calls]
    if backend == "aot_eager":
        results = without_recompilation(step, copies, dynamic=[0, 1, 2, 3, 4])
    else:
        torch._dynamo.reset()
        compiled = torch.compile(step, fullgraph=True)
        results = [compiled(*call) for call in copies]
    for result, call, copy in zip(results, calls, copies, strict=True):
        torch.testing.assert_close(result, step(*call), rtol=1e-6, atol=1e-5)
        torch.testing.assert_close(copy[5], call[5], rtol=1e-6, atol=1e-5)
        assert torch.equal(copy[0], call[0])


@pytest.mark.gpu
def test_cuda_graph(rng: torch.Generator) -> None:
    """A replay sees new tokens, new places and new padding."""
    device = torch.device("cuda", 0)
    inputs, pool, table = call_inputs((5, 3), (32, 8), 128, torch.bfloat16, device, rng)
    weight = normal((128,), torch.bfloat16, device, rng)
    out = torch.empty_like(inputs[0])

    def call(*arguments: Any, q_out: Tensor) -> None:
        ridgeline.rope_append_paged_kv_cache(
            *arguments, q_weight=weight, k_weight=weight, q_out=q_out
        )

    graph = captured(lambda: call(*inputs, pool, *table, q_out=out))
    new, _, _ = call_inputs((5, 3), (32, 8), 128, torch.bfloat16, device, rng)
    new[3][2] = -1
    for old, values in zip(inputs, new, strict=True):
        old.copy_(values)
    table[0].copy_(table[0].flip(0))
    pool.zero_()
    graph.replay()
    eager_pool, eager_out = torch.zeros_like(pool), torch.empty_like(out)
    call(*new, eager_pool, *table, q_out=eager_out)
    assert torch.equal(out, eager_out)
    assert torch.equal(pool, eager_pool)


@pytest.mark.gpu
def test_second_device(second_device: torch.device, rng: torch.Generator) -> None:
    check(second_device, rng, Case(norm=torch.float16))
    assert torch.cuda.current_device() == 0


def ones(*shape: int, dtype: torch.dtype = torch.float16) -> Callable[[Any], Tensor]:
    return lambda device: torch.ones(shape, dtype=dtype, device=device)


def good(device: torch.device) -> dict[str, Any]:
    return {
        "q": ones(3, 4, 64)(device),
        "k": ones(3, 2, 64)(device),
        "v": ones(3, 2, 64)(device),
        "batch_indices": ones(3, dtype=torch.int32)(device) - 1,
        "positions": torch.arange(3, device=device),
        "paged_kv_cache": ones(2, 2, 16, 2, 64)(device),
        "kv_indices": torch.arange(2, device=device).int(),
        "kv_indptr": torch.tensor([0, 2], dtype=torch.int32, device=device),
    }


def fp8_cache(device: Any) -> Tensor:
    return torch.zeros(2, 2, 16, 2, 64, device=device).to(torch.float8_e4m3fn)


def weights(**changes: Any) -> dict[str, Any]:
    return {"q_weight": ones(64), "k_weight": ones(64), **changes}


WRONG = (
    Wrong("q's dtype", {"q": ones(3, 4, 64, dtype=torch.int32)}, r"'q'.*float16.*int32"),
    Wrong("q's rank", {"q": ones(3, 256)}, r"'q'.*3 dimensions"),
    Wrong("q's tokens", {"q": ones(4, 4, 64)}, r"'q'.*\[3, 4, 64\].*\[4, 4, 64\]"),
    Wrong("q's head_dim", {"q": ones(3, 4, 32)}, r"'q'.*\[3, 4, 64\].*\[3, 4, 32\]"),
    Wrong("q's stride", {"q": lambda d: ones(3, 64, 4)(d).mT}, r"'q'.*stride 4"),
    Wrong("k's dtype", {"k": ones(3, 2, 64, dtype=torch.bfloat16)}, r"float16.*bfloat16|bfloat16"),
    Wrong("k's heads", {"k": ones(3, 3, 64)}, r"'k'.*\[3, 2, 64\].*\[3, 3, 64\]"),
    Wrong("v's tokens", {"v": ones(2, 2, 64)}, r"'v'.*\[3, 2, 64\].*\[2, 2, 64\]"),
    Wrong("q of another dtype", {"q": ones(3, 4, 64, dtype=torch.float32)}, r"float32.*float16"),
    Wrong("cache's dtype", {"paged_kv_cache": lambda d: fp8_cache(d).int()}, r"'k_cache'.*int32"),
    Wrong("cache's rank", {"paged_kv_cache": ones(2, 16, 2, 64)}, r"'paged_kv_cache'.*5 dim"),
    Wrong("layout", {"kv_layout": "NDH"}, r"'kv_layout'.*'NHD' or 'HND'.*'NDH'"),
    Wrong("float positions", {"positions": ones(3)}, r"'positions'.*int32.*float16"),
    Wrong("batch_indices", {"batch_indices": ones(4, dtype=torch.int32)}, r"'batch_indices'"),
    Wrong("int64 pages", {"kv_indices": ones(2, dtype=torch.int64)}, r"'kv_indices'.*int32"),
    Wrong("no indptr", {"kv_indptr": ones(0, dtype=torch.int32)}, r"'kv_indptr'.*batch_size"),
    Wrong("pos_ids' length", {"pos_ids": ones(2, dtype=torch.int32)}, r"'pos_ids'.*\[3\].*\[2\]"),
    Wrong("one weight", {"q_weight": ones(64)}, r"'k_weight'.*a tensor, as 'q_weight' is.*None"),
    Wrong("weight's shape", weights(k_weight=ones(32)), r"'k_weight'.*\[64\].*\[32\]"),
    Wrong(
        "weight's dtype", weights(q_weight=ones(64, dtype=torch.bfloat16)), r"'q_weight'.*bfloat"
    ),
    Wrong("mixed weights", weights(k_weight=ones(64, dtype=torch.float32)), r"'k_weight'.*float16"),
    Wrong("eps", weights(norm_eps=-1.0), r"'norm_eps'.*>= 0.*-1"),
    Wrong("rotary_dim of 0", {"rotary_dim": 0}, r"'rotary_dim'.*even"),
    Wrong("odd rotary_dim", {"rotary_dim": 33}, r"'rotary_dim'.*even.*33"),
    Wrong("rotary_dim over head_dim", {"rotary_dim": 66}, r"'rotary_dim'.*\(64\).*66"),
    Wrong("rope_scale", {"rope_scale": 0.0}, r"'rope_scale'.*> 0"),
    Wrong("rope_theta", {"rope_theta": float("nan")}, r"'rope_theta'.*finite"),
    Wrong("no context", {"old_context_len": 0}, r"'old_context_len'.*> 0"),
    Wrong(
        "high below low",
        {"old_context_len": 8192, "high_freq_factor": 0.5},
        r"'high_freq_factor'.*above low_freq_factor",
    ),
    Wrong("half table", {"cos_sin_cache": ones(9, 64)}, r"'cos_sin_cache'.*float32.*float16"),
    Wrong(
        "table's width",
        {"cos_sin_cache": ones(9, 32, dtype=torch.float32), "rotary_dim": 64},
        r"'cos_sin_cache'.*\[9, 64\].*\[9, 32\]",
    ),
    Wrong(
        "table and theta",
        {"cos_sin_cache": ones(9, 64, dtype=torch.float32), "rope_theta": 5e5},
        r"'cos_sin_cache'.*None where rope_scale",
    ),
    Wrong("scale without cast", {"k_scale": 0.5}, r"'k_scale'.*None or 1.*0.5"),
    Wrong("scale of 0", {"v_scale": 0.0, "paged_kv_cache": fp8_cache}, r"'v_scale'.*> 0"),
    Wrong(
        "scale's shape",
        {"k_scale": ones(3, dtype=torch.float32), "paged_kv_cache": fp8_cache},
        r"'k_scale'.*2 heads.*\[3\]",
    ),
    Wrong("q_out's shape", {"q_out": ones(3, 4, 32)}, r"'q_out'.*\[3, 4, 64\].*\[3, 4, 32\]"),
    Wrong("q_out's dtype", {"q_out": ones(3, 4, 64, dtype=torch.float32)}, r"'q_out'.*float16"),
    Wrong(
        "expanded q_out", {"q_out": lambda d: ones(1, 4, 64)(d).expand(3, 4, 64)}, r"'q_out'.*dis"
    ),
)


@pytest.mark.parametrize("wrong", WRONG, ids=lambda wrong: wrong.name)
def test_wrong(device: torch.device, wrong: Wrong) -> None:
    assert_raises(wrong, ridgeline.rope_append_paged_kv_cache, good(device), device)


def test_large_heads_are_refused(device: torch.device) -> None:
    arguments = good(device)
    arguments |= {"q": ones(3, 4, 264)(device), "k": ones(3, 2, 264)(device)}
    arguments |= {"v": arguments["k"].clone(), "paged_kv_cache": ones(2, 2, 16, 2, 264)(device)}
    with pytest.raises((ValueError, RuntimeError), match=r"'q'.*at most 256.*264"):
        ridgeline.rope_append_paged_kv_cache(**arguments)


def test_overlap(device: torch.device) -> None:
    for name, other in (("q_out", "k"), ("k", "paged_kv_cache"), ("q", "paged_kv_cache")):
        arguments = good(device)
        if other == "paged_kv_cache":
            cache = arguments[other]
            arguments[name] = cache.view(-1)[: arguments[name].numel()].view_as(arguments[name])
            message = "'k_cache'.*overlaps"
        else:
            arguments |= {"q": ones(3, 2, 64)(device), name: arguments[other]}
            message = "'q_out'.*overlaps 'k'"
        with pytest.raises((ValueError, RuntimeError), match=message):
            ridgeline.rope_append_paged_kv_cache(**arguments)


@pytest.mark.gpu
def test_mixed_devices() -> None:
    device = torch.device("cuda", 0)
    arguments = {**good(device), **{k: v(device) for k, v in weights().items()}}
    for name, value in arguments.items():
        said = "k_cache" if name == "paged_kv_cache" else name
        wrong = Wrong(name, {name: value.cpu()}, rf"'{said}'.*(cuda|CUDA).*cpu")
        assert_raises(wrong, ridgeline.rope_append_paged_kv_cache, arguments, device)


def test_gradients_are_refused(device: torch.device) -> None:
    arguments = {**good(device), **{k: v(device) for k, v in weights().items()}}
    names = list(arguments)
    assert_refuses_grad(
        lambda *tensors: ridgeline.rope_append_paged_kv_cache(
            **dict(zip(names, tensors, strict=True))
        ),
        list(arguments.values()),
    )
