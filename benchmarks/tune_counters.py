"""Where the time of a kernel goes, from Nsight Compute's counters.

`count` runs a program under ncu and returns, for every launch of a kernel, the shares of the
pipes in percent of their peak and the cycles for which a warp waits before each instruction, by
reason. Clocks are left as they are.
"""

from __future__ import annotations

import csv
import os
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

Counters = dict[str, float]

PIPES = {
    "tensor pipe": "sm__pipe_tensor_cycles_active.avg.pct_of_peak_sustained_active",
    "issue slots": "smsp__issue_active.avg.pct_of_peak_sustained_active",
    "shared memory": "l1tex__data_pipe_lsu_wavefronts_mem_shared.sum.pct_of_peak_sustained_elapsed",
    "DRAM": "dram__throughput.avg.pct_of_peak_sustained_elapsed",
}
# What a warp waits for, in ncu's words: the end of the instruction before it (wait), a pipe
# (math_pipe_throttle), shared memory (short_scoreboard), global memory (long_scoreboard).
REASONS = (
    "wait",
    "math_pipe_throttle",
    "short_scoreboard",
    "long_scoreboard",
    "barrier",
    "mio_throttle",
    "dispatch_stall",
    "not_selected",
)
STALLS = {
    reason: f"smsp__average_warps_issue_stalled_{reason}_per_issue_active.ratio"
    for reason in REASONS
}


class CountersError(RuntimeError):
    """Why there are no counters."""


def count(command: Sequence[str], kernel: str, env: Mapping[str, str], cwd: Path) -> list[Counters]:
    """Counters of every launch of the kernels that a command runs whose names match."""
    program = shutil.which("ncu")
    if program is None:
        raise CountersError("no ncu on the PATH (Nsight Compute is part of the CUDA toolkit)")
    metrics = ",".join((PIPES | STALLS).values())
    options = ["--clock-control", "none", "--kernel-name", f"regex:{kernel}", "--metrics", metrics]
    found = subprocess.run(
        [program, "--csv", "--page", "raw", *options, *command],
        env={**os.environ, **env},
        cwd=cwd,
        text=True,
        capture_output=True,
    )
    launches = parse(found.stdout)
    if found.returncode or not launches:
        lines = (found.stdout + found.stderr).splitlines()
        said = [line for line in lines if "ERROR" in line] or ["it saw no launch"]
        raise CountersError(f"ncu ended with {found.returncode}: {said[-1]}")
    return launches


def parse(text: str) -> list[Counters]:
    """The counters in ncu's CSV output, which lies among its own messages and the program's."""
    lines = [line for line in text.splitlines() if line.startswith('"')]
    rows = list(csv.reader(lines))
    heads = [i for i, row in enumerate(rows) if row[0] == "ID"]
    if not heads:
        return []
    head = rows[heads[-1]]
    places = {name: head.index(metric) for name, metric in (PIPES | STALLS).items()}
    return [
        {name: float(row[place].replace(",", "")) for name, place in places.items()}
        for row in rows[heads[-1] + 2 :]  # a row of units comes first
    ]


def describe(counters: Counters) -> str:
    """One line: shares of the pipes, then the three longest waits."""
    pipes = ", ".join(f"{name} {counters[name]:.0f}%" for name in PIPES)
    longest = sorted(STALLS, key=lambda reason: counters[reason], reverse=True)[:3]
    waits = ", ".join(f"{reason} {counters[reason]:.2f}" for reason in longest)
    return f"{pipes}; cycles a warp waits for each instruction: {waits}"
