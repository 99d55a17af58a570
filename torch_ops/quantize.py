"""Numbers of 8 bits: floats of two formats and integers, with a scale for each group of them."""

from __future__ import annotations

import torch
from torch import Tensor

from . import _check, _quant
from ._ops import cpu_impl, fake_impl, find_op, refuse_grad

__all__ = ["dequantize", "quantize"]

_QUANTIZE = find_op("quantize")
_QUANTIZE_WITH_SCALE = find_op("quantize_with_scale")
_DEQUANTIZE = find_op("dequantize")

_FLOATS = (torch.float16, torch.bfloat16, torch.float32)
_WHOLE_ROW, _WHOLE_TENSOR = 0, -1  # as group sizes


def quantize(
    input: Tensor,
    dtype: torch.dtype | str = torch.float8_e4m3fn,
    granularity: str | int = "token",
    *,
    scale: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Divide by a scale, round to nearest even and saturate: ``q = saturate(round(x / scale))``.

    A computed scale is the largest magnitude of what shares it over the type's largest number (448,
    57,344 or 127), and at least float32's smallest normal number. NaN counts as nothing there; as
    an element it stays NaN in fp8 and becomes 0 in int8. Infinities saturate.

    Parameters
    ----------
    input : Tensor
        ``[..., hidden]``, float16, bfloat16 or float32, any strides but a last one of 1. On CUDA
        the leading dimensions must fold into two.
    dtype : torch.dtype or str
        float8_e4m3fn, float8_e5m2 or int8.
    granularity : {"tensor", "token"} or int
        What shares a computed scale: everything, a row, or this many neighbouring elements of a
        row, a divisor of hidden.
    scale : Tensor, optional
        Scales to use instead: float32, of one element, or contiguous ``[..., num_groups]`` where
        num_groups divides hidden; `granularity` then is not asked.

    Returns
    -------
    quantized : Tensor
        ``[..., hidden]``, contiguous, of `dtype`.
    scale : Tensor
        float32: ``[1]``, ``[..., 1]`` or ``[..., hidden // group]``; or `scale` as it was given.

    Raises
    ------
    TypeError, ValueError
        On the CPU, for an argument that does not fit; the message names it.
    RuntimeError
        The same on CUDA; on both, when grad mode is on and an argument requires grad.

    Examples
    --------
    >>> import torch, ridgeline
    >>> x = torch.tensor([[1.0, -2.0, 0.5, 0.25]])
    >>> ridgeline.quantize(x, "int8", 2)
    (tensor([[  64, -127,  127,   64]], dtype=torch.int8), tensor([[0.0157, 0.0039]]))
    """
    quant = _dtype_of("quantize", dtype, _quant.DTYPES)
    if scale is not None:
        refuse_grad("quantize", input, scale)
        return _QUANTIZE_WITH_SCALE(input, scale, quant), scale
    refuse_grad("quantize", input)
    result: tuple[Tensor, Tensor] = _QUANTIZE(input, quant, _group_size(granularity))
    return result


def dequantize(input: Tensor, scale: Tensor, dtype: torch.dtype | str = torch.bfloat16) -> Tensor:
    """Multiply by the scale: ``x = q * scale``, in float32 and rounded once.

    Parameters
    ----------
    input : Tensor
        ``[..., hidden]``, float8_e4m3fn, float8_e5m2 or int8, strides as in `quantize`.
    scale : Tensor
        float32: one element, or contiguous ``[..., num_groups]`` where num_groups divides hidden.
    dtype : torch.dtype or str
        float16, bfloat16 or float32.

    Returns
    -------
    Tensor
        ``[..., hidden]``, contiguous, of `dtype`.

    Raises
    ------
    TypeError, ValueError, RuntimeError
        As in `quantize`.

    Examples
    --------
    >>> import torch, ridgeline
    >>> q, scale = ridgeline.quantize(torch.tensor([[1.0, -2.0, 0.5, 0.25]]), "int8")
    >>> ridgeline.dequantize(q, scale, torch.float32)
    tensor([[ 1.0079, -2.0000,  0.5039,  0.2520]])
    """
    refuse_grad("dequantize", scale)
    wide = _dtype_of("dequantize", dtype, _FLOATS)
    return _DEQUANTIZE(input, scale, wide)  # type: ignore[no-any-return]


def _dtype_of(op: str, dtype: torch.dtype | str, allowed: tuple[torch.dtype, ...]) -> torch.dtype:
    found = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if found not in allowed:
        names = " or ".join(str(d) for d in allowed)
        _check.fail(op, "dtype", names, repr(dtype), "Pass one of these.")
    return found


def _group_size(granularity: str | int) -> int:
    if granularity == "token":
        return _WHOLE_ROW
    if granularity == "tensor":
        return _WHOLE_TENSOR
    if not isinstance(granularity, (int, torch.SymInt)) or granularity < 1:
        _check.fail(
            "quantize",
            "granularity",
            "'tensor', 'token' or the size of a group, at least 1",
            repr(granularity),
            "Pass one of these.",
        )
    return granularity


@cpu_impl("quantize")
def _quantize_cpu(input: Tensor, dtype: torch.dtype, group_size: int) -> tuple[Tensor, Tensor]:
    _check_input("quantize", input, _FLOATS)
    _check_dtype("quantize", dtype, _quant.DTYPES)
    num_groups = _num_groups(input, group_size)
    x = input.contiguous().float()
    if group_size == _WHOLE_TENSOR:
        scale = _quant.scale_for(_quant.row_maxima(x.reshape(1, -1)), dtype).reshape(1)
        return _quant.rounded(x, scale, dtype), scale
    groups = _grouped(x, num_groups)
    scale = _quant.scale_for(_quant.row_maxima(groups), dtype)
    return _quant.rounded(groups, scale, dtype).reshape(x.shape), scale.squeeze(-1)


@cpu_impl("quantize_with_scale")
def _quantize_with_scale_cpu(input: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    _check_input("quantize", input, _FLOATS)
    _check_dtype("quantize", dtype, _quant.DTYPES)
    groups, scales = _with_scales("quantize", input.contiguous().float(), scale)
    return _quant.rounded(groups, scales, dtype).reshape(input.shape)


@cpu_impl("dequantize")
def _dequantize_cpu(input: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    _check_input("dequantize", input, _quant.DTYPES)
    _check_dtype("dequantize", dtype, _FLOATS)
    groups, scales = _with_scales("dequantize", input.contiguous().float(), scale)
    return (groups * scales).to(dtype).reshape(input.shape)


@fake_impl("quantize")
def _quantize_fake(input: Tensor, dtype: torch.dtype, group_size: int) -> tuple[Tensor, Tensor]:
    shape = [1]
    if group_size != _WHOLE_TENSOR:
        groups = 1 if group_size == _WHOLE_ROW else input.shape[-1] // group_size
        shape = [*input.shape[:-1], groups]
    return (
        input.new_empty(input.shape, dtype=dtype),
        input.new_empty(shape, dtype=torch.float32),
    )


@fake_impl("quantize_with_scale")
@fake_impl("dequantize")
def _rescaled_fake(input: Tensor, _scale: Tensor, dtype: torch.dtype) -> Tensor:
    return input.new_empty(input.shape, dtype=dtype)


def _num_groups(input: Tensor, group_size: int) -> int:
    if group_size <= _WHOLE_ROW:
        return 1
    hidden = input.shape[-1]
    if hidden % group_size != 0:
        _check.fail(
            "quantize",
            "granularity",
            f"a divisor of the last dimension, {hidden}",
            group_size,
            "Pad the tensor, or choose another size of a group.",
        )
    return hidden // group_size


def _grouped(x: Tensor, num_groups: int) -> Tensor:
    """``[..., hidden]`` as ``[..., num_groups, hidden / num_groups]``."""
    return x.reshape(*x.shape[:-1], num_groups, x.shape[-1] // max(num_groups, 1))


def _with_scales(op: str, x: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """`x` by groups, and scales that broadcast against them."""
    _check.same_device(op, "scale", scale, "input", x)
    _check.dtype(op, "scale", scale, (torch.float32,))
    if scale.numel() == 1:
        return x, scale.reshape(())
    num_groups = scale.shape[-1] if scale.dim() else 1
    _check.shape(
        op, "scale", scale, [*x.shape[:-1], num_groups], "[..., num_groups] (or 1 element)"
    )
    hidden = x.shape[-1]
    if hidden != 0 if num_groups == 0 else hidden % num_groups != 0:
        _check.fail(
            op,
            "scale",
            f"a number of groups that divides the last dimension of 'input', {hidden}",
            num_groups,
            "Pass one scale for each group of neighbouring elements.",
        )
    if not scale.is_contiguous():
        _check.fail(
            op,
            "scale",
            "a contiguous tensor",
            f"strides {list(scale.stride())}",
            "Call .contiguous() on it first.",
        )
    return _grouped(x, max(num_groups, 1)), scale.unsqueeze(-1)


def _check_input(op: str, input: Tensor, allowed: tuple[torch.dtype, ...]) -> None:
    _check.dtype(op, "input", input, allowed)
    if input.dim() == 0:
        _check.fail(
            op, "input", "at least 1 dimension", "a scalar", "Give it a shape [..., hidden]."
        )
    _check.last_stride(op, "input", input)


def _check_dtype(op: str, dtype: torch.dtype, allowed: tuple[torch.dtype, ...]) -> None:
    if dtype not in allowed:
        names = " or ".join(str(d) for d in allowed)
        _check.fail(op, "dtype", names, dtype, "Pass one of these.")
