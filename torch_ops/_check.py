"""One vocabulary of argument checks for the CPU implementations and the Python functions.

The messages are those of the C++ side:
``ridgeline.<op>: argument '<arg>': expected <expected>, got <got>. <way out>``
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NoReturn

import torch


def message(op: str, arg: str, expected: str, got: object, way_out: str) -> str:
    return f"ridgeline.{op}: argument '{arg}': expected {expected}, got {got}. {way_out}"


def fail(op: str, arg: str, expected: str, got: object, way_out: str) -> NoReturn:
    """Raises ValueError."""
    raise ValueError(message(op, arg, expected, got, way_out))


def not_yet(op: str, arg: str, got: object, way_out: str) -> NoReturn:
    """Raises NotImplementedError for an option that this version does not have."""
    raise NotImplementedError(
        f"ridgeline.{op}: argument '{arg}': {got} is not supported yet. {way_out}"
    )


def dtype(op: str, arg: str, tensor: torch.Tensor, allowed: Sequence[torch.dtype]) -> None:
    """Raises TypeError unless the tensor's dtype is one of `allowed`."""
    if tensor.dtype not in allowed:
        names = " or ".join(str(d) for d in allowed)
        raise TypeError(
            message(op, arg, f"dtype {names}", tensor.dtype, f"Convert it with .to({allowed[0]}).")
        )


def same_dtype(op: str, arg: str, tensor: torch.Tensor, as_arg: str, other: torch.Tensor) -> None:
    """Raises TypeError unless both tensors have one dtype."""
    if tensor.dtype != other.dtype:
        expected = f"dtype {other.dtype} (that of '{as_arg}')"
        raise TypeError(
            message(op, arg, expected, tensor.dtype, f"Convert it with .to({as_arg}.dtype).")
        )


def same_device(op: str, arg: str, tensor: torch.Tensor, as_arg: str, other: torch.Tensor) -> None:
    if tensor.device != other.device:
        expected = f"device {other.device} (that of '{as_arg}')"
        fail(op, arg, expected, tensor.device, f"Move it with .to({as_arg}.device).")


def rank(op: str, arg: str, tensor: torch.Tensor, *allowed: int) -> None:
    if tensor.dim() not in allowed:
        expected = " or ".join(str(r) for r in allowed) + " dimensions"
        got = f"{tensor.dim()} (shape {list(tensor.shape)})"
        fail(op, arg, expected, got, "Reshape it as the function's documentation says.")


def shape(op: str, arg: str, tensor: torch.Tensor, expected: Sequence[int], meaning: str) -> None:
    if tuple(tensor.shape) != tuple(expected):
        fail(
            op,
            arg,
            f"shape {list(expected)} = {meaning}",
            list(tensor.shape),
            "Pass a tensor of that shape.",
        )


def last_stride(op: str, arg: str, tensor: torch.Tensor) -> None:
    if tensor.shape[-1] > 1 and tensor.stride(-1) != 1:
        got = f"stride {tensor.stride(-1)}"
        fail(op, arg, "a last dimension of stride 1", got, "Call .contiguous() on it first.")


def no_pdl(op: str, enable_pdl: bool) -> None:
    """Raises ValueError when programmatic dependent launch is asked of the CPU."""
    if enable_pdl:
        fail(op, "enable_pdl", "False or None on the CPU", True, "Leave it out.")
