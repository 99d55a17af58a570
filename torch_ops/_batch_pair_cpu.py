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
    HND,
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


def _is_single(qo_indptr: Tensor | None, kv_indptr: Tensor | None, kv_lens: Tensor | None) -> bool:
    return qo_indptr is None and kv_indptr is None and kv_lens is None


class _Operands(NamedTuple):
    """A segment's arguments of the op."""

    op: str
    q: Tensor
    k: Tensor
    v: Tensor
    kv_indices: Tensor | None
    qo_indptr: Tensor | None
    kv_indptr: Tensor | None
    kv_lens: Tensor | None
    flags: int
    max_q_len: int
    window_left: int

    def check(self) -> tuple[_Segment, _Operands]:
        """Check what shapes, dtypes and devices tell; stacked keys and values come back apart."""
        k, v = _check_inputs(
            self.op, self.q, self.k, self.v, self.kv_indices, None, self.qo_indptr, self.flags,
            self.max_q_len, self.window_left, None, self.kv_indptr, self.kv_lens,
        )  # fmt: skip
        num_tokens, num_qo_heads, head_dim_qk = self.q.shape
        num_kv_heads, page_size = _heads_and_page(k, self.kv_indices is not None, self.flags)
        batch_size = num_tokens if self.qo_indptr is None else self.qo_indptr.shape[0] - 1
        heads, head_dims = (num_qo_heads, num_kv_heads), (head_dim_qk, v.shape[-1])
        segment = _Segment(self.op, batch_size, num_tokens, heads, head_dims, self.flags, page_size)
        return segment, self._replace(k=k, v=v)


class _Arguments(NamedTuple):
    """Arguments of the op, in its order."""

    q_a: Tensor
    k_a: Tensor
    v_a: Tensor
    kv_indices_a: Tensor | None
    qo_indptr_a: Tensor | None
    kv_indptr_a: Tensor | None
    kv_lens_a: Tensor | None
    q_b: Tensor
    k_b: Tensor
    v_b: Tensor
    kv_indices_b: Tensor | None
    qo_indptr_b: Tensor | None
    kv_indptr_b: Tensor | None
    kv_lens_b: Tensor | None
    schedule: Tensor | None = None
    flags_a: int = 0
    flags_b: int = 0
    max_q_len_a: int = -1
    max_q_len_b: int = -1
    window_left_a: int = -1
    window_left_b: int = -1
    sm_scale: float | None = None
    logits_soft_cap: float = 0.0

    @property
    def is_single(self) -> bool:
        """Whether segment a is one request with all queries and keys."""
        return self.kv_indices_a is None and _is_single(
            self.qo_indptr_a, self.kv_indptr_a, self.kv_lens_a
        )

    def segments(self) -> tuple[_Operands, _Operands]:
        """Both segments, a single request as a batch of one whose index has no contents yet."""
        qo_indptr, kv_indptr = self.qo_indptr_a, self.kv_indptr_a
        if self.is_single:
            qo_indptr = kv_indptr = self.q_a.new_empty((2,), dtype=torch.int32)
        a = _Operands(
            f"{_OP}, segment a", self.q_a, self.k_a, self.v_a, self.kv_indices_a, qo_indptr,
            kv_indptr, self.kv_lens_a, self.flags_a, self.max_q_len_a, self.window_left_a,
        )  # fmt: skip
        b = _Operands(
            f"{_OP}, segment b", self.q_b, self.k_b, self.v_b, self.kv_indices_b,
            self.qo_indptr_b, self.kv_indptr_b, self.kv_lens_b, self.flags_b, self.max_q_len_b,
            self.window_left_b,
        )  # fmt: skip
        return a, b

    def check(self) -> tuple[_Operands, _Operands]:
        """Check what shapes, dtypes and devices tell; returns both segments."""
        a, b = self.segments()
        if b.kv_indices is None:
            way_out = "Pass the batch with another cache as segment a."
            expected = "a tensor: the keys of segment b are paged"
            _check.fail(b.op, "kv_indices", expected, "None", way_out)
        of_a, a = a.check()
        of_b, b = b.check()
        _check.same_device(b.op, "q", b.q, "q_a", a.q)
        _check.same_dtype(b.op, "q", b.q, "q_a", a.q)
        length = _check_pair(of_a, of_b)
        if self.schedule is not None:
            _check.same_device(_OP, "schedule", self.schedule, "q_a", a.q)
            _check.dtype(_OP, "schedule", self.schedule, (torch.int32,))
            meaning = "the work list of these shapes, heads, masks and page sizes"
            _check.shape(_OP, "schedule", self.schedule, (length,), meaning)
        return a, b


@fake_impl(_OP)
def _attention_pair_fake(*arguments: Any, **named: Any) -> tuple[Tensor, Tensor]:
    a, b = _Arguments(*arguments, **named).check()
    rows = (a.q.shape[0] + b.q.shape[0], a.q.shape[1])
    return a.q.new_empty((*rows, a.v.shape[-1])), a.q.new_empty(rows, dtype=torch.float32)


@cpu_impl(_OP)
def _attention_pair_cpu(*arguments: Any) -> tuple[Tensor, Tensor]:
    given = _Arguments(*arguments)
    cap, scale = given.logits_soft_cap, given.sm_scale
    results = []
    a, b = given.check()
    if given.is_single:
        num_keys = a.k.shape[-2 if a.flags & HND else 0]
        a = a._replace(
            qo_indptr=torch.tensor([0, len(a.q)], dtype=torch.int32),
            kv_indptr=torch.tensor([0, num_keys], dtype=torch.int32),
        )
    for of in (a, b):
        check_values(_OP, of.window_left, cap, 1.0, 1e4)
        result = _attend_batch(
            of.q, of.k, of.v, of.qo_indptr, of.kv_indptr, of.kv_indices, of.kv_lens, of.flags,
            of.max_q_len, of.window_left, cap,
            of.q.shape[-1] ** -0.5 if scale is None else scale, None,
        )  # fmt: skip
        results.append(result)
    (out_a, lse_a), (out_b, lse_b) = results
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
    if _is_single(qo_indptr_a, kv_indptr_a, kv_lens_a):
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
