"""Checks of what an op writes: the counterpart of csrc/runtime/overlap.h on the CPU path."""

from __future__ import annotations

from torch import Tensor

from . import _check


def writable(op: str, arg: str, tensor: Tensor) -> None:
    """Raises ValueError when two indices of the tensor are one address (an expanded view)."""
    for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
        if size > 1 and stride == 0 and tensor.numel() > 0:
            _check.fail(
                op,
                arg,
                "a tensor whose elements are distinct, since it is written",
                f"strides {list(tensor.stride())} (an expanded view)",
                "Call .contiguous() on it first.",
            )


def distinct(op: str, arg: str, tensor: Tensor, as_arg: str, other: Tensor) -> None:
    """Raises ValueError when two tensors surely share an element.

    Views that interleave in one buffer, such as q and k of a fused projection, pass: they share
    none. So sure means that both are dense, or that both start at one address.
    """
    if tensor.numel() == 0 or other.numel() == 0:
        return
    begin, end = _extent(tensor)
    other_begin, other_end = _extent(other)
    if begin >= other_end or other_begin >= end:
        return
    if begin == other_begin or (_is_dense(tensor) and _is_dense(other)):
        _check.fail(
            op,
            arg,
            f"memory of its own, since it is written beside '{as_arg}'",
            f"a tensor that overlaps '{as_arg}'",
            "Pass a .clone() of one of them.",
        )


def out(op: str, tensor: Tensor, arg: str, source: Tensor) -> None:
    """As `distinct` for the argument `out`, which may be exactly `source` itself."""
    if tensor.data_ptr() != source.data_ptr() or tensor.stride() != source.stride():
        distinct(op, "out", tensor, arg, source)


def _extent(tensor: Tensor) -> tuple[int, int]:
    last = sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
    begin = tensor.data_ptr()
    return begin, begin + (last + 1) * tensor.element_size()


def _is_dense(tensor: Tensor) -> bool:
    begin, end = _extent(tensor)
    return end - begin == tensor.numel() * tensor.element_size()
