"""The step from a layer's projection to its attention, in one launch."""

from __future__ import annotations

import torch
from torch import Tensor

from . import _check, _overlap, _paged
from ._append_cpu import Side, check_append, split_scale
from ._ops import cpu_impl, fake_impl, find_eager_op, find_op, is_compiling, refuse_grad
from ._paged import PagedCache
from ._rope_cpu import DTYPES, Angles, check_cache, check_rotary_dim, looked_up, rotated

__all__ = ["rope_append_paged_kv_cache"]

_NARROW = find_op("rope_append_paged_kv_cache")
_NARROW_EAGER = find_eager_op("rope_append_paged_kv_cache")
_FULL = find_op("rope_append_paged_kv_cache_full")

_HND, _INTERLEAVE = 1, 2  # bits of `flags`, as csrc/ops/rope_append.cpp has them
_MAX_HEAD_DIM = 256  # kRopeAppendMaxHeadDim of kernels/rope/params.h
_OP = "rope_append_paged_kv_cache"


def rope_append_paged_kv_cache(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    batch_indices: Tensor,
    positions: Tensor,
    paged_kv_cache: PagedCache,
    kv_indices: Tensor,
    kv_indptr: Tensor,
    kv_layout: str = "NHD",
    *,
    pos_ids: Tensor | None = None,
    q_weight: Tensor | None = None,
    k_weight: Tensor | None = None,
    norm_eps: float = 1e-6,
    rotary_dim: int | None = None,
    interleave: bool = False,
    rope_scale: float = 1,
    rope_theta: float = 1e4,
    low_freq_factor: float = 1,
    high_freq_factor: float = 4,
    old_context_len: float | None = None,
    cos_sin_cache: Tensor | None = None,
    k_scale: float | Tensor | None = None,
    v_scale: float | Tensor | None = None,
    q_out: Tensor | None = None,
) -> Tensor:
    """Normalise, rotate, and append keys and values to a paged cache, in one launch.

    Each head of q and k is divided by its root mean square and multiplied by its weights (if there
    are any), then rotated; k and v go to their places in the cache, q is returned. `rmsnorm` of q
    and of k, `apply_rope_pos_ids` and `append_paged_kv_cache` do the same one after the other; here
    all is float32 and rounded once.

    Parameters
    ----------
    q : Tensor
        ``[nnz, num_q_heads, head_dim]``, float16, bfloat16 or float32; head_dim at most 256. Any
        strides but a last one of 1; views that are aligned to 16 bytes, such as slices of a fused
        projection's output, are faster.
    k, v : Tensor
        ``[nnz, num_kv_heads, head_dim]``, of q's dtype; the head_dim of values may differ.
    batch_indices, positions : Tensor
        ``[nnz]``, int32 or int64: each token's request and its position there, as
        `get_batch_indices_positions` gives them. Rows of -1 (padding), and rows whose request,
        position or page does not exist, are not appended; their q is written like any other.
    paged_kv_cache, kv_indices, kv_indptr, kv_layout
        As in `append_paged_kv_cache`; the lengths of last pages are not needed. The cache is
        overwritten at the tokens' places.
    pos_ids : Tensor, optional
        ``[nnz]``, int32 or int64: the positions that angles follow from. Default: `positions`.
    q_weight, k_weight : Tensor, optional
        ``[head_dim]``, of q's dtype or float32, both of one dtype: the weights of the norm, as in
        Qwen3. Both or neither.
    norm_eps : float
        Added to the mean square.
    rotary_dim, interleave, rope_scale, rope_theta
        As in `apply_rope_pos_ids`.
    low_freq_factor, high_freq_factor, old_context_len : float
        With an `old_context_len`, frequencies are scaled as in `apply_llama31_rope_pos_ids`, low
        ones divided by `rope_scale`; without one, the other two are not used.
    cos_sin_cache : Tensor, optional
        ``[max_position, rotary_dim]``, float32: angles from a table instead, as in
        `apply_rope_with_cos_sin_cache`. Then rope_scale, rope_theta and old_context_len keep their
        defaults.
    k_scale, v_scale : float or Tensor, optional
        What keys and values are divided by on their way into a cache of lower precision, as in
        `append_paged_kv_cache`.
    q_out : Tensor, optional
        Where the rotated queries go, shape and dtype of `q`; `q` itself for in place. Default: a
        new contiguous tensor.

    Returns
    -------
    Tensor
        The rotated queries: `q_out`, or the new tensor.

    Raises
    ------
    TypeError, ValueError, RuntimeError
        As in `append_paged_kv_cache`.

    Examples
    --------
    >>> import torch, ridgeline
    >>> cache = torch.zeros(3, 2, 4, 1, 2)  # 3 pages of 4 tokens, 1 head of 2
    >>> indices, indptr = (torch.tensor(x, dtype=torch.int32) for x in ([2], [0, 1]))
    >>> q, k, v = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]]), torch.ones(1, 2)
    >>> batch, positions = torch.tensor([0]), torch.tensor([1])
    >>> ridgeline.rope_append_paged_kv_cache(
    ...     q[None], k[None], v[None], batch, positions, cache, indices, indptr
    ... )
    tensor([[[0.5403, 0.8415]]])
    >>> cache[2, :, 1, 0]
    tensor([[-0.8415,  0.5403],
            [ 1.0000,  1.0000]])
    """
    compiling = is_compiling()
    k_cache, v_cache = _paged.split(_OP, "paged_kv_cache", paged_kv_cache, as_views=compiling)
    refuse_grad(_OP, q, k, v, k_cache, v_cache, q_weight, k_weight, cos_sin_cache, q_out)
    flags = _paged.layout_code(_OP, kv_layout) | (_INTERLEAVE if interleave else 0)
    if q_out is None:
        q_out = torch.empty_like(q, memory_format=torch.contiguous_format)
    required = (
        q, k, v, batch_indices, positions, k_cache, v_cache, kv_indices, kv_indptr, q_out, flags,
        rope_theta,
    )  # fmt: skip
    if (
        pos_ids is None
        and rotary_dim is None
        and rope_scale == 1
        and old_context_len is None
        and cos_sin_cache is None
        and k_scale is None
        and v_scale is None
    ):
        narrow = _NARROW if compiling else _NARROW_EAGER
        if q_weight is None and k_weight is None:
            narrow(*required)
        else:
            narrow(*required, q_weight, k_weight, norm_eps)
        return q_out
    k_value, k_scales = split_scale(k_scale)
    v_value, v_scales = split_scale(v_scale)
    if rotary_dim is not None and rotary_dim == 0:
        rotary_dim = -1  # which the op's own check refuses; 0 is its default
    if old_context_len is not None and not old_context_len > 0:
        way_out = "Leave it out for plain frequencies."
        _check.fail(_OP, "old_context_len", "a finite number > 0", old_context_len, way_out)
    _FULL(
        *required, q_weight, k_weight, norm_eps, pos_ids, 0 if rotary_dim is None else rotary_dim,
        rope_scale, low_freq_factor, high_freq_factor,
        0.0 if old_context_len is None else old_context_len, cos_sin_cache, k_value, v_value,
        k_scales, v_scales,
    )  # fmt: skip
    return q_out


# The narrow op's arguments are the first of these.
@cpu_impl("rope_append_paged_kv_cache")
@cpu_impl("rope_append_paged_kv_cache_full")
def _cpu(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    batch_indices: Tensor,
    positions: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    kv_indices: Tensor,
    kv_indptr: Tensor,
    q_out: Tensor,
    flags: int = 0,
    rope_theta: float = 1e4,
    q_weight: Tensor | None = None,
    k_weight: Tensor | None = None,
    norm_eps: float = 1e-6,
    pos_ids: Tensor | None = None,
    rotary_dim: int = 0,
    rope_scale: float = 1.0,
    low_freq_factor: float = 1.0,
    high_freq_factor: float = 4.0,
    old_context_len: float = 0.0,
    cos_sin_cache: Tensor | None = None,
    k_scale: float = 1.0,
    v_scale: float = 1.0,
    k_scales: Tensor | None = None,
    v_scales: Tensor | None = None,
) -> None:
    k_cache, v_cache = _paged.halves(k_cache, v_cache)
    k_pool = _paged.checked_pool(_OP, "k_cache", k_cache, flags & _HND)
    v_pool = _paged.checked_pool(_OP, "v_cache", v_cache, flags & _HND)
    sides = (
        Side(_OP, "k", k, "k_cache", k_cache, k_pool, "k_scale", k_scale, k_scales),
        Side(_OP, "v", v, "v_cache", v_cache, v_pool, "v_scale", v_scale, v_scales),
    )
    nnz = check_append(sides, batch_indices, positions, kv_indices, kv_indptr, None)
    if pos_ids is None:
        pos_ids = positions
    meaning = "[nnz], as 'positions'"
    _paged.check_indices(_OP, "pos_ids", pos_ids, nnz, meaning, "k_cache", k_cache)
    _check_query(q, q_out, sides, nnz)
    _check_norm(q_weight, k_weight, norm_eps, q)
    angles = Angles(
        rope_scale, rope_theta, low_freq_factor, high_freq_factor, old_context_len,
        is_llama31=old_context_len != 0,
    )  # fmt: skip
    rotary_dim = _checked_rotary_dim(q, rotary_dim, angles, cos_sin_cache)
    if cos_sin_cache is None:
        cos_sin = angles.cos_sin(pos_ids, rotary_dim)
    else:
        cos_sin = looked_up(cos_sin_cache, pos_ids)
    interleave = bool(flags & _INTERLEAVE)
    new_q = rotated(_normed(q, q_weight, norm_eps), cos_sin, rotary_dim, interleave)
    new_k = rotated(_normed(k, k_weight, norm_eps), cos_sin, rotary_dim, interleave)
    rows, *at = _paged.places(k_pool, batch_indices, positions, kv_indices, kv_indptr)
    sides[0].write(new_k[rows], *at)
    sides[1].write(v[rows], *at)
    q_out.copy_(new_q)


@fake_impl("rope_append_paged_kv_cache")
@fake_impl("rope_append_paged_kv_cache_full")
def _fake(*_: object) -> None:
    return None


def _check_query(q: Tensor, q_out: Tensor, sides: tuple[Side, Side], nnz: int) -> None:
    k, v = sides
    head_dim = k.pool.tokens.shape[3]
    _check.same_device(_OP, "q", q, k.target_arg, k.target)
    _check.dtype(_OP, "q", q, DTYPES)
    _check.rank(_OP, "q", q, 3)
    meaning = "[nnz, num_q_heads, head_dim], as 'positions' and the cache's"
    _check.shape(_OP, "q", q, (nnz, q.shape[1], head_dim), meaning)
    _check.last_stride(_OP, "q", q)
    _check.same_device(_OP, "q_out", q_out, k.target_arg, k.target)
    _check.same_dtype(_OP, "q_out", q_out, "q", q)
    _check.shape(_OP, "q_out", q_out, q.shape, "that of 'q'")
    _check.last_stride(_OP, "q_out", q_out)
    _overlap.writable(_OP, "q_out", q_out)
    if q_out.data_ptr() != q.data_ptr() or q_out.stride() != q.stride():
        _overlap.distinct(_OP, "q_out", q_out, "q", q)
    for side in sides:
        _check.same_dtype(_OP, side.source_arg, side.source, "q", q)
        _overlap.distinct(_OP, side.target_arg, side.target, "q", q)
        _overlap.distinct(_OP, "q_out", q_out, side.source_arg, side.source)
        _overlap.distinct(_OP, "q_out", q_out, side.target_arg, side.target)
    for arg, size in (("q", head_dim), (v.source_arg, v.source.shape[2])):
        if size > _MAX_HEAD_DIM:
            way_out = "Call apply_rope_pos_ids and append_paged_kv_cache."
            _check.fail(_OP, arg, f"a head_dim of at most {_MAX_HEAD_DIM}", size, way_out)


def _check_norm(
    q_weight: Tensor | None, k_weight: Tensor | None, norm_eps: float, q: Tensor
) -> None:
    if q_weight is None and k_weight is None:
        return
    if q_weight is None or k_weight is None:
        missing, given = ("q_weight", "k_weight") if q_weight is None else ("k_weight", "q_weight")
        way_out = "Pass both, or neither for no norm."
        _check.fail(_OP, missing, f"a tensor, as '{given}' is", None, way_out)
    if not 0 <= norm_eps < float("inf"):
        way_out = "1e-6 is the default."
        _check.fail(_OP, "norm_eps", "a finite number >= 0", norm_eps, way_out)
    for arg, weight in (("q_weight", q_weight), ("k_weight", k_weight)):
        _check.same_device(_OP, arg, weight, "q", q)
        if weight.dtype != torch.float32:
            _check.same_dtype(_OP, arg, weight, "q", q)
        _check.rank(_OP, arg, weight, 1)
        _check.shape(_OP, arg, weight, (q.shape[2],), "[head_dim]")
        _check.last_stride(_OP, arg, weight)
    _check.same_dtype(_OP, "k_weight", k_weight, "q_weight", q_weight)


def _checked_rotary_dim(
    q: Tensor, rotary_dim: int, angles: Angles, cos_sin_cache: Tensor | None
) -> int:
    """The rotary_dim in force; 0 asks for the head_dim, or the table's."""
    head_dim = q.shape[2]
    if cos_sin_cache is None:
        rotary_dim = rotary_dim or head_dim
        check_rotary_dim(_OP, rotary_dim, head_dim, _MAX_HEAD_DIM)
        angles.check(_OP)
        return rotary_dim
    check_cache(_OP, cos_sin_cache, "q", q)
    rotary_dim = rotary_dim or cos_sin_cache.shape[1]
    check_rotary_dim(_OP, rotary_dim, head_dim, _MAX_HEAD_DIM)
    expected = (cos_sin_cache.shape[0], rotary_dim)
    _check.shape(_OP, "cos_sin_cache", cos_sin_cache, expected, "[max_position, rotary_dim]")
    if (angles.rope_scale, angles.rope_theta, angles.is_llama31) != (1.0, 1e4, False):
        expected_none = "None where rope_scale, rope_theta or a scaling are given"
        way_out = "Its angles are scaled already: leave the others out."
        _check.fail(_OP, "cos_sin_cache", expected_none, "a tensor", way_out)
    return rotary_dim


def _normed(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    if weight is None:
        return x
    wide = x.float()
    scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return wide * scale * weight.float()
