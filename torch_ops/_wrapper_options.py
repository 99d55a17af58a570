"""Arguments that every wrapper has, checked in one place: those of later versions, and dtypes."""

from __future__ import annotations

import torch
from torch import Tensor

from . import _check
from ._attention_cpu import one_of, refuse_given

_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def refuse_backend(where: str, backend: str) -> None:
    """Raise unless the backend is one that there is."""
    if backend == "fa3":
        _check.not_yet(where, "backend", backend, 'Use "auto" or "fa2".')
    one_of(where, "backend", backend, ("auto", "fa2"))


def refuse_run_options(where: str, args: tuple[object, ...], **options: object) -> None:
    """Raise for what a run does not take yet."""
    if args:
        got = f"{len(args)} of them"
        way_out = "They belong to custom variants; pass options by name."
        _check.not_yet(where, "args", got, way_out)
    refuse_given(where, **options)


def invariant(
    where: str, batch_invariant: bool, fixed_split_size: int | None, disable_split_kv: bool
) -> bool:
    """Whether cuts must depend on a request's own length alone."""
    if fixed_split_size is not None and fixed_split_size < 1:
        way_out = "Pass batch_invariant=True; the size itself is chosen by the kernel."
        _check.fail(where, "fixed_split_size", "at least 1", fixed_split_size, way_out)
    return batch_invariant or fixed_split_size is not None or disable_split_kv


def as_dtype(where: str, name: str, value: object) -> torch.dtype:
    """A dtype from itself or its name."""
    given = getattr(torch, value, None) if isinstance(value, str) else value
    if not isinstance(given, torch.dtype):
        way_out = 'Pass a torch.dtype or its name, such as "float16".'
        _check.fail(where, name, "a dtype", repr(value), way_out)
    return given


def dtypes_of(where: str, q: object, kv: object, out: object) -> torch.dtype:
    """The dtype of queries, cache and output, which is one so far."""
    dtype = as_dtype(where, "q_data_type", q)
    if dtype in _DTYPES and (kv is None or kv is q) and (out is None or out is q):
        return dtype
    one_of(where, "q_data_type", dtype, _DTYPES)
    for name, value in (("kv_data_type", kv), ("o_data_type", out)):
        if value is not None and as_dtype(where, name, value) != dtype:
            way_out = f"Leave it out; it is {dtype}, as q_data_type is."
            _check.not_yet(where, name, value, way_out)
    return dtype


def last_of(tensor: Tensor, given: int | None) -> int | None:
    """The last element of an indptr where reading it waits for no GPU; `given` if there is one."""
    if given is not None or tensor.device.type != "cpu" or tensor.dim() != 1 or not len(tensor):
        return given
    return int(tensor[-1])
