"""Merging attention states: outputs with their LSE over disjoint sets of keys of the same queries.

A state (v, s) stands for softmax(logits) @ values and log(sum(exp(logits))) over one set of keys;
the merged state is the one over the union. A state with s = -inf has seen no key and counts for
nothing; when every state is like that, the result is 0 and -inf.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from . import _check
from ._ops import cpu_impl, fake_impl, find_op, refuse_grad

__all__ = ["merge_state", "merge_state_in_place", "merge_states"]

_MERGE_STATE = find_op("merge_state")
_MERGE_STATE_IN_PLACE = find_op("merge_state_in_place")
_MERGE_STATES = find_op("merge_states")

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_LN2 = math.log(2.0)


def merge_state(
    v_a: Tensor, s_a: Tensor, v_b: Tensor, s_b: Tensor, *, lse_base: str = "ln"
) -> tuple[Tensor, Tensor]:
    """Merge two attention states.

    Parameters
    ----------
    v_a, v_b : Tensor
        Attention outputs, ``[seq_len, num_heads, head_dim]``; float16, bfloat16 or float32, both
        of one dtype, any head_dim.
    s_a, s_b : Tensor
        Their LSE, ``[seq_len, num_heads]``, float32.
    lse_base : {"ln", "log2"}
        Logarithm of `s_a`, `s_b` and the returned LSE.

    Returns
    -------
    v : Tensor
        Merged output, as `v_a`.
    s : Tensor
        Merged LSE, as `s_a`.

    Examples
    --------
    >>> import torch, ridgeline
    >>> v, s = torch.ones(1, 1, 4), torch.zeros(1, 1)
    >>> ridgeline.merge_state(v, s, 3 * v, s)
    (tensor([[[2., 2., 2., 2.]]]), tensor([[0.6931]]))
    """
    refuse_grad("merge_state", v_a, s_a, v_b, s_b)
    if lse_base == "ln":
        merged: tuple[Tensor, Tensor] = _MERGE_STATE(v_a, s_a, v_b, s_b)
        return merged
    _check_log2("merge_state", lse_base)
    v, s = _MERGE_STATE(v_a, s_a * _LN2, v_b, s_b * _LN2)
    return v, s / _LN2


def merge_state_in_place(
    v: Tensor,
    s: Tensor,
    v_other: Tensor,
    s_other: Tensor,
    mask: Tensor | None = None,
    *,
    lse_base: str = "ln",
) -> None:
    """Merge a second attention state into the first, in place.

    Parameters
    ----------
    v : Tensor
        Attention output, ``[seq_len, num_heads, head_dim]``; overwritten.
    s : Tensor
        Its LSE, ``[seq_len, num_heads]``, float32; overwritten.
    v_other, s_other : Tensor
        The other state, as `v` and `s`.
    mask : Tensor, optional
        Bool, ``[seq_len]``; rows where it is False keep `v` and `s`.
    lse_base : {"ln", "log2"}
        Logarithm of `s` and `s_other`.

    Examples
    --------
    >>> import torch, ridgeline
    >>> v, s = torch.ones(2, 1, 2), torch.zeros(2, 1)
    >>> ridgeline.merge_state_in_place(v, s, 3 * v, s.clone(), torch.tensor([True, False]))
    >>> v
    tensor([[[2., 2.]],
    <BLANKLINE>
            [[1., 1.]]])
    """
    refuse_grad("merge_state_in_place", v, s, v_other, s_other)
    if lse_base == "ln":
        _MERGE_STATE_IN_PLACE(v, s, v_other, s_other, mask)
        return
    _check_log2("merge_state_in_place", lse_base)
    merged = s * _LN2
    _MERGE_STATE_IN_PLACE(v, merged, v_other, s_other * _LN2, mask)
    merged /= _LN2
    s.copy_(merged if mask is None else torch.where(mask.unsqueeze(1), merged, s))


def merge_states(v: Tensor, s: Tensor, *, lse_base: str = "ln") -> tuple[Tensor, Tensor]:
    """Merge any number of attention states, in the order in which they lie.

    Parameters
    ----------
    v : Tensor
        Attention outputs, ``[seq_len, num_states, num_heads, head_dim]``; float16, bfloat16 or
        float32, any head_dim.
    s : Tensor
        Their LSE, ``[seq_len, num_states, num_heads]``, float32.
    lse_base : {"ln", "log2"}
        Logarithm of `s` and of the returned LSE.

    Returns
    -------
    v : Tensor
        Merged output, ``[seq_len, num_heads, head_dim]``, of the dtype of `v`.
    s : Tensor
        Merged LSE, ``[seq_len, num_heads]``, float32.

    Examples
    --------
    >>> import torch, ridgeline
    >>> v, s = ridgeline.merge_states(torch.ones(5, 3, 2, 8), torch.zeros(5, 3, 2))
    >>> v.shape, round(s[0, 0].exp().item(), 4)
    (torch.Size([5, 2, 8]), 3.0)
    """
    refuse_grad("merge_states", v, s)
    if lse_base == "ln":
        merged: tuple[Tensor, Tensor] = _MERGE_STATES(v, s)
        return merged
    _check_log2("merge_states", lse_base)
    merged_v, merged_s = _MERGE_STATES(v, s * _LN2)
    return merged_v, merged_s / _LN2


def _check_log2(op: str, lse_base: str) -> None:
    if lse_base != "log2":
        _check.fail(op, "lse_base", "'ln' or 'log2'", repr(lse_base), "Pass one of these.")


def _check_pair(op: str, names: tuple[str, str, str, str], *tensors: Tensor) -> None:
    """Check two states (v, s) of one shape; fakes call it as well."""
    v, s, v_other, s_other = tensors
    v_name = names[0]
    _check.dtype(op, v_name, v, _DTYPES)
    _check.rank(op, v_name, v, 3)
    for name, tensor in zip(names[1:], tensors[1:], strict=True):
        _check.same_device(op, name, tensor, v_name, v)
    _check.same_dtype(op, names[2], v_other, v_name, v)
    _check.shape(op, names[2], v_other, v.shape, f"that of '{v_name}'")
    for name, tensor in ((names[1], s), (names[3], s_other)):
        _check.dtype(op, name, tensor, (torch.float32,))
        _check.shape(op, name, tensor, v.shape[:2], "[seq_len, num_heads]")
    _check.last_stride(op, v_name, v)
    _check.last_stride(op, names[2], v_other)


def _check_mask(op: str, mask: Tensor | None, v: Tensor) -> None:
    if mask is not None:
        _check.same_device(op, "mask", mask, "v", v)
        _check.dtype(op, "mask", mask, (torch.bool,))
        _check.shape(op, "mask", mask, v.shape[:1], "[seq_len]")


def _check_states(v: Tensor, s: Tensor) -> None:
    op = "merge_states"
    _check.dtype(op, "v", v, _DTYPES)
    _check.rank(op, "v", v, 4)
    _check.same_device(op, "s", s, "v", v)
    _check.dtype(op, "s", s, (torch.float32,))
    _check.shape(op, "s", s, v.shape[:3], "[seq_len, num_states, num_heads]")
    _check.last_stride(op, "v", v)


@fake_impl("merge_state")
def _merge_state_fake(v_a: Tensor, s_a: Tensor, v_b: Tensor, s_b: Tensor) -> tuple[Tensor, Tensor]:
    _check_pair("merge_state", ("v_a", "s_a", "v_b", "s_b"), v_a, s_a, v_b, s_b)
    return v_a.new_empty(v_a.shape), s_a.new_empty(s_a.shape)


@fake_impl("merge_state_in_place")
def _merge_state_in_place_fake(
    v: Tensor, s: Tensor, v_other: Tensor, s_other: Tensor, mask: Tensor | None = None
) -> None:
    op = "merge_state_in_place"
    _check_pair(op, ("v", "s", "v_other", "s_other"), v, s, v_other, s_other)
    _check_mask(op, mask, v)


@fake_impl("merge_states")
def _merge_states_fake(v: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
    _check_states(v, s)
    seq_len, _, num_heads, head_dim = v.shape
    return v.new_empty((seq_len, num_heads, head_dim)), s.new_empty((seq_len, num_heads))


def _merge(v: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
    """Merge over dimension 1 in float32; states without keys have weight 0, whatever they hold."""
    if s.shape[1] == 0:
        empty = v.new_zeros((s.shape[0], s.shape[2], v.shape[3]))
        return empty, s.new_full(empty.shape[:2], -math.inf)
    # Why: shifting by the largest LSE keeps the weights exact where the LSE itself is huge.
    shift = s.amax(1, keepdim=True).clamp_min(torch.finfo(torch.float32).min)
    powers = (s - shift).exp()
    total = powers.sum(1)
    weights = (powers / total.masked_fill(total == 0.0, 1.0).unsqueeze(1)).unsqueeze(-1)
    merged = (v.float() * weights).masked_fill(weights == 0.0, 0.0).sum(1)
    return merged.to(v.dtype), total.log() + shift.squeeze(1)


@cpu_impl("merge_state")
def _merge_state_cpu(v_a: Tensor, s_a: Tensor, v_b: Tensor, s_b: Tensor) -> tuple[Tensor, Tensor]:
    _check_pair("merge_state", ("v_a", "s_a", "v_b", "s_b"), v_a, s_a, v_b, s_b)
    return _merge(torch.stack((v_a, v_b), 1), torch.stack((s_a, s_b), 1))


@cpu_impl("merge_state_in_place")
def _merge_state_in_place_cpu(
    v: Tensor, s: Tensor, v_other: Tensor, s_other: Tensor, mask: Tensor | None = None
) -> None:
    op = "merge_state_in_place"
    _check_pair(op, ("v", "s", "v_other", "s_other"), v, s, v_other, s_other)
    _check_mask(op, mask, v)
    merged_v, merged_s = _merge(torch.stack((v, v_other), 1), torch.stack((s, s_other), 1))
    if mask is not None:
        merged_v = torch.where(mask[:, None, None], merged_v, v)
        merged_s = torch.where(mask[:, None], merged_s, s)
    v.copy_(merged_v)
    s.copy_(merged_s)


@cpu_impl("merge_states")
def _merge_states_cpu(v: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
    _check_states(v, s)
    return _merge(v, s)
