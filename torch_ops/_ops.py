"""What every op family uses to register its Python side and to call its ops."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch

from . import _library as _library  # registers the schemas

_Function = TypeVar("_Function", bound=Callable[..., Any])

_cpu = torch.library.Library("ridgeline", "IMPL", "CPU")
_autograd = torch.library.Library("ridgeline", "IMPL", "Autograd")
_fragment = torch.library.Library("ridgeline", "FRAGMENT")
_below_autograd = torch._C._AutoDispatchBelowAutograd
_exclude = torch._C._dispatch_tls_set_dispatch_key_excluded
_is_excluded = torch._C._dispatch_tls_is_dispatch_key_excluded
_AUTOGRAD_CUDA = torch._C.DispatchKey.AutogradCUDA
is_compiling = torch.compiler.is_compiling
is_grad_enabled = torch.is_grad_enabled


def cpu_impl(name: str) -> Callable[[_Function], _Function]:
    """Registers a function as the CPU implementation of an op."""

    def register(function: _Function) -> _Function:
        _cpu.impl(name, function)
        return function

    return register


def fake_impl(name: str) -> Callable[[_Function], _Function]:
    """Registers a function as the fake of an op, and the guard against missing gradients."""

    def register(function: _Function) -> _Function:
        torch.library.register_fake(f"ridgeline::{name}", function, lib=_fragment)
        _guard_gradients(name)
        return function

    return register


def call(op: torch._ops.OpOverload, *args: Any) -> Any:
    """Calls an op whose inputs `refuse_grad` has checked, without the autograd key's own check."""
    if is_compiling():
        return op(*args)
    # Why not a guard object: this does the same for CUDA tensors, at half of what the guard costs.
    # Why _op: what the overload's own __call__ calls, without its frame.
    if _is_excluded(_AUTOGRAD_CUDA):
        return op._op(*args)
    _exclude(_AUTOGRAD_CUDA, True)
    try:
        return op._op(*args)
    finally:
        _exclude(_AUTOGRAD_CUDA, False)


def refuse_grad(name: str, *tensors: torch.Tensor | None) -> None:
    """Raises RuntimeError when grad mode is on and one of the tensors requires grad."""
    if is_grad_enabled():
        for tensor in tensors:
            if tensor is not None and tensor.requires_grad:
                raise RuntimeError(_no_gradient(name))


def _no_gradient(name: str) -> str:
    return (
        f"ridgeline.{name}: an input requires grad, and this op has no backward. Call it under "
        "torch.inference_mode() or torch.no_grad(), or pass .detach()ed tensors."
    )


def _guard_gradients(name: str) -> None:
    op = getattr(torch.ops.ridgeline, name).default

    def guard(keyset: torch._C.DispatchKeySet, *args: Any, **kwargs: Any) -> Any:
        tensors = [a for a in (*args, *kwargs.values()) if isinstance(a, torch.Tensor)]
        refuse_grad(name, *tensors)
        with _below_autograd():
            return op.redispatch(keyset & torch._C._after_autograd_keyset, *args, **kwargs)

    _autograd.impl(name, guard, with_keyset=True)
