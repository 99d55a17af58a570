"""What every op family uses to register its Python side and to call its ops."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch

from . import _library as _library  # registers the schemas

_Function = TypeVar("_Function", bound=Callable[..., Any])

# csrc/runtime/ops.h says why there are two.
_NAMESPACES = ("ridgeline", "ridgeline_unguarded")
_cpu = [torch.library.Library(name, "IMPL", "CPU") for name in _NAMESPACES]
_autograd, _no_autograd = [torch.library.Library(name, "IMPL", "Autograd") for name in _NAMESPACES]
_fragments = [torch.library.Library(name, "FRAGMENT") for name in _NAMESPACES]
_below_autograd = torch._C._AutoDispatchBelowAutograd
is_compiling = torch.compiler.is_compiling
is_grad_enabled = torch.is_grad_enabled


def cpu_impl(name: str) -> Callable[[_Function], _Function]:
    """Registers a function as the CPU implementation of an op."""

    def register(function: _Function) -> _Function:
        for library in _cpu:
            library.impl(name, function)
        return function

    return register


def fake_impl(name: str) -> Callable[[_Function], _Function]:
    """Registers a function as the fake of an op, and the guard against missing gradients."""

    def register(function: _Function) -> _Function:
        for library in _fragments:
            torch.library.register_fake(f"{library.ns}::{name}", function, lib=library)
        _guard_gradients(name)
        _no_autograd.impl(name, torch.library.fallthrough_kernel)
        return function

    return register


def find_op(name: str) -> Callable[..., Any]:
    """A function that calls an op on tensors that `refuse_grad` has checked.

    Trailing arguments that have the schema's default are best left out: one that is passed costs
    0.2 us, one that is not next to nothing.
    """
    traced = getattr(torch.ops.ridgeline, name).default
    eager = find_eager_op(name)

    def call(*args: Any) -> Any:
        return traced(*args) if is_compiling() else eager(*args)

    return call


def find_eager_op(name: str) -> Callable[..., Any]:
    """The same for callers that know that nothing traces them."""
    # Why _op: what the overload's own __call__ calls, without its frame.
    eager: Callable[..., Any] = getattr(torch.ops.ridgeline_unguarded, name).default._op
    return eager


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
