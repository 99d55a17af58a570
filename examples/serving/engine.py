"""The loop of the server: wait for arrivals, plan a step, run it, hand its tokens out."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass

from .runner import Runner
from .scheduler import Scheduler, Sequence


class Clock:
    """Seconds since it was made."""

    def __init__(self) -> None:
        self._start = time.perf_counter()

    def now(self) -> float:
        """Return the time."""
        return time.perf_counter() - self._start

    def sleep_until(self, moment: float) -> None:
        """Return when it is `moment`."""
        time.sleep(max(0.0, moment - self.now()))


@dataclass
class Totals:
    """What the steps so far amount to."""

    seconds: float = 0.0
    num_steps: int = 0
    num_mixed_steps: int = 0  # that computed prompts and decoded, both
    num_computed: int = 0  # tokens
    most_used: int = 0  # pages
    most_shared: int = 0  # pages


@dataclass(frozen=True)
class Progress:
    """Handed out after every step: when it ended, and the sequences with a new token."""

    now: float
    grown: list[Sequence]


def serve(
    scheduler: Scheduler, runner: Runner, totals: Totals, clock: Clock | None = None
) -> Iterator[Progress]:
    """Serve all requests of `scheduler`, and yield after every step.

    Parameters
    ----------
    scheduler, runner
        Made for the same pool and the same limits.
    totals
        Filled in.
    clock
        What arrivals are measured by.
    """
    clock = clock or Clock()
    while not scheduler.is_done:
        parts = scheduler.plan(clock.now())
        if not parts:
            clock.sleep_until(scheduler.waiting[0].request.arrival)
            continue
        totals.most_used = max(totals.most_used, scheduler.pool.num_used)
        totals.most_shared = max(totals.most_shared, scheduler.pool.num_shared)
        totals.num_steps += 1
        sizes = [part.num_tokens for part in parts]
        totals.num_mixed_steps += min(sizes) == 1 < max(sizes)
        totals.num_computed += sum(sizes)
        chosen = runner.step(parts)
        totals.seconds = clock.now()
        yield Progress(totals.seconds, scheduler.finish(parts, chosen, totals.seconds))
