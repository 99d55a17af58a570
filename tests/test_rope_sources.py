"""Rotary embedding by requests, with the scaling of Llama 3.1 and from a table."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import hypothesis
import pytest
import ridgeline
import torch
from elementwise import (
    DTYPES,
    FLOAT32_UNIT,
    VIEWS,
    Wrong,
    assert_raises,
    assert_refuses_grad,
    captured,
    untouched_outside,
    view_of,
    without_recompilation,
)
from hypothesis import strategies as st
from rope_oracle import Angles, assert_rotated, draw, frequencies
from support import normal, poisoned_call
from torch import Tensor

LENS = ((1,), (5, 0, 0, 3, 1), (0, 0), (0, 7), (200,), tuple(i % 4 for i in range(70)))
LLAMA31 = (1.0, 4.0, 8192.0)


def requests_of(
    lens: tuple[int, ...], device: torch.device, rng: torch.Generator, last: int = 3_000_000
) -> tuple[Tensor, Tensor, Tensor]:
    """indptr, offsets and the positions of the tokens."""
    indptr = torch.tensor([0, *lens]).cumsum(0).int()
    offsets = torch.randint(0, last, (len(lens),), generator=rng).int()
    positions = [
        int(offset) + i for offset, count in zip(offsets, lens, strict=True) for i in range(count)
    ]
    return indptr.to(device), offsets.to(device), torch.tensor(positions, dtype=torch.int64)


def table_of(rotary_dim: int, length: int, rng: torch.Generator) -> Tensor:
    """Any numbers, so that a wrong row or column shows."""
    return torch.randn(length, rotary_dim, generator=rng)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("lens", LENS, ids=lambda lens: f"{len(lens)} requests, {sum(lens)} tokens")
@pytest.mark.parametrize("interleave", [False, True], ids=["half-split", "interleaved"])
def test_requests(
    device: torch.device,
    lens: tuple[int, ...],
    dtype: torch.dtype,
    interleave: bool,
    rng: torch.Generator,
) -> None:
    indptr, offsets, positions = requests_of(lens, device, rng)
    q, k, _ = draw(sum(lens), (5, 2), 64, dtype, device, rng)
    for offset in (offsets, offsets.long()):
        result = poisoned_call(
            device, ridgeline.apply_rope, q, k, indptr, offset, interleave=interleave
        )
        assert_rotated(result, (q, k), Angles.of(positions, frequencies(64, 1, 1e4)), interleave)
    ridgeline.apply_rope_inplace(q, k, indptr, offsets, interleave=interleave)
    assert torch.equal(q, result[0])
    assert torch.equal(k, result[1])


@pytest.mark.parametrize("count", [1, 2, 31, 32, 33, 64, 1000, 1088, 1089, 5000])
def test_many_requests(device: torch.device, count: int, rng: torch.Generator) -> None:
    """The same bits as with position ids, wherever a request lies in the batch."""
    lens = torch.randint(0, 3, (count,), generator=rng)
    indptr = torch.cat([torch.zeros(1, dtype=torch.int64), lens.cumsum(0)]).int()
    offsets = torch.randint(0, 2**31 - 10, (count,), generator=rng)
    positions = torch.repeat_interleave(offsets - indptr[:-1], lens) + torch.arange(lens.sum())
    q, k, _ = draw(int(lens.sum()), (1, 1), 16, torch.float16, device, rng)
    result = ridgeline.apply_rope(q, k, indptr.to(device), offsets.to(device))
    expected = ridgeline.apply_rope_pos_ids(q, k, positions.to(device))
    assert torch.equal(result[0], expected[0])
    assert torch.equal(result[1], expected[1])


@pytest.mark.parametrize("heads", [(1, 0), (1, 1), (40, 8), (3, 2)], ids=str)
@pytest.mark.parametrize("head_dim", [2, 6, 128, 256])
def test_requests_in_blocks_of_any_shape(
    device: torch.device, head_dim: int, heads: tuple[int, int], rng: torch.Generator
) -> None:
    lens = (3, 0, 250, 1, 40)
    indptr, offsets, positions = requests_of(lens, device, rng)
    q, k, _ = draw(sum(lens), heads, head_dim, torch.bfloat16, device, rng)
    result = ridgeline.apply_rope(q, k, indptr, offsets)
    expected = ridgeline.apply_rope_pos_ids(q, k, positions.to(device))
    assert torch.equal(result[0], expected[0])
    assert torch.equal(result[1], expected[1])


def test_tokens_of_no_request_stay(device: torch.device, rng: torch.Generator) -> None:
    """Padding before the first request and after the last, and a batch of none."""
    q, k, _ = draw(20, (3, 1), 32, torch.float32, device, rng)
    indptr = torch.tensor([4, 6, 15], dtype=torch.int32, device=device)
    offsets = torch.tensor([100, 7], device=device)
    positions = torch.tensor([0] * 4 + [100, 101, *range(7, 16)] + [0] * 5)
    result = poisoned_call(device, ridgeline.apply_rope, q, k, indptr, offsets)
    assert_rotated(result, (q, k), Angles.of(positions, frequencies(32, 1, 1e4)))
    none = ridgeline.apply_rope(q, k, indptr[:1], offsets[:0])
    assert torch.equal(none[0], q)
    assert torch.equal(none[1], k)


def test_garbage_indptr_is_safe(device: torch.device, rng: torch.Generator) -> None:
    q, k, _ = draw(300, (2, 1), 64, torch.float16, device, rng)
    for count in (1, 20, 500):
        indptr = torch.randint(-(2**31), 2**31, (count + 1,), generator=rng).int().to(device)
        offsets = torch.randint(-(2**63), 2**63 - 1, (count,), generator=rng).to(device)
        result = ridgeline.apply_rope(q, k, indptr, offsets)
        assert bool(result[0].isfinite().all())


@pytest.mark.parametrize("interleave", [False, True], ids=["half-split", "interleaved"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("scale", "theta", "llama31"),
    [
        (8.0, 5e5, LLAMA31),
        (32.0, 5e5, LLAMA31),
        (8.0, 1e4, (0.0, 4.0, 8192.0)),
        (0.5, 1e6, (2.0, 2.5, 300.0)),
    ],
    ids=str,
)
def test_llama31(
    device: torch.device,
    scale: float,
    theta: float,
    llama31: tuple[float, float, float],
    dtype: torch.dtype,
    interleave: bool,
    rng: torch.Generator,
) -> None:
    lens = (9, 0, 4)
    indptr, offsets, positions = requests_of(lens, device, rng)
    q, k, _ = draw(sum(lens), (4, 2), 128, dtype, device, rng)
    options = (96, interleave, scale, theta, *llama31)
    angles = Angles.of(positions, frequencies(96, scale, theta, llama31))
    calls: list[tuple[Any, Any, tuple[Tensor, ...]]] = [
        (ridgeline.apply_llama31_rope, ridgeline.apply_llama31_rope_inplace, (indptr, offsets)),
        (
            ridgeline.apply_llama31_rope_pos_ids,
            ridgeline.apply_llama31_rope_pos_ids_inplace,
            (positions.to(device),),
        ),
    ]
    for functional, in_place, where in calls:
        result = poisoned_call(device, functional, q, k, *where, *options)
        assert_rotated(result, (q, k), angles, interleave)
        q_copy, k_copy = q.clone(), k.clone()
        in_place(q_copy, k_copy, *where, *options)
        assert torch.equal(q_copy, result[0])
        assert torch.equal(k_copy, result[1])


def test_far_positions(device: torch.device, rng: torch.Generator) -> None:
    """Every function is as exact at 2^24 and beyond as at 1."""
    far = torch.tensor([2**24 - 1, 2**24, 2**24 + 1, 1_000_001, 2**31 - 1, -5], device=device)
    q, k, _ = draw(len(far), (4, 1), 128, torch.float32, device, rng)
    indptr = torch.arange(len(far) + 1, dtype=torch.int32, device=device)
    plain = Angles.of(far, frequencies(128, 1, 1e4))
    assert_rotated(ridgeline.apply_rope(q, k, indptr, far), (q, k), plain)
    assert_rotated(ridgeline.apply_rope(q, k, indptr, far.int()), (q, k), plain)
    scaled = Angles.of(far, frequencies(128, 8, 5e5, LLAMA31))
    assert_rotated(ridgeline.apply_llama31_rope(q, k, indptr, far), (q, k), scaled)
    assert_rotated(ridgeline.apply_llama31_rope_pos_ids(q, k, far.int()), (q, k), scaled)


@pytest.mark.parametrize("positions_dtype", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("is_neox", [True, False], ids=["half-split", "interleaved"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("head_size", "rotary_dim"), [(128, 128), (80, 80), (128, 32), (6, 2)])
def test_table(
    device: torch.device,
    head_size: int,
    rotary_dim: int,
    dtype: torch.dtype,
    is_neox: bool,
    positions_dtype: torch.dtype,
    rng: torch.Generator,
) -> None:
    q, k, positions = draw(11, (5, 2), head_size, dtype, device, rng, last=300)
    cache = table_of(rotary_dim, 300, rng)
    positions = positions.to(positions_dtype)
    call = ridgeline.apply_rope_with_cos_sin_cache
    table = cache.to(device)
    result = poisoned_call(device, call, positions, q, k, head_size, table, is_neox)
    assert_rotated(result, (q, k), Angles.table(positions, cache), not is_neox)
    flat = poisoned_call(
        device, call, positions, q.flatten(1), k.flatten(1), head_size, table, is_neox
    )
    for one, other in zip(flat, result, strict=True):
        assert torch.equal(one, other.flatten(1))
    in_place = ridgeline.apply_rope_with_cos_sin_cache_inplace
    in_place(positions, q, k.flatten(1), head_size, table, is_neox)
    assert torch.equal(q, result[0])
    assert torch.equal(k, result[1])


def test_table_views(device: torch.device, rng: torch.Generator) -> None:
    """A strided table; queries and keys as slices of a fused projection, in place."""
    qkv = normal((9, (6 + 2 + 2) * 64), torch.float16, device, rng)
    before = qkv.clone()
    cache = table_of(64, 50, rng)
    wide = torch.full((50, 70), float("nan"), device=device)
    wide[:, 3:67] = cache.to(device)
    positions = torch.randint(0, 50, (9,), generator=rng).to(device)
    q, k, v = qkv.split([6 * 64, 2 * 64, 2 * 64], dim=1)
    ridgeline.apply_rope_with_cos_sin_cache_inplace(positions, q, k, 64, wide[:, 3:67])
    q_before, k_before, v_before = before.split([6 * 64, 2 * 64, 2 * 64], dim=1)
    pairs = [x.unflatten(1, (-1, 64)) for x in (q, k, q_before, k_before)]
    angles = Angles.table(positions, cache)
    assert_rotated((pairs[0], pairs[1]), (pairs[2], pairs[3]), angles)
    assert torch.equal(v, v_before)


def test_positions_outside_the_table(device: torch.device, rng: torch.Generator) -> None:
    positions = torch.tensor([-1, 0, 49, 50, 2**40, -(2**40)], device=device)
    q, k, _ = draw(6, (2, 1), 16, torch.float32, device, rng)
    cache = table_of(16, 50, rng)
    result = ridgeline.apply_rope_with_cos_sin_cache(positions, q, k, 16, cache.to(device))
    assert_rotated(result, (q, k), Angles.table(positions.clamp(0, 49), cache))


@pytest.mark.parametrize("kind", VIEWS)
def test_views(device: torch.device, kind: str, rng: torch.Generator) -> None:
    q_values, k_values, _ = draw(11, (6, 2), 64, torch.bfloat16, device, rng)
    indptr, offsets, positions = requests_of((4, 7), device, rng)
    q, k = view_of(q_values, kind), view_of(k_values, kind)
    result = poisoned_call(device, ridgeline.apply_llama31_rope, q, k, indptr, offsets)
    angles = Angles.of(positions, frequencies(64, 8, 5e5, LLAMA31))
    assert_rotated(result, (q_values, k_values), angles)
    ridgeline.apply_llama31_rope_inplace(q, k, indptr, offsets)
    assert torch.equal(q, result[0])
    assert torch.equal(k, result[1])
    assert kind == "contiguous" or (untouched_outside(q) and untouched_outside(k))


@pytest.mark.parametrize("nnz", [0, 3])
def test_empty(device: torch.device, nnz: int) -> None:
    q = torch.ones(nnz, 0 if nnz else 4, 64, dtype=torch.float16, device=device)
    k = q[:, :1]
    numbers = torch.zeros(nnz, dtype=torch.int64, device=device)
    indptr = torch.zeros(1, dtype=torch.int32, device=device)
    assert ridgeline.apply_rope(q, k, indptr, numbers[:0])[0].shape == q.shape
    ridgeline.apply_llama31_rope_inplace(q, k.clone(), indptr, numbers[:0])
    table = torch.zeros(1 if nnz else 0, 64, device=device)
    result = ridgeline.apply_rope_with_cos_sin_cache(numbers, q, k.flatten(1), 64, table)
    assert [x.shape for x in result] == [q.shape, k.flatten(1).shape]


@pytest.mark.parametrize("rope_type", ["default", "llama3"])
def test_transformers(device: torch.device, rope_type: str, rng: torch.Generator) -> None:
    """Near positions only: theirs computes frequencies and angles in float32."""
    llama = pytest.importorskip("transformers.models.llama.modeling_llama")
    from transformers import LlamaConfig

    head_dim, theta = 128, 5e5
    parameters: dict[str, Any] = {"rope_type": rope_type, "rope_theta": theta}
    if rope_type == "llama3":
        parameters |= {
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        }
    config = LlamaConfig(
        hidden_size=4 * head_dim,
        num_attention_heads=4,
        head_dim=head_dim,
        max_position_embeddings=131072,
        rope_parameters=parameters,
        rope_theta=theta,
    )
    rotary = llama.LlamaRotaryEmbedding(config).to(device)
    q, k, pos_ids = draw(50, (4, 2), head_dim, torch.float32, device, rng, last=1000)
    cos, sin = rotary(q, pos_ids[None])
    theirs = llama.apply_rotary_pos_emb(q.transpose(0, 1)[None], k.transpose(0, 1)[None], cos, sin)
    if rope_type == "llama3":
        ours = ridgeline.apply_llama31_rope_pos_ids(q, k, pos_ids)
        frequency = frequencies(head_dim, 8.0, theta, LLAMA31)
    else:
        ours = ridgeline.apply_rope_pos_ids(q, k, pos_ids, rope_theta=theta)
        frequency = frequencies(head_dim, 1.0, theta)
    angles = pos_ids.cpu().double()[:, None, None] * frequency
    for mine, other, x in zip(ours, theirs, (q, k), strict=True):
        size = x.cpu().double().abs()
        size = size + size.roll(head_dim // 2, -1)
        bound = size * (angles.repeat(1, 1, 2) * 8 + 16) * FLOAT32_UNIT
        error = (mine - other[0].transpose(0, 1)).cpu().double().abs()
        assert bool((error <= bound).all())
    # From their table: the same numbers, so only the rotation's own roundings.
    table = torch.cat([cos[0, :, : head_dim // 2], sin[0, :, : head_dim // 2]], dim=-1)
    rows = torch.arange(50, device=device)
    looked_up = ridgeline.apply_rope_with_cos_sin_cache(rows, q, k, head_dim, table.contiguous())
    for mine, other, x in zip(looked_up, theirs, (q, k), strict=True):
        size = x.cpu().double().abs()
        bound = (size + size.roll(head_dim // 2, -1)) * 4 * FLOAT32_UNIT
        error = (mine - other[0].transpose(0, 1)).cpu().double().abs()
        assert bool((error <= bound).all())


@hypothesis.given(data=st.data())
@hypothesis.settings(max_examples=60, deadline=None)
def test_any_source(device: torch.device, data: st.DataObject) -> None:
    pick = data.draw
    dtype = pick(st.sampled_from(DTYPES), label="dtype")
    head_dim = pick(st.integers(2, 300), label="head_dim")
    rotary_dim = 2 * pick(st.integers(1, head_dim // 2), label="rotary_dim / 2")
    heads = pick(st.tuples(st.integers(0, 12), st.integers(0, 5)), label="heads")
    lens = tuple(pick(st.lists(st.integers(0, 12), max_size=40), label="lens"))
    kind = pick(st.sampled_from(VIEWS), label="view")
    interleave = pick(st.booleans(), label="interleave")
    rng = torch.Generator().manual_seed(pick(st.integers(0, 2**31), label="seed"))
    indptr, offsets, positions = requests_of(lens, device, rng)
    q_values, k_values, _ = draw(sum(lens), heads, head_dim, dtype, device, rng)
    q, k = view_of(q_values, kind), view_of(k_values, kind)
    inputs = (q_values, k_values)
    result = poisoned_call(
        device, ridgeline.apply_rope, q, k, indptr, offsets, rotary_dim, interleave, 2.0, 1e5
    )
    angles = Angles.of(positions, frequencies(rotary_dim, 2.0, 1e5))
    assert_rotated(result, inputs, angles, interleave)
    cache = table_of(rotary_dim, 20, rng)
    rows = torch.randint(0, 20, (sum(lens),), generator=rng)
    ridgeline.apply_rope_with_cos_sin_cache_inplace(
        rows.to(device), q, k, head_dim, cache.to(device), not interleave
    )
    assert_rotated((q, k), inputs, Angles.table(rows, cache), interleave)


def test_compile(device: torch.device, rng: torch.Generator) -> None:
    table = table_of(64, 100, rng).to(device)

    def step(q: Tensor, k: Tensor, indptr: Tensor, offsets: Tensor) -> tuple[Tensor, Tensor]:
        q, k = ridgeline.apply_rope(q * 2, k, indptr, offsets, rope_theta=5e5)
        ridgeline.apply_llama31_rope_inplace(q, k, indptr, offsets, 32, True)
        rows = torch.arange(q.shape[0], device=q.device)
        ridgeline.apply_rope_with_cos_sin_cache_inplace(rows, q, k, 64, table)
        return q + 1, k

    calls = []
    for n in (3, 8, 31):
        q, k, _ = draw(n, (4, 2), 64, torch.bfloat16, device, rng)
        indptr, offsets, _ = requests_of((n - 2, 2), device, rng)
        calls.append((q, k, indptr, offsets))
    results = without_recompilation(step, calls, dynamic=[0, 1])
    for result, call in zip(results, calls, strict=True):
        expected = step(*call)
        assert torch.equal(result[0], expected[0])
        assert torch.equal(result[1], expected[1])


@pytest.mark.gpu
def test_cuda_graph(rng: torch.Generator) -> None:
    """A replay sees new offsets and new bounds."""
    device = torch.device("cuda", 0)
    q, k, _ = draw(8, (32, 8), 128, torch.bfloat16, device, rng)
    indptr, offsets, _ = requests_of((3, 5), device, rng)
    graph = captured(lambda: ridgeline.apply_rope_inplace(q, k, indptr, offsets))
    new_q, new_k, _ = draw(8, (32, 8), 128, torch.bfloat16, device, rng)
    new_indptr, new_offsets, positions = requests_of((7, 1), device, rng)
    for old, new in ((q, new_q), (k, new_k), (indptr, new_indptr), (offsets, new_offsets)):
        old.copy_(new)
    graph.replay()
    assert_rotated((q, k), (new_q, new_k), Angles.of(positions, frequencies(128, 1, 1e4)))


@pytest.mark.gpu
def test_second_device(second_device: torch.device, rng: torch.Generator) -> None:
    q, k, _ = draw(8, (32, 8), 128, torch.bfloat16, second_device, rng)
    indptr, offsets, positions = requests_of((3, 5), second_device, rng)
    result = ridgeline.apply_rope(q, k, indptr, offsets)
    assert_rotated(result, (q, k), Angles.of(positions, frequencies(128, 1, 1e4)))
    assert torch.cuda.current_device() == 0


def ones(*shape: int, dtype: torch.dtype = torch.float16) -> Callable[[Any], Tensor]:
    return lambda device: torch.ones(shape, dtype=dtype, device=device)


def ints(*values: int, dtype: torch.dtype = torch.int32) -> Callable[[Any], Tensor]:
    return lambda device: torch.tensor(values, dtype=dtype, device=device)


def good(op: str, device: torch.device) -> dict[str, Any]:
    q, k = ones(3, 4, 64)(device), ones(3, 2, 64)(device)
    if "cache" in op:
        return {
            "positions": ints(0, 1, 2)(device),
            "query": q.flatten(1),
            "key": k,
            "head_size": 64,
            "cos_sin_cache": torch.ones(5, 32, device=device),
            "is_neox": True,
        }
    arguments = {"q": q, "k": k, "indptr": ints(0, 1, 3)(device), "offsets": ints(4, 0)(device)}
    if "pos_ids" in op:
        arguments = {"q": q, "k": k, "pos_ids": ints(4, 0, 1)(device)}
    arguments |= {"rotary_dim": 64, "interleave": False, "rope_scale": 8.0, "rope_theta": 1e4}
    if "llama31" in op:
        names = ("low_freq_factor", "high_freq_factor", "old_context_len")
        arguments |= dict(zip(names, LLAMA31, strict=True))
    return arguments


BY_REQUEST = ["apply_rope", "apply_rope_inplace", "apply_llama31_rope"]
BY_REQUEST += ["apply_llama31_rope_inplace"]
LLAMA31_OPS = ["apply_llama31_rope", "apply_llama31_rope_inplace"]
LLAMA31_OPS += ["apply_llama31_rope_pos_ids", "apply_llama31_rope_pos_ids_inplace"]
TABLE_OPS = ["apply_rope_with_cos_sin_cache", "apply_rope_with_cos_sin_cache_inplace"]
WRONG_REQUESTS = (
    Wrong("q's dtype", {"q": ones(3, 4, 64, dtype=torch.float64)}, r"'q'.*float16.*float64"),
    Wrong("k's tokens", {"k": ones(2, 2, 64)}, r"'k'.*\[3, 2, 64\].*\[2, 2, 64\]"),
    Wrong("int64 indptr", {"indptr": ints(0, 1, 3, dtype=torch.int64)}, r"'indptr'.*int32.*int64"),
    Wrong("indptr's rank", {"indptr": ones(1, 3, dtype=torch.int32)}, r"'indptr'.*1 dimension"),
    Wrong("no indptr", {"indptr": ints()}, r"'indptr'.*\[batch_size \+ 1\]"),
    Wrong("offsets' length", {"offsets": ints(1, 2, 3)}, r"'offsets'.*\[2\].*\[3\]"),
    Wrong("float offsets", {"offsets": ones(2)}, r"'offsets'.*int32.*int64.*float16"),
    Wrong("offsets' stride", {"offsets": lambda d: ints(1, 2, 3, 4)(d)[::2]}, r"'offsets'.*stride"),
    Wrong("odd rotary_dim", {"rotary_dim": 31}, r"'rotary_dim'.*even.*31"),
    Wrong("rope_scale of 0", {"rope_scale": 0.0}, r"'rope_scale'.*> 0"),
)
WRONG_LLAMA31 = (
    Wrong("low of -1", {"low_freq_factor": -1.0}, r"'low_freq_factor'.*>= 0"),
    Wrong("high of low", {"high_freq_factor": 1.0}, r"'high_freq_factor'.*above low_freq_factor"),
    Wrong("high of nan", {"high_freq_factor": float("nan")}, r"'high_freq_factor'.*finite"),
    Wrong("no context", {"old_context_len": 0.0}, r"'old_context_len'.*> 0"),
    Wrong("rope_theta of inf", {"rope_theta": float("inf")}, r"'rope_theta'.*finite"),
)
WRONG_TABLES = (
    Wrong("query's dtype", {"query": ones(3, 256, dtype=torch.int32)}, r"'query'.*float16.*int32"),
    Wrong("query's rank", {"query": ones(3)}, r"'query'.*2 or 3 dimensions"),
    Wrong("query's width", {"query": ones(3, 250)}, r"'query'.*\[3, 192\].*\[3, 250\]"),
    Wrong("key's head_size", {"key": ones(3, 2, 32)}, r"'key'.*\[3, 2, 64\].*\[3, 2, 32\]"),
    Wrong("key's dtype", {"key": ones(3, 2, 64, dtype=torch.float32)}, r"'key'.*float16.*float32"),
    Wrong("key's stride", {"key": lambda d: ones(3, 64, 2)(d).mT}, r"'key'.*stride 2"),
    Wrong("head_size of 0", {"head_size": 0}, r"'head_size'.*at least 1.*0"),
    Wrong("half table", {"cos_sin_cache": ones(5, 32)}, r"'cos_sin_cache'.*float32.*float16"),
    Wrong(
        "wide table",
        {"cos_sin_cache": ones(5, 66, dtype=torch.float32)},
        r"'cos_sin_cache'.*head_size \(64\).*\[5, 66\]",
    ),
    Wrong(
        "odd table",
        {"cos_sin_cache": ones(5, 31, dtype=torch.float32)},
        r"'cos_sin_cache'.*even.*\[5, 31\]",
    ),
    Wrong(
        "empty table",
        {"cos_sin_cache": ones(0, 32, dtype=torch.float32)},
        r"'cos_sin_cache'.*at least 1 position",
    ),
    Wrong("positions' length", {"positions": ints(1)}, r"'positions'.*\[3\].*\[1\]"),
    Wrong("float positions", {"positions": ones(3)}, r"'positions'.*int32.*int64.*float16"),
)
CASES = [
    *((op, wrong) for op in BY_REQUEST for wrong in WRONG_REQUESTS),
    *((op, wrong) for op in LLAMA31_OPS for wrong in WRONG_LLAMA31),
    *((op, wrong) for op in TABLE_OPS for wrong in WRONG_TABLES),
]


@pytest.mark.parametrize("layer", [ridgeline, torch.ops.ridgeline], ids=["function", "op"])
@pytest.mark.parametrize(("op", "wrong"), CASES, ids=[f"{op}: {w.name}" for op, w in CASES])
def test_wrong(device: torch.device, op: str, wrong: Wrong, layer: Any) -> None:
    assert_raises(wrong, getattr(layer, op), good(op, device), device)


@pytest.mark.parametrize("op", [*BY_REQUEST, *LLAMA31_OPS[2:], *TABLE_OPS])
@pytest.mark.parametrize("layer", [ridgeline, torch.ops.ridgeline], ids=["function", "op"])
def test_overlap_and_gradients(device: torch.device, layer: Any, op: str) -> None:
    arguments = good(op, device)
    q, k = ("query", "key") if "cache" in op else ("q", "k")
    call = getattr(layer, op)
    if op.endswith("_inplace"):
        same = {**arguments, k: arguments[q]}
        with pytest.raises((ValueError, RuntimeError), match=f"'{k}'.*overlaps '{q}'"):
            call(**same)
    names = [name for name, value in arguments.items() if isinstance(value, Tensor)]
    assert_refuses_grad(
        lambda *tensors: call(**{**arguments, **dict(zip(names, tensors, strict=True))}),
        [arguments[name] for name in names],
    )


@pytest.mark.gpu
@pytest.mark.parametrize("op", [*BY_REQUEST, *TABLE_OPS])
def test_mixed_devices(op: str) -> None:
    device = torch.device("cuda", 0)
    arguments = good(op, device)
    for name, value in arguments.items():
        if isinstance(value, Tensor):
            wrong = Wrong(name, {name: value.cpu()}, rf"'{name}'.*(cuda|CUDA).*cpu")
            assert_raises(wrong, getattr(torch.ops.ridgeline, op), arguments, device)
