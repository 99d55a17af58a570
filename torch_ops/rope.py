"""Rotary position embedding of queries and keys."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from . import _check, _overlap
from ._ops import cpu_impl, fake_impl, find_op, refuse_grad

__all__ = ["apply_rope_pos_ids", "apply_rope_pos_ids_inplace"]

_POS_IDS = find_op("apply_rope_pos_ids")
_POS_IDS_INPLACE = find_op("apply_rope_pos_ids_inplace")

_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
_MAX_ROTARY_DIM = 512  # kRopeMaxPairs of kernels/rope/params.h, twice


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
        copied. Default: head_dim.
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
    rotary_dim = _rotary_dim(q, rotary_dim)
    options = _options(interleave, rope_scale, rope_theta)
    return _POS_IDS(q, k, pos_ids, rotary_dim, *options)  # type: ignore[no-any-return]


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
    rotary_dim = _rotary_dim(q, rotary_dim)
    _POS_IDS_INPLACE(q, k, pos_ids, rotary_dim, *_options(interleave, rope_scale, rope_theta))


def _options(
    interleave: bool, rope_scale: float, rope_theta: float
) -> tuple[bool, float, float] | tuple[()]:
    """The last arguments of an op, or none when all have its defaults."""
    if interleave or rope_scale != 1 or rope_theta != 1e4:
        return (interleave, rope_scale, rope_theta)
    return ()


@cpu_impl("apply_rope_pos_ids")
def _pos_ids_cpu(
    q: Tensor,
    k: Tensor,
    pos_ids: Tensor,
    rotary_dim: int,
    interleave: bool = False,
    rope_scale: float = 1.0,
    rope_theta: float = 1e4,
) -> tuple[Tensor, Tensor]:
    _check_arguments("apply_rope_pos_ids", q, k, pos_ids, rotary_dim, rope_scale, rope_theta)
    cos_sin = _cos_sin(pos_ids, rotary_dim, rope_scale, rope_theta)
    q_rotated, k_rotated = q.new_empty(q.shape), k.new_empty(k.shape)
    for x, rotated in ((q, q_rotated), (k, k_rotated)):
        rotated.copy_(x)
        _rotate(rotated, cos_sin, rotary_dim, interleave)
    return q_rotated, k_rotated


@cpu_impl("apply_rope_pos_ids_inplace")
def _pos_ids_inplace_cpu(
    q: Tensor,
    k: Tensor,
    pos_ids: Tensor,
    rotary_dim: int,
    interleave: bool = False,
    rope_scale: float = 1.0,
    rope_theta: float = 1e4,
) -> None:
    op = "apply_rope_pos_ids_inplace"
    _check_arguments(op, q, k, pos_ids, rotary_dim, rope_scale, rope_theta)
    _overlap.writable(op, "q", q)
    _overlap.writable(op, "k", k)
    _overlap.distinct(op, "k", k, "q", q)
    cos_sin = _cos_sin(pos_ids, rotary_dim, rope_scale, rope_theta)
    _rotate(q, cos_sin, rotary_dim, interleave)
    _rotate(k, cos_sin, rotary_dim, interleave)


@fake_impl("apply_rope_pos_ids")
def _pos_ids_fake(q: Tensor, k: Tensor, *_: object) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape)


@fake_impl("apply_rope_pos_ids_inplace")
def _pos_ids_inplace_fake(*_: object) -> None:
    return None


def _rotary_dim(q: Tensor, rotary_dim: int | None) -> int:
    if rotary_dim is not None:
        return rotary_dim
    return q.shape[-1] if q.dim() > 0 else 0  # the op's own check refuses a scalar


def _cos_sin(
    pos_ids: Tensor, rotary_dim: int, rope_scale: float, rope_theta: float
) -> tuple[Tensor, Tensor]:
    """Cosines and sines, [nnz, 1, rotary_dim / 2] in float32.

    Why float64 angles: a float32 frequency is off by 6e-8 of itself, 0.06 radians at 1,000,000.
    """
    exponents = torch.arange(0, rotary_dim, 2, dtype=torch.float64) / max(rotary_dim, 1)
    frequencies = torch.pow(torch.tensor(rope_theta, dtype=torch.float64), -exponents) / rope_scale
    angles = pos_ids.to(torch.float64)[:, None, None] * frequencies
    return angles.cos().float(), angles.sin().float()


def _rotate(x: Tensor, cos_sin: tuple[Tensor, Tensor], rotary_dim: int, interleave: bool) -> None:
    """Rotates [nnz, num_heads, head_dim] in place."""
    cos, sin = cos_sin
    if interleave:
        first, second = x[..., 0:rotary_dim:2], x[..., 1:rotary_dim:2]
    else:
        first, second = x[..., : rotary_dim // 2], x[..., rotary_dim // 2 : rotary_dim]
    a, b = first.float(), second.float()
    rotated = a * cos - b * sin, b * cos + a * sin
    first.copy_(rotated[0])
    second.copy_(rotated[1])


def _check_arguments(
    op: str,
    q: Tensor,
    k: Tensor,
    pos_ids: Tensor,
    rotary_dim: int,
    rope_scale: float,
    rope_theta: float,
) -> None:
    _check.dtype(op, "q", q, _DTYPES)
    _check.rank(op, "q", q, 3)
    _check.last_stride(op, "q", q)
    nnz, _, head_dim = q.shape
    _check.same_device(op, "k", k, "q", q)
    _check.same_dtype(op, "k", k, "q", q)
    _check.rank(op, "k", k, 3)
    expected = (nnz, k.shape[1], head_dim)
    _check.shape(op, "k", k, expected, "[nnz, num_k_heads, head_dim], as q's")
    _check.last_stride(op, "k", k)
    _check.same_device(op, "pos_ids", pos_ids, "q", q)
    _check.dtype(op, "pos_ids", pos_ids, (torch.int32, torch.int64))
    _check.rank(op, "pos_ids", pos_ids, 1)
    _check.shape(op, "pos_ids", pos_ids, (nnz,), "[nnz]")
    _check.last_stride(op, "pos_ids", pos_ids)
    if rotary_dim % 2 != 0 or not 0 < rotary_dim <= min(head_dim, _MAX_ROTARY_DIM):
        _check.fail(
            op,
            "rotary_dim",
            f"an even number from 2 to head_dim ({head_dim}) and at most {_MAX_ROTARY_DIM}",
            rotary_dim,
            "Leave it out to rotate whole heads.",
        )
    for name, value in (("rope_scale", rope_scale), ("rope_theta", rope_theta)):
        if not (math.isfinite(value) and value > 0):
            _check.fail(op, name, "a finite number > 0", value, "The defaults are 1 and 1e4.")
