"""What the scheduler of a work list tells the host for calls to come (csrc/ops/list_report.h)."""

from __future__ import annotations

import ctypes
from functools import lru_cache
from typing import Any

from torch import Tensor

from . import compiler


class _Native(ctypes.Structure):
    _fields_ = (
        ("place", ctypes.c_void_p),
        ("value", ctypes.c_int64),
        ("flags", ctypes.c_int64),
    )


class ListReport:
    """Of one list: read again and again, since nobody waits for it."""

    __slots__ = ("_flags", "_place", "_value")

    def __init__(self, place: int, value: int, flags: int) -> None:
        self._place = ctypes.c_int64.from_address(place)
        self._value = value
        self._flags = flags

    def flags(self) -> int:
        """What the ops' `flags` may have by now, beside their own."""
        return self._flags if self._place.value == self._value else 0


@lru_cache(maxsize=1)
def _query() -> Any:
    """``ridgeline_list_report``: the address of a list to that of its report, or None."""
    # Why [] and not an attribute: this makes an object of our own, with our own types.
    query = compiler.library().library["ridgeline_list_report"]
    query.argtypes, query.restype = (ctypes.c_void_p,), ctypes.c_void_p
    return query


def report_of(work: Tensor) -> ListReport | None:
    """The report of a list that has just been made, where its scheduler makes one."""
    address = _query()(work.data_ptr())
    if address is None:
        return None
    native = _Native.from_address(address)
    return ListReport(native.place, native.value, native.flags)
