"""Work lists that the runs of a plan, or of a CUDA-graph capture, share."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ._capture import current_capture, is_capturing
from ._list_report import ListReport, new_report

# Most work lists kept at a time; a step needs one for each mask that its layers use.
_MAX_LISTS = 16

Key = tuple[int, ...]


class WorkLists:
    """Lists by what they were made for: lengths that are the host's, flags, windows."""

    def __init__(self) -> None:
        self.eager: dict[Key, Tensor] = {}
        self.reports: dict[Key, ListReport] = {}  # of some eager ones
        self.captured: dict[Key, Tensor] = {}
        self._capture = -1

    def clear(self) -> None:
        """Forget all lists: there is another plan."""
        self.eager = {}
        self.reports = {}
        self.captured = {}

    def keep_report(self, key: Key) -> None:
        """Ask for the report of an eager list that has just been made."""
        report = new_report()
        if len(self.eager) == 1:
            self.reports.clear()
        if report is not None:
            self.reports[key] = report

    def find(
        self,
        key: Key,
        make: Callable[..., Tensor],
        gpu: torch.device | None,
        begin_capture: Callable[[], None],
    ) -> Tensor:
        """The list of a key, made (of the key's numbers) when first asked for.

        On a `gpu` the runs of a capture share theirs, where the driver tells which capture it is;
        `begin_capture` is called at the first run of one.
        """
        if gpu is None or not is_capturing(gpu.index):
            return _shared(self.eager, key, key, make)
        found = current_capture(gpu)
        if found is None:
            return make(*key)
        capture, stream = found
        if capture != self._capture:
            self._capture, self.captured = capture, {}
            begin_capture()
        # Why the stream: another one of the capture need not wait for the one that made it.
        return _shared(self.captured, (*key, stream), key, make)


def _shared(lists: dict[Key, Tensor], place: Key, key: Key, make: Callable[..., Tensor]) -> Tensor:
    work = lists.get(place)
    if work is None:
        if len(lists) >= _MAX_LISTS:
            lists.clear()
        work = lists[place] = make(*key)
    return work
