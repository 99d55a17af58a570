"""Fakes, checks and the CPU implementation of `attention_pair`: two batches, one launch.

The CUDA side is csrc/ops/batch_pair.cpp. The CPU runs one segment after the other.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import _check
from ._attention_cpu import check_values
from ._batch_attention_cpu import (
    BATCH_INVARIANT,
    _attend_batch,
    _check_inputs,
    _check_length_tensors,
    _check_lengths,
    _heads_and_page,
    _list_config,
    _list_words,
)
from ._ops import cpu_impl, fake_impl

_OP = "attention_pair"
_SCHEDULE = "attention_pair_schedule"


class _Segment(NamedTuple):
    """What the list of a pair is made for, of one segment."""

    op: str
    batch_size: int
    num_tokens: int
    heads: tuple[int, int]
    head_dims: tuple[int, int]
    flags: int
    page_size: int


def _check_pair(a: _Segment, b: _Segment) -> int:
    """Check what both must have in common; returns the words of their list."""
    for of_a, of_b in zip((*a.heads, *a.head_dims), (*b.heads, *b.head_dims), strict=True):
        if of_a != of_b:
            expected = f"the heads and head dims of segment a, {of_a}"
            _check.fail(b.op, "q", expected, of_b, "Call ridgeline.attention for each.")
    for segment in (a, b):
        if segment.flags & BATCH_INVARIANT:
            way_out = "Call ridgeline.attention for each."
            _check.fail(segment.op, "flags", "no batch_invariant (4)", segment.flags, way_out)
    words = _list_words(a.batch_size + b.batch_size, a.num_tokens + b.num_tokens, a.heads, False)
    first = _list_config(a.heads, a.head_dims, a.flags, a.page_size)
    return words + _list_config(b.heads, b.head_dims, b.flags, b.page_size, first)


def _check_operands(
    op: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    kv_indices: Tensor | None,
    qo_indptr: Tensor | None,
    kv_indptr: Tensor | None,
    kv_lens: Tensor | None,
    flags: int,
    max_q_len: int,
    window_left: int,
) -> tuple[_Segment, Tensor, Tensor]:
    """Check a segment; returns it with its keys and values, stacked ones apart."""
    k, v = _check_inputs(
        op, q, k, v, kv_indices, None, qo_indptr, flags, max_q_len, window_left, None, kv_indptr,
        kv_lens,
    )  # fmt: skip
    num_kv_heads, page_size = _heads_and_page(k, kv_indices is not None, flags)
    batch_size = q.shape[0] if qo_indptr is None else qo_indptr.shape[0] - 1
    heads, head_dims = (q.shape[1], num_kv_heads), (q.shape[-1], v.shape[-1])
    return _Segment(op, batch_size, q.shape[0], heads, head_dims, flags, page_size), k, v


def _is_single(
    kv_indices: Tensor | None,
    qo_indptr: Tensor | None,
    kv_indptr: Tensor | None,
    kv_lens: Tensor | None,
) -> bool:
    """Whether a segment is one request with all queries and keys."""
    return kv_indices is None and qo_indptr is None and kv_indptr is None and kv_lens is None


def _check_arguments(
    q_a: Tensor,
    k_a: Tensor,
    v_a: Tensor,
    kv_indices_a: Tensor | None,
    qo_indptr_a: Tensor | None,
    kv_indptr_a: Tensor | None,
    kv_lens_a: Tensor | None,
    q_b: Tensor,
    k_b: Tensor,
    v_b: Tensor,
    kv_indices_b: Tensor | None,
    qo_indptr_b: Tensor | None,
    kv_indptr_b: Tensor | None,
    kv_lens_b: Tensor | None,
    schedule: Tensor | None = None,
    flags_a: int = 0,
    flags_b: int = 0,
    max_q_len_a: int = -1,
    max_q_len_b: int = -1,
    window_left_a: int = -1,
    window_left_b: int = -1,
    _sm_scale: float | None = None,
    _logits_soft_cap: float = 0.0,
) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Check what shapes, dtypes and devices tell; returns keys and values of both."""
    op_a, op_b = f"{_OP}, segment a", f"{_OP}, segment b"
    if _is_single(kv_indices_a, qo_indptr_a, kv_indptr_a, kv_lens_a):
        qo_indptr_a = kv_indptr_a = q_a.new_empty((2,), dtype=torch.int32)
    if kv_indices_b is None:
        way_out = "Pass the batch with another cache as segment a."
        expected = "a tensor: the keys of segment b are paged"
        _check.fail(op_b, "kv_indices", expected, "None", way_out)
    a, *kv_a = _check_operands(
        op_a, q_a, k_a, v_a, kv_indices_a, qo_indptr_a, kv_indptr_a, kv_lens_a, flags_a,
        max_q_len_a, window_left_a,
    )  # fmt: skip
    b, *kv_b = _check_operands(
        op_b, q_b, k_b, v_b, kv_indices_b, qo_indptr_b, kv_indptr_b, kv_lens_b, flags_b,
        max_q_len_b, window_left_b,
    )  # fmt: skip
    _check.same_device(op_b, "q", q_b, "q_a", q_a)
    _check.same_dtype(op_b, "q", q_b, "q_a", q_a)
    length = _check_pair(a, b)
    if schedule is not None:
        _check.same_device(_OP, "schedule", schedule, "q_a", q_a)
        _check.dtype(_OP, "schedule", schedule, (torch.int32,))
        meaning = "the work list of these shapes, heads, masks and page sizes"
        _check.shape(_OP, "schedule", schedule, (length,), meaning)
    return (kv_a[0], kv_a[1]), (kv_b[0], kv_b[1])


@fake_impl(_OP)
def _attention_pair_fake(*arguments: Any, **named: Any) -> tuple[Tensor, Tensor]:
    (_, v), _ = _check_arguments(*arguments, **named)
    q_a, q_b = arguments[0], arguments[7]
    rows = (q_a.shape[0] + q_b.shape[0], q_a.shape[1])
    return q_a.new_empty((*rows, v.shape[-1])), q_a.new_empty(rows, dtype=torch.float32)


@cpu_impl(_OP)
def _attention_pair_cpu(
    q_a: Tensor,
    k_a: Tensor,
    v_a: Tensor,
    kv_indices_a: Tensor | None,
    qo_indptr_a: Tensor | None,
    kv_indptr_a: Tensor | None,
    kv_lens_a: Tensor | None,
    q_b: Tensor,
    k_b: Tensor,
    v_b: Tensor,
    kv_indices_b: Tensor | None,
    qo_indptr_b: Tensor | None,
    kv_indptr_b: Tensor | None,
    kv_lens_b: Tensor | None,
    schedule: Tensor | None = None,
    flags_a: int = 0,
    flags_b: int = 0,
    max_q_len_a: int = -1,
    max_q_len_b: int = -1,
    window_left_a: int = -1,
    window_left_b: int = -1,
    sm_scale: float | None = None,
    logits_soft_cap: float = 0.0,
) -> tuple[Tensor, Tensor]:
    (k_a, v_a), (k_b, v_b) = _check_arguments(
        q_a, k_a, v_a, kv_indices_a, qo_indptr_a, kv_indptr_a, kv_lens_a, q_b, k_b, v_b,
        kv_indices_b, qo_indptr_b, kv_indptr_b, kv_lens_b, schedule, flags_a, flags_b,
        max_q_len_a, max_q_len_b, window_left_a, window_left_b,
    )  # fmt: skip
    check_values(_OP, window_left_a, logits_soft_cap, 1.0, 1e4)
    check_values(_OP, window_left_b, logits_soft_cap, 1.0, 1e4)
    if _is_single(kv_indices_a, qo_indptr_a, kv_indptr_a, kv_lens_a):
        num_keys = k_a.shape[-2] if flags_a & 1 else k_a.shape[0]
        qo_indptr_a = torch.tensor([0, q_a.shape[0]], dtype=torch.int32)
        kv_indptr_a = torch.tensor([0, num_keys], dtype=torch.int32)
    scale = q_a.shape[-1] ** -0.5 if sm_scale is None else sm_scale
    out_a, lse_a = _attend_batch(
        q_a, k_a, v_a, qo_indptr_a, kv_indptr_a, kv_indices_a, kv_lens_a, flags_a, max_q_len_a,
        window_left_a, logits_soft_cap, scale, None,
    )  # fmt: skip
    out_b, lse_b = _attend_batch(
        q_b, k_b, v_b, qo_indptr_b, kv_indptr_b, kv_indices_b, kv_lens_b, flags_b, max_q_len_b,
        window_left_b, logits_soft_cap, scale, None,
    )  # fmt: skip
    return torch.cat([out_a, out_b]), torch.cat([lse_a, lse_b])


def _empty_schedule(
    qo_indptr_a: Tensor | None,
    kv_indptr_a: Tensor | None,
    kv_lens_a: Tensor | None,
    qo_indptr_b: Tensor | None,
    kv_indptr_b: Tensor,
    kv_lens_b: Tensor,
    flags_a: int,
    flags_b: int,
    page_size_a: int,
    page_size_b: int,
    num_tokens_a: int,
    num_tokens_b: int,
    num_qo_heads: int,
    num_kv_heads: int,
    head_dim_qk: int,
    head_dim_vo: int,
    max_q_len_a: int,
    max_q_len_b: int,
    window_left_a: int,
    window_left_b: int,
    single_kv_len_a: int = 0,
) -> Tensor:
    op_a, op_b = f"{_SCHEDULE}, segment a", f"{_SCHEDULE}, segment b"
    heads, head_dims = (num_qo_heads, num_kv_heads), (head_dim_qk, head_dim_vo)
    like = ("kv_indptr", kv_indptr_b)
    if _is_single(None, qo_indptr_a, kv_indptr_a, kv_lens_a):
        qo_indptr_a = kv_indptr_a = kv_indptr_b.new_empty((2,))
        if single_kv_len_a < 0:
            way_out = "Pass the number of keys of the one request."
            _check.fail(op_a, "single_kv_len_a", "0 to 2^30 keys", single_kv_len_a, way_out)
    _check_length_tensors(op_a, kv_indptr_a, kv_lens_a)
    batch_a = _check_lengths(
        op_a, like, qo_indptr_a, kv_indptr_a, kv_lens_a, num_tokens_a, *heads, head_dims,
        page_size_a, max_q_len_a, window_left_a,
    )  # fmt: skip
    batch_b = _check_lengths(
        op_b, like, qo_indptr_b, kv_indptr_b, kv_lens_b, num_tokens_b, *heads, head_dims,
        page_size_b, max_q_len_b, window_left_b,
    )  # fmt: skip
    paged_a = kv_indptr_a is not None and kv_lens_a is not None
    length = _check_pair(
        _Segment(
            op_a, batch_a, num_tokens_a, heads, head_dims, flags_a, page_size_a if paged_a else 1
        ),
        _Segment(op_b, batch_b, num_tokens_b, heads, head_dims, flags_b, page_size_b),
    )
    return kv_indptr_b.new_empty((length,), dtype=torch.int32)


@fake_impl(_SCHEDULE)
def _attention_pair_schedule_fake(*arguments: Any, **named: Any) -> Tensor:
    return _empty_schedule(*arguments, **named)


@cpu_impl(_SCHEDULE)
def _attention_pair_schedule_cpu(*arguments: Any) -> Tensor:
    return _empty_schedule(*arguments).zero_()
