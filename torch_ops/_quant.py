"""What the ops with 8-bit outputs share: the types, and the arithmetic of their CPU path.

A real number is its 8-bit number times a scale.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from . import _check

FUSED_DTYPES = (torch.float8_e4m3fn, torch.int8)
DTYPES = (torch.float8_e4m3fn, torch.float8_e5m2, torch.int8)

_MIN_SCALE = torch.finfo(torch.float32).smallest_normal
_MAX_FLOAT = torch.finfo(torch.float32).max


def largest(dtype: torch.dtype) -> float:
    """The largest finite number of an 8-bit type."""
    return 127.0 if dtype == torch.int8 else torch.finfo(dtype).max


def split_scale(scale: float | Tensor) -> tuple[Tensor | None, float]:
    """A scale as the ops take it: a tensor, or a number beside None."""
    return (scale, 1.0) if isinstance(scale, Tensor) else (None, scale)


def scale_for(magnitude: Tensor, dtype: torch.dtype) -> Tensor:
    """The scale that maps float32 maxima to the largest number; at least float32's smallest."""
    finite = magnitude.clamp(max=_MAX_FLOAT)
    inverse = torch.tensor(1 / largest(dtype), dtype=torch.float32)
    return (finite * inverse).clamp(min=_MIN_SCALE)


def row_maxima(x: Tensor) -> Tensor:
    """``[..., 1]``: the largest magnitude of each row of float32 numbers; NaN counts as nothing."""
    if x.shape[-1] == 0:
        return x.new_zeros([*x.shape[:-1], 1])
    return x.abs().nan_to_num(nan=0.0, posinf=torch.inf).amax(-1, keepdim=True)


def rounded(x: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """float32 divided by a scale, rounded to nearest even, saturated; NaN stays, or becomes 0."""
    scaled = x * scale.reciprocal()
    if dtype == torch.int8:
        return scaled.nan_to_num(0.0, torch.inf, -torch.inf).round().clamp(-128, 127).to(dtype)
    return scaled.clamp(-largest(dtype), largest(dtype)).to(dtype)


def quantized(
    out: Tensor, x: Tensor, scale: Tensor | None, scale_value: float, token_scale: Tensor | None
) -> None:
    """Write float32 rows `x` as 8-bit numbers; with `token_scale`, compute and write that too."""
    if token_scale is not None:
        token_scale.copy_(scale_for(row_maxima(x), out.dtype))
        scale = token_scale
    elif scale is None:
        scale = torch.tensor(scale_value, dtype=torch.float32)
    out.copy_(rounded(x, scale if token_scale is not None else scale.reshape(()), out.dtype))


def check_scale(op: str, scale: Tensor | None, scale_value: float, input: Tensor) -> None:
    """A given scale: a tensor of one element, or a positive number."""
    if scale is None:
        normal = math.isfinite(scale_value) and _MIN_SCALE <= scale_value <= _MAX_FLOAT
        if not normal:
            _check.fail(
                op,
                "scale",
                "a number > 0, a normal one of float32",
                scale_value,
                "Pass what an 8-bit number is to be multiplied with to get the real one.",
            )
        return
    _check.same_device(op, "scale", scale, "input", input)
    _check.dtype(op, "scale", scale, (torch.float32,))
    if scale.numel() != 1:
        _check.fail(
            op,
            "scale",
            "1 element",
            f"shape {list(scale.shape)}",
            "The scale is one for the whole tensor; None computes one for each row.",
        )


def check_row_scale(
    op: str, scale: Tensor | None, scale_value: float, token_scale: Tensor | None, out: Tensor
) -> None:
    """A given scale, or room for one of each row of `out`."""
    if token_scale is None:
        check_scale(op, scale, scale_value, out)
        return
    if scale is not None:
        _check.fail(op, "scale", "None beside 'token_scale'", "a tensor", "Pass one of the two.")
    _check.same_device(op, "token_scale", token_scale, "out", out)
    _check.dtype(op, "token_scale", token_scale, (torch.float32,))
    _check.shape(op, "token_scale", token_scale, [*out.shape[:-1], 1], "[..., 1]")
    if not token_scale.is_contiguous():
        _check.fail(
            op,
            "token_scale",
            "a contiguous tensor",
            f"strides {list(token_scale.stride())}",
            "Pass torch.empty of that shape.",
        )
