"""Attention over a batch of requests of any lengths: `attention` and `schedule`.

The CUDA side is csrc/ops/batch_attention.cpp and kernels/attention/; fakes and the CPU side are in
_batch_attention_cpu.py.
"""

from __future__ import annotations

from typing import Literal, overload

from torch import Tensor

from . import _check
from ._attention_cpu import check_values, one_of, refuse_given
from ._batch_attention_cpu import (
    BATCH_INVARIANT,
    CAUSAL,
    HND,
    LENS_ARE_TOKENS,
    validate_contents,
)
from ._batch_ops import (
    NARROW,
    PLAIN,
    PLAIN_LENGTH,
    POS_ENCODING_MODES,
    SCHEDULE,
    Cache,
    attend,
    pair,
    trimmed,
)
from ._ops import refuse_grad

__all__ = ["attention", "schedule"]


@overload
def attention(
    q: Tensor,
    kv_cache: Cache,
    *,
    qo_indptr: Tensor | None = ...,
    kv_indptr: Tensor | None = ...,
    kv_indices: Tensor | None = ...,
    kv_last_page_len: Tensor | None = ...,
    kv_lens: Tensor | None = ...,
    kv_layout: str = ...,
    causal: bool = ...,
    window_left: int = ...,
    logits_soft_cap: float | None = ...,
    sm_scale: float | None = ...,
    pos_encoding_mode: str = ...,
    rope_scale: float | None = ...,
    rope_theta: float | None = ...,
    use_fp16_qk_reduction: bool = ...,
    custom_mask: Tensor | None = ...,
    q_scale: float | Tensor | None = ...,
    k_scale: float | Tensor | None = ...,
    v_scale: float | Tensor | None = ...,
    sinks: Tensor | None = ...,
    max_q_len: int | None = ...,
    schedule: Tensor | None = ...,
    batch_invariant: bool = ...,
    validate: bool = ...,
    out: Tensor | None = ...,
    lse: Tensor | None = ...,
    return_lse: Literal[False] = ...,
    lse_base: str = ...,
    lse_layout: str = ...,
) -> Tensor: ...


@overload
def attention(
    q: Tensor,
    kv_cache: Cache,
    *,
    qo_indptr: Tensor | None = ...,
    kv_indptr: Tensor | None = ...,
    kv_indices: Tensor | None = ...,
    kv_last_page_len: Tensor | None = ...,
    kv_lens: Tensor | None = ...,
    kv_layout: str = ...,
    causal: bool = ...,
    window_left: int = ...,
    logits_soft_cap: float | None = ...,
    sm_scale: float | None = ...,
    pos_encoding_mode: str = ...,
    rope_scale: float | None = ...,
    rope_theta: float | None = ...,
    use_fp16_qk_reduction: bool = ...,
    custom_mask: Tensor | None = ...,
    q_scale: float | Tensor | None = ...,
    k_scale: float | Tensor | None = ...,
    v_scale: float | Tensor | None = ...,
    sinks: Tensor | None = ...,
    max_q_len: int | None = ...,
    schedule: Tensor | None = ...,
    batch_invariant: bool = ...,
    validate: bool = ...,
    out: Tensor | None = ...,
    lse: Tensor | None = ...,
    return_lse: Literal[True],
    lse_base: str = ...,
    lse_layout: str = ...,
) -> tuple[Tensor, Tensor]: ...


def attention(
    q: Tensor,
    kv_cache: Cache,
    *,
    qo_indptr: Tensor | None = None,
    kv_indptr: Tensor | None = None,
    kv_indices: Tensor | None = None,
    kv_last_page_len: Tensor | None = None,
    kv_lens: Tensor | None = None,
    kv_layout: str = "NHD",
    causal: bool = False,
    window_left: int = -1,
    logits_soft_cap: float | None = None,
    sm_scale: float | None = None,
    pos_encoding_mode: str = "NONE",
    rope_scale: float | None = None,
    rope_theta: float | None = None,
    use_fp16_qk_reduction: bool = False,
    custom_mask: Tensor | None = None,
    q_scale: float | Tensor | None = None,
    k_scale: float | Tensor | None = None,
    v_scale: float | Tensor | None = None,
    sinks: Tensor | None = None,
    max_q_len: int | None = None,
    schedule: Tensor | None = None,
    batch_invariant: bool = False,
    validate: bool = False,
    out: Tensor | None = None,
    lse: Tensor | None = None,
    return_lse: bool = False,
    lse_base: str = "ln",
    lse_layout: str = "NH",
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention of a batch: decode, prefill, append and any mixture of them, in one call.

    The index tensors tell the form of the cache: ``kv_indices`` that it is paged, ``kv_indptr``
    alone that it is ragged, ``kv_lens`` alone that it is padded. They are int32, live on the
    device of `q`, and only kernels read them: their contents may change between the replays of a
    CUDA graph.

    Parameters
    ----------
    q : Tensor
        Queries of all requests, ``[num_tokens, num_qo_heads, head_dim_qk]``; float16 or bfloat16,
        on the CPU also float32. Rows from ``qo_indptr[-1]`` on belong to no request.
    kv_cache : tuple of Tensor, or Tensor
        Keys and values. Paged: ``[num_pages, page_size, num_kv_heads, head_dim]`` (NHD) or
        ``[num_pages, num_kv_heads, page_size, head_dim]`` (HND), or both in one tensor with a
        dimension of 2 after the pages. Ragged: ``[nnz, num_kv_heads, head_dim]`` or
        ``[num_kv_heads, nnz, head_dim]``. Padded: ``[batch_size, max_kv_len, num_kv_heads,
        head_dim]`` or ``[batch_size, num_kv_heads, max_kv_len, head_dim]``. Views are fine.
    qo_indptr : Tensor, optional
        ``[batch_size + 1]``, where each request's queries begin. None: one query a request.
    kv_indptr : Tensor, optional
        ``[batch_size + 1]``: where each request's pages begin in `kv_indices`, or its tokens.
    kv_indices : Tensor, optional
        Page numbers, ``[kv_indptr[-1]]`` or longer.
    kv_last_page_len : Tensor, optional
        ``[batch_size]``, tokens on each request's last page.
    kv_lens : Tensor, optional
        ``[batch_size]``, tokens of each request: of a padded cache, or of a paged one instead of
        `kv_last_page_len`.
    kv_layout : {"NHD", "HND"}
        Layout of the cache.
    causal : bool
        Key j is visible to query i iff ``j <= i + kv_len - qo_len`` (bottom-right aligned).
    window_left : int
        Key j is hidden from query i if ``j < i + kv_len - qo_len - window_left``; -1 hides none.
    logits_soft_cap : float, optional
        Logits become ``cap * tanh(logits / cap)``; None or 0 leaves them.
    sm_scale : float, optional
        Factor of the logits; ``1 / sqrt(head_dim_qk)`` when None.
    pos_encoding_mode : {"NONE", "ROPE_LLAMA"}
        ROPE_LLAMA rotates queries and keys inside the kernel. "ALIBI" is not there yet.
    rope_scale, rope_theta : float, optional
        Interpolation factor (1) and base (10,000) of ROPE_LLAMA.
    use_fp16_qk_reduction : bool
        Accumulate the logits in float16; for float16 inputs only.
    custom_mask, q_scale, k_scale, v_scale, sinks : None
        Not there yet.
    max_q_len : int, optional
        Most queries of a request; longer ones are cut off. It chooses the kernel: pass 1 for
        decode when `qo_indptr` is given.
    schedule : Tensor, optional
        What `schedule` made for these shapes, lengths, heads and mask, for all layers of a step.
        None: the call makes its own. A list for another configuration is refused, or, where
        shapes cannot tell, gives NaN. On a GPU the list tells where requests begin and end, and
        `kv_indptr`, `kv_last_page_len` and `kv_lens` are not looked at.
    batch_invariant : bool
        A request's bits depend on nothing else in the batch.
    validate : bool
        Check the contents of the index tensors first, which waits for the GPU. Without it wrong
        contents give wrong results, but reads and writes stay within the tensors.
    out, lse : Tensor, optional
        Where results go; the kernel writes them itself. `out` may have any strides that are
        multiples of 16 bytes, but for the last dimension, which is dense; `lse` is contiguous
        (with `lse_layout` "HN" it is copied into). Neither overlaps another argument.
    return_lse : bool
        Also return the log-sum-exp of the logits.
    lse_base : {"ln", "log2"}
        Logarithm of the LSE.
    lse_layout : {"NH", "HN"}
        ``[num_tokens, num_qo_heads]`` or ``[num_qo_heads, num_tokens]``.

    Returns
    -------
    out : Tensor
        ``[num_tokens, num_qo_heads, head_dim_vo]``, of `q`'s dtype. Rows without a visible key, and
        rows of no request, are 0.
    lse : Tensor
        Float32, with `return_lse` only; -inf where no key is visible.

    Examples
    --------
    >>> import torch, ridgeline
    >>> q = torch.randn(3, 8, 64)                                    # requests of 1 and 2 queries
    >>> pool = torch.randn(10, 2, 16, 2, 64)                         # pages of 16 tokens
    >>> table = {"kv_indptr": [0, 1, 3], "kv_indices": [7, 2, 5], "kv_last_page_len": [9, 4]}
    >>> table = {name: torch.tensor(t, dtype=torch.int32) for name, t in table.items()}
    >>> indptr = torch.tensor([0, 1, 3], dtype=torch.int32)
    >>> ridgeline.attention(q, pool, qo_indptr=indptr, causal=True, **table).shape
    torch.Size([3, 8, 64])
    """
    op = "attention"
    k, v = pair(op, kv_cache)
    if kv_last_page_len is not None and (kv_lens is not None or kv_indices is None):
        expected = "None beside kv_lens, or without kv_indices"
        _check.fail(op, "kv_last_page_len", expected, "a tensor", "Pass one of the two.")
    # One query a request sees all keys, causal or not.
    is_causal = causal and qo_indptr is not None
    flags = _flags(
        op, kv_layout, is_causal, batch_invariant, kv_lens is not None and kv_indices is not None
    )
    lens = kv_lens if kv_last_page_len is None else kv_last_page_len
    if validate:
        validate_contents(op, q, k, qo_indptr, kv_indptr, kv_indices, lens, flags)
    cap = 0.0 if logits_soft_cap is None else logits_soft_cap
    longest = _most_queries(max_q_len, qo_indptr)
    # A list tells where requests begin and end: two tensors less cost the host half a microsecond.
    listed = schedule is not None and q.is_cuda
    lengths = (None, None) if listed else (kv_indptr, lens)
    problem = trimmed(
        kv_indices, schedule, qo_indptr, flags, longest, window_left, sm_scale, *lengths
    )
    if (
        cap == 0.0
        and pos_encoding_mode == "NONE"
        and (rope_scale is None and rope_theta is None)
        and (custom_mask is None and sinks is None)
        and (q_scale is None and k_scale is None and v_scale is None)
        and not use_fp16_qk_reduction
        and (window_left >= -1 and lse_base == "ln" and lse_layout == "NH")
    ):
        refuse_grad(op, q, k, v)
        if out is None and lse is None and not return_lse:
            call = PLAIN if len(problem) <= PLAIN_LENGTH else NARROW
            result: Tensor = call(q, k, v, *problem)
            return result
        return attend(op, (q, k, v), problem, None, out, lse, return_lse, lse_base, lse_layout)

    refuse_given(
        op, custom_mask=custom_mask, q_scale=q_scale, k_scale=k_scale, v_scale=v_scale, sinks=sinks
    )
    if pos_encoding_mode == "ALIBI":
        way_out = 'Use "NONE" or "ROPE_LLAMA".'
        _check.not_yet(op, "pos_encoding_mode", pos_encoding_mode, way_out)
    one_of(op, "pos_encoding_mode", pos_encoding_mode, tuple(POS_ENCODING_MODES))
    one_of(op, "lse_base", lse_base, ("ln", "log2"))
    one_of(op, "lse_layout", lse_layout, ("NH", "HN"))
    for name, value in (("rope_scale", rope_scale), ("rope_theta", rope_theta)):
        if value is not None and pos_encoding_mode == "NONE":
            way_out = 'Pass pos_encoding_mode="ROPE_LLAMA", or leave it out.'
            _check.fail(op, name, "None with pos_encoding_mode NONE", value, way_out)
    rope = (1.0 if rope_scale is None else rope_scale, 1e4 if rope_theta is None else rope_theta)
    check_values(op, window_left, cap, *rope)
    refuse_grad(op, q, k, v)
    options = (cap, POS_ENCODING_MODES[pos_encoding_mode], *rope, use_fp16_qk_reduction)
    return attend(op, (q, k, v), problem, options, out, lse, return_lse, lse_base, lse_layout)


def schedule(
    *,
    qo_indptr: Tensor | None = None,
    kv_indptr: Tensor | None = None,
    kv_last_page_len: Tensor | None = None,
    kv_lens: Tensor | None = None,
    page_size: int | None = None,
    num_qo_tokens: int | None = None,
    num_qo_heads: int,
    num_kv_heads: int,
    head_dim_qk: int,
    head_dim_vo: int | None = None,
    causal: bool = False,
    window_left: int = -1,
    max_q_len: int | None = None,
    batch_invariant: bool = False,
) -> Tensor:
    """Make the work list of a step, for every layer's `attention`.

    It is made on the GPU, from the lengths that the index tensors hold when it runs; under a CUDA
    graph call it inside the capture, so that each replay makes its own.

    Parameters
    ----------
    qo_indptr, kv_indptr, kv_last_page_len, kv_lens, max_q_len, batch_invariant :
        As in `attention`.
    page_size : int, optional
        Tokens of a page. None: the cache is ragged (`kv_indptr`) or padded (`kv_lens`).
    num_qo_tokens : int, optional
        Rows of ``q``; may be left out without `qo_indptr`, where it is the batch size.
    num_qo_heads, num_kv_heads, head_dim_qk, head_dim_vo : int
        Of the calls that use it; `head_dim_vo` is `head_dim_qk` when None.
    causal, window_left :
        The mask of the calls that use it.

    Returns
    -------
    Tensor
        Int32; its length follows from the arguments, not from the contents of tensors.

    Examples
    --------
    >>> import torch, ridgeline
    >>> lens = torch.tensor([5, 3], dtype=torch.int32)
    >>> heads = {"num_qo_heads": 4, "num_kv_heads": 2, "head_dim_qk": 64}
    >>> work = ridgeline.schedule(kv_lens=lens, **heads)
    >>> q, (k, v) = torch.randn(2, 4, 64), torch.randn(2, 2, 8, 2, 64)
    >>> ridgeline.attention(q, (k, v), kv_lens=lens, schedule=work).shape
    torch.Size([2, 4, 64])
    """
    op = "schedule"
    if (page_size is not None) != (
        kv_last_page_len is not None or (kv_lens is not None and kv_indptr is not None)
    ):
        expected = "a number exactly when the cache is paged"
        _check.fail(op, "page_size", expected, page_size, "Pass it with kv_last_page_len.")
    if kv_last_page_len is not None and kv_lens is not None:
        expected = "None beside kv_lens"
        _check.fail(op, "kv_last_page_len", expected, "a tensor", "Pass one of the two.")
    lens = kv_lens if kv_last_page_len is None else kv_last_page_len
    if num_qo_tokens is None:
        given = kv_indptr if kv_indptr is not None else lens
        if qo_indptr is not None or given is None:
            expected = "a number when qo_indptr is given"
            _check.fail(op, "num_qo_tokens", expected, None, "Pass q.shape[0].")
        num_qo_tokens = given.shape[0] - (1 if kv_indptr is not None else 0)
    tokens = kv_lens is not None and kv_indptr is not None
    is_causal = causal and qo_indptr is not None
    flags = _flags(op, "NHD", is_causal, batch_invariant, tokens)
    list_: Tensor = SCHEDULE(
        qo_indptr, kv_indptr, lens, flags, 1 if page_size is None else page_size,
        num_qo_tokens, num_qo_heads, num_kv_heads, head_dim_qk,
        head_dim_qk if head_dim_vo is None else head_dim_vo,
        _most_queries(max_q_len, qo_indptr), window_left,
    )  # fmt: skip
    return list_


def _most_queries(max_q_len: int | None, qo_indptr: Tensor | None) -> int:
    """`max_q_len` as the ops take it: -1 where it tells nothing."""
    if max_q_len is None or (qo_indptr is None and max_q_len > 0):
        return -1
    return max_q_len


def _flags(op: str, kv_layout: str, causal: bool, invariant: bool, lens_are_tokens: bool) -> int:
    one_of(op, "kv_layout", kv_layout, ("NHD", "HND"))
    return (
        (HND if kv_layout == "HND" else 0)
        + (CAUSAL if causal else 0)
        + (BATCH_INVARIANT if invariant else 0)
        + (LENS_ARE_TOKENS if lens_are_tokens else 0)
    )
