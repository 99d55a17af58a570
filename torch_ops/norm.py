"""Normalisation by the root mean square of the last dimension, with and without a residual."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from . import _check, _overlap
from ._ops import cpu_impl, fake_impl, find_op, refuse_grad

__all__ = ["fused_add_rmsnorm", "rmsnorm"]

_RMSNORM = find_op("rmsnorm")
_RMSNORM_OUT = find_op("rmsnorm_out")
_FUSED_ADD_RMSNORM = find_op("fused_add_rmsnorm")

_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def rmsnorm(
    input: Tensor,
    weight: Tensor,
    eps: float = 1e-6,
    out: Tensor | None = None,
    enable_pdl: bool | None = None,
) -> Tensor:
    """Divide rows by their root mean square: ``input / sqrt(mean(input^2) + eps) * weight``.

    Computed in float32 and rounded once (Zhang and Sennrich, "Root Mean Square Layer
    Normalization", 2019). A row's bits do not depend on the rows around it.

    Parameters
    ----------
    input : Tensor
        ``[..., hidden]``, float16, bfloat16 or float32; any hidden size from 1 and any strides but
        a last one of 1. On CUDA the leading dimensions must fold into two; views that are aligned
        to 16 bytes are faster.
    weight : Tensor
        ``[hidden]``, of the input's dtype or float32.
    eps : float
        Added to the mean, at least 0.
    out : Tensor, optional
        Where to write; shape, dtype and device of `input`, and it may be `input` itself.
    enable_pdl : bool, optional
        True: programmatic dependent launch, on GPUs of compute capability 9.0 and up.

    Returns
    -------
    Tensor
        `out`, or a new contiguous tensor of the input's shape and dtype.

    Raises
    ------
    TypeError, ValueError
        On the CPU, for an argument that does not fit; the message names it.
    RuntimeError
        The same on CUDA; on both, when grad mode is on and an argument requires grad.

    Examples
    --------
    >>> import torch, ridgeline
    >>> ridgeline.rmsnorm(torch.tensor([[3.0, 4.0]]), torch.ones(2))
    tensor([[0.8485, 1.1314]])
    """
    if out is None:
        refuse_grad("rmsnorm", input, weight)
        return _RMSNORM(input, weight, *_options(eps, enable_pdl))  # type: ignore[no-any-return]
    refuse_grad("rmsnorm", input, weight, out)
    _RMSNORM_OUT(out, input, weight, *_options(eps, enable_pdl))
    return out


def fused_add_rmsnorm(
    input: Tensor,
    residual: Tensor,
    weight: Tensor,
    eps: float = 1e-6,
    enable_pdl: bool | None = None,
) -> None:
    """Add to the residual and normalise the sum, both in place.

    ``residual += input``, then ``input = rmsnorm(residual, weight, eps)``. The sum is rounded to
    the dtype first, and the rounded value is what is stored and normalised.

    Parameters
    ----------
    input : Tensor
        ``[..., hidden]``, float16, bfloat16 or float32, strides as in `rmsnorm`; overwritten with
        the normalised sum.
    residual : Tensor
        As `input`, in memory of its own; overwritten with the sum.
    weight : Tensor
        ``[hidden]``, of the input's dtype or float32.
    eps : float
        Added to the mean, at least 0.
    enable_pdl : bool, optional
        True: programmatic dependent launch, on GPUs of compute capability 9.0 and up.

    Raises
    ------
    TypeError, ValueError, RuntimeError
        As in `rmsnorm`.

    Examples
    --------
    >>> import torch, ridgeline
    >>> x, residual = torch.tensor([[1.0, 2.0]]), torch.tensor([[2.0, 2.0]])
    >>> ridgeline.fused_add_rmsnorm(x, residual, torch.ones(2))
    >>> residual, x
    (tensor([[3., 4.]]), tensor([[0.8485, 1.1314]]))
    """
    refuse_grad("fused_add_rmsnorm", input, residual, weight)
    _FUSED_ADD_RMSNORM(input, residual, weight, *_options(eps, enable_pdl))


def _options(eps: float, enable_pdl: bool | None) -> tuple[float | bool, ...]:
    """The last arguments of an op, without those that have its defaults."""
    if enable_pdl is True:
        return (eps, True)
    return () if eps == 1e-6 else (eps,)


@cpu_impl("rmsnorm")
def _rmsnorm_cpu(
    input: Tensor, weight: Tensor, eps: float = 1e-6, enable_pdl: bool = False
) -> Tensor:
    _check_arguments("rmsnorm", input, weight, eps, enable_pdl)
    return _normalized(input, weight, eps)


@cpu_impl("rmsnorm_out")
def _rmsnorm_out_cpu(
    out: Tensor, input: Tensor, weight: Tensor, eps: float = 1e-6, enable_pdl: bool = False
) -> None:
    _check_arguments("rmsnorm", input, weight, eps, enable_pdl)
    _check_like_input("rmsnorm", "out", out, input)
    _overlap.writable("rmsnorm", "out", out)
    _overlap.out("rmsnorm", out, "input", input)
    _overlap.distinct("rmsnorm", "out", out, "weight", weight)
    out.copy_(_normalized(input, weight, eps))


@cpu_impl("fused_add_rmsnorm")
def _fused_add_rmsnorm_cpu(
    input: Tensor, residual: Tensor, weight: Tensor, eps: float = 1e-6, enable_pdl: bool = False
) -> None:
    op = "fused_add_rmsnorm"
    _check_arguments(op, input, weight, eps, enable_pdl)
    _check_like_input(op, "residual", residual, input)
    _overlap.writable(op, "input", input)
    _overlap.writable(op, "residual", residual)
    _overlap.distinct(op, "residual", residual, "input", input)
    _overlap.distinct(op, "input", input, "weight", weight)
    _overlap.distinct(op, "residual", residual, "weight", weight)
    residual.copy_(residual.float() + input.float())
    input.copy_(_normalized(residual, weight, eps))


@fake_impl("rmsnorm")
def _rmsnorm_fake(input: Tensor, *_: object) -> Tensor:
    return input.new_empty(input.shape)


@fake_impl("rmsnorm_out")
@fake_impl("fused_add_rmsnorm")
def _returns_nothing(*_: object) -> None:
    return None


def _normalized(input: Tensor, weight: Tensor, eps: float) -> Tensor:
    x = input.contiguous().float()
    scale = torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
    return (x * scale * weight.float()).to(input.dtype)


def _check_arguments(op: str, input: Tensor, weight: Tensor, eps: float, enable_pdl: bool) -> None:
    _check.dtype(op, "input", input, _DTYPES)
    if input.dim() == 0:
        _check.fail(
            op, "input", "at least 1 dimension", "a scalar", "Give it a shape [..., hidden]."
        )
    _check.last_stride(op, "input", input)
    _check.same_device(op, "weight", weight, "input", input)
    _check.rank(op, "weight", weight, 1)
    _check.shape(op, "weight", weight, input.shape[-1:], "[hidden]")
    if weight.dtype != torch.float32:
        _check.same_dtype(op, "weight", weight, "input", input)
    _check.last_stride(op, "weight", weight)
    if not (math.isfinite(eps) and eps >= 0):
        _check.fail(op, "eps", "a finite number >= 0", eps, "1e-6 is the default.")
    _check.no_pdl(op, enable_pdl)


def _check_like_input(op: str, arg: str, tensor: Tensor, input: Tensor) -> None:
    _check.same_device(op, arg, tensor, "input", input)
    _check.same_dtype(op, arg, tensor, "input", input)
    _check.shape(op, arg, tensor, input.shape, "that of 'input'")
    _check.last_stride(op, arg, tensor)
