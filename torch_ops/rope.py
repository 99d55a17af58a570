"""Rotary position embedding of queries and keys.

A function is told positions by id or by request, and angles by frequencies or by a table; each has
a form that returns new tensors and one that works in place. In all of them the rotation is computed
in float32 and rounded once.
"""

from __future__ import annotations

from torch import Tensor

from . import _rope_cpu as _rope_cpu  # registers the CPU implementations and the fakes
from ._ops import find_op, refuse_grad

__all__ = [
    "apply_llama31_rope",
    "apply_llama31_rope_inplace",
    "apply_llama31_rope_pos_ids",
    "apply_llama31_rope_pos_ids_inplace",
    "apply_rope",
    "apply_rope_inplace",
    "apply_rope_pos_ids",
    "apply_rope_pos_ids_inplace",
    "apply_rope_with_cos_sin_cache",
    "apply_rope_with_cos_sin_cache_inplace",
]

_ROPE = find_op("apply_rope")
_ROPE_INPLACE = find_op("apply_rope_inplace")
_POS_IDS = find_op("apply_rope_pos_ids")
_POS_IDS_INPLACE = find_op("apply_rope_pos_ids_inplace")
_LLAMA31 = find_op("apply_llama31_rope")
_LLAMA31_INPLACE = find_op("apply_llama31_rope_inplace")
_LLAMA31_POS_IDS = find_op("apply_llama31_rope_pos_ids")
_LLAMA31_POS_IDS_INPLACE = find_op("apply_llama31_rope_pos_ids_inplace")
_TABLE = find_op("apply_rope_with_cos_sin_cache")
_TABLE_INPLACE = find_op("apply_rope_with_cos_sin_cache_inplace")


def apply_rope(
    q: Tensor,
    k: Tensor,
    indptr: Tensor,
    offsets: Tensor,
    rotary_dim: int | None = None,
    interleave: bool = False,
    rope_scale: float = 1,
    rope_theta: float = 1e4,
) -> tuple[Tensor, Tensor]:
    """Rotate queries and keys by their places in ragged requests.

    Parameters
    ----------
    q, k : Tensor
        As in `apply_rope_pos_ids`.
    indptr : Tensor
        ``[batch_size + 1]``, int32: request r has the tokens ``indptr[r] .. indptr[r + 1] - 1``.
    offsets : Tensor
        ``[batch_size]``, int32 or int64: the position of each request's first token. Tokens of no
        request (padding) are at position 0.
    rotary_dim, interleave, rope_scale, rope_theta
        As in `apply_rope_pos_ids`.

    Returns
    -------
    q_rotated, k_rotated : Tensor
        New contiguous tensors, shapes and dtype of `q` and `k`.

    Raises
    ------
    TypeError, ValueError, RuntimeError
        As in `apply_rope_pos_ids`.

    Examples
    --------
    >>> import torch, ridgeline
    >>> q, k = torch.tensor([[[1.0, 0.0]]]), torch.tensor([[[0.0, 1.0]]])
    >>> ridgeline.apply_rope(q, k, torch.tensor([0, 1]).int(), torch.tensor([1]))
    (tensor([[[0.5403, 0.8415]]]), tensor([[[-0.8415,  0.5403]]]))
    """
    refuse_grad("apply_rope", q, k)
    if rotary_dim is None and not interleave and rope_scale == 1:
        return _ROPE(q, k, indptr, offsets, rope_theta)  # type: ignore[no-any-return]
    return _ROPE(  # type: ignore[no-any-return]
        q,
        k,
        indptr,
        offsets,
        rope_theta,
        -1 if rotary_dim is None else rotary_dim,
        interleave,
        rope_scale,
    )


def apply_rope_inplace(
    q: Tensor,
    k: Tensor,
    indptr: Tensor,
    offsets: Tensor,
    rotary_dim: int | None = None,
    interleave: bool = False,
    rope_scale: float = 1,
    rope_theta: float = 1e4,
) -> None:
    """Rotate queries and keys by their places in ragged requests, in place.

    Parameters
    ----------
    q, k : Tensor
        As in `apply_rope`; overwritten. They may be views of one buffer, such as a fused
        projection's output, but share no element.
    indptr, offsets, rotary_dim, interleave, rope_scale, rope_theta
        As in `apply_rope`.

    Raises
    ------
    TypeError, ValueError, RuntimeError
        As in `apply_rope_pos_ids`.

    Examples
    --------
    >>> import torch, ridgeline
    >>> q, k = torch.tensor([[[1.0, 0.0]]]), torch.tensor([[[0.0, 1.0]]])
    >>> ridgeline.apply_rope_inplace(q, k, torch.tensor([0, 1]).int(), torch.tensor([1]))
    >>> q
    tensor([[[0.5403, 0.8415]]])
    """
    refuse_grad("apply_rope_inplace", q, k)
    if rotary_dim is None and not interleave and rope_scale == 1:
        _ROPE_INPLACE(q, k, indptr, offsets, rope_theta)
    else:
        _ROPE_INPLACE(
            q,
            k,
            indptr,
            offsets,
            rope_theta,
            -1 if rotary_dim is None else rotary_dim,
            interleave,
            rope_scale,
        )


def apply_rope_pos_ids(
    q: Tensor,
    k: Tensor,
    pos_ids: Tensor,
    rotary_dim: int | None = None,
    interleave: bool = False,
    rope_scale: float = 1,
    rope_theta: float = 1e4,
) -> tuple[Tensor, Tensor]:
    """Rotate queries and keys by their tokens' positions.

    Pair ``i`` of a head turns by ``pos / rope_scale * rope_theta^(-2 i / rotary_dim)`` radians (Su
    et al., "RoFormer", 2021). The angle is reduced exactly before it is rounded to float32, at any
    position; the rotation is computed in float32 and rounded once.

    Parameters
    ----------
    q : Tensor
        ``[nnz, num_q_heads, head_dim]``, float16, bfloat16 or float32; any strides but a last one
        of 1. Views that are aligned to 16 bytes are faster.
    k : Tensor
        ``[nnz, num_k_heads, head_dim]``, of q's dtype.
    pos_ids : Tensor
        ``[nnz]``, int32 or int64.
    rotary_dim : int, optional
        How many leading elements of a head turn: even, at most head_dim and 512; the others are
        copied. Default, and -1: head_dim.
    interleave : bool
        False: pairs ``(i, i + rotary_dim / 2)``, as in Llama of Hugging Face Transformers; True:
        pairs ``(2 i, 2 i + 1)``, as in GPT-J.
    rope_scale : float
        Positions are divided by it.
    rope_theta : float
        Base of the frequencies.

    Returns
    -------
    q_rotated, k_rotated : Tensor
        New contiguous tensors, shapes and dtype of `q` and `k`.

    Raises
    ------
    TypeError, ValueError
        On the CPU, for an argument that does not fit; the message names it.
    RuntimeError
        The same on CUDA; on both, when grad mode is on and an argument requires grad.

    Examples
    --------
    >>> import torch, ridgeline
    >>> q, k = torch.tensor([[[1.0, 0.0]]]), torch.tensor([[[0.0, 1.0]]])
    >>> ridgeline.apply_rope_pos_ids(q, k, torch.tensor([1]))
    (tensor([[[0.5403, 0.8415]]]), tensor([[[-0.8415,  0.5403]]]))
    """
    refuse_grad("apply_rope_pos_ids", q, k)
    if rotary_dim is None and not interleave and rope_scale == 1:
        return _POS_IDS(q, k, pos_ids, rope_theta)  # type: ignore[no-any-return]
    return _POS_IDS(  # type: ignore[no-any-return]
        q, k, pos_ids, rope_theta, -1 if rotary_dim is None else rotary_dim, interleave, rope_scale
    )


def apply_rope_pos_ids_inplace(
    q: Tensor,
    k: Tensor,
    pos_ids: Tensor,
    rotary_dim: int | None = None,
    interleave: bool = False,
    rope_scale: float = 1,
    rope_theta: float = 1e4,
) -> None:
    """Rotate queries and keys by their tokens' positions, in place.

    Parameters
    ----------
    q, k : Tensor
        As in `apply_rope_pos_ids`; overwritten. They may be views of one buffer, such as a fused
        projection's output, but share no element.
    pos_ids, rotary_dim, interleave, rope_scale, rope_theta
        As in `apply_rope_pos_ids`.

    Raises
    ------
    TypeError, ValueError, RuntimeError
        As in `apply_rope_pos_ids`.

    Examples
    --------
    >>> import torch, ridgeline
    >>> q, k = torch.tensor([[[1.0, 0.0]]]), torch.tensor([[[0.0, 1.0]]])
    >>> ridgeline.apply_rope_pos_ids_inplace(q, k, torch.tensor([1]))
    >>> q
    tensor([[[0.5403, 0.8415]]])
    """
    refuse_grad("apply_rope_pos_ids_inplace", q, k)
    if rotary_dim is None and not interleave and rope_scale == 1:
        _POS_IDS_INPLACE(q, k, pos_ids, rope_theta)
    else:
        _POS_IDS_INPLACE(
            q,
            k,
            pos_ids,
            rope_theta,
            -1 if rotary_dim is None else rotary_dim,
            interleave,
            rope_scale,
        )


def apply_llama31_rope(
    q: Tensor,
    k: Tensor,
    indptr: Tensor,
    offsets: Tensor,
    rotary_dim: int | None = None,
    interleave: bool = False,
    rope_scale: float = 8,
    rope_theta: float = 5e5,
    low_freq_factor: float = 1,
    high_freq_factor: float = 4,
    old_context_len: float = 8192,
) -> tuple[Tensor, Tensor]:
    """Rotate by places in ragged requests, with the frequencies of Llama 3.1.

    Parameters
    ----------
    q, k : Tensor
        As in `apply_rope_pos_ids`.
    indptr : Tensor
        ``[batch_size + 1]``, int32: request r has the tokens ``indptr[r] .. indptr[r + 1] - 1``.
    offsets : Tensor
        ``[batch_size]``, int32 or int64: the position of each request's first token. Tokens of no
        request (padding) are at position 0.
    rotary_dim, interleave, rope_theta
        As in `apply_rope_pos_ids`.
    rope_scale : float
        What low frequencies are divided by.
    low_freq_factor, high_freq_factor, old_context_len : float
        A frequency that turns fewer than `low_freq_factor` times in `old_context_len` positions is
        divided by `rope_scale`, one that turns more than `high_freq_factor` times stays, between
        them both are mixed linearly. low_freq_factor >= 0, high_freq_factor above it.

    Returns
    -------
    q_rotated, k_rotated : Tensor
        New contiguous tensors, shapes and dtype of `q` and `k`.

    Raises
    ------
    TypeError, ValueError, RuntimeError
        As in `apply_rope_pos_ids`.

    Examples
    --------
    >>> import torch, ridgeline
    >>> q, k = torch.tensor([[[1.0, 0.0]]]), torch.tensor([[[0.0, 1.0]]])
    >>> ridgeline.apply_llama31_rope(q, k, torch.tensor([0, 1]).int(), torch.tensor([1]))
    (tensor([[[0.5403, 0.8415]]]), tensor([[[-0.8415,  0.5403]]]))
    """
    refuse_grad("apply_llama31_rope", q, k)
    return _LLAMA31(  # type: ignore[no-any-return]
        q,
        k,
        indptr,
        offsets,
        rope_theta,
        -1 if rotary_dim is None else rotary_dim,
        interleave,
        rope_scale,
        low_freq_factor,
        high_freq_factor,
        old_context_len,
    )


def apply_llama31_rope_inplace(
    q: Tensor,
    k: Tensor,
    indptr: Tensor,
    offsets: Tensor,
    rotary_dim: int | None = None,
    interleave: bool = False,
    rope_scale: float = 8,
    rope_theta: float = 5e5,
    low_freq_factor: float = 1,
    high_freq_factor: float = 4,
    old_context_len: float = 8192,
) -> None:
    """Rotate by places in ragged requests, with the frequencies of Llama 3.1, in place.

    Parameters
    ----------
    q, k : Tensor
        As in `apply_llama31_rope`; overwritten.
    indptr, offsets, rotary_dim, interleave, rope_scale, rope_theta
    low_freq_factor, high_freq_factor, old_context_len
        As in `apply_llama31_rope`.

    Raises
    ------
    TypeError, ValueError, RuntimeError
        As in `apply_rope_pos_ids`.

    Examples
    --------
    >>> import torch, ridgeline
    >>> q, k = torch.tensor([[[1.0, 0.0]]]), torch.tensor([[[0.0, 1.0]]])
    >>> ridgeline.apply_llama31_rope_inplace(q, k, torch.tensor([0, 1]).int(), torch.tensor([1]))
    >>> q
    tensor([[[0.5403, 0.8415]]])
    """
    refuse_grad("apply_llama31_rope_inplace", q, k)
    _LLAMA31_INPLACE(
        q,
        k,
        indptr,
        offsets,
        rope_theta,
        -1 if rotary_dim is None else rotary_dim,
        interleave,
        rope_scale,
        low_freq_factor,
        high_freq_factor,
        old_context_len,
    )


def apply_llama31_rope_pos_ids(
    q: Tensor,
    k: Tensor,
    pos_ids: Tensor,
    rotary_dim: int | None = None,
    interleave: bool = False,
    rope_scale: float = 8,
    rope_theta: float = 5e5,
    low_freq_factor: float = 1,
    high_freq_factor: float = 4,
    old_context_len: float = 8192,
) -> tuple[Tensor, Tensor]:
    """Rotate by positions, with the frequencies of Llama 3.1.

    Parameters
    ----------
    q, k : Tensor
        As in `apply_rope_pos_ids`.
    pos_ids : Tensor
        ``[nnz]``, int32 or int64.
    rotary_dim, interleave, rope_theta
        As in `apply_rope_pos_ids`.
    rope_scale : float
        What low frequencies are divided by.
    low_freq_factor, high_freq_factor, old_context_len : float
        A frequency that turns fewer than `low_freq_factor` times in `old_context_len` positions is
        divided by `rope_scale`, one that turns more than `high_freq_factor` times stays, between
        them both are mixed linearly. low_freq_factor >= 0, high_freq_factor above it.

    Returns
    -------
    q_rotated, k_rotated : Tensor
        New contiguous tensors, shapes and dtype of `q` and `k`.

    Raises
    ------
    TypeError, ValueError, RuntimeError
        As in `apply_rope_pos_ids`.

    Examples
    --------
    >>> import torch, ridgeline
    >>> q, k = torch.tensor([[[1.0, 0.0]]]), torch.tensor([[[0.0, 1.0]]])
    >>> ridgeline.apply_llama31_rope_pos_ids(q, k, torch.tensor([1]))
    (tensor([[[0.5403, 0.8415]]]), tensor([[[-0.8415,  0.5403]]]))
    """
    refuse_grad("apply_llama31_rope_pos_ids", q, k)
    return _LLAMA31_POS_IDS(  # type: ignore[no-any-return]
        q,
        k,
        pos_ids,
        rope_theta,
        -1 if rotary_dim is None else rotary_dim,
        interleave,
        rope_scale,
        low_freq_factor,
        high_freq_factor,
        old_context_len,
    )


def apply_llama31_rope_pos_ids_inplace(
    q: Tensor,
    k: Tensor,
    pos_ids: Tensor,
    rotary_dim: int | None = None,
    interleave: bool = False,
    rope_scale: float = 8,
    rope_theta: float = 5e5,
    low_freq_factor: float = 1,
    high_freq_factor: float = 4,
    old_context_len: float = 8192,
) -> None:
    """Rotate by positions, with the frequencies of Llama 3.1, in place.

    Parameters
    ----------
    q, k : Tensor
        As in `apply_llama31_rope_pos_ids`; overwritten.
    pos_ids, rotary_dim, interleave, rope_scale, rope_theta
    low_freq_factor, high_freq_factor, old_context_len
        As in `apply_llama31_rope_pos_ids`.

    Raises
    ------
    TypeError, ValueError, RuntimeError
        As in `apply_rope_pos_ids`.

    Examples
    --------
    >>> import torch, ridgeline
    >>> q, k = torch.tensor([[[1.0, 0.0]]]), torch.tensor([[[0.0, 1.0]]])
    >>> ridgeline.apply_llama31_rope_pos_ids_inplace(q, k, torch.tensor([1]))
    >>> q
    tensor([[[0.5403, 0.8415]]])
    """
    refuse_grad("apply_llama31_rope_pos_ids_inplace", q, k)
    _LLAMA31_POS_IDS_INPLACE(
        q,
        k,
        pos_ids,
        rope_theta,
        -1 if rotary_dim is None else rotary_dim,
        interleave,
        rope_scale,
        low_freq_factor,
        high_freq_factor,
        old_context_len,
    )


def apply_rope_with_cos_sin_cache(
    positions: Tensor,
    query: Tensor,
    key: Tensor,
    head_size: int,
    cos_sin_cache: Tensor,
    is_neox: bool = True,
) -> tuple[Tensor, Tensor]:
    """Rotate queries and keys by cosines and sines from a table.

    Parameters
    ----------
    positions : Tensor
        ``[nnz]``, int32 or int64. One outside the table is taken as the nearest inside.
    query, key : Tensor
        ``[nnz, num_heads * head_size]`` or ``[nnz, num_heads, head_size]``, float16, bfloat16 or
        float32; any strides but a last one of 1.
    head_size : int
    cos_sin_cache : Tensor
        ``[max_position, rotary_dim]``, float32: a position's rotary_dim / 2 cosines, then as many
        sines. rotary_dim is even, at most head_size and 512; the other elements of a head are
        copied. Any strides but a last one of 1.
    is_neox : bool
        True: pairs ``(i, i + rotary_dim / 2)``; False: pairs ``(2 i, 2 i + 1)``.

    Returns
    -------
    query_rotated, key_rotated : Tensor
        New contiguous tensors, shapes and dtype of `query` and `key`.

    Raises
    ------
    TypeError, ValueError, RuntimeError
        As in `apply_rope_pos_ids`.

    Examples
    --------
    >>> import torch, ridgeline
    >>> query, key = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]])
    >>> quarter_turns = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    >>> ridgeline.apply_rope_with_cos_sin_cache(torch.tensor([1]), query, key, 2, quarter_turns)
    (tensor([[0., 1.]]), tensor([[-1.,  0.]]))
    """
    refuse_grad("apply_rope_with_cos_sin_cache", query, key, cos_sin_cache)
    return _TABLE(  # type: ignore[no-any-return]
        positions, query, key, head_size, cos_sin_cache, is_neox
    )


def apply_rope_with_cos_sin_cache_inplace(
    positions: Tensor,
    query: Tensor,
    key: Tensor,
    head_size: int,
    cos_sin_cache: Tensor,
    is_neox: bool = True,
) -> None:
    """Rotate queries and keys by cosines and sines from a table, in place.

    Parameters
    ----------
    positions, head_size, cos_sin_cache, is_neox
        As in `apply_rope_with_cos_sin_cache`.
    query, key : Tensor
        As in `apply_rope_with_cos_sin_cache`; overwritten. They may be views of one buffer, but
        share no element.

    Raises
    ------
    TypeError, ValueError, RuntimeError
        As in `apply_rope_pos_ids`.

    Examples
    --------
    >>> import torch, ridgeline
    >>> query, key = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]])
    >>> table = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    >>> ridgeline.apply_rope_with_cos_sin_cache_inplace(torch.tensor([1]), query, key, 2, table)
    >>> query
    tensor([[0., 1.]])
    """
    refuse_grad("apply_rope_with_cos_sin_cache_inplace", query, key, cos_sin_cache)
    _TABLE_INPLACE(positions, query, key, head_size, cos_sin_cache, is_neox)
