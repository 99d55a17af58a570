"""Tries other tiles and constants for batch attention: `python -m benchmarks.tune_attention`.

Every candidate of tune_candidates.py becomes a library and a folder of kernels (tune_build.py). A
process each loads them and compiles its kernels, all side by side; then one after the other
measures its cases with the timer of all benchmarks, and checks every result against float32. The
report has, for every group of cases, the candidates by their geometric mean beside the checkout's
own; for the winner the rate, its share of the roofline, registers, shared memory and occupancy,
and with --counters what its kernels wait for.

--build-only  stop before the GPU is needed (the folder can travel to the machine that has it);
              with --arch sm_90a also compile the kernels for it, and print what they take
--counters    run each group's winner once more, under Nsight Compute, for what limits it
"""

from __future__ import annotations

import argparse
import datetime
import fcntl
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .tune_build import ROOT, build, folder_of, missing
from .tune_candidates import CANDIDATES, CASES, GROUPS, Candidate
from .tune_counters import CountersError, count

if TYPE_CHECKING:
    from .attention_batch import Requests, Shape

BASE = "as it is"
REGISTERS_OF_SM, THREADS_OF_SM, RESERVED_SMEM = 65536, 2048, 1024
Result = dict[str, Any]


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.tune_attention", description=__doc__
    )
    parser.add_argument("--folder", type=Path, default=ROOT / "build" / "tune")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument("--only", type=re.compile, metavar="REGEX", help="of 'group: candidate'")
    parser.add_argument("--build-only", action="store_true")
    parser.add_argument(
        "--prebuilt", action="store_true", help="take the folder as it is, whatever the sources are"
    )
    parser.add_argument("--arch", help="with --build-only, such as sm_90a")
    parser.add_argument("--counters", action="store_true", help="of the winners, if ncu is there")
    parser.add_argument("--measure", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--once", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    folder = arguments.folder.resolve()
    if arguments.measure is not None:
        candidate = CANDIDATES[arguments.measure]
        if arguments.once:
            run_once(candidate)
            return 0
        compiles = arguments.arch is not None
        found = compiled(candidate, arguments.arch) if compiles else measure(candidate, folder)
        print(json.dumps(found))
        return 0
    chosen = [
        candidate
        for candidate in CANDIDATES
        if arguments.only is None
        or candidate.name == BASE
        or arguments.only.search(f"{candidate.group}: {candidate.name}")
    ]
    groups = {candidate.group for candidate in chosen if candidate.name != BASE}
    chosen = [candidate for candidate in chosen if candidate.group in groups]
    failed = missing(folder, chosen) if arguments.prebuilt else build(folder, chosen)
    for candidate, reason in failed.items():
        print(f">> not built: {candidate.group}: {candidate.name}: {reason}", file=sys.stderr)
    built = [candidate for candidate in chosen if candidate not in failed]
    if arguments.build_only:
        for candidate in built if arguments.arch else []:
            run_all(folder, [candidate], arguments.arch)
        return 0
    results = run_all(folder, built)
    if arguments.counters:
        add_counters(folder, results)
    save(arguments.out, results, failed)
    return 1 if any("error" in result for result in results.values()) else 0


def run_all(
    folder: Path, candidates: list[Candidate], arch: str | None = None
) -> dict[Candidate, Result]:
    """A process a candidate, all at once; a lock lets one measure at a time."""
    (folder / "lock").touch()
    processes = {}
    for candidate in candidates:
        command = command_of(folder, candidate) + (["--arch", arch] if arch else [])
        processes[candidate] = subprocess.Popen(
            command,
            env={**os.environ, **environment_of(folder, candidate)},
            cwd=ROOT,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
    results = {}
    for candidate, process in processes.items():
        output, errors = process.communicate()
        if process.returncode:
            results[candidate] = {"error": "\n".join(errors.strip().splitlines()[-6:])}
        else:
            results[candidate] = json.loads(output.splitlines()[-1])
        print(
            f">> {candidate.group}: {candidate.name}: {str(results[candidate])[:300]}",
            file=sys.stderr,
        )
    return results


def command_of(folder: Path, candidate: Candidate) -> list[str]:
    command = [sys.executable, "-m", "benchmarks.tune_attention", "--folder", str(folder)]
    return [*command, "--measure", str(CANDIDATES.index(candidate))]


def environment_of(folder: Path, candidate: Candidate) -> dict[str, str]:
    own = folder_of(folder, candidate)
    return {
        "PYTHONPATH": os.pathsep.join([str(own / "site"), str(ROOT)]),
        "RIDGELINE_KERNELS_DIR": str(own / "kernels"),
        "RIDGELINE_CACHE_DIR": os.environ.get("RIDGELINE_CACHE_DIR", str(folder / "cache")),
        "RIDGELINE_PACK_DIR": "",
        "MAX_JOBS": os.environ.get("MAX_JOBS", "2"),
    }


def add_counters(folder: Path, results: dict[Candidate, Result]) -> None:
    """For the winner of each group, the counters of each case, or why there are none."""
    from .tune_report import winner

    for name, group in GROUPS.items():
        candidate = winner(name, results)
        if candidate is None:
            continue
        command = [*command_of(folder, candidate), "--once"]
        try:
            launches = count(command, "batch_attention", environment_of(folder, candidate), ROOT)
            counters: Any = dict(zip(group.cases, launches, strict=True))
        except (CountersError, ValueError) as error:
            counters = str(error)
            print(f">> no counters: {name}: {error}", file=sys.stderr)
        results[candidate]["counters"] = counters


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def pattern_of(candidate: Candidate) -> str:
    """Of the names of the kernels that its group is about."""
    group = GROUPS[candidate.group]
    qk, vo = group.head_dims
    return f"bfloat16.*HeadDims<{qk}, {vo}>, {re.escape(group.kernel)}.*bfloat16>, StandardVariant"


def compiled(candidate: Candidate, arch: str) -> list[Result]:
    """In the candidate's own process: its kernels for an architecture, without a GPU."""
    import ridgeline

    from .attention_batch import kernel_names

    pattern = pattern_of(candidate)
    ridgeline.warmup(kernel_names(arch, pattern), arch=arch, progress=False)
    return kernel_facts(pattern, arch)


def run_once(candidate: Candidate) -> None:
    """In the candidate's own process: each case once, for a profiler."""
    import torch

    from .attention_batch import Batch
    from .session import Session

    session = Session(torch.device("cuda"), roofline=False)
    for name in GROUPS[candidate.group].cases:
        Batch.of(session, *problem(candidate, name)).attention()
    torch.cuda.synchronize()


def measure(candidate: Candidate, folder: Path) -> Result:
    """In the candidate's own process: its kernels, and microseconds and error of each case."""
    import torch
    from ridgeline import compiler

    from .attention_batch import Batch, warm
    from .session import Session

    group = GROUPS[candidate.group]
    device = torch.device("cuda")
    torch.zeros(1, device=device)
    warm(device, pattern_of(candidate))
    arch = compiler.library().driver_report()["devices"][0]["arch"]
    smem_of_sm = torch.cuda.get_device_properties(device).shared_memory_per_multiprocessor
    facts = kernel_facts(pattern_of(candidate), arch, smem_of_sm)
    result: Result = {"kernels": facts, "cases": {}}
    with alone(folder):
        session = Session(device, roofline=False)
        for name in group.cases:
            batch = Batch.of(session, *problem(candidate, name))
            work = batch.schedule()
            result["cases"][name] = {
                "us": session.timer.time(partial(batch.attention, work)),
                "error": batch.error(batch.attention(work)),
                "bytes": batch.num_bytes,
                "flops": batch.num_flops,
            }
            del batch, work
    return result


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


def save(out: Path, results: dict[Candidate, Result], failed: dict[Candidate, str]) -> None:
    import torch

    from .__main__ import commit
    from .session import Session
    from .tune_report import report

    facts = {
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d"),
        "commit": commit(),
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "architecture": os.environ.get("RIDGELINE_ARCH", "native"),
    }
    ceilings = Session(torch.device("cuda")).ceilings
    text = report(facts, ceilings, results, failed)
    content = [
        {"group": c.group, "candidate": c.name, "why": c.why, "tiles": c.tiles, **result}
        for c, result in results.items()
    ]
    content += [{"group": c.group, "candidate": c.name, "error": why} for c, why in failed.items()]
    out.mkdir(parents=True, exist_ok=True)
    stem = f"{facts['date']}_tune_attention_{facts['commit']}"
    (out / f"{stem}.json").write_text(json.dumps({**facts, "candidates": content}, indent=1) + "\n")
    (out / f"{stem}.md").write_text(text)
    print(text)


if __name__ == "__main__":
    sys.exit(main())
