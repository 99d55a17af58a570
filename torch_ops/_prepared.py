"""Runs that differ from an earlier one in the addresses of their tensors alone.

The fourth run of a plan leaves everything else with the library (csrc/ops/batch_prepared.cpp); the
later ones pass q, k, v and the number of what was left. Whether a run is such a one is seen there,
where a question to a tensor costs a tenth of what it costs here.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import lru_cache
from typing import Any

from . import compiler
from ._list_report import ListReport
from ._ops import find_eager_op

PREPARE = find_eager_op("attention_prepare")
PREPARED = find_eager_op("attention_prepared")
PREPARED_LSE = find_eager_op("attention_prepared_lse")

# So many runs of a plan come first: preparing costs 14 us, what seven later runs save.
RUNS_BEFORE = 3
# So many calls at most does a plan prepare: where tensors look different again and again, it costs
# more than it saves.
MOST_PREPARED = 8


@lru_cache(maxsize=1)
def _forget() -> Any:
    # Why [] and not an attribute: this makes an object of our own, with our own types.
    function = compiler.library().library["ridgeline_forget_call"]
    function.argtypes = [ctypes.c_int64]
    function.restype = None
    return function


class PreparedCall:
    """What the library keeps, for as long as this object lives.

    Attributes
    ----------
    number : int
        The library's name for it.
    report : ListReport, optional
        What the call asks for, and does without once it has come.
    """

    __slots__ = ("number", "report")

    def __init__(self, number: int, report: ListReport | None) -> None:
        self.number = number
        self.report = report

    # Why an argument: globals may be gone when the interpreter ends.
    def __del__(self, forget: Callable[[], Any] = _forget) -> None:
        forget()(self.number)
