"""Runs of the serving example, which lies beside the tests and not in the package."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

from ridgeline.demo.llama import Llama

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
sys.path.insert(0, str(EXAMPLES))

import serve as script  # noqa: E402
from serving import check, display, pool, requests, summary  # noqa: E402
from serving.engine import Clock, Progress, Totals, serve  # noqa: E402
from serving.pool import PagePool  # noqa: E402
from serving.requests import Request  # noqa: E402
from serving.runner import Runner  # noqa: E402
from serving.scheduler import Scheduler, Sequence  # noqa: E402

__all__ = [
    "EXAMPLES", "REQUESTS", "STORY", "PagePool", "Request", "Runner", "Scheduler", "Steps",
    "Totals", "check", "display", "pool", "requests", "run", "script", "serve", "summary",
]  # fmt: skip

STORY = b"Emma Woodhouse, handsome, clever, and rich, with a comfortable home, "  # 69 bytes
# As of a server that is busy from the start: long, short, of one token, with a common prefix.
REQUESTS = [
    Request("a", 0.0, STORY + b"was", 40),
    Request("b", 0.0, b"The whale", 60),
    Request("c", 2.0, b"N", 1),
    Request("d", 30.0, STORY + b"had", 33),
    Request("e", 31.0, STORY + b"and her father " * 4, 20),
    Request("f", 31.5, b"It was a dark night at sea; ", 48),
    Request("g", 500.0, STORY + b"was", 5),
]


class Steps(Clock):
    """A clock that counts steps, so that every run makes the same decisions."""

    def __init__(self) -> None:
        self.time = 0.0
        self.slept_until: list[float] = []

    def now(self) -> float:
        """Return the time, which each look moves on."""
        self.time += 0.5
        return self.time

    def sleep_until(self, moment: float) -> None:
        """Note it."""
        self.slept_until.append(moment)
        self.time = max(self.time, moment)


@dataclass
class Served:
    """What a run left."""

    scheduler: Scheduler
    runner: Runner
    totals: Totals
    progress: list[Progress]
    clock: Steps

    @property
    def tokens(self) -> dict[str, list[int]]:
        return {s.request.name: s.written for s in self.scheduler.sequences}

    def sequence(self, name: str) -> Sequence:
        return next(s for s in self.scheduler.sequences if s.request.name == name)


def run(
    model: Llama,
    requests: list[Request],
    *,
    num_pages: int = 64,
    page_size: int = 8,
    max_requests: int = 6,
    max_batch_tokens: int = 40,
    use_graphs: bool = False,
) -> Served:
    runner = Runner(model, num_pages, page_size, max_requests, max_batch_tokens, use_graphs)
    # Nothing that a page held before may count.
    runner.pool.fill_(float("nan"))
    pool = PagePool(num_pages, page_size)
    scheduler = Scheduler(requests, pool, max_requests, max_batch_tokens)
    totals, clock = Totals(), Steps()
    progress = list(serve(scheduler, runner, totals, clock))
    assert pool.num_free == num_pages
    assert pool.num_used == pool.num_shared == 0
    assert sorted(pool.take() for _ in range(num_pages)) == list(range(num_pages))
    return Served(scheduler, runner, totals, progress, clock)
