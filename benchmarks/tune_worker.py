"""A candidate's own process: it loads the candidate's library and measures when it is its turn.

The parent writes a line of JSON for each step, and reads a line in answer: first, unasked, the
facts of the kernels; for {"case": name} the problem is made, computed once and checked; for
{"turn": n} its graph is replayed for a few milliseconds; {"end": true} gives its memory back.
"""

from __future__ import annotations

import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from .tune_candidates import CASES, GROUPS, Candidate

if TYPE_CHECKING:
    from .attention_batch import Requests, Shape

TURNS, TURN_MS = 6, 12.0
REGISTERS_OF_SM, THREADS_OF_SM, RESERVED_SMEM = 65536, 2048, 1024
Result = dict[str, Any]


class Worker:
    """The parent's side of such a process, whose last lines say why if it fails."""

    def __init__(self, command: Sequence[str], env: Mapping[str, str], cwd: Path) -> None:
        # Why a file: nobody reads a pipe while other processes have their turn.
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115
        self._process = subprocess.Popen(
            command, env=env, cwd=cwd, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=self._errors,
        )  # fmt: skip
        self.error: str | None = None

    def tell(self, **what: Any) -> None:
        if self.error is None and self._process.stdin is not None:
            try:
                print(json.dumps(what), file=self._process.stdin, flush=True)
            except BrokenPipeError:
                self._fail()

    def answer(self) -> Result:
        """What the process says next; nothing, and its `error` is set, if it ended instead."""
        if self.error is None and self._process.stdout is not None:
            line = self._process.stdout.readline()
            if line:
                return dict(json.loads(line))
            self._fail()
        return {}

    def close(self) -> None:
        self._process.communicate()
        self._errors.close()

    def _fail(self) -> None:
        code = self._process.wait()
        self._errors.seek(0)
        lines = self._errors.read().strip().splitlines()[-6:]
        self.error = "\n".join(lines) or f"its process ended with {code}"


def in_turns(workers: Mapping[Candidate, Worker]) -> dict[Candidate, Result]:
    """Facts of every candidate's kernels, and microseconds and error of each case of its group."""
    results: dict[Candidate, Result] = {
        candidate: {**worker.answer(), "cases": {}} for candidate, worker in workers.items()
    }
    for name, group in GROUPS.items():
        here = {c: worker for c, worker in workers.items() if c.group == name}
        for case in group.cases if here else ():
            _measure_case(case, here, results)
    for candidate, worker in workers.items():
        worker.close()
        if worker.error is not None:
            results[candidate] = {"error": worker.error}
    return results


def _measure_case(
    case: str, workers: Mapping[Candidate, Worker], results: Mapping[Candidate, Result]
) -> None:
    for worker in workers.values():
        worker.tell(case=case)
    for candidate, worker in workers.items():
        results[candidate]["cases"][case] = worker.answer()
    times: dict[Candidate, list[float]] = {candidate: [] for candidate in workers}
    for turn in range(TURNS):
        for candidate, worker in workers.items():
            worker.tell(turn=turn)
            times[candidate] += worker.answer().get("us", [])
    for candidate, worker in workers.items():
        worker.tell(end=True)
        worker.answer()
        if times[candidate]:
            results[candidate]["cases"][case]["us"] = statistics.median(times[candidate])


def work(candidate: Candidate) -> None:
    """The process itself: what it prints otherwise goes where its errors go."""
    channel = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    _work(candidate, channel)


def _work(candidate: Candidate, channel: TextIO) -> None:
    import torch
    from ridgeline import compiler

    from .attention_batch import Batch, warm
    from .session import Session

    def say(**what: Any) -> None:
        print(json.dumps(what), file=channel, flush=True)

    device = torch.device("cuda")
    torch.zeros(1, device=device)
    warm(device, pattern_of(candidate))
    arch = compiler.library().driver_report()["devices"][0]["arch"]
    smem_of_sm = torch.cuda.get_device_properties(device).shared_memory_per_multiprocessor
    session = Session(device, roofline=False)
    session.timer.budget_ms = TURN_MS
    say(kernels=kernel_facts(pattern_of(candidate), arch, smem_of_sm))
    batch = call = replay = None
    for line in sys.stdin:
        told = json.loads(line)
        if "case" in told:
            batch = Batch.of(session, *problem(candidate, told["case"]))
            call = partial(batch.attention, batch.schedule())
            error = batch.error(call())
            replay = session.timer.prepare(call)
            say(error=error, bytes=batch.num_bytes, flops=batch.num_flops)
        elif "turn" in told and replay is not None:
            say(us=session.timer.together([replay]))
        else:
            batch = call = replay = None
            torch.cuda.empty_cache()
            say()


def run_once(candidate: Candidate) -> None:
    """In the candidate's own process: each case once, for a profiler."""
    import torch

    from .attention_batch import Batch
    from .session import Session

    session = Session(torch.device("cuda"), roofline=False)
    for name in GROUPS[candidate.group].cases:
        Batch.of(session, *problem(candidate, name)).attention()
    torch.cuda.synchronize()


def compiled(candidate: Candidate, arch: str) -> list[Result]:
    """In the candidate's own process: its kernels for an architecture, without a GPU."""
    import ridgeline

    from .attention_batch import kernel_names

    pattern = pattern_of(candidate)
    ridgeline.warmup(kernel_names(arch, pattern), arch=arch, progress=False)
    return kernel_facts(pattern, arch)


def pattern_of(candidate: Candidate) -> str:
    """Of the names of the kernels that its group is about."""
    group = GROUPS[candidate.group]
    qk, vo = group.head_dims
    return f"bfloat16.*HeadDims<{qk}, {vo}>, {re.escape(group.kernel)}.*bfloat16>, StandardVariant"


def problem(candidate: Candidate, case: str) -> tuple[Shape, Requests]:
    """What a case measures."""
    from .attention_batch import Shape

    requests, heads, place, causal = CASES[case]
    head_dims = GROUPS[candidate.group].head_dims
    return Shape(heads=heads, head_dims=head_dims, place=place, causal=causal), requests


def kernel_facts(pattern: str, arch: str, smem_of_sm: int | None = None) -> list[Result]:
    """What the assembler said of each kernel, and how many CTAs an SM holds."""
    from ridgeline import compiler
    from ridgeline.compiler import entry

    rows = {row.kernel: row for row in compiler.library().core_table if row.serves(arch)}
    facts = []
    for name, row in rows.items():
        if not re.search(pattern, name):
            continue
        made = entry.unpack(compiler.obtain(name, arch))
        smem = made.static_smem + row.dynamic_smem
        registers = -(-max(made.registers, 1) // 8) * 8
        limits = [REGISTERS_OF_SM // (registers * row.block), THREADS_OF_SM // row.block]
        if smem_of_sm is not None:
            limits.append(smem_of_sm // (smem + RESERVED_SMEM))
        facts.append(
            {
                "kernel": name,
                "registers": made.registers,
                "spills": made.spill_stores + made.spill_loads,
                "smem": smem,
                "threads": row.block,
                "ctas_per_sm": min(limits),
                "occupancy": min(limits) * row.block / THREADS_OF_SM,
            }
        )
    return facts
