"""Gated activations: one half of the last dimension, activated, times the other half."""

from __future__ import annotations

import torch
from torch import Tensor

from . import _check, _overlap
from ._ops import cpu_impl, fake_impl, find_op, refuse_grad

__all__ = ["silu_and_mul"]

_SILU_AND_MUL = find_op("silu_and_mul")
_SILU_AND_MUL_OUT = find_op("silu_and_mul_out")

_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def silu_and_mul(
    input: Tensor, out: Tensor | None = None, enable_pdl: bool | None = None
) -> Tensor:
    """Gate with SiLU: ``silu(input[..., :hidden]) * input[..., hidden:]``.

    ``silu(x) = x / (1 + exp(-x))``; computed in float32 and rounded once. This is the SwiGLU of
    Shazeer, "GLU Variants Improve Transformer", 2020, after its two projections.

    Parameters
    ----------
    input : Tensor
        ``[..., 2 * hidden]``, float16, bfloat16 or float32; any hidden size and any strides but a
        last one of 1. On CUDA the leading dimensions must fold into two; views that are aligned to
        16 bytes are faster.
    out : Tensor, optional
        Where to write, ``[..., hidden]``; dtype and device of `input`, in memory of its own.
    enable_pdl : bool, optional
        True: programmatic dependent launch, on GPUs of compute capability 9.0 and up.

    Returns
    -------
    Tensor
        `out`, or a new contiguous tensor ``[..., hidden]`` of the input's dtype.

    Raises
    ------
    TypeError, ValueError
        On the CPU, for an argument that does not fit; the message names it.
    RuntimeError
        The same on CUDA; on both, when grad mode is on and an argument requires grad.

    Examples
    --------
    >>> import torch, ridgeline
    >>> ridgeline.silu_and_mul(torch.tensor([[0.0, 1.0, 5.0, 10.0]]))
    tensor([[0.0000, 7.3106]])
    """
    if out is None:
        refuse_grad("silu_and_mul", input)
        options = (True,) if enable_pdl is True else ()
        return _SILU_AND_MUL(input, *options)  # type: ignore[no-any-return]
    refuse_grad("silu_and_mul", input, out)
    _SILU_AND_MUL_OUT(out, input, enable_pdl is True)
    return out


@cpu_impl("silu_and_mul")
def _silu_and_mul_cpu(input: Tensor, enable_pdl: bool = False) -> Tensor:
    _check_input("silu_and_mul", input, enable_pdl)
    return _gated(input)


@cpu_impl("silu_and_mul_out")
def _silu_and_mul_out_cpu(out: Tensor, input: Tensor, enable_pdl: bool = False) -> None:
    op = "silu_and_mul"
    _check_input(op, input, enable_pdl)
    _check.same_device(op, "out", out, "input", input)
    _check.same_dtype(op, "out", out, "input", input)
    _check.shape(op, "out", out, _output_shape(input), "[..., hidden]")
    _check.last_stride(op, "out", out)
    _overlap.writable(op, "out", out)
    _overlap.distinct(op, "out", out, "input", input)
    out.copy_(_gated(input))


@fake_impl("silu_and_mul")
def _silu_and_mul_fake(input: Tensor, *_: object) -> Tensor:
    return input.new_empty(_output_shape(input))


@fake_impl("silu_and_mul_out")
def _silu_and_mul_out_fake(*_: object) -> None:
    return None


def _output_shape(input: Tensor) -> list[int]:
    return [*input.shape[:-1], input.shape[-1] // 2]


def _gated(input: Tensor) -> Tensor:
    gate, value = input.contiguous().float().chunk(2, dim=-1)
    # exp(-|x| / 2), squared, neither overflows nor goes subnormal where silu(x) is not zero.
    half_exp = torch.exp(-0.5 * gate.abs())
    numerator = torch.where(gate < 0, gate * half_exp * half_exp, gate)
    return (numerator / (1 + half_exp * half_exp) * value).to(input.dtype)


def _check_input(op: str, input: Tensor, enable_pdl: bool) -> None:
    _check.dtype(op, "input", input, _DTYPES)
    if input.dim() == 0 or input.shape[-1] % 2 != 0:
        _check.fail(
            op,
            "input",
            "an even last dimension (gate and value side by side)",
            f"shape {list(input.shape)}",
            "Concatenate the two projections along the last dimension.",
        )
    _check.last_stride(op, "input", input)
    _check.no_pdl(op, enable_pdl)
