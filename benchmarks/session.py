"""What a benchmark is given: the device, the timer, the ceilings, and how to measure a case."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from .roofline import NOTHING_MEASURED, Ceilings, measure
from .table import Row
from .timer import Call, Timer

MAX_DIFFERENCE = 2e-2
# Why: the launch of a graph is nothing beside a long call, and sixteen copies of it are slow.
MAX_NET_US = 500.0


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
        self,
        op: str,
        case: str,
        call: Call,
        *,
        peers: Mapping[str, Callable[[], Call]],
        num_read: float = 0.0,
        num_written: float = 0.0,
        num_flops: float = 0.0,
        predicted_us: float | None = None,
        net: bool = True,
    ) -> Row:
        """Measure ours, then every peer that runs here; compare what they return.

        A peer is given as a function that prepares it and returns its call. One that raises is left
        out, and a note says why. Without `net` the time inside a longer graph is not measured.
        """
        limit = self.ceilings.memory_us(num_read, num_written)
        if num_flops:
            limit = max(limit, self.ceilings.math_us(num_flops))
        us = self.timer.time(call)
        row = Row(
            op=op,
            case=case,
            us=us,
            net_us=self.timer.net(call) if net and us < MAX_NET_US else None,
            num_bytes=num_read + num_written,
            num_flops=num_flops,
            limit_us=None if self.dry_run else limit,
            predicted_us=predicted_us,
        )
        for name, prepare in peers.items():
            self._measure_peer(row, name, prepare, call)
        return row

    def _measure_peer(self, row: Row, name: str, prepare: Callable[[], Call], ours: Call) -> None:
        try:
            peer = prepare()
            difference = relative_difference(ours(), peer())
            us = self.timer.time(peer)
        except Exception as error:
            reason = str(error).strip().splitlines()
            text = f"{type(error).__name__}: {reason[0] if reason else ''}"[:160]
            row.notes.append(f"{name} did not run ({row.op}): {text}")
            return
        row.peers[name] = us
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
