"""One timer for every benchmark.

A call is captured in a CUDA graph. For each repetition the L2 cache is flushed by reading twice its
size (after a flush by writing, the call pays for the lines that are written back), then events
around the graph's replay give the time; the median of many counts. This `us` holds what an empty
kernel costs too (reported beside the results), as a single launch does in use.

Calls that are compared take turns, in an order drawn anew for each round: a GPU at its power limit
lowers its clock, by a third at times, so figures of two calls may differ for no other reason than
what ran before each.

`net_us` is the time inside a longer graph: N pairs of (flush, call) against N flushes alone, so the
launch of the graph and the resolution of the events fall out.

On the CPU (dry runs) a wall clock is read around the call, and the figures mean nothing.
"""

from __future__ import annotations

import contextlib
import random
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

Call = Callable[[], object]
WARMUP_CALLS = 3
COPIES = 16
MIN_ROUNDS = 8


def l2_bytes(device: torch.device) -> int:
    return int(torch.cuda.get_device_properties(device).L2_cache_size)


@dataclass(frozen=True)
class Replay:
    """A call's graph, and the call itself: its graph reads tensors that nobody else may hold."""

    graph: torch.cuda.CUDAGraph
    call: Call

    def __call__(self) -> None:
        self.graph.replay()


class Timer:
    """Times calls on one device; `budget_ms` of GPU time for each."""

    def __init__(self, device: torch.device, budget_ms: float = 60.0) -> None:
        self.device = device
        self.budget_ms = budget_ms
        if device.type == "cuda":
            self.stream = torch.cuda.Stream(device)
            size = max(2 * l2_bytes(device), 64 << 20)
            self.flush_buffer = torch.zeros(size // 4, dtype=torch.int32, device=device)
            self.flush_result = torch.zeros((), dtype=torch.int32, device=device)
            self._begin_pool()
            (self.flush_us,) = self._medians([self.pool_keeper.replay], 50, flush=False)
            scalar = torch.zeros(1, device=device)
            self.empty_us, self.empty_net_us = self.time(scalar.zero_), self.net(scalar.zero_)

    def flush(self) -> None:
        torch.amax(self.flush_buffer, 0, out=self.flush_result)

    def time(self, call: Call) -> float:
        """Microseconds of one call with a cold L2: the median."""
        return self.together([self.prepare(call)])[0]

    def prepare(self, call: Call) -> Call:
        """What `together` measures of a call: on a GPU the replay of its graph."""
        return Replay(self._capture(call, 1), call) if self.device.type == "cuda" else call

    def together(self, prepared: Sequence[Call]) -> list[float]:
        """Microseconds of each call with a cold L2: the medians of rounds in which all run."""
        if self.device.type != "cuda":
            return [self._wall(call) for call in prepared]
        first = self._medians(prepared, 3, flush=True)
        round_us = sum(first) / len(first) + self.flush_us
        return self._medians(prepared, self._repetitions(round_us), flush=True)

    def net(self, call: Call) -> float:
        """Microseconds that one call adds to a graph of other work."""
        if self.device.type != "cuda":
            return self._wall(call)

        def pair() -> None:
            self.flush()
            call()

        both = [self._capture(c, COPIES).replay for c in (pair, self.flush)]
        first = self._medians(both[:1], 2, flush=False)
        total, alone = self._medians(both, self._repetitions(first[0]), flush=False)
        return (total - alone) / COPIES

    def _repetitions(self, us: float) -> int:
        return max(MIN_ROUNDS, min(200, int(self.budget_ms * 1000 / max(us, 1.0))))

    def _begin_pool(self) -> None:
        """The memory of all graphs, used again by each; it lives as long as one of them."""
        self.pool = torch.cuda.graph_pool_handle()
        self.pool_keeper = self._capture(self.flush, 1)

    def _capture(self, call: Call, copies: int) -> torch.cuda.CUDAGraph:
        self.stream.wait_stream(torch.cuda.current_stream(self.device))
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.stream(self.stream):
            for _ in range(WARMUP_CALLS):
                call()
            self.stream.synchronize()
            # Why not torch.cuda.graph: it empties the caches of memory, which costs milliseconds.
            graph.capture_begin(pool=self.pool)
            try:
                for _ in range(copies):
                    call()
                graph.capture_end()
            except Exception:
                with contextlib.suppress(RuntimeError):
                    graph.capture_end()
                self._begin_pool()
                raise
        return graph

    def _medians(self, replays: Sequence[Call], count: int, *, flush: bool) -> list[float]:
        events = [
            [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in replays]
            for _ in range(count)
        ]
        for replay in replays:
            replay()
        order = random.Random(count)
        for each in events:
            turns = list(zip(replays, each, strict=True))
            for replay, (start, end) in order.sample(turns, len(turns)):
                if flush:
                    self.flush()
                start.record()
                replay()
                end.record()
        torch.cuda.synchronize(self.device)
        return [
            1000 * statistics.median(start.elapsed_time(end) for start, end in column)
            for column in zip(*events, strict=True)
        ]

    def _wall(self, call: Call) -> float:
        start = time.perf_counter()
        call()
        return (time.perf_counter() - start) * 1e6


def host_us(call: Call, *, calls: int = 2000, rounds: int = 5) -> float:
    """Microseconds of host time for one call: the smallest of the medians of several rounds.

    Calls come in bursts of 100 with an idle device before each: where a launch takes the device
    longer than the host, a longer run of them fills the device's queue, and the host waits.
    """
    wait = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None
    medians = []
    for _ in range(rounds):
        times = []
        for i in range(calls):
            if i % 100 == 0:
                wait()
            start = time.perf_counter_ns()
            call()
            times.append(time.perf_counter_ns() - start)
        wait()
        medians.append(statistics.median(times) / 1000)
    return min(medians)
