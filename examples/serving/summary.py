"""What a run amounts to: times to the first token, times per token, pages, steps."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TextIO

import torch
from ridgeline.demo.model_folder import DemoError

from .engine import Totals
from .runner import Runner
from .scheduler import Scheduler
from .scheduler import Sequence as Served


def first_token_times(served: Sequence[Served]) -> list[float]:
    """Return the seconds from each request's arrival to its first token."""
    return [sequence.times[0] - sequence.request.arrival for sequence in served]


def times_per_token(served: Sequence[Served]) -> list[float]:
    """Return each request's mean seconds from one token to the next, where it has two."""
    return [
        (sequence.times[-1] - sequence.times[0]) / (len(sequence.times) - 1)
        for sequence in served
        if len(sequence.times) > 1
    ]


def percentiles(seconds: Sequence[float]) -> tuple[float, float]:
    """Return the 50th and the 95th percentile.

    >>> percentiles([float(x) for x in range(21)])
    (10.0, 19.0)
    """
    at = torch.tensor([0.5, 0.95], dtype=torch.float64)
    p50, p95 = torch.tensor(seconds, dtype=torch.float64).quantile(at).tolist()
    return p50, p95


def print_summary(scheduler: Scheduler, runner: Runner, totals: Totals, out: TextIO) -> None:
    """Print times and speeds, then what the pool and the steps did."""
    served, pool = scheduler.sequences, scheduler.pool
    written = sum(len(sequence.times) for sequence in served)
    asked = sum(len(sequence.request.prompt) for sequence in served)
    reused = sum(sequence.num_reused for sequence in served)
    paused = sum(sequence.num_pauses > 0 for sequence in served)
    pauses = sum(sequence.num_pauses for sequence in served)
    print(
        f"{len(served)} requests, {written:,} tokens in {totals.seconds:.2f} s: "
        f"{written / totals.seconds:,.0f} tokens/s",
        file=out,
    )
    print(f"{'':<24}{'p50':>12}{'p95':>12}", file=out)
    for name, seconds in (
        ("time to first token", first_token_times(served)),
        ("time per output token", times_per_token(served)),
    ):
        if seconds:
            p50, p95 = percentiles(seconds)
            print(f"{name:<24}{1e3 * p50:>9.2f} ms{1e3 * p95:>9.2f} ms", file=out)
    for name, text in (
        (
            "steps",
            f"{totals.num_steps}, {totals.num_mixed_steps} of them with prompts and decodes, "
            f"{runner.num_replays} as CUDA graphs; {totals.num_computed:,} tokens computed",
        ),
        (
            "pages",
            f"{pool.num_pages} of {pool.page_size} tokens; at most {totals.most_used} held, "
            f"{totals.most_shared} shared",
        ),
        ("prefix sharing", f"{reused:,} of {asked:,} prompt tokens were there already"),
        ("pauses", f"{pauses}, of {paused} requests, since the pool was full"),
    ):
        print(f"{name:<24}{text}", file=out)
    print(file=out)


def write_results(path: Path, served: Sequence[Served]) -> None:
    """Write every request's text, tokens and times as JSON lines."""
    lines = []
    for sequence in served:
        result = {
            "id": sequence.request.name,
            "text": bytes(sequence.written).decode(errors="replace"),
            "tokens": sequence.written,
            "first_token": round(sequence.times[0], 6),
            "done": round(sequence.times[-1], 6),
            "pauses": sequence.num_pauses,
        }
        lines.append(json.dumps(result) + "\n")
    try:
        path.write_text("".join(lines), encoding="utf-8")
    except OSError as error:
        raise DemoError(f"--out {path} cannot be written: {error}") from None
