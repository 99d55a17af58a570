"""Normalisation of the last dimension, with and without a residual."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from . import _check, _overlap
from ._ops import cpu_impl, fake_impl, find_op, refuse_grad

__all__ = [
    "fused_add_rmsnorm",
    "gemma_fused_add_rmsnorm",
    "gemma_rmsnorm",
    "layernorm",
    "rmsnorm",
]

_RMSNORM = find_op("rmsnorm")
_RMSNORM_OUT = find_op("rmsnorm_out")
_GEMMA_RMSNORM = find_op("gemma_rmsnorm")
_GEMMA_RMSNORM_OUT = find_op("gemma_rmsnorm_out")
_FUSED_ADD_RMSNORM = find_op("fused_add_rmsnorm")
_GEMMA_FUSED_ADD_RMSNORM = find_op("gemma_fused_add_rmsnorm")
_LAYERNORM = find_op("layernorm")

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


def gemma_rmsnorm(
    input: Tensor,
    weight: Tensor,
    eps: float = 1e-6,
    out: Tensor | None = None,
    enable_pdl: bool | None = None,
) -> Tensor:
    """Divide rows by their root mean square, weights counted from 1, as Gemma's models store them.

    ``input / sqrt(mean(input^2) + eps) * (1 + weight)``; otherwise as `rmsnorm`.

    Parameters
    ----------
    input : Tensor
        ``[..., hidden]``, as in `rmsnorm`.
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
    TypeError, ValueError, RuntimeError
        As in `rmsnorm`.

    Examples
    --------
    >>> import torch, ridgeline
    >>> ridgeline.gemma_rmsnorm(torch.tensor([[3.0, 4.0]]), torch.zeros(2))
    tensor([[0.8485, 1.1314]])
    """
    if out is None:
        refuse_grad("gemma_rmsnorm", input, weight)
        fresh: Tensor = _GEMMA_RMSNORM(input, weight, *_options(eps, enable_pdl))
        return fresh
    refuse_grad("gemma_rmsnorm", input, weight, out)
    _GEMMA_RMSNORM_OUT(out, input, weight, *_options(eps, enable_pdl))
    return out


def gemma_fused_add_rmsnorm(
    input: Tensor,
    residual: Tensor,
    weight: Tensor,
    eps: float = 1e-6,
    enable_pdl: bool | None = None,
) -> None:
    """Add to the residual and normalise the sum, both in place, weights counted from 1.

    ``residual += input``, then ``input = gemma_rmsnorm(residual, weight, eps)``; otherwise as
    `fused_add_rmsnorm`.

    Parameters
    ----------
    input : Tensor
        ``[..., hidden]``, as in `fused_add_rmsnorm`; overwritten with the normalised sum.
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
    >>> ridgeline.gemma_fused_add_rmsnorm(x, residual, torch.zeros(2))
    >>> residual, x
    (tensor([[3., 4.]]), tensor([[0.8485, 1.1314]]))
    """
    refuse_grad("gemma_fused_add_rmsnorm", input, residual, weight)
    _GEMMA_FUSED_ADD_RMSNORM(input, residual, weight, *_options(eps, enable_pdl))


def layernorm(input: Tensor, gamma: Tensor, beta: Tensor, eps: float = 1e-6) -> Tensor:
    """Take the mean from rows and divide them by their standard deviation.

    ``(input - mean) / sqrt(variance + eps) * gamma + beta``, the variance being the mean of the
    squared distances from the mean. Computed in float32 and rounded once (Ba, Kiros and Hinton,
    "Layer Normalization", 2016). A row's bits do not depend on the rows around it.

    Parameters
    ----------
    input : Tensor
        ``[..., hidden]``, as in `rmsnorm`.
    gamma, beta : Tensor
        ``[hidden]``, both of the input's dtype or both float32.
    eps : float
        Added to the variance, at least 0.

    Returns
    -------
    Tensor
        A new contiguous tensor of the input's shape and dtype.

    Raises
    ------
    TypeError, ValueError, RuntimeError
        As in `rmsnorm`.

    Examples
    --------
    >>> import torch, ridgeline
    >>> ridgeline.layernorm(torch.tensor([[1.0, 3.0]]), torch.ones(2), torch.zeros(2))
    tensor([[-1.0000,  1.0000]])
    """
    refuse_grad("layernorm", input, gamma, beta)
    return _LAYERNORM(input, gamma, beta, eps)  # type: ignore[no-any-return]


def _options(eps: float, enable_pdl: bool | None) -> tuple[float | bool, ...]:
    """The last arguments of an op, without those that have its defaults."""
    if enable_pdl is True:
        return (eps, True)
    return () if eps == 1e-6 else (eps,)


@cpu_impl("rmsnorm")
def _rmsnorm_cpu(
    input: Tensor, weight: Tensor, eps: float = 1e-6, enable_pdl: bool = False
) -> Tensor:
    check_arguments("rmsnorm", input, weight, eps, enable_pdl)
    return normalized(input, weight, eps).to(input.dtype)


@cpu_impl("gemma_rmsnorm")
def _gemma_rmsnorm_cpu(
    input: Tensor, weight: Tensor, eps: float = 1e-6, enable_pdl: bool = False
) -> Tensor:
    check_arguments("gemma_rmsnorm", input, weight, eps, enable_pdl)
    return normalized(input, weight, eps, 1.0).to(input.dtype)


@cpu_impl("rmsnorm_out")
def _rmsnorm_out_cpu(
    out: Tensor, input: Tensor, weight: Tensor, eps: float = 1e-6, enable_pdl: bool = False
) -> None:
    _check_out("rmsnorm", out, input, weight, eps, enable_pdl)
    out.copy_(normalized(input, weight, eps))


@cpu_impl("gemma_rmsnorm_out")
def _gemma_rmsnorm_out_cpu(
    out: Tensor, input: Tensor, weight: Tensor, eps: float = 1e-6, enable_pdl: bool = False
) -> None:
    _check_out("gemma_rmsnorm", out, input, weight, eps, enable_pdl)
    out.copy_(normalized(input, weight, eps, 1.0))


@cpu_impl("fused_add_rmsnorm")
def _fused_add_rmsnorm_cpu(
    input: Tensor, residual: Tensor, weight: Tensor, eps: float = 1e-6, enable_pdl: bool = False
) -> None:
    _check_fused_add("fused_add_rmsnorm", input, residual, weight, eps, enable_pdl)
    residual.copy_(residual.float() + input.float())
    input.copy_(normalized(residual, weight, eps))


@cpu_impl("gemma_fused_add_rmsnorm")
def _gemma_fused_add_rmsnorm_cpu(
    input: Tensor, residual: Tensor, weight: Tensor, eps: float = 1e-6, enable_pdl: bool = False
) -> None:
    _check_fused_add("gemma_fused_add_rmsnorm", input, residual, weight, eps, enable_pdl)
    residual.copy_(residual.float() + input.float())
    input.copy_(normalized(residual, weight, eps, 1.0))


@cpu_impl("layernorm")
def _layernorm_cpu(input: Tensor, gamma: Tensor, beta: Tensor, eps: float) -> Tensor:
    check_layernorm("layernorm", input, gamma, beta, eps)
    return layer_normalized(input, gamma, beta, eps).to(input.dtype)


@fake_impl("rmsnorm")
@fake_impl("gemma_rmsnorm")
@fake_impl("layernorm")
def _like_input(input: Tensor, *_: object) -> Tensor:
    return input.new_empty(input.shape)


@fake_impl("rmsnorm_out")
@fake_impl("gemma_rmsnorm_out")
@fake_impl("fused_add_rmsnorm")
@fake_impl("gemma_fused_add_rmsnorm")
def _returns_nothing(*_: object) -> None:
    return None


def normalized(input: Tensor, weight: Tensor, eps: float, offset: float = 0.0) -> Tensor:
    """float32, not rounded yet."""
    x = input.contiguous().float()
    scale = torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
    weights = weight.float() + offset if offset else weight.float()
    return x * scale * weights


def layer_normalized(input: Tensor, gamma: Tensor, beta: Tensor, eps: float) -> Tensor:
    """float32, not rounded yet."""
    x = input.contiguous().float()
    x = x - x.mean(-1, keepdim=True)
    scale = torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
    return x * scale * gamma.float() + beta.float()


def check_arguments(
    op: str,
    input: Tensor,
    weight: Tensor,
    eps: float,
    enable_pdl: bool = False,
    name: str = "weight",
) -> None:
    """The input and a vector as long as its rows."""
    _check.dtype(op, "input", input, _DTYPES)
    if input.dim() == 0:
        _check.fail(
            op, "input", "at least 1 dimension", "a scalar", "Give it a shape [..., hidden]."
        )
    _check.last_stride(op, "input", input)
    _check.same_device(op, name, weight, "input", input)
    _check.rank(op, name, weight, 1)
    _check.shape(op, name, weight, input.shape[-1:], "[hidden]")
    if weight.dtype != torch.float32:
        _check.same_dtype(op, name, weight, "input", input)
    _check.last_stride(op, name, weight)
    if not (math.isfinite(eps) and eps >= 0):
        _check.fail(op, "eps", "a finite number >= 0", eps, "1e-6 is the default.")
    _check.no_pdl(op, enable_pdl)


def check_layernorm(op: str, input: Tensor, gamma: Tensor, beta: Tensor, eps: float) -> None:
    check_arguments(op, input, gamma, eps, name="gamma")
    check_arguments(op, input, beta, eps, name="beta")
    _check.same_dtype(op, "beta", beta, "gamma", gamma)


def check_residual(op: str, input: Tensor, residual: Tensor, weight: Tensor) -> None:
    """A residual that is written beside its neighbours."""
    _check_like_input(op, "residual", residual, input)
    _overlap.writable(op, "residual", residual)
    _overlap.distinct(op, "residual", residual, "input", input)
    _overlap.distinct(op, "residual", residual, "weight", weight)


def _check_fused_add(
    op: str, input: Tensor, residual: Tensor, weight: Tensor, eps: float, enable_pdl: bool
) -> None:
    check_arguments(op, input, weight, eps, enable_pdl)
    check_residual(op, input, residual, weight)
    _overlap.writable(op, "input", input)
    _overlap.distinct(op, "input", input, "weight", weight)


def _check_out(
    op: str, out: Tensor, input: Tensor, weight: Tensor, eps: float, enable_pdl: bool
) -> None:
    check_arguments(op, input, weight, eps, enable_pdl)
    _check_like_input(op, "out", out, input)
    _overlap.writable(op, "out", out)
    _overlap.out(op, out, "input", input)
    _overlap.distinct(op, "out", out, "weight", weight)


def _check_like_input(op: str, arg: str, tensor: Tensor, input: Tensor) -> None:
    _check.same_device(op, arg, tensor, "input", input)
    _check.same_dtype(op, arg, tensor, "input", input)
    _check.shape(op, arg, tensor, input.shape, "that of 'input'")
    _check.last_stride(op, arg, tensor)
