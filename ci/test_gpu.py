"""The GPU tests: `make test-gpu`, on a machine whose Python has torch built for CUDA.

Runs the tests marked `gpu` once for each architecture's code path (older ones as PTX of their
compute capability) and, where compute-sanitizer is installed, memcheck and racecheck over
ci/sanitize.py. All jobs run side by side; each writes build/gpu/logs/<job>.log.

ARCH    architectures, default 75,80,89,90a
WHEEL   the built wheel to test; without it the checkout is compiled against the torch here
ARGS    more arguments for pytest, such as "-k decode"
SHARDS  processes for each architecture, default as many as the cores serve, at most 6
TIMEOUT seconds for all of it, default 1500
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from itertools import product
from pathlib import Path

from common import ROOT, Stopwatch, say
from gpu import GPU_BUILD, count_gpus, install_site, require_gpu

LOGS = GPU_BUILD / "logs"
SANITIZED_ARCHS = ("75", "80", "90a")
TOOLS = ("memcheck", "racecheck")


@dataclass
class Job:
    """A process, its log, and how it ended."""

    name: str
    process: subprocess.Popen[bytes]
    started: float
    code: int | None = None
    seconds: float = 0.0

    @property
    def log(self) -> Path:
        return LOGS / f"{self.name}.log"

    def last_words(self) -> str:
        """The closing line of pytest or of the sanitizer, else the log's last line."""
        lines = self.log.read_text(errors="replace").strip().splitlines()
        for line in reversed(lines):
            if re.search(r"\d+ (passed|failed|error)|ERROR SUMMARY|RACECHECK SUMMARY", line):
                return line.strip("= ")
        return lines[-1].strip("= ") if lines else "no output"


def start(name: str, command: list[str], env: dict[str, str]) -> Job:
    with (LOGS / f"{name}.log").open("wb") as log:
        process = subprocess.Popen(
            command,
            cwd=LOGS,
            env={**os.environ, **env},
            stdout=log,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            start_new_session=True,
        )
    return Job(name, process, time.monotonic())


# racecheck does not take the arrival of one lane at an mbarrier, behind __syncwarp, for one of the
# whole warp: on sm_90a it gets kernels in which each lane arrives for itself.
ALL_LANES_ARRIVE = {
    "attention/tile_arrivals.cuh": ("read.init(num_threads / 32);", "read.init(num_threads);"),
    "attention/tile.cuh": (
        "if (opaque(int(threadIdx.x)) % 32 == 0) tile_arrivals()",
        "tile_arrivals()",
    ),
}


def kernels_for_racecheck() -> dict[str, str]:
    folder = GPU_BUILD / "kernels_for_racecheck"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(ROOT / "kernels", folder)
    for name, (one_lane, all_lanes) in ALL_LANES_ARRIVE.items():
        text = (folder / name).read_text()
        if text.count(one_lane) != 1:
            raise SystemExit(f"ci/test_gpu.py: kernels/{name} has not exactly one '{one_lane}'")
        (folder / name).write_text(text.replace(one_lane, all_lanes))
    return {"RIDGELINE_KERNELS_DIR": str(folder)}


# Compiles the core table for the architecture that RIDGELINE_ARCH names, into the cache: kernels
# whose name begins with the argument.
PREPARE = """
import sys
import ridgeline
from ridgeline import compiler
library = compiler.library()
arch = library.driver_report()["devices"][0]["arch"]
names = {row.kernel for row in library.core_table if row.serves(arch)}
kernels = sorted(name for name in names if name.startswith(sys.argv[1]))
print(ridgeline.warmup(kernels, arch=arch, progress=False))
"""


def prepare(archs: list[str], env: dict[str, str]) -> None:
    """Fill the cache side by side, so that the tests' processes need not compile one by one."""
    watch = Stopwatch()
    share = {"MAX_JOBS": str(max(1, (os.cpu_count() or 1) // len(archs)))}
    command = [sys.executable, "-c", PREPARE]
    jobs = [
        start(f"compile_sm_{arch}", [*command, ""], {**env, **share, "RIDGELINE_ARCH": arch})
        for arch in archs
    ]
    if shutil.which("compute-sanitizer") and "90a" in archs:
        extra = {**share, **kernels_for_racecheck(), "RIDGELINE_ARCH": "90a"}
        jobs.append(start("compile_for_racecheck", [*command, "attention/"], {**env, **extra}))
    wait(jobs, 600)
    print_failures(jobs)
    say(f"compiled the core table for {', '.join(archs)} in {watch}")


def pytest_job(arch: str, shard: int, num_shards: int, env: dict[str, str]) -> Job:
    name = f"sm_{arch}" if num_shards == 1 else f"sm_{arch}_{shard + 1}of{num_shards}"
    command = [sys.executable, "-m", "pytest", "-c", str(ROOT / "pyproject.toml")]
    command += ["--rootdir", str(ROOT), "-o", f"cache_dir={LOGS / name}", "-m", "gpu"]
    command += ["--arch", arch, "--shard", f"{shard}/{num_shards}"]
    command += ["--durations", "10", *shlex.split(os.environ.get("ARGS", "")), str(ROOT / "tests")]
    return start(name, command, env)


def sanitizer_job(tool: str, arch: str, sanitizer: str, env: dict[str, str]) -> Job:
    # Why the filter: torch's own kernels are not ours to check, and slow under the tool.
    command = [
        sanitizer,
        "--tool",
        tool,
        "--error-exitcode",
        "9",
        "--kernel-regex",
        "kns=ridgeline",
    ]
    command += [sys.executable, str(ROOT / "ci" / "sanitize.py")]
    extra = {"RIDGELINE_ARCH": arch, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    if (tool, arch) == ("racecheck", "90a"):
        extra |= kernels_for_racecheck()
    return start(f"{tool}_sm_{arch}", command, {**env, **extra})


def wait(jobs: list[Job], limit: float) -> None:
    """Wait for every job, say what still runs twice a minute, end what outlives the limit."""
    begin = said = time.monotonic()
    while any(job.code is None for job in jobs):
        time.sleep(0.5)
        now = time.monotonic()
        for job in jobs:
            if job.code is None and now - begin > limit:
                os.killpg(job.process.pid, signal.SIGKILL)
                job.process.wait()
                job.code = 124
            elif job.code is None:
                job.code = job.process.poll()
            if job.code is not None and not job.seconds:
                job.seconds = now - job.started
                say(f"{job.name}: {job.last_words()}")
        running = [job.name for job in jobs if job.code is None]
        if running and now - said > 30:
            said = now
            say(f"{now - begin:.0f} s, running: {' '.join(running)}")


def print_failures(jobs: list[Job]) -> None:
    for job in jobs:
        if job.code:
            lines = job.log.read_text(errors="replace").splitlines()
            marked = [line for line in lines if line.startswith(("FAILED", "ERROR", "========= "))]
            print(f"--- {job.name}, exit code {job.code}, {job.log.relative_to(ROOT)}")
            print("\n".join(marked[:25] or lines[-25:]))


def main() -> int:
    watch = Stopwatch()
    require_gpu()
    env = install_site()
    shutil.rmtree(LOGS, ignore_errors=True)
    LOGS.mkdir(parents=True)
    archs = (os.environ.get("ARCH") or "75,80,89,90a").replace("native", "90a").split(",")
    prepare(archs, env)
    gpus = [str(index) for index in range(count_gpus())]
    jobs = []
    cores = os.cpu_count() or 1
    num_shards = int(os.environ.get("SHARDS") or max(1, min(6, cores // (2 * len(archs)))))
    env["OMP_NUM_THREADS"] = str(max(1, cores // (num_shards * len(archs))))
    for index, (arch, shard) in enumerate(product(archs, range(num_shards))):
        # Each job sees all GPUs, and another one first.
        first = index % len(gpus)
        order = {"CUDA_VISIBLE_DEVICES": ",".join(gpus[first:] + gpus[:first])}
        jobs.append(pytest_job(arch, shard, num_shards, {**env, **order}))
    sanitizer = shutil.which("compute-sanitizer")
    if sanitizer:
        chosen = [arch for arch in SANITIZED_ARCHS if arch in archs] or archs[:1]
        jobs += [sanitizer_job(tool, arch, sanitizer, env) for tool in TOOLS for arch in chosen]
    wait(jobs, float(os.environ.get("TIMEOUT") or 1500))

    print_failures(jobs)
    print(f"\n{'job':<18} {'result':<8} {'time':>7}  closing line")
    for job in jobs:
        result = "ok" if job.code == 0 else "TIMEOUT" if job.code == 124 else f"code {job.code}"
        print(f"{job.name:<18} {result:<8} {job.seconds:>5.0f} s  {job.last_words()}")
    if not sanitizer:
        print("not run: memcheck and racecheck (compute-sanitizer is not on PATH)")
    failed = [job.name for job in jobs if job.code]
    say(f"make test-gpu: {'FAILED: ' + ' '.join(failed) if failed else 'passed'} after {watch}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
