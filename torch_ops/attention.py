"""Attention over one request's dense KV cache: the public functions.

They are thin: options become the arguments of ``torch.ops.ridgeline.single_attention`` (the common
case, few arguments) or ``single_attention_full``. The CUDA side is csrc/ops/attention.cpp and
kernels/attention/; fakes and the CPU side are in _attention_cpu.py.
"""

from __future__ import annotations

import math
from typing import Literal, overload

import torch
from torch import Tensor

from . import _check
from ._attention_cpu import check_values, one_of, refuse_given
from ._ops import find_eager_op, find_op, is_compiling, is_grad_enabled, refuse_grad

__all__ = [
    "single_decode_with_kv_cache",
    "single_prefill_with_kv_cache",
    "single_prefill_with_kv_cache_return_lse",
]

_SINGLE = find_op("single_attention")
_SINGLE_EAGER = find_eager_op("single_attention")
_PLAIN = find_eager_op("single_attention_plain")
_SINGLE_FULL = find_op("single_attention_full")

_KV_LAYOUTS = {"NHD": 0, "HND": 1}
_POS_ENCODING_MODES = {"NONE": 0, "ROPE_LLAMA": 1}


@overload
def single_decode_with_kv_cache(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    kv_layout: str = ...,
    pos_encoding_mode: str = ...,
    use_tensor_cores: bool = ...,
    q_scale: float | Tensor | None = ...,
    k_scale: float | Tensor | None = ...,
    v_scale: float | Tensor | None = ...,
    window_left: int = ...,
    logits_soft_cap: float | None = ...,
    sm_scale: float | None = ...,
    rope_scale: float | None = ...,
    rope_theta: float | None = ...,
    return_lse: Literal[False] = ...,
    *,
    lse_base: str = ...,
    lse_layout: str = ...,
) -> Tensor: ...


@overload
def single_decode_with_kv_cache(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    kv_layout: str = ...,
    pos_encoding_mode: str = ...,
    use_tensor_cores: bool = ...,
    q_scale: float | Tensor | None = ...,
    k_scale: float | Tensor | None = ...,
    v_scale: float | Tensor | None = ...,
    window_left: int = ...,
    logits_soft_cap: float | None = ...,
    sm_scale: float | None = ...,
    rope_scale: float | None = ...,
    rope_theta: float | None = ...,
    *,
    return_lse: Literal[True],
    lse_base: str = ...,
    lse_layout: str = ...,
) -> tuple[Tensor, Tensor]: ...


def single_decode_with_kv_cache(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    kv_layout: str = "NHD",
    pos_encoding_mode: str = "NONE",
    use_tensor_cores: bool = False,
    q_scale: float | Tensor | None = None,
    k_scale: float | Tensor | None = None,
    v_scale: float | Tensor | None = None,
    window_left: int = -1,
    logits_soft_cap: float | None = None,
    sm_scale: float | None = None,
    rope_scale: float | None = None,
    rope_theta: float | None = None,
    return_lse: bool = False,
    *,
    lse_base: str = "ln",
    lse_layout: str = "NH",
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention of one query token over one request's KV cache.

    Parameters
    ----------
    q : Tensor
        Query, ``[num_qo_heads, head_dim_qk]``; float16 or bfloat16, on the CPU also float32.
    k, v : Tensor
        Keys and values, ``[kv_len, num_kv_heads, head_dim]`` (NHD) or
        ``[num_kv_heads, kv_len, head_dim]`` (HND); views are fine. ``num_qo_heads`` is a multiple
        of ``num_kv_heads``; head dims are multiples of 8 up to 256, and may differ (192 and 128).
    kv_layout : {"NHD", "HND"}
        Layout of `k` and `v`.
    pos_encoding_mode : {"NONE", "ROPE_LLAMA"}
        ROPE_LLAMA rotates query and keys inside the kernel; the query's position is
        ``kv_len - 1``. "ALIBI" is not there yet.
    use_tensor_cores : bool
        Accepted for compatibility; the same tensor-core kernel runs for both values.
    q_scale, k_scale, v_scale : None
        Scales of low-precision caches; not there yet.
    window_left : int
        Keys further than this many positions before the query are hidden; -1 hides none.
    logits_soft_cap : float, optional
        Logits become ``cap * tanh(logits / cap)``; None or 0 leaves them.
    sm_scale : float, optional
        Factor of the logits; ``1 / sqrt(head_dim_qk)`` when None.
    rope_scale, rope_theta : float, optional
        Interpolation factor (1) and base (10,000) of ROPE_LLAMA.
    return_lse : bool
        Also return the log-sum-exp of the logits.
    lse_base : {"ln", "log2"}
        Logarithm of the returned LSE.
    lse_layout : {"NH", "HN"}
        Without a token dimension both are ``[num_qo_heads]``.

    Returns
    -------
    out : Tensor
        ``[num_qo_heads, head_dim_vo]``, of `q`'s dtype. With an empty cache it is 0.
    lse : Tensor
        ``[num_qo_heads]``, float32; with `return_lse` only. With an empty cache it is -inf.

    Examples
    --------
    >>> import torch, ridgeline
    >>> q = torch.randn(8, 64)
    >>> k, v = torch.randn(2, 100, 2, 64)
    >>> ridgeline.single_decode_with_kv_cache(q, k, v).shape
    torch.Size([8, 64])
    """
    if q.dim() != 2:
        _check.rank("single_decode_with_kv_cache", "q", q, 2)
    cap = 0.0 if logits_soft_cap is None else logits_soft_cap
    if (
        kv_layout in _KV_LAYOUTS
        and pos_encoding_mode == "NONE"
        and (q_scale is None and k_scale is None and v_scale is None)
        and (rope_scale is None and rope_theta is None)
        and (window_left >= -1 and cap >= 0.0)
        and not return_lse
        and (lse_base == "ln" and lse_layout == "NH")
        and (use_tensor_cores is False or use_tensor_cores is True)
    ):
        if window_left != -1 or cap or sm_scale is not None or kv_layout != "NHD" or is_compiling():
            return _narrow(q, k, v, False, sm_scale, kv_layout, window_left, cap)
        # Why all of it here: calls between Python functions are a tenth of the time.
        if is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad):
            refuse_grad("single_attention", q, k, v)
        return _PLAIN(q, k, v)  # type: ignore[no-any-return]
    op = "single_decode_with_kv_cache"
    refuse_given(op, q_scale=q_scale, k_scale=k_scale, v_scale=v_scale)
    one_of(op, "use_tensor_cores", use_tensor_cores, (False, True))
    return _full(
        op, q, k, v, False, kv_layout, pos_encoding_mode, False, sm_scale, window_left, cap,
        rope_scale, rope_theta, return_lse, lse_base, lse_layout,
    )  # fmt: skip


@overload
def single_prefill_with_kv_cache(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale_q: Tensor | None = ...,
    scale_k: Tensor | None = ...,
    scale_v: Tensor | None = ...,
    o_dtype: torch.dtype | str | None = ...,
    custom_mask: Tensor | None = ...,
    packed_custom_mask: Tensor | None = ...,
    causal: bool = ...,
    kv_layout: str = ...,
    pos_encoding_mode: str = ...,
    use_fp16_qk_reduction: bool = ...,
    sm_scale: float | None = ...,
    window_left: int = ...,
    logits_soft_cap: float | None = ...,
    rope_scale: float | None = ...,
    rope_theta: float | None = ...,
    backend: str = ...,
    return_lse: Literal[False] = ...,
    *,
    k_scale: float | Tensor | None = ...,
    v_scale: float | Tensor | None = ...,
    lse_base: str = ...,
    lse_layout: str = ...,
) -> Tensor: ...


@overload
def single_prefill_with_kv_cache(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale_q: Tensor | None = ...,
    scale_k: Tensor | None = ...,
    scale_v: Tensor | None = ...,
    o_dtype: torch.dtype | str | None = ...,
    custom_mask: Tensor | None = ...,
    packed_custom_mask: Tensor | None = ...,
    causal: bool = ...,
    kv_layout: str = ...,
    pos_encoding_mode: str = ...,
    use_fp16_qk_reduction: bool = ...,
    sm_scale: float | None = ...,
    window_left: int = ...,
    logits_soft_cap: float | None = ...,
    rope_scale: float | None = ...,
    rope_theta: float | None = ...,
    backend: str = ...,
    *,
    return_lse: Literal[True],
    k_scale: float | Tensor | None = ...,
    v_scale: float | Tensor | None = ...,
    lse_base: str = ...,
    lse_layout: str = ...,
) -> tuple[Tensor, Tensor]: ...


def single_prefill_with_kv_cache(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale_q: Tensor | None = None,
    scale_k: Tensor | None = None,
    scale_v: Tensor | None = None,
    o_dtype: torch.dtype | str | None = None,
    custom_mask: Tensor | None = None,
    packed_custom_mask: Tensor | None = None,
    causal: bool = False,
    kv_layout: str = "NHD",
    pos_encoding_mode: str = "NONE",
    use_fp16_qk_reduction: bool = False,
    sm_scale: float | None = None,
    window_left: int = -1,
    logits_soft_cap: float | None = None,
    rope_scale: float | None = None,
    rope_theta: float | None = None,
    backend: str = "auto",
    return_lse: bool = False,
    *,
    k_scale: float | Tensor | None = None,
    v_scale: float | Tensor | None = None,
    lse_base: str = "ln",
    lse_layout: str = "NH",
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention of the query tokens of one request over its KV cache.

    Parameters
    ----------
    q : Tensor
        Queries, ``[qo_len, num_qo_heads, head_dim_qk]``; float16 or bfloat16, on the CPU also
        float32.
    k, v : Tensor
        Keys and values, ``[kv_len, num_kv_heads, head_dim]`` (NHD) or
        ``[num_kv_heads, kv_len, head_dim]`` (HND); views are fine. ``num_qo_heads`` is a multiple
        of ``num_kv_heads``; head dims are multiples of 8 up to 256, and may differ (192 and 128).
    scale_q, scale_k, scale_v, k_scale, v_scale : None
        Scales of low-precision inputs; not there yet.
    o_dtype : torch.dtype or str, optional
        Dtype of `out`; so far `q`'s own.
    custom_mask, packed_custom_mask : None
        Not there yet.
    causal : bool
        Key j is visible to query i iff ``j <= i + kv_len - qo_len`` (bottom-right aligned).
    kv_layout : {"NHD", "HND"}
        Layout of `k` and `v`.
    pos_encoding_mode : {"NONE", "ROPE_LLAMA"}
        ROPE_LLAMA rotates queries and keys inside the kernel: element d with element
        ``d + head_dim / 2``; query i stands at position ``i + kv_len - qo_len``. "ALIBI" is not
        there yet.
    use_fp16_qk_reduction : bool
        Accumulate the logits in float16; for float16 inputs only. The CPU accumulates in float32.
    sm_scale : float, optional
        Factor of the logits; ``1 / sqrt(head_dim_qk)`` when None.
    window_left : int
        Key j is hidden from query i if ``j < i + kv_len - qo_len - window_left``; -1 hides none.
    logits_soft_cap : float, optional
        Logits become ``cap * tanh(logits / cap)``; None or 0 leaves them.
    rope_scale, rope_theta : float, optional
        Interpolation factor (1) and base (10,000) of ROPE_LLAMA.
    backend : {"auto", "fa2"}
        "fa2" names the portable kernels, which "auto" chooses too; "fa3" is not there yet.
    return_lse : bool
        Also return the log-sum-exp of the logits.
    lse_base : {"ln", "log2"}
        Logarithm of the returned LSE.
    lse_layout : {"NH", "HN"}
        ``[qo_len, num_qo_heads]`` or ``[num_qo_heads, qo_len]``.

    Returns
    -------
    out : Tensor
        ``[qo_len, num_qo_heads, head_dim_vo]``, of `q`'s dtype. A row with no visible key is 0.
    lse : Tensor
        Float32, with `return_lse` only. A row with no visible key is -inf.

    Examples
    --------
    >>> import torch, ridgeline
    >>> q = torch.randn(16, 8, 64)
    >>> k, v = torch.randn(2, 100, 2, 64)
    >>> out, lse = ridgeline.single_prefill_with_kv_cache(q, k, v, causal=True, return_lse=True)
    >>> out.shape, lse.shape
    (torch.Size([16, 8, 64]), torch.Size([16, 8]))
    """
    if q.dim() != 3:
        _check.rank("single_prefill_with_kv_cache", "q", q, 3)
    cap = 0.0 if logits_soft_cap is None else logits_soft_cap
    if (
        kv_layout in _KV_LAYOUTS
        and pos_encoding_mode == "NONE"
        and (scale_q is None and scale_k is None and scale_v is None and o_dtype is None)
        and (k_scale is None and v_scale is None)
        and (custom_mask is None and packed_custom_mask is None)
        and (rope_scale is None and rope_theta is None)
        and (window_left >= -1 and cap >= 0.0)
        and not (return_lse or use_fp16_qk_reduction)
        and (lse_base == "ln" and lse_layout == "NH")
        and backend in ("auto", "fa2")
    ):
        if window_left != -1 or cap or sm_scale is not None or kv_layout != "NHD" or is_compiling():
            return _narrow(q, k, v, causal, sm_scale, kv_layout, window_left, cap)
        # Why all of it here: calls between Python functions are a tenth of the time.
        if is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad):
            refuse_grad("single_attention", q, k, v)
        return _PLAIN(q, k, v) if causal else _SINGLE_EAGER(q, k, v)  # type: ignore[no-any-return]
    op = "single_prefill_with_kv_cache"
    refuse_given(
        op, scale_q=scale_q, scale_k=scale_k, scale_v=scale_v, k_scale=k_scale, v_scale=v_scale,
        custom_mask=custom_mask, packed_custom_mask=packed_custom_mask,
    )  # fmt: skip
    _check_o_dtype(op, o_dtype, q.dtype)
    if backend == "fa3":
        _check.not_yet(op, "backend", backend, 'Use "auto" or "fa2".')
    one_of(op, "backend", backend, ("auto", "fa2"))
    return _full(
        op, q, k, v, causal, kv_layout, pos_encoding_mode, use_fp16_qk_reduction, sm_scale,
        window_left, cap, rope_scale, rope_theta, return_lse, lse_base, lse_layout,
    )  # fmt: skip


def single_prefill_with_kv_cache_return_lse(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale_q: Tensor | None = None,
    scale_k: Tensor | None = None,
    scale_v: Tensor | None = None,
    o_dtype: torch.dtype | str | None = None,
    custom_mask: Tensor | None = None,
    packed_custom_mask: Tensor | None = None,
    causal: bool = False,
    kv_layout: str = "NHD",
    pos_encoding_mode: str = "NONE",
    use_fp16_qk_reduction: bool = False,
    sm_scale: float | None = None,
    window_left: int = -1,
    logits_soft_cap: float | None = None,
    rope_scale: float | None = None,
    rope_theta: float | None = None,
    backend: str = "auto",
    *,
    k_scale: float | Tensor | None = None,
    v_scale: float | Tensor | None = None,
    lse_base: str = "ln",
    lse_layout: str = "NH",
) -> tuple[Tensor, Tensor]:
    """`single_prefill_with_kv_cache` with ``return_lse=True``; the other arguments are its own.

    Returns
    -------
    out : Tensor
        ``[qo_len, num_qo_heads, head_dim_vo]``, of `q`'s dtype.
    lse : Tensor
        ``[qo_len, num_qo_heads]`` (or `lse_layout` "HN"), float32.

    Examples
    --------
    >>> import torch, ridgeline
    >>> q, (k, v) = torch.randn(3, 2, 8), torch.randn(2, 5, 1, 8)
    >>> out, lse = ridgeline.single_prefill_with_kv_cache_return_lse(q, k, v, lse_layout="HN")
    >>> lse.shape
    torch.Size([2, 3])
    """
    return single_prefill_with_kv_cache(
        q, k, v, scale_q, scale_k, scale_v, o_dtype, custom_mask, packed_custom_mask, causal,
        kv_layout, pos_encoding_mode, use_fp16_qk_reduction, sm_scale, window_left, logits_soft_cap,
        rope_scale, rope_theta, backend, return_lse=True, k_scale=k_scale, v_scale=v_scale,
        lse_base=lse_base, lse_layout=lse_layout,
    )  # fmt: skip


def _narrow(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    causal: bool,
    sm_scale: float | None,
    kv_layout: str,
    window_left: int,
    logits_soft_cap: float,
) -> Tensor:
    """Call the narrow op with an option that is not its default, or for a compiler."""
    refuse_grad("single_attention", q, k, v)
    layout = _KV_LAYOUTS[kv_layout]
    result: Tensor
    if window_left == -1 and not logits_soft_cap and layout == 0 and sm_scale is not None:
        result = _SINGLE(q, k, v, causal, sm_scale)
    else:
        result = _SINGLE(q, k, v, causal, sm_scale, layout, window_left, logits_soft_cap)
    return result


def _full(
    op: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    causal: bool,
    kv_layout: str,
    pos_encoding_mode: str,
    use_fp16_qk_reduction: bool,
    sm_scale: float | None,
    window_left: int,
    logits_soft_cap: float,
    rope_scale: float | None,
    rope_theta: float | None,
    return_lse: bool,
    lse_base: str,
    lse_layout: str,
) -> Tensor | tuple[Tensor, Tensor]:
    """Check the options that the fast path does not take, call the full op, convert the LSE."""
    one_of(op, "kv_layout", kv_layout, tuple(_KV_LAYOUTS))
    if pos_encoding_mode == "ALIBI":
        way_out = 'Use "NONE" or "ROPE_LLAMA".'
        _check.not_yet(op, "pos_encoding_mode", pos_encoding_mode, way_out)
    one_of(op, "pos_encoding_mode", pos_encoding_mode, tuple(_POS_ENCODING_MODES))
    one_of(op, "lse_base", lse_base, ("ln", "log2"))
    one_of(op, "lse_layout", lse_layout, ("NH", "HN"))
    for name, value in (("rope_scale", rope_scale), ("rope_theta", rope_theta)):
        if value is not None and pos_encoding_mode == "NONE":
            way_out = 'Pass pos_encoding_mode="ROPE_LLAMA", or leave it out.'
            _check.fail(op, name, "None with pos_encoding_mode NONE", value, way_out)
    options = (
        causal,
        sm_scale,
        _KV_LAYOUTS[kv_layout],
        window_left,
        logits_soft_cap,
        _POS_ENCODING_MODES[pos_encoding_mode],
        1.0 if rope_scale is None else rope_scale,
        1e4 if rope_theta is None else rope_theta,
        use_fp16_qk_reduction,
    )
    check_values(op, window_left, logits_soft_cap, options[6], options[7])
    refuse_grad("single_attention_full", q, k, v)
    both: tuple[Tensor, Tensor] = _SINGLE_FULL(q, k, v, *options)
    out, lse = both
    if not return_lse:
        return out
    if lse_base == "log2":
        lse = lse * math.log2(math.e)
    if lse_layout == "HN" and lse.dim() == 2:
        lse = lse.t().contiguous()
    return out, lse


def _check_o_dtype(op: str, o_dtype: torch.dtype | str | None, q_dtype: torch.dtype) -> None:
    if o_dtype is None:
        return
    given = getattr(torch, o_dtype, None) if isinstance(o_dtype, str) else o_dtype
    if not isinstance(given, torch.dtype):
        way_out = 'Pass a torch.dtype or its name, such as "float16".'
        _check.fail(op, "o_dtype", "a dtype", repr(o_dtype), way_out)
    if given != q_dtype:
        way_out = "Leave it out and convert the result."
        _check.not_yet(op, "o_dtype", o_dtype, way_out)
