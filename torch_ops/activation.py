"""Gated activations: one half of the last dimension, activated, times the other half."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from . import _check, _overlap, _quant
from ._ops import cpu_impl, fake_impl, find_op, refuse_grad

__all__ = ["gelu_and_mul", "gelu_tanh_and_mul", "silu_and_mul"]

_SILU = find_op("silu_and_mul")
_SILU_OUT = find_op("silu_and_mul_out")
_SILU_QUANT = find_op("silu_and_mul_quant")
_GELU = find_op("gelu_and_mul")
_GELU_OUT = find_op("gelu_and_mul_out")
_GELU_QUANT = find_op("gelu_and_mul_quant")
_GELU_TANH = find_op("gelu_tanh_and_mul")
_GELU_TANH_OUT = find_op("gelu_tanh_and_mul_out")
_GELU_TANH_QUANT = find_op("gelu_tanh_and_mul_quant")

_DTYPES = (torch.float16, torch.bfloat16, torch.float32)

Activation = Callable[[Tensor], Tensor]


def silu_and_mul(
    input: Tensor,
    out: Tensor | None = None,
    enable_pdl: bool | None = None,
    scale: float | Tensor | None = None,
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
        Where to write, ``[..., hidden]``; dtype and device of `input`, in memory of its own. Of
        float8_e4m3fn where `scale` is given.
    enable_pdl : bool, optional
        True: programmatic dependent launch, on GPUs of compute capability 9.0 and up.
    scale : float or Tensor, optional
        For an `out` of float8_e4m3fn: what its numbers are multiplied with to get the real ones, a
        number or a float32 tensor of one element. The result is divided by it in float32, rounded
        once and saturated at 448; NaN stays NaN.

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
    >>> out = torch.empty(1, 2, dtype=torch.float8_e4m3fn)
    >>> ridgeline.silu_and_mul(torch.tensor([[0.0, 1.0, 5.0, 10.0]]), out, scale=0.5).float()
    tensor([[ 0., 15.]])
    """
    if scale is not None:
        return _quantized("silu_and_mul", _SILU_QUANT, input, out, enable_pdl, scale)
    if out is None:
        refuse_grad("silu_and_mul", input)
        return _SILU(input, *((True,) if enable_pdl is True else ()))  # type: ignore[no-any-return]
    refuse_grad("silu_and_mul", input, out)
    _SILU_OUT(out, input, enable_pdl is True)
    return out


def gelu_and_mul(
    input: Tensor,
    out: Tensor | None = None,
    enable_pdl: bool | None = None,
    scale: float | Tensor | None = None,
) -> Tensor:
    """Gate with GELU: ``gelu(input[..., :hidden]) * input[..., hidden:]``.

    ``gelu(x) = x * Phi(x)``, Phi being the normal distribution function; computed in float32 and
    rounded once, the tail of negative numbers included.

    Parameters
    ----------
    input : Tensor
        ``[..., 2 * hidden]``, as in `silu_and_mul`.
    out : Tensor, optional
        Where to write, ``[..., hidden]``; dtype and device of `input`, in memory of its own. Of
        float8_e4m3fn where `scale` is given.
    enable_pdl : bool, optional
        True: programmatic dependent launch, on GPUs of compute capability 9.0 and up.
    scale : float or Tensor, optional
        For an `out` of float8_e4m3fn: what its numbers are multiplied with to get the real ones, a
        number or a float32 tensor of one element. The result is divided by it in float32, rounded
        once and saturated at 448; NaN stays NaN.

    Returns
    -------
    Tensor
        `out`, or a new contiguous tensor ``[..., hidden]`` of the input's dtype.

    Raises
    ------
    TypeError, ValueError, RuntimeError
        As in `silu_and_mul`.

    Examples
    --------
    >>> import torch, ridgeline
    >>> ridgeline.gelu_and_mul(torch.tensor([[0.0, 1.0, 5.0, 10.0]]))
    tensor([[0.0000, 8.4134]])
    """
    if scale is not None:
        return _quantized("gelu_and_mul", _GELU_QUANT, input, out, enable_pdl, scale)
    if out is None:
        refuse_grad("gelu_and_mul", input)
        return _GELU(input, *((True,) if enable_pdl is True else ()))  # type: ignore[no-any-return]
    refuse_grad("gelu_and_mul", input, out)
    _GELU_OUT(out, input, enable_pdl is True)
    return out


def gelu_tanh_and_mul(
    input: Tensor,
    out: Tensor | None = None,
    enable_pdl: bool | None = None,
    scale: float | Tensor | None = None,
) -> Tensor:
    """Gate with the tanh form of GELU, times the other half: GeGLU as Gemma has it.

    ``gelu(x) = x / 2 * (1 + tanh(sqrt(2 / pi) * (x + 0.044715 * x^3)))`` of
    ``input[..., :hidden]``, times ``input[..., hidden:]``; computed in float32 and rounded once.

    Parameters
    ----------
    input : Tensor
        ``[..., 2 * hidden]``, as in `silu_and_mul`.
    out : Tensor, optional
        Where to write, ``[..., hidden]``; dtype and device of `input`, in memory of its own. Of
        float8_e4m3fn where `scale` is given.
    enable_pdl : bool, optional
        True: programmatic dependent launch, on GPUs of compute capability 9.0 and up.
    scale : float or Tensor, optional
        For an `out` of float8_e4m3fn: what its numbers are multiplied with to get the real ones, a
        number or a float32 tensor of one element. The result is divided by it in float32, rounded
        once and saturated at 448; NaN stays NaN.

    Returns
    -------
    Tensor
        `out`, or a new contiguous tensor ``[..., hidden]`` of the input's dtype.

    Raises
    ------
    TypeError, ValueError, RuntimeError
        As in `silu_and_mul`.

    Examples
    --------
    >>> import torch, ridgeline
    >>> ridgeline.gelu_tanh_and_mul(torch.tensor([[0.0, 1.0, 5.0, 10.0]]))
    tensor([[0.0000, 8.4119]])
    """
    if scale is not None:
        return _quantized("gelu_tanh_and_mul", _GELU_TANH_QUANT, input, out, enable_pdl, scale)
    if out is None:
        refuse_grad("gelu_tanh_and_mul", input)
        return _GELU_TANH(input, *((True,) if enable_pdl is True else ()))  # type: ignore[no-any-return]
    refuse_grad("gelu_tanh_and_mul", input, out)
    _GELU_TANH_OUT(out, input, enable_pdl is True)
    return out


def _quantized(
    name: str,
    op: Callable[..., None],
    input: Tensor,
    out: Tensor | None,
    enable_pdl: bool | None,
    scale: float | Tensor,
) -> Tensor:
    refuse_grad(name, input)
    if out is None:
        out = input.new_empty(_output_shape(input), dtype=torch.float8_e4m3fn)
    op(out, input, *_quant.split_scale(scale), enable_pdl is True)
    return out


def _silu(x: Tensor) -> Tensor:
    return _sigmoid_gated(x, 0.5 * x)


def _gelu_tanh(x: Tensor) -> Tensor:
    root = 0.7978845608028654  # sqrt(2 / pi)
    return _sigmoid_gated(x, x * (root * 0.044715 * x * x + root))


def _sigmoid_gated(x: Tensor, half: Tensor) -> Tensor:
    """``x * sigmoid(2 * half)``."""
    # exp(-|half|), squared, neither overflows nor goes subnormal where the result is not zero.
    half_exp = torch.exp(-half.abs())
    numerator = torch.where(half < 0, x * half_exp * half_exp, x)
    return numerator / (1 + half_exp * half_exp)


def _gelu(x: Tensor) -> Tensor:
    wide = x.double()  # in float32 the argument's rounding alone costs the tail its digits
    product: Tensor = 0.5 * wide * torch.special.erfc(-(0.5**0.5) * wide)
    return product.float()


def _register_cpu(op: str, activation: Activation) -> None:
    @cpu_impl(op)
    def fresh(input: Tensor, enable_pdl: bool = False) -> Tensor:
        _check_input(op, input, enable_pdl)
        return _gated(input, activation).to(input.dtype)

    @cpu_impl(f"{op}_out")
    def into_out(out: Tensor, input: Tensor, enable_pdl: bool = False) -> None:
        _check_input(op, input, enable_pdl)
        _check.same_device(op, "out", out, "input", input)
        _check.same_dtype(op, "out", out, "input", input)
        _check_out(op, out, input)
        out.copy_(_gated(input, activation))

    @cpu_impl(f"{op}_quant")
    def quant(
        out: Tensor,
        input: Tensor,
        scale: Tensor | None,
        scale_value: float,
        enable_pdl: bool = False,
    ) -> None:
        _check_input(op, input, enable_pdl)
        _check.same_device(op, "out", out, "input", input)
        _check.dtype(op, "out", out, (torch.float8_e4m3fn,))
        _check_out(op, out, input)
        _quant.check_scale(op, scale, scale_value, input)
        _quant.quantized(out, _gated(input, activation), scale, scale_value, None)


_register_cpu("silu_and_mul", _silu)
_register_cpu("gelu_and_mul", _gelu)
_register_cpu("gelu_tanh_and_mul", _gelu_tanh)


@fake_impl("silu_and_mul")
@fake_impl("gelu_and_mul")
@fake_impl("gelu_tanh_and_mul")
def _fresh_fake(input: Tensor, *_: object) -> Tensor:
    return input.new_empty(_output_shape(input))


@fake_impl("silu_and_mul_out")
@fake_impl("silu_and_mul_quant")
@fake_impl("gelu_and_mul_out")
@fake_impl("gelu_and_mul_quant")
@fake_impl("gelu_tanh_and_mul_out")
@fake_impl("gelu_tanh_and_mul_quant")
def _returns_nothing(*_: object) -> None:
    return None


def _output_shape(input: Tensor) -> list[int]:
    return [*input.shape[:-1], input.shape[-1] // 2]


def _gated(input: Tensor, activation: Activation) -> Tensor:
    """float32, not rounded yet."""
    gate, value = input.contiguous().float().chunk(2, dim=-1)
    gated: Tensor = activation(gate) * value
    return gated


def _check_out(op: str, out: Tensor, input: Tensor) -> None:
    _check.shape(op, "out", out, _output_shape(input), "[..., hidden]")
    _check.last_stride(op, "out", out)
    _overlap.writable(op, "out", out)
    _overlap.distinct(op, "out", out, "input", input)


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
