"""The word that a work list leaves nothing to add up, from a kernel to the host.

Eager calls with tall tiles are two launches, of which the second often has nothing to do. Calls
with a list ask it to say so; once it has, later ones leave it out (csrc/ops/list_report.h).
"""

from __future__ import annotations

import ctypes
from functools import lru_cache
from itertools import count

from . import compiler

# In the ops' `flags`, as csrc/ops/batch_inputs.h has them.
_ASKS, _IS_COMPLETE = 16, 32
_NUM_PLACES = 512
_LOWER = (1 << 32) - 1
# Calls behind which no word is looked for any more: there is something to add up.
_MOST_CALLS = 64

_numbers = count(1)


class ListReport:
    """Of one list: looked for again and again, since nobody waits for it.

    Attributes
    ----------
    settled : int, optional
        What goes into the ops' `flags` beside their own, once that does not change any more.
    """

    __slots__ = ("_asks", "_calls", "_number", "_place", "settled")

    def __init__(self, place: int, number: int) -> None:
        self._place = ctypes.c_int64.from_address(place)
        self._number = number
        self._asks = number << 32 | _ASKS
        self._calls = 0
        self.settled: int | None = None

    def flags(self) -> int:
        """What goes into the `flags` of the next call beside their own."""
        value = self._place.value
        if value & _LOWER == self._number:
            self.settled = value & ~_LOWER | _IS_COMPLETE
            return self.settled
        self._calls += 1
        if self._calls > _MOST_CALLS:
            self.settled = 0
            return 0
        return self._asks

    def is_awaited(self) -> bool:
        """Whether it has still not come, nor been given up."""
        self.flags()
        return self.settled is None


def new_report() -> ListReport | None:
    """The report of a list that no call has had yet; None: there is no memory for it."""
    places = _places()
    if places is None:
        return None
    number = next(_numbers) % (1 << 31)
    return ListReport(places + 8 * (number % _NUM_PLACES), number) if number else None


@lru_cache(maxsize=1)
def _places() -> int | None:
    # Why [] and not an attribute: this makes an object of our own, with our own types.
    function = compiler.library().library["ridgeline_report_places"]
    function.restype = ctypes.c_void_p
    address: int | None = function()
    return address
