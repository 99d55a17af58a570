"""Rotary embedding on the CPU: checks, angles in float64 and the rotation; the fakes."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from . import _check, _overlap, _paged
from ._ops import cpu_impl, fake_impl

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
MAX_ROTARY_DIM = 512  # kRopeMaxPairs of kernels/rope/params.h, twice
CosSin = tuple[Tensor, Tensor]  # [nnz, 1, rotary_dim / 2] each, float32


@dataclass(frozen=True)
class Angles:
    """Where angles come from but for positions; without old_context_len nothing is mixed."""

    rope_scale: float = 1.0
    rope_theta: float = 1e4
    low_freq_factor: float = 0.0
    high_freq_factor: float = 0.0
    old_context_len: float = 0.0
    is_llama31: bool = False

    def check(self, op: str) -> None:
        for name in ("rope_scale", "rope_theta"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value > 0):
                way_out = "Leave it out for the default."
                _check.fail(op, name, "a finite number > 0", value, way_out)
        if not self.is_llama31:
            return
        low, high, length = self.low_freq_factor, self.high_freq_factor, self.old_context_len
        if not (math.isfinite(length) and length > 0):
            way_out = "It is the context that the model was first trained on."
            _check.fail(op, "old_context_len", "a finite number > 0", length, way_out)
        if not (math.isfinite(low) and low >= 0):
            _check.fail(op, "low_freq_factor", "a finite number >= 0", low, "Llama 3.1 has 1.")
        if not (math.isfinite(high) and high > low):
            expected = f"a finite number above low_freq_factor ({low})"
            _check.fail(op, "high_freq_factor", expected, high, "Llama 3.1 has 4.")

    def cos_sin(self, positions: Tensor, rotary_dim: int) -> CosSin:
        """Why float64: a float32 frequency is off by 6e-8 of itself, 0.06 radians at 1,000,000."""
        exponents = torch.arange(0, rotary_dim, 2, dtype=torch.float64) / rotary_dim
        theta = torch.tensor(self.rope_theta, dtype=torch.float64)
        frequencies = torch.pow(theta, -exponents)
        divided = frequencies / self.rope_scale
        if self.is_llama31:
            turns = frequencies * self.old_context_len / (2 * math.pi)
            low, high = self.low_freq_factor, self.high_freq_factor
            kept = ((turns - low) / (high - low)).clamp(0, 1)
            frequencies = (1 - kept) * divided + kept * frequencies
        else:
            frequencies = divided
        angles = positions.to(torch.float64)[:, None, None] * frequencies
        return angles.cos().float(), angles.sin().float()


def check_rotary_dim(op: str, rotary_dim: int, head_dim: int, limit: int = MAX_ROTARY_DIM) -> None:
    if rotary_dim % 2 != 0 or not 0 < rotary_dim <= min(head_dim, limit):
        expected = f"an even number from 2 to head_dim ({head_dim}) and at most {limit}"
        way_out = "Leave it out to rotate whole heads."
        _check.fail(op, "rotary_dim", expected, rotary_dim, way_out)


def check_heads(op: str, q: Tensor, k: Tensor) -> None:
    """Queries and keys of rank 3."""
    _check.dtype(op, "q", q, DTYPES)
    _check.same_device(op, "k", k, "q", q)
    _check.same_dtype(op, "k", k, "q", q)
    _check.rank(op, "q", q, 3)
    _check.last_stride(op, "q", q)
    _check.rank(op, "k", k, 3)
    expected = (q.shape[0], k.shape[1], q.shape[2])
    _check.shape(op, "k", k, expected, "[nnz, num_k_heads, head_dim], as q's")
    _check.last_stride(op, "k", k)


def check_positions(op: str, arg: str, positions: Tensor, as_arg: str, other: Tensor) -> None:
    nnz = other.shape[0]
    _paged.check_indices(op, arg, positions, nnz, "[nnz]", as_arg, other)


def positions_in_requests(op: str, indptr: Tensor, offsets: Tensor, q: Tensor) -> Tensor:
    """Checks both; [nnz] int64, 0 for a token of no request."""
    batch_size = _paged.check_indptr(op, "indptr", indptr, "q", q)
    _paged.check_indices(op, "offsets", offsets, batch_size, "[batch_size]", "q", q)
    tokens = torch.arange(q.shape[0])
    if batch_size == 0:
        return torch.zeros_like(tokens)
    bounds = indptr.long()
    ends = torch.searchsorted(bounds, tokens, right=True)
    requests = (ends - 1).clamp(0, batch_size - 1)
    positions = offsets.long()[requests] + tokens - bounds[requests]
    return positions.where((ends > 0) & (ends <= batch_size), 0)


def check_cache(op: str, cache: Tensor, as_arg: str, other: Tensor) -> None:
    """A table of cosines and sines; no position is fine for no token."""
    arg = "cos_sin_cache"
    _check.same_device(op, arg, cache, as_arg, other)
    _check.dtype(op, arg, cache, (torch.float32,))
    _check.rank(op, arg, cache, 2)
    _check.last_stride(op, arg, cache)
    if cache.shape[0] == 0 and other.shape[0] > 0:
        way_out = "Make it as long as the longest context."
        _check.fail(op, arg, "at least 1 position", list(cache.shape), way_out)


def looked_up(cache: Tensor, positions: Tensor) -> CosSin:
    """A position outside the table is taken as the nearest inside."""
    last = max(cache.shape[0] - 1, 0)
    cos, sin = cache[positions.long().clamp(0, last)][:, None].chunk(2, dim=-1)
    return cos, sin


def rotated(x: Tensor, cos_sin: CosSin, rotary_dim: int, interleave: bool) -> Tensor:
    """[nnz, num_heads, head_dim] in float32, all but the first rotary_dim elements as they are."""
    result = x.float().clone()
    cos, sin = cos_sin
    if interleave:
        first, second = result[..., 0:rotary_dim:2], result[..., 1:rotary_dim:2]
    else:
        first, second = result[..., : rotary_dim // 2], result[..., rotary_dim // 2 : rotary_dim]
    a, b = first * cos - second * sin, second * cos + first * sin
    first.copy_(a)
    second.copy_(b)
    return result


def _register(name: str, by_request: bool, is_llama31: bool) -> None:
    """Registers the CPU implementations and fakes of an op and of its form in place.

    Their arguments after q and k: indptr and offsets or pos_ids, then rope_theta, rotary_dim,
    interleave, rope_scale and the scaling of Llama 3.1; those with a default may be missing.
    """
    num_sources = 2 if by_request else 1
    defaults = (5e5, -1, False, 8.0, 1.0, 4.0, 8192.0) if is_llama31 else (1e4, -1, False, 1.0)

    def prepare(op: str, q: Tensor, k: Tensor, *rest: Any) -> Callable[[Tensor], Tensor]:
        check_heads(op, q, k)
        sources, options = rest[:num_sources], rest[num_sources:]
        if by_request:
            positions = positions_in_requests(op, sources[0], sources[1], q)
        else:
            check_positions(op, "pos_ids", sources[0], "q", q)
            positions = sources[0]
        options = (*options, *defaults[len(options) :])
        rope_theta, rotary_dim, interleave, rope_scale, *scaling = options
        if rotary_dim == -1:
            rotary_dim = q.shape[2]
        check_rotary_dim(op, rotary_dim, q.shape[2])
        angles = replace(Angles(rope_scale, rope_theta, *scaling), is_llama31=is_llama31)
        angles.check(op)
        cos_sin = angles.cos_sin(positions, rotary_dim)
        return lambda x: rotated(x, cos_sin, rotary_dim, interleave).to(x.dtype)

    def functional(q: Tensor, k: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
        turn = prepare(name, q, k, *rest)
        return turn(q).contiguous(), turn(k).contiguous()

    def in_place(q: Tensor, k: Tensor, *rest: Any) -> None:
        op = f"{name}_inplace"
        turn = prepare(op, q, k, *rest)
        _overlap.writable(op, "q", q)
        _overlap.writable(op, "k", k)
        _overlap.distinct(op, "k", k, "q", q)
        q.copy_(turn(q))
        k.copy_(turn(k))

    cpu_impl(name)(functional)
    cpu_impl(f"{name}_inplace")(in_place)
    fake_impl(name)(_fake)
    fake_impl(f"{name}_inplace")(_fake_inplace)


def _fake(q: Tensor, k: Tensor, *_: object) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape)


def _fake_inplace(*_: object) -> None:
    return None


_register("apply_rope", by_request=True, is_llama31=False)
_register("apply_rope_pos_ids", by_request=False, is_llama31=False)
_register("apply_llama31_rope", by_request=True, is_llama31=True)
_register("apply_llama31_rope_pos_ids", by_request=False, is_llama31=True)


def _prepare_table(
    op: str, positions: Tensor, query: Tensor, key: Tensor, head_size: int, cache: Tensor
) -> tuple[Tensor, Tensor, CosSin]:
    """The arguments of the ops with a table, checked; queries and keys as rank 3."""
    _check.dtype(op, "query", query, DTYPES)
    _check.same_device(op, "key", key, "query", query)
    _check.same_dtype(op, "key", key, "query", query)
    if head_size < 1:
        _check.fail(op, "head_size", "at least 1", head_size, "It is the length of one head.")
    _check.rank(op, "query", query, 2, 3)
    nnz = query.shape[0]
    heads = []
    for arg, x in (("query", query), ("key", key)):
        _check.rank(op, arg, x, 2, 3)
        if x.dim() == 3:
            expected: tuple[int, ...] = (nnz, x.shape[1], head_size)
            meaning = "[nnz, num_heads, head_size]"
        else:
            expected = (nnz, x.shape[1] // head_size * head_size)
            meaning = "[nnz, num_heads * head_size]"
        _check.shape(op, arg, x, expected, meaning)
        _check.last_stride(op, arg, x)
        heads.append(x if x.dim() == 3 else x.unflatten(1, (x.shape[1] // head_size, head_size)))
    check_cache(op, cache, "query", query)
    rotary_dim = cache.shape[1]
    if rotary_dim % 2 != 0 or not 2 <= rotary_dim <= min(head_size, MAX_ROTARY_DIM):
        expected_cache = (
            "shape [max_position, rotary_dim] with an even rotary_dim from 2 to head_size "
            f"({head_size}) and at most {MAX_ROTARY_DIM}"
        )
        way_out = "A row is rotary_dim / 2 cosines, then as many sines."
        _check.fail(op, "cos_sin_cache", expected_cache, list(cache.shape), way_out)
    check_positions(op, "positions", positions, "query", query)
    return heads[0], heads[1], looked_up(cache, positions)


@cpu_impl("apply_rope_with_cos_sin_cache")
def _table_cpu(
    positions: Tensor,
    query: Tensor,
    key: Tensor,
    head_size: int,
    cos_sin_cache: Tensor,
    is_neox: bool = True,
) -> tuple[Tensor, Tensor]:
    op = "apply_rope_with_cos_sin_cache"
    q, k, cos_sin = _prepare_table(op, positions, query, key, head_size, cos_sin_cache)
    rotary_dim, dtype = cos_sin_cache.shape[1], query.dtype
    q, k = (rotated(x, cos_sin, rotary_dim, not is_neox).to(dtype) for x in (q, k))
    return q.reshape(query.shape).contiguous(), k.reshape(key.shape).contiguous()


@cpu_impl("apply_rope_with_cos_sin_cache_inplace")
def _table_inplace_cpu(
    positions: Tensor,
    query: Tensor,
    key: Tensor,
    head_size: int,
    cos_sin_cache: Tensor,
    is_neox: bool = True,
) -> None:
    op = "apply_rope_with_cos_sin_cache_inplace"
    q, k, cos_sin = _prepare_table(op, positions, query, key, head_size, cos_sin_cache)
    _overlap.writable(op, "query", query)
    _overlap.writable(op, "key", key)
    _overlap.distinct(op, "key", key, "query", query)
    for x in (q, k):
        x.copy_(rotated(x, cos_sin, cos_sin_cache.shape[1], not is_neox))


@fake_impl("apply_rope_with_cos_sin_cache")
def _table_fake(_: Tensor, query: Tensor, key: Tensor, *__: object) -> tuple[Tensor, Tensor]:
    return query.new_empty(query.shape), key.new_empty(key.shape)


@fake_impl("apply_rope_with_cos_sin_cache_inplace")
def _table_inplace_fake(*_: object) -> None:
    return None
