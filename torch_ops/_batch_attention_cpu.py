"""Fakes, checks and the CPU implementation of the batch attention ops.

The CPU runs request by request over the single-request implementation.
"""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from . import _check, _overlap
from ._attention_cpu import _DTYPES, _attend, _check_alignment, check_values, one_of, refuse_given
from ._ops import cpu_impl, fake_impl

# The argument `flags`, as csrc/ops/batch_inputs.h has it.
HND, CAUSAL, BATCH_INVARIANT, LENS_ARE_TOKENS = 1, 2, 4, 8

# The last arguments of attention_full, in order.
_LATER = (
    "custom_mask", "mask_indptr", "q_scale", "k_scale", "v_scale", "sinks", "extra_tensors",
    "extra_scalars",
)  # fmt: skip

# Of kernels/attention/batch_params.h.
_MAX_CTAS = 1024
_CUT_TILES_AT = 16 + _MAX_CTAS * 16
_CUT_TILE_WORDS = 8
_RECORD_WORDS = 12
_REQUEST_WORDS = 4
_ITEM_WORDS = 4
_INVARIANT_PIECES = 8
_MIN_TALL_TILE = 64
_TAG_SIZES = 1021


def _list_words(batch_size: int, num_tokens: int, heads: tuple[int, int], invariant: bool) -> int:
    """Words of a work list, but for `_list_config`; heads of queries, and of keys."""
    items = (
        batch_size * (_INVARIANT_PIECES if invariant else 1)
        + num_tokens * (heads[0] // heads[1]) // _MIN_TALL_TILE
    )
    cut_tiles = batch_size * heads[1] if invariant else _MAX_CTAS
    records = items * heads[1] + _MAX_CTAS
    requests_at = _CUT_TILES_AT + cut_tiles * _CUT_TILE_WORDS + records * _RECORD_WORDS
    costs_at = requests_at + batch_size * _REQUEST_WORDS + items * _ITEM_WORDS
    return costs_at + 2 * (items + 1) + batch_size + 1


def _list_config(
    heads: tuple[int, int], head_dims: tuple[int, int], flags: int, page_size: int, config: int = 0
) -> int:
    """A number that tells configurations apart, going on from `config`."""
    told = flags & (CAUSAL | BATCH_INVARIANT | LENS_ARE_TOKENS)
    for value in (*heads, *head_dims, told, page_size):
        config = (config * 31 + value) % _TAG_SIZES
    return config


def _list_length(
    batch_size: int,
    num_tokens: int,
    num_qo_heads: int,
    num_kv_heads: int,
    head_dims: tuple[int, int],
    flags: int,
    page_size: int,
) -> int:
    """Words of a work list; its remainder tells configurations apart."""
    heads = (num_qo_heads, num_kv_heads)
    words = _list_words(batch_size, num_tokens, heads, bool(flags & BATCH_INVARIANT))
    return words + _list_config(heads, head_dims, flags, page_size)


def _check_index(
    op: str, name: str, tensor: Tensor | None, as_name: str, like: Tensor, length: int | None
) -> None:
    if tensor is None:
        return
    _check.same_device(op, name, tensor, as_name, like)
    _check.dtype(op, name, tensor, (torch.int32,))
    _check.rank(op, name, tensor, 1)
    _check.last_stride(op, name, tensor)
    if length is not None:
        _check.shape(op, name, tensor, (length,), "[batch_size] or [batch_size + 1]")


def _check_length_tensors(op: str, kv_indptr: Tensor | None, kv_lens: Tensor | None) -> None:
    """Raise unless there is a tensor that tells where requests begin and end."""
    if kv_indptr is None and kv_lens is None:
        expected = "kv_indptr (ragged or paged keys) or kv_lens (padded keys)"
        way_out = "Pass the tensor that tells where each request's keys are."
        _check.fail(op, "kv_indptr", expected, "neither of them", way_out)


def _check_lengths(
    op: str,
    like: tuple[str, Tensor],
    qo_indptr: Tensor | None,
    kv_indptr: Tensor | None,
    kv_lens: Tensor | None,
    num_tokens: int,
    num_qo_heads: int,
    num_kv_heads: int,
    head_dims: tuple[int, int],
    page_size: int,
    max_q_len: int,
    window_left: int,
) -> int:
    """Check what shapes alone can tell; returns the batch size."""
    _check_index(op, "qo_indptr", qo_indptr, *like, None)
    batch_size = num_tokens if qo_indptr is None else qo_indptr.shape[0] - 1
    if batch_size < 0:
        way_out = "An empty batch has [0]."
        _check.fail(op, "qo_indptr", "batch_size + 1 elements", "none", way_out)
    _check_index(op, "kv_indptr", kv_indptr, *like, batch_size + 1)
    _check_index(op, "kv_lens", kv_lens, *like, batch_size)
    if num_qo_heads < 1 or num_kv_heads < 1 or num_qo_heads % num_kv_heads:
        expected = f"a multiple of the {num_kv_heads} heads of the keys"
        way_out = (
            "Check kv_layout: NHD is [..., tokens, heads, head_dim], HND [..., heads, tokens, "
            "head_dim]."
        )
        _check.fail(op, "num_qo_heads", expected, num_qo_heads, way_out)
    for name, head_dim in zip(("head_dim_qk", "head_dim_vo"), head_dims, strict=True):
        if head_dim % 8 or not 8 <= head_dim <= 256:
            way_out = "Pad q, k and v with zeros to the next multiple of 8."
            _check.fail(op, name, "a multiple of 8, at most 256", head_dim, way_out)
    if page_size < 1:
        way_out = "Pass the tokens that a page holds."
        _check.fail(op, "page_size", "at least 1", page_size, way_out)
    if max_q_len < -1:
        _check.fail(op, "max_q_len", "at least 0", max_q_len, "Leave it out.")
    if window_left < -1:
        _check.fail(op, "window_left", "at least -1", window_left, "-1 turns it off.")
    return batch_size


def _check_inputs(
    op: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    kv_indices: Tensor | None,
    schedule: Tensor | None = None,
    qo_indptr: Tensor | None = None,
    flags: int = 0,
    max_q_len: int = -1,
    window_left: int = -1,
    _sm_scale: float | None = None,
    kv_indptr: Tensor | None = None,
    kv_lens: Tensor | None = None,
    *_options: object,
    **_named: object,
) -> tuple[Tensor, Tensor]:
    """Check what shapes, dtypes and devices alone can tell (fakes call it as well).

    Returns keys and values; stacked ones (5 dimensions) apart.
    """
    if not 0 <= flags <= 15:
        _check.fail(op, "flags", "a sum of 1, 2, 4 and 8", flags, "Call ridgeline.attention.")
    paged = kv_indices is not None
    k, v = _half(op, "k", k, 0), _half(op, "v", v, 1)
    # A list knows where requests begin and end, so with one the rank of the keys alone tells.
    listed = schedule is not None and kv_indptr is None and kv_lens is None
    ragged = not paged and (k.dim() == 3 if listed else kv_indptr is not None)
    _check.dtype(op, "q", q, _DTYPES)
    _check.rank(op, "q", q, 3)
    for name, tensor in (("k", k), ("v", v)):
        _check.same_device(op, name, tensor, "q", q)
        _check.same_dtype(op, name, tensor, "q", q)
        _check.rank(op, name, tensor, 3 if ragged else 4)
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        _check.last_stride(op, name, tensor)
    if k.shape[-1] != q.shape[-1]:
        expected = f"head_dim {q.shape[-1]}, as in 'q'"
        _check.fail(op, "k", expected, k.shape[-1], "Pass the keys that belong to these queries.")
    if k.shape[:-1] != v.shape[:-1]:
        expected = f"the leading dimensions of 'k', {list(k.shape[:-1])}"
        _check.fail(op, "v", expected, list(v.shape[:-1]), "Pass one value for each key.")
    _check_index(op, "kv_indices", kv_indices, "q", q, None)
    if paged and not listed and (kv_indptr is None or kv_lens is None):
        name = "kv_indptr" if kv_indptr is None else "kv_last_page_len"
        way_out = "A page table is kv_indptr, kv_indices and kv_last_page_len (or kv_lens)."
        _check.fail(op, name, "a tensor, since kv_indices is one", "None", way_out)
    if ragged and kv_lens is not None:
        expected = "None for ragged keys (kv_indptr without kv_indices)"
        way_out = "Pass kv_indices for paged keys, or leave kv_indptr out for padded ones."
        _check.fail(op, "kv_lens", expected, "a tensor", way_out)
    num_kv_heads, page_size = _heads_and_page(k, paged, flags)
    head_dims = (q.shape[-1], v.shape[-1])
    if not listed:
        _check_length_tensors(op, kv_indptr, kv_lens)
    batch_size = _check_lengths(
        op, ("q", q), qo_indptr, kv_indptr, kv_lens, q.shape[0], q.shape[1], num_kv_heads,
        head_dims, page_size, max_q_len, window_left,
    )  # fmt: skip
    if not paged and not ragged and k.shape[0] != batch_size:
        way_out = "Padded keys are [batch_size, max_kv_len, ...]."
        _check.fail(op, "k", f"batch_size {batch_size} rows", k.shape[0], way_out)
    if schedule is not None:
        _check.same_device(op, "schedule", schedule, "q", q)
        _check.dtype(op, "schedule", schedule, (torch.int32,))
        expected_length = _list_length(
            batch_size, q.shape[0], q.shape[1], num_kv_heads, head_dims, flags, page_size
        )
        meaning = (
            "the work list of these shapes, heads, mask and page size; make one with "
            "ridgeline.schedule and the arguments of this call"
        )
        _check.shape(op, "schedule", schedule, (expected_length,), meaning)
    return k, v


def _half(op: str, name: str, cache: Tensor, half: int) -> Tensor:
    """Keys or values of a stacked cache, with a dimension of 2 after the first; or the tensor."""
    if cache.dim() != 5:
        return cache
    if cache.shape[1] != 2:
        expected = "a (k, v) tuple, or one tensor [num_pages, 2, ...] of 5 dimensions"
        way_out = "Pass the keys and the values as a tuple."
        _check.fail(op, name, expected, f"shape {list(cache.shape)}", way_out)
    return cache.select(1, half)


def _heads_and_page(k: Tensor, paged: bool, flags: int) -> tuple[int, int]:
    """Number of KV heads, and tokens of a page (1 where there are none)."""
    heads_dim, tokens_dim = (-3, -2) if flags & HND else (-2, -3)
    return k.shape[heads_dim], k.shape[tokens_dim] if paged else 1


@fake_impl("attention")
@fake_impl("attention_plain")
def _attention_fake(q: Tensor, k: Tensor, v: Tensor, *options: Any, **named: Any) -> Tensor:
    _, v = _check_inputs("attention", q, k, v, *options, **named)
    return q.new_empty((*q.shape[:-1], v.shape[-1]))


@fake_impl("attention_lse")
@fake_impl("attention_plain_lse")
@fake_impl("attention_full")
def _attention_full_fake(
    q: Tensor, k: Tensor, v: Tensor, *options: Any, **named: Any
) -> tuple[Tensor, Tensor]:
    _, v = _check_inputs("attention_full", q, k, v, *options, **named)
    out = q.new_empty((*q.shape[:-1], v.shape[-1]))
    return out, q.new_empty(q.shape[:-1], dtype=torch.float32)


def _check_results(op: str, out: Tensor, lse: Tensor | None, q: Tensor, v: Tensor) -> None:
    """Check results that the caller gives, as far as shapes, dtypes and devices tell."""
    _check.same_device(op, "out", out, "q", q)
    _check.same_dtype(op, "out", out, "q", q)
    meaning = "[num_tokens, num_qo_heads, head_dim_vo]"
    _check.shape(op, "out", out, (*q.shape[:2], v.shape[-1]), meaning)
    _check.last_stride(op, "out", out)
    if lse is None:
        return
    _check.same_device(op, "lse", lse, "q", q)
    _check.dtype(op, "lse", lse, (torch.float32,))
    _check.shape(op, "lse", lse, q.shape[:2], "[num_tokens, num_qo_heads]")
    if not lse.is_contiguous():
        got = f"strides {list(lse.stride())}"
        _check.fail(op, "lse", "a contiguous tensor", got, "Pass one, and copy from it.")


@fake_impl("attention_out")
def _attention_out_fake(
    out: Tensor,
    lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *options: Any,
    **named: Any,
) -> None:
    _, v = _check_inputs("attention_out", q, k, v, *options, **named)
    _check_results("attention_out", out, lse, q, v)


def _schedule_like(
    qo_indptr: Tensor | None, kv_indptr: Tensor | None, kv_lens: Tensor | None
) -> tuple[str, Tensor]:
    for name, tensor in (
        ("kv_indptr", kv_indptr), ("kv_lens", kv_lens), ("qo_indptr", qo_indptr)
    ):  # fmt: skip
        if tensor is not None:
            return name, tensor
    raise AssertionError("the dispatcher found a tensor")


def _empty_schedule(
    qo_indptr: Tensor | None,
    kv_indptr: Tensor | None,
    kv_lens: Tensor | None,
    flags: int,
    page_size: int,
    num_qo_tokens: int,
    num_qo_heads: int,
    num_kv_heads: int,
    head_dim_qk: int,
    head_dim_vo: int,
    max_q_len: int,
    window_left: int,
) -> Tensor:
    _check_length_tensors("attention_schedule", kv_indptr, kv_lens)
    like = _schedule_like(qo_indptr, kv_indptr, kv_lens)
    head_dims = (head_dim_qk, head_dim_vo)
    batch_size = _check_lengths(
        "attention_schedule", like, qo_indptr, kv_indptr, kv_lens, num_qo_tokens, num_qo_heads,
        num_kv_heads, head_dims, page_size, max_q_len, window_left,
    )  # fmt: skip
    paged = kv_indptr is not None and kv_lens is not None
    length = _list_length(
        batch_size, num_qo_tokens, num_qo_heads, num_kv_heads, head_dims, flags,
        page_size if paged else 1,
    )  # fmt: skip
    return like[1].new_empty((length,), dtype=torch.int32)


@fake_impl("attention_schedule")
def _attention_schedule_fake(*arguments: object, **_named: object) -> Tensor:
    return _empty_schedule(*arguments)  # type: ignore[arg-type]


@cpu_impl("attention_schedule")
def _attention_schedule_cpu(*arguments: object) -> Tensor:
    return _empty_schedule(*arguments).zero_()  # type: ignore[arg-type]


def _clamped(value: int, low: int, high: int) -> int:
    return max(low, min(value, high))


def _request_keys(
    cache: Tensor,
    request: int,
    kv_indptr: Tensor | None,
    kv_indices: Tensor | None,
    kv_lens: Tensor | None,
    flags: int,
) -> Tensor:
    """Keys (or values) of a request as ``[num_kv_heads, kv_len, head_dim]``."""
    hnd = bool(flags & HND)
    if kv_indptr is None:
        assert kv_lens is not None
        rows = cache[request] if hnd else cache[request].transpose(0, 1)
        return rows[:, : _clamped(int(kv_lens[request]), 0, rows.shape[1])]
    begin, end = int(kv_indptr[request]), int(kv_indptr[request + 1])
    if kv_indices is None:
        rows = cache if hnd else cache.transpose(0, 1)
        begin = _clamped(begin, 0, rows.shape[1])
        return rows[:, begin : _clamped(end, begin, rows.shape[1])]
    assert kv_lens is not None
    num_pages = cache.shape[0]
    page_size = cache.shape[2 if hnd else 1]
    begin = _clamped(begin, 0, kv_indices.shape[0])
    available = (kv_indices.shape[0] - begin) * page_size if num_pages else 0
    given = int(kv_lens[request])
    if flags & LENS_ARE_TOKENS:
        kv_len = given
    else:
        kv_len = (end - begin - 1) * page_size + _clamped(given, 0, page_size)
        kv_len = kv_len if end > begin else 0
    kv_len = _clamped(kv_len, 0, available)
    pages = kv_indices[begin : begin + -(-kv_len // page_size)].long()
    # A negative number, as the kernels see it, is a large one.
    pages = torch.where(pages < 0, num_pages - 1, pages.clamp_max(num_pages - 1))
    rows = cache[pages] if not hnd else cache[pages].transpose(1, 2)
    return rows.reshape(-1, *rows.shape[2:])[:kv_len].transpose(0, 1)


def _attend_batch(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    qo_indptr: Tensor | None,
    kv_indptr: Tensor | None,
    kv_indices: Tensor | None,
    kv_lens: Tensor | None,
    flags: int,
    max_q_len: int,
    window_left: int,
    logits_soft_cap: float,
    sm_scale: float,
    rope: tuple[float, float] | None,
) -> tuple[Tensor, Tensor]:
    out = q.new_zeros((*q.shape[:-1], v.shape[-1]))
    lse = q.new_full(q.shape[:-1], -math.inf, dtype=torch.float32)
    num_tokens = q.shape[0]
    indptr = list(range(num_tokens + 1)) if qo_indptr is None else qo_indptr.tolist()
    for request in range(len(indptr) - 1):
        begin = _clamped(indptr[request], 0, num_tokens)
        end = _clamped(indptr[request + 1], begin, num_tokens)
        if max_q_len >= 0:
            end = min(end, begin + max_q_len)
        if begin == end:
            continue
        keys, values = (
            _request_keys(cache, request, kv_indptr, kv_indices, kv_lens, flags) for cache in (k, v)
        )
        out[begin:end], lse[begin:end] = _attend(
            q[begin:end], keys, values, 1, bool(flags & CAUSAL), window_left, logits_soft_cap,
            sm_scale, rope,
        )  # fmt: skip
    return out, lse


@cpu_impl("attention")
@cpu_impl("attention_plain")
def _attention_cpu(q: Tensor, k: Tensor, v: Tensor, *options: Any) -> Tensor:
    return _attend_checked("attention", q, k, v, *options)[0]


@cpu_impl("attention_lse")
@cpu_impl("attention_plain_lse")
def _attention_lse_cpu(q: Tensor, k: Tensor, v: Tensor, *options: Any) -> tuple[Tensor, Tensor]:
    return _attend_checked("attention_lse", q, k, v, *options)


@fake_impl("attention_prepare")
@cpu_impl("attention_prepare")
def _attention_prepare(*_: Any, **__: Any) -> int:
    """Only a GPU is worth it."""
    return 0


@fake_impl("attention_prepared")
@cpu_impl("attention_prepared")
def _attention_prepared(*_: Any) -> None:
    return None


@fake_impl("attention_prepared_lse")
@cpu_impl("attention_prepared_lse")
def _attention_prepared_lse(*_: Any) -> tuple[None, None]:
    return None, None


@cpu_impl("attention_full")
def _attention_full_cpu(q: Tensor, k: Tensor, v: Tensor, *options: Any) -> tuple[Tensor, Tensor]:
    return _attend_checked("attention_full", q, k, v, *options)


@cpu_impl("attention_out")
def _attention_out_cpu(
    out: Tensor, lse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, *options: Any
) -> None:
    op = "attention_out"
    keys, values = _check_inputs(op, q, k, v, *options)
    _check_results(op, out, lse, q, values)
    _check_alignment(op, out=out)
    for name, result in (("out", out), ("lse", lse)):
        if result is not None:
            _overlap.writable(op, name, result)
            for as_name, other in (("q", q), ("k", keys), ("v", values)):
                _overlap.distinct(op, name, result, as_name, other)
    if lse is not None:
        _overlap.distinct(op, "lse", lse, "out", out)
    result, logs = _attend_checked(op, q, k, v, *options)
    out.copy_(result)
    if lse is not None:
        lse.copy_(logs)


def _attend_checked(
    op: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    kv_indices: Tensor | None,
    schedule: Tensor | None = None,
    qo_indptr: Tensor | None = None,
    flags: int = 0,
    max_q_len: int = -1,
    window_left: int = -1,
    sm_scale: float | None = None,
    kv_indptr: Tensor | None = None,
    kv_lens: Tensor | None = None,
    logits_soft_cap: float = 0.0,
    pos_encoding_mode: int = 0,
    rope_scale: float = 1.0,
    rope_theta: float = 1e4,
    use_fp16_qk_reduction: bool = False,
    *later: object,
) -> tuple[Tensor, Tensor]:
    """Check the arguments of any of the ops and compute its results."""
    refuse_given(op, **dict(zip(_LATER, later, strict=False)))
    k, v = _check_inputs(
        op, q, k, v, kv_indices, schedule, qo_indptr, flags, max_q_len, window_left, sm_scale,
        kv_indptr, kv_lens,
    )  # fmt: skip
    # The CPU makes no list, so it needs what a list would know.
    _check_length_tensors(op, kv_indptr, kv_lens)
    check_values(op, window_left, logits_soft_cap, rope_scale, rope_theta)
    if pos_encoding_mode == 2:
        _check.not_yet(op, "pos_encoding_mode", "2 (ALIBI)", "Pass 0 (NONE) or 1 (ROPE_LLAMA).")
    one_of(op, "pos_encoding_mode", pos_encoding_mode, (0, 1))
    if use_fp16_qk_reduction and q.dtype != torch.float16:
        got = f"True with {str(q.dtype).removeprefix('torch.')}"
        way_out = "Leave it out, or convert q, k and v to float16."
        _check.fail(op, "use_fp16_qk_reduction", "False unless q is float16", got, way_out)
    rope = (rope_scale, rope_theta) if pos_encoding_mode == 1 else None
    scale = q.shape[-1] ** -0.5 if sm_scale is None else sm_scale
    return _attend_batch(
        q, k, v, qo_indptr, kv_indptr, kv_indices, kv_lens, flags, max_q_len, window_left,
        logits_soft_cap, scale, rope,
    )  # fmt: skip


def validate_contents(
    op: str,
    q: Tensor,
    k: Tensor,
    qo_indptr: Tensor | None,
    kv_indptr: Tensor | None,
    kv_indices: Tensor | None,
    kv_lens: Tensor | None,
    flags: int,
) -> None:
    """Raise ValueError, naming the request, where index tensors hold what they must not."""
    paged = kv_indices is not None
    page_size = _heads_and_page(k, paged, flags)[1]
    tokens_dim = -2 if flags & HND else -3
    limits = (
        ("qo_indptr", qo_indptr, q.shape[0]),
        ("kv_indptr", kv_indptr, k.shape[tokens_dim] if kv_indices is None else len(kv_indices)),
    )
    for name, indptr, limit in limits:
        if indptr is None:
            continue
        values = indptr.tolist()
        if values[0] != 0:
            _check.fail(op, name, "0 first", values[0], "Pass cumulated lengths.")
        for request, (begin, end) in enumerate(pairwise(values)):
            if end < begin:
                got = f"{begin} before {end} (request {request})"
                _check.fail(op, name, "values that do not fall", got, "Pass cumulated lengths.")
            if end > limit:
                got = f"{end} (request {request})"
                _check.fail(op, name, f"at most {limit}", got, "Pass cumulated lengths.")
    if kv_lens is None:
        return
    counts = None if kv_indptr is None else kv_indptr.diff().tolist()
    for request, length in enumerate(kv_lens.tolist()):
        if counts is None:
            low, high, name = 0, k.shape[tokens_dim], "kv_lens"
        elif flags & LENS_ARE_TOKENS:
            low, high, name = 0, counts[request] * page_size, "kv_lens"
        else:
            low, high, name = min(counts[request], 1), page_size, "kv_last_page_len"
        if not low <= length <= high and not (name == "kv_last_page_len" and low == 0):
            got = f"{length} (request {request})"
            _check.fail(op, name, f"{low} to {high}", got, "Pass the tokens that there are.")
    if kv_indices is None or kv_indptr is None:
        return
    pages = kv_indices[: int(kv_indptr[-1])]
    wrong = ((pages < 0) | (pages >= k.shape[0])).nonzero()
    if len(wrong):
        place = int(wrong[0])
        request = int((kv_indptr.cpu() <= place).sum()) - 1
        got = f"{int(pages[place])} at {place} (request {request})"
        _check.fail(op, "kv_indices", f"page numbers below {k.shape[0]}", got, "Check the table.")
