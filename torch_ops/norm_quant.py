"""Norms whose outputs are 8-bit numbers: one pass instead of a norm and a quantization."""

from __future__ import annotations

import torch
from torch import Tensor

from . import _check, _overlap, _quant
from ._ops import cpu_impl, fake_impl, find_op, refuse_grad
from .norm import (
    check_arguments,
    check_layernorm,
    check_residual,
    layer_normalized,
    normalized,
)

__all__ = ["fused_add_rmsnorm_quant", "layernorm_quant", "rmsnorm_quant"]

_RMSNORM_QUANT = find_op("rmsnorm_quant")
_FUSED_ADD_RMSNORM_QUANT = find_op("fused_add_rmsnorm_quant")
_LAYERNORM_QUANT = find_op("layernorm_quant")


def rmsnorm_quant(
    out: Tensor,
    input: Tensor,
    weight: Tensor,
    scale: float | Tensor | None = None,
    eps: float = 1e-6,
    enable_pdl: bool | None = None,
) -> Tensor | None:
    """Normalise as `rmsnorm` does and store 8-bit numbers.

    ``out = saturate(rmsnorm(input, weight, eps) / scale)``.

    Computed in float32 and rounded once, to nearest even; what exceeds the type's range becomes its
    largest number. NaN stays NaN in fp8 and becomes 0 in int8.

    Parameters
    ----------
    out : Tensor
        ``[..., hidden]``, float8_e4m3fn or int8, strides as in `rmsnorm`; overwritten.
    input : Tensor
        ``[..., hidden]``, float16, bfloat16 or float32, as in `rmsnorm`.
    weight : Tensor
        ``[hidden]``, of the input's dtype or float32.
    scale : float or Tensor, optional
        What an 8-bit number is multiplied with to get the real one: a number, or a float32 tensor
        of one element. None: a scale for each row, the row's largest magnitude over the type's
        largest number (448 or 127), is computed and returned.
    eps : float
        Added to the mean, at least 0.
    enable_pdl : bool, optional
        True: programmatic dependent launch, on GPUs of compute capability 9.0 and up.

    Returns
    -------
    Tensor or None
        The rows' scales, ``[..., 1]``, float32, where `scale` is None.

    Raises
    ------
    TypeError, ValueError, RuntimeError
        As in `rmsnorm`.

    Examples
    --------
    >>> import torch, ridgeline
    >>> x, out = torch.tensor([[3.0, 4.0]]), torch.empty(1, 2, dtype=torch.int8)
    >>> ridgeline.rmsnorm_quant(out, x, torch.ones(2), scale=0.01)
    >>> out
    tensor([[ 85, 113]], dtype=torch.int8)
    >>> ridgeline.rmsnorm_quant(out, x, torch.ones(2)), out
    (tensor([[0.0089]]), tensor([[ 95, 127]], dtype=torch.int8))
    """
    refuse_grad("rmsnorm_quant", input, weight)
    token_scale, tensor, number = _scales(out, scale)
    _RMSNORM_QUANT(out, input, weight, token_scale, tensor, number, eps, enable_pdl is True)
    return token_scale


def fused_add_rmsnorm_quant(
    out: Tensor,
    input: Tensor,
    residual: Tensor,
    weight: Tensor,
    scale: float | Tensor | None = None,
    eps: float = 1e-6,
    enable_pdl: bool | None = None,
) -> Tensor | None:
    """Add to the residual in place, normalise the sum and store 8-bit numbers.

    ``residual += input``, then ``out = saturate(rmsnorm(residual, weight, eps) / scale)``. The sum
    is rounded to the dtype first, and the rounded value is what is stored and normalised; `input`
    keeps its contents.

    Parameters
    ----------
    out : Tensor
        ``[..., hidden]``, float8_e4m3fn or int8; overwritten.
    input : Tensor
        ``[..., hidden]``, float16, bfloat16 or float32, as in `rmsnorm`.
    residual : Tensor
        As `input`, in memory of its own; overwritten with the sum.
    weight : Tensor
        ``[hidden]``, of the input's dtype or float32.
    scale : float or Tensor, optional
        As in `rmsnorm_quant`. None: a scale for each row is computed and returned.
    eps : float
        Added to the mean, at least 0.
    enable_pdl : bool, optional
        True: programmatic dependent launch, on GPUs of compute capability 9.0 and up.

    Returns
    -------
    Tensor or None
        The rows' scales, ``[..., 1]``, float32, where `scale` is None.

    Raises
    ------
    TypeError, ValueError, RuntimeError
        As in `rmsnorm`.

    Examples
    --------
    >>> import torch, ridgeline
    >>> x, residual = torch.tensor([[1.0, 2.0]]), torch.tensor([[2.0, 2.0]])
    >>> out = torch.empty(1, 2, dtype=torch.int8)
    >>> ridgeline.fused_add_rmsnorm_quant(out, x, residual, torch.ones(2), scale=0.01)
    >>> residual, out
    (tensor([[3., 4.]]), tensor([[ 85, 113]], dtype=torch.int8))
    """
    refuse_grad("fused_add_rmsnorm_quant", input, residual, weight)
    token_scale, tensor, number = _scales(out, scale)
    pdl = enable_pdl is True
    scales = (token_scale, tensor, number)
    _FUSED_ADD_RMSNORM_QUANT(out, input, residual, weight, *scales, eps, pdl)
    return token_scale


def layernorm_quant(
    out: Tensor,
    input: Tensor,
    gamma: Tensor,
    beta: Tensor,
    scale: float | Tensor | None = None,
    eps: float = 1e-6,
) -> Tensor | None:
    """Normalise as `layernorm` does and store 8-bit numbers.

    ``out = saturate(layernorm(input, gamma, beta, eps) / scale)``, rounded once as in
    `rmsnorm_quant`.

    Parameters
    ----------
    out : Tensor
        ``[..., hidden]``, float8_e4m3fn or int8; overwritten.
    input : Tensor
        ``[..., hidden]``, float16, bfloat16 or float32, as in `rmsnorm`.
    gamma, beta : Tensor
        ``[hidden]``, both of the input's dtype or both float32.
    scale : float or Tensor, optional
        As in `rmsnorm_quant`. None: a scale for each row is computed and returned.
    eps : float
        Added to the variance, at least 0.

    Returns
    -------
    Tensor or None
        The rows' scales, ``[..., 1]``, float32, where `scale` is None.

    Raises
    ------
    TypeError, ValueError, RuntimeError
        As in `rmsnorm`.

    Examples
    --------
    >>> import torch, ridgeline
    >>> x, out = torch.tensor([[1.0, 3.0]]), torch.empty(1, 2, dtype=torch.int8)
    >>> ridgeline.layernorm_quant(out, x, torch.ones(2), torch.zeros(2), scale=0.01)
    >>> out
    tensor([[-100,  100]], dtype=torch.int8)
    """
    refuse_grad("layernorm_quant", input, gamma, beta)
    token_scale, tensor, number = _scales(out, scale)
    _LAYERNORM_QUANT(out, input, gamma, beta, token_scale, tensor, number, eps)
    return token_scale


def _scales(
    out: Tensor, scale: float | Tensor | None
) -> tuple[Tensor | None, Tensor | None, float]:
    """Room for the rows' scales, or the given scale as a tensor or a number."""
    if scale is None:
        shape = [*out.shape[:-1], 1] if out.dim() else [1]
        return out.new_empty(shape, dtype=torch.float32), None, 1.0
    return None, *_quant.split_scale(scale)


@cpu_impl("rmsnorm_quant")
def _rmsnorm_quant_cpu(
    out: Tensor,
    input: Tensor,
    weight: Tensor,
    token_scale: Tensor | None,
    scale: Tensor | None,
    scale_value: float,
    eps: float,
    enable_pdl: bool = False,
) -> None:
    op = "rmsnorm_quant"
    check_arguments(op, input, weight, eps, enable_pdl)
    _check_out(op, out, input, {"weight": weight})
    _quant.check_row_scale(op, scale, scale_value, token_scale, out)
    _quant.quantized(out, normalized(input, weight, eps), scale, scale_value, token_scale)


@cpu_impl("fused_add_rmsnorm_quant")
def _fused_add_rmsnorm_quant_cpu(
    out: Tensor,
    input: Tensor,
    residual: Tensor,
    weight: Tensor,
    token_scale: Tensor | None,
    scale: Tensor | None,
    scale_value: float,
    eps: float,
    enable_pdl: bool = False,
) -> None:
    op = "fused_add_rmsnorm_quant"
    check_arguments(op, input, weight, eps, enable_pdl)
    check_residual(op, input, residual, weight)
    _check_out(op, out, input, {"residual": residual, "weight": weight})
    _quant.check_row_scale(op, scale, scale_value, token_scale, out)
    residual.copy_(residual.float() + input.float())
    _quant.quantized(out, normalized(residual, weight, eps), scale, scale_value, token_scale)


@cpu_impl("layernorm_quant")
def _layernorm_quant_cpu(
    out: Tensor,
    input: Tensor,
    gamma: Tensor,
    beta: Tensor,
    token_scale: Tensor | None,
    scale: Tensor | None,
    scale_value: float,
    eps: float,
) -> None:
    op = "layernorm_quant"
    check_layernorm(op, input, gamma, beta, eps)
    _check_out(op, out, input, {"gamma": gamma, "beta": beta})
    _quant.check_row_scale(op, scale, scale_value, token_scale, out)
    rows = layer_normalized(input, gamma, beta, eps)
    _quant.quantized(out, rows, scale, scale_value, token_scale)


@fake_impl("rmsnorm_quant")
@fake_impl("fused_add_rmsnorm_quant")
@fake_impl("layernorm_quant")
def _returns_nothing(*_: object) -> None:
    return None


def _check_out(op: str, out: Tensor, input: Tensor, others: dict[str, Tensor]) -> None:
    _check.same_device(op, "out", out, "input", input)
    _check.dtype(op, "out", out, _quant.FUSED_DTYPES)
    _check.shape(op, "out", out, input.shape, "that of 'input'")
    _check.last_stride(op, "out", out)
    _overlap.writable(op, "out", out)
    for name, tensor in {"input": input, **others}.items():
        _overlap.distinct(op, "out", out, name, tensor)
