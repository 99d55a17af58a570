"""What a benchmark is given: the device, the timer, the ceilings, and how to measure a case."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypedDict

import torch

from .roofline import NOTHING_MEASURED, Ceilings, measure
from .table import Row
from .timer import Call, Timer

if TYPE_CHECKING:
    from typing_extensions import Unpack

MAX_DIFFERENCE = 2e-2
# Why: the launch of a graph is nothing beside a long call, and sixteen copies of it are slow.
MAX_NET_US = 500.0


class Facts(TypedDict, total=False):
    """What is known of a case before it is measured.

    A peer is given as a function that prepares it and returns its call. One that raises is left
    out, and a note says why.
    """

    peers: Mapping[str, Callable[[], Call]]
    num_read: float
    num_written: float
    num_flops: float
    predicted_us: float


@dataclass
class Entry:
    """A case that is ready to be measured: its row without times, and what each contender runs."""

    row: Row
    call: Call
    peers: dict[str, Call]  # as `Timer.prepare` gave them
    net: bool


@dataclass
class Session:
    """One process's measurements; a dry run goes through every line on tiny sizes on the CPU."""

    device: torch.device
    quick: bool = False
    dry_run: bool = False
    ceilings: Ceilings = NOTHING_MEASURED
    only: re.Pattern[str] | None = None
    roofline: bool = True

    def __post_init__(self) -> None:
        self.timer = Timer(self.device, budget_ms=20.0 if self.quick else 60.0)
        if self.roofline and not self.dry_run:
            self.ceilings = measure(self.timer)

    def randn(self, *shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
        return torch.randn(*shape, device=self.device, dtype=torch.float32).to(dtype)

    def sizes(self, full: list[int], quick: list[int], dry: list[int]) -> list[int]:
        return dry if self.dry_run else quick if self.quick else full

    def wants(self, case: str) -> bool:
        """Whether `--cells` lets a case through; the attention benchmarks ask."""
        return self.only is None or self.only.search(case) is not None

    def case(
        self, op: str, case: str, call: Call, *, net: bool = True, **facts: Unpack[Facts]
    ) -> Row:
        """Measure ours and every peer that runs here, in turns; compare what they return."""
        return self.measure([self.entry(op, case, call, net=net, **facts)])[0]

    def entry(
        self, op: str, case: str, call: Call, *, net: bool = False, **facts: Unpack[Facts]
    ) -> Entry:
        """Prepare a case for `measure`, and compare what its contenders return.

        Without `net` the time inside a longer graph is not measured.
        """
        num_read, num_written = facts.get("num_read", 0.0), facts.get("num_written", 0.0)
        num_flops = facts.get("num_flops", 0.0)
        limit = self.ceilings.memory_us(num_read, num_written)
        if num_flops:
            limit = max(limit, self.ceilings.math_us(num_flops))
        row = Row(
            op=op,
            case=case,
            us=math.nan,
            num_bytes=num_read + num_written,
            num_flops=num_flops,
            limit_us=None if self.dry_run else limit,
            predicted_us=facts.get("predicted_us"),
        )
        entry = Entry(row, call, {}, net)
        for name, prepare in facts.get("peers", {}).items():
            self._add_peer(entry, name, prepare)
        return entry

    def measure(self, entries: Sequence[Entry]) -> list[Row]:
        """Measure every contender of every entry, all in turns."""
        ours = [self.timer.prepare(entry.call) for entry in entries]
        peers = [peer for entry in entries for peer in entry.peers.values()]
        times = iter(self.timer.together([*ours, *peers]))
        for entry in entries:
            entry.row.us = next(times)
        for entry in entries:
            entry.row.peers = {name: next(times) for name in entry.peers}
            if entry.net and entry.row.us < MAX_NET_US:
                entry.row.net_us = self.timer.net(entry.call)
        return [entry.row for entry in entries]

    def _add_peer(self, entry: Entry, name: str, prepare: Callable[[], Call]) -> None:
        row = entry.row
        try:
            peer = prepare()
            difference = relative_difference(entry.call(), peer())
            entry.peers[name] = self.timer.prepare(peer)
        except Exception as error:
            reason = str(error).strip().splitlines()
            text = f"{type(error).__name__}: {reason[0] if reason else ''}"[:160]
            row.notes.append(f"{name} did not run ({row.op}): {text}")
            return
        if difference is not None:
            row.difference = max(difference, row.difference or 0.0)
            if not difference < MAX_DIFFERENCE:
                row.notes.append(
                    f"WRONG: {row.op} {row.case} differs from {name} by {difference:.1e}"
                )


def relative_difference(ours: object, theirs: object) -> float | None:
    """Norm of the difference over the norm of theirs, when both are tensors of one size."""
    if isinstance(ours, tuple) and isinstance(theirs, tuple):
        pairs = [relative_difference(a, b) for a, b in zip(ours, theirs, strict=True)]
        known = [value for value in pairs if value is not None]
        return max(known) if known else None
    if not isinstance(ours, torch.Tensor) or not isinstance(theirs, torch.Tensor):
        return None
    a, b = ours.float().flatten(), theirs.float().flatten()
    if a.numel() != b.numel():
        return None
    return float((a - b).norm() / b.norm().clamp_min(1e-20))
