"""Compile many kernels in parallel processes.

Why processes: NVRTC compiles one kernel at a time inside a process. A worker that dies takes one
kernel with it, not the pool.
"""

from __future__ import annotations

import base64
import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import threading
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .toolchain import CompilerMissingError

_WORKER = Path(__file__).with_name("worker.py")
_BYTES_A_WORKER = 1 << 30


@dataclass(frozen=True)
class Job:
    """A kernel to compile; `key` is its entry's key."""

    name: str
    arch: str
    key: str


@dataclass(frozen=True)
class Outcome:
    """What became of a job: the entry's bytes, or None and why."""

    job: Job
    entry: bytes | None
    error: str
    seconds: float


def compile_all(
    jobs: Sequence[Job], options: str, kernels_dir: str, *, num_workers: int | None = None
) -> Generator[Outcome, None, None]:
    """Compile `jobs` and yield each outcome as it comes.

    Closing the iterator, or an exception such as Ctrl-C, ends the workers.

    Parameters
    ----------
    jobs : sequence of Job
        Handed out in this order.
    options, kernels_dir : str
        As in `nvrtc.compile_kernel`.
    num_workers : int, optional
        Defaults to `default_workers()`; never more than there are jobs.

    Raises
    ------
    CompilerMissingError
        If the workers find no compiler.
    """
    limit = num_workers if num_workers is not None else default_workers()
    setup = {"path": sys.path, "options": options, "kernels_dir": kernels_dir}
    pool = _Pool(jobs, json.dumps(setup), max(1, min(limit, len(jobs))))
    try:
        for _ in jobs:
            outcome = pool.outcomes.get()
            if isinstance(outcome, BaseException):
                raise outcome
            yield outcome
    finally:
        pool.stop()


def default_workers() -> int:
    """Return how many compilers fit: a core and 1 GiB each, at most MAX_JOBS where that is set."""
    limits = [len(os.sched_getaffinity(0))]
    memory = _available_memory()
    if memory is not None:
        limits.append(memory // _BYTES_A_WORKER)
    with contextlib.suppress(KeyError, ValueError):
        limits.append(int(os.environ["MAX_JOBS"]))
    return max(1, min(limits))


class _Pool:
    """Threads that each feed one worker process from a shared queue of jobs."""

    def __init__(self, jobs: Sequence[Job], setup: str, num_workers: int) -> None:
        self.outcomes: queue.SimpleQueue[Outcome | BaseException] = queue.SimpleQueue()
        self._jobs: queue.SimpleQueue[Job] = queue.SimpleQueue()
        for job in jobs:
            self._jobs.put(job)
        self._setup = setup
        self._lock = threading.Lock()
        self._stopped = False
        self._processes: set[subprocess.Popen[str]] = set()
        self._threads = [
            threading.Thread(target=self._serve, name=f"ridgeline-compiler-{index}", daemon=True)
            for index in range(num_workers)
        ]
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """End the workers, at once."""
        with self._lock:
            self._stopped = True
            for process in self._processes:
                process.kill()
        for thread in self._threads:
            thread.join()

    def _serve(self) -> None:
        process: subprocess.Popen[str] | None = None
        try:
            while not self._stopped:
                try:
                    job = self._jobs.get_nowait()
                except queue.Empty:
                    return
                process = process or self._start()
                if process is None:
                    return
                outcome, alive = _compile_in(process, job)
                self.outcomes.put(outcome)
                if not alive:
                    self._end(process)
                    process = None
        except BaseException as error:
            self.outcomes.put(error)
        finally:
            if process is not None:
                self._end(process)

    def _start(self) -> subprocess.Popen[str] | None:
        with self._lock:
            if self._stopped:
                return None
            process = subprocess.Popen(
                [sys.executable, str(_WORKER)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                encoding="utf-8",
            )
            self._processes.add(process)
        with contextlib.suppress(BrokenPipeError):
            _send(process, self._setup)
        return process

    def _end(self, process: subprocess.Popen[str]) -> None:
        with self._lock:
            self._processes.discard(process)
        process.kill()
        process.wait()
        for pipe in (process.stdin, process.stdout):
            with contextlib.suppress(OSError):
                if pipe is not None:
                    pipe.close()


def _compile_in(process: subprocess.Popen[str], job: Job) -> tuple[Outcome, bool]:
    """Return the outcome of a job, and whether the worker lives on."""
    assert process.stdout is not None
    line = ""
    with contextlib.suppress(BrokenPipeError):
        _send(process, json.dumps({"name": job.name, "arch": job.arch, "key": job.key}))
        line = process.stdout.readline()
    if not line.endswith("\n"):
        return Outcome(job, None, _death(job, process), 0.0), False
    answer: dict[str, Any] = json.loads(line)
    if answer.get("missing"):
        raise CompilerMissingError(answer["error"])
    entry = base64.b64decode(answer["entry"]) if "entry" in answer else None
    return Outcome(job, entry, answer.get("error", ""), answer["seconds"]), True


def _send(process: subprocess.Popen[str], line: str) -> None:
    assert process.stdin is not None
    process.stdin.write(line + "\n")
    process.stdin.flush()


def _death(job: Job, process: subprocess.Popen[str]) -> str:
    code = process.wait()
    if code < 0:
        how = f"was killed by {signal.Signals(-code).name}"
        if code == -signal.SIGKILL:
            how += " (out of memory? MAX_JOBS=1 compiles one kernel at a time)"
    else:
        how = f"ended with exit code {code}"
    return f"ridgeline: the compiler process of kernel '{job.name}' for {job.arch} {how}"


def _available_memory() -> int | None:
    """Return the bytes free for new processes, the control group's limit included."""
    amounts = []
    with contextlib.suppress(OSError, ValueError, StopIteration):
        lines = Path("/proc/meminfo").read_text().splitlines()
        available = next(line for line in lines if line.startswith("MemAvailable:"))
        amounts.append(int(available.split()[1]) * 1024)
    with contextlib.suppress(OSError, ValueError):
        group = Path("/sys/fs/cgroup")
        limit, used = (group / "memory.max").read_text(), (group / "memory.current").read_text()
        amounts.append(int(limit) - int(used))
    return min(amounts, default=None)
