"""Bits: masks of bytes packed into masks of bits."""

from __future__ import annotations

import torch
from torch import Tensor

from . import _check
from ._ops import cpu_impl, fake_impl, find_op

__all__ = ["packbits", "segment_packbits"]

_PACKBITS = find_op("packbits")
_SEGMENT_PACKBITS = find_op("segment_packbits")

_BIT_DTYPES = (torch.bool, torch.uint8)
_MAX_SEGMENT_BITS = 2**31 - 1


def packbits(x: Tensor, bitorder: str = "big") -> Tensor:
    """Pack a mask into bits, eight to a byte, as ``numpy.packbits`` does.

    Parameters
    ----------
    x : Tensor
        Any shape, taken in row-major order; bool or uint8, where nonzero is 1.
    bitorder : {"big", "little"}
        Whether the first bit of a byte is its highest or its lowest.

    Returns
    -------
    Tensor
        ``[ceil(x.numel() / 8)]``, uint8; bits past the end are 0.

    Raises
    ------
    TypeError, ValueError, RuntimeError
        For an argument that does not fit; the message names it.

    Examples
    --------
    >>> import torch, ridgeline
    >>> ridgeline.packbits(torch.tensor([True, False, True]), bitorder="little")
    tensor([5], dtype=torch.uint8)
    """
    packed: Tensor = _PACKBITS(x.reshape(-1), _is_big("packbits", bitorder))
    return packed


def segment_packbits(x: Tensor, indptr: Tensor, bitorder: str = "big") -> tuple[Tensor, Tensor]:
    """Pack each segment of a mask into bytes of its own.

    Nothing is read on the host, so the length of the result follows from shapes alone: it is what
    the segments may need at most. Bytes past ``new_indptr[-1]`` are 0.

    Parameters
    ----------
    x : Tensor
        ``[num_bits]``, bool or uint8, where nonzero is 1; fewer than 2^31.
    indptr : Tensor
        ``[num_segments + 1]``, int32: segment s is ``x[indptr[s]:indptr[s + 1]]``.
    bitorder : {"big", "little"}
        Whether the first bit of a byte is its highest or its lowest.

    Returns
    -------
    packed : Tensor
        ``[(num_bits + 7 * num_segments) // 8, rounded up to a multiple of 4]``, uint8.
    new_indptr : Tensor
        ``[num_segments + 1]``, int32: segment s is ``packed[new_indptr[s]:new_indptr[s + 1]]``.

    Raises
    ------
    TypeError, ValueError, RuntimeError
        For an argument that does not fit; the message names it.

    Examples
    --------
    >>> import torch, ridgeline
    >>> indptr = torch.tensor([0, 3, 4], dtype=torch.int32)
    >>> ridgeline.segment_packbits(torch.ones(4, dtype=torch.bool), indptr, "little")
    (tensor([7, 1, 0, 0], dtype=torch.uint8), tensor([0, 1, 2], dtype=torch.int32))
    """
    big = _is_big("segment_packbits", bitorder)
    result: tuple[Tensor, Tensor] = _SEGMENT_PACKBITS(x, indptr, big)
    return result


def _is_big(op: str, bitorder: str) -> bool:
    if bitorder not in ("big", "little"):
        _check.fail(op, "bitorder", "'big' or 'little'", repr(bitorder), "Pass one of these.")
    return bitorder == "big"


def _check_bits(op: str, x: Tensor) -> None:
    _check.dtype(op, "x", x, _BIT_DTYPES)
    _check.rank(op, "x", x, 1)


def _bytes_of(bits: Tensor, big: bool) -> Tensor:
    """Bytes ``[n]`` of bits ``[n, 8]``."""
    exponents = torch.arange(8)
    weights = (1 << (exponents.flip(0) if big else exponents)).to(torch.uint8)
    return ((bits != 0) * weights).sum(1, dtype=torch.uint8)


def _num_segment_bytes(num_bits: int, num_segments: int) -> int:
    """Every segment fills at most 7 bits that are not there; whole words of 4 bytes."""
    return ((num_bits + 7 * num_segments) // 8 + 3) // 4 * 4


@cpu_impl("packbits")
def _packbits_cpu(x: Tensor, big: bool = True) -> Tensor:
    _check_bits("packbits", x)
    padded = torch.zeros((x.shape[0] + 7) // 8 * 8, dtype=torch.bool)
    padded[: x.shape[0]] = x != 0
    return _bytes_of(padded.view(-1, 8), big)


@cpu_impl("segment_packbits")
def _segment_packbits_cpu(x: Tensor, indptr: Tensor, big: bool = True) -> tuple[Tensor, Tensor]:
    op = "segment_packbits"
    _check_bits(op, x)
    _check.same_device(op, "indptr", indptr, "x", x)
    _check.dtype(op, "indptr", indptr, (torch.int32,))
    _check.rank(op, "indptr", indptr, 1)
    _check.last_stride(op, "indptr", indptr)
    num_bits, num_segments = x.shape[0], indptr.shape[0] - 1
    if num_segments < 0:
        way_out = "No segments have one number, 0."
        _check.fail(op, "indptr", "shape [num_segments + 1]", [0], way_out)
    num_bytes = _num_segment_bytes(num_bits, num_segments) if num_segments else 0
    if max(num_bits, num_bytes) > _MAX_SEGMENT_BITS:
        _check.fail(op, "x", "fewer than 2^31 bits", num_bits, "Split the call.")

    begins = indptr[:-1].long().clamp(0, num_bits)
    ends = torch.maximum(indptr[1:].long().clamp(0, num_bits), begins)
    new_indptr = torch.zeros(num_segments + 1, dtype=torch.int64)
    new_indptr[1:] = ((ends - begins + 7) // 8).cumsum(0).clamp(max=num_bytes)
    packed = torch.zeros(num_bytes, dtype=torch.uint8)
    used = torch.arange(int(new_indptr[-1]))
    segments = torch.searchsorted(new_indptr, used, right=True) - 1
    bits = (begins[segments] + (used - new_indptr[segments]) * 8)[:, None] + torch.arange(8)
    inside = bits < ends[segments][:, None]
    values = (x[bits[inside]] != 0) if num_bits else torch.zeros(0, dtype=torch.bool)
    is_set = torch.zeros_like(inside)
    is_set[inside] = values
    packed[: used.shape[0]] = _bytes_of(is_set, big)
    return packed, new_indptr.int()


@fake_impl("packbits")
def _packbits_fake(x: Tensor, *_: object) -> Tensor:
    return x.new_empty(((x.shape[0] + 7) // 8,), dtype=torch.uint8)


@fake_impl("segment_packbits")
def _segment_packbits_fake(x: Tensor, indptr: Tensor, *_: object) -> tuple[Tensor, Tensor]:
    num_segments = indptr.shape[0] - 1
    num_bytes = _num_segment_bytes(x.shape[0], num_segments) if num_segments else 0
    packed = x.new_empty((num_bytes,), dtype=torch.uint8)
    return packed, torch.empty_like(indptr)
