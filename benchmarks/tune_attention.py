"""Tries other tiles and constants for batch attention: `python -m benchmarks.tune_attention`.

Every candidate of tune_candidates.py becomes a library and a folder of kernels (tune_build.py). A
process each (tune_worker.py) loads them and compiles its kernels, all side by side; then the
candidates of a group take turns at each of its cases, so that a clock which the GPU lowers is the
same for all, and every result is checked against float32. The report has, for every group of cases,
the candidates by their geometric mean beside the checkout's own; for the winner the rate, its share
of the roofline, registers, shared memory and occupancy, and with --counters what its kernels wait
for.

--build-only  stop before the GPU is needed (the folder can travel to the machine that has it);
              with --arch sm_90a also compile the kernels for it, and print what they take
--counters    run each group's winner once more, under Nsight Compute, for what limits it
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

from .tune_build import ROOT, build, folder_of, missing
from .tune_candidates import CANDIDATES, GROUPS, Candidate
from .tune_counters import CountersError, count
from .tune_worker import Worker, compiled, in_turns, run_once, work

BASE = "as it is"
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
        elif arguments.arch is not None:
            print(json.dumps(compiled(candidate, arguments.arch)))
        else:
            work(candidate)
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
            print_compiled(folder, candidate, arguments.arch)
        return 0
    results = measure(folder, built)
    if arguments.counters:
        add_counters(folder, results)
    save(arguments.out, results, failed)
    return 1 if any("error" in result for result in results.values()) else 0


def measure(folder: Path, candidates: list[Candidate]) -> dict[Candidate, Result]:
    results = in_turns(
        {
            candidate: Worker(command_of(folder, candidate), environment(folder, candidate), ROOT)
            for candidate in candidates
        }
    )
    for candidate, result in results.items():
        print(f">> {candidate.group}: {candidate.name}: {str(result)[:300]}", file=sys.stderr)
    return results


def print_compiled(folder: Path, candidate: Candidate, arch: str) -> None:
    command = [*command_of(folder, candidate), "--arch", arch]
    made = subprocess.run(
        command, env=environment(folder, candidate), cwd=ROOT, text=True, capture_output=True
    )
    said = (made.stderr if made.returncode else made.stdout).strip().splitlines()[-1:]
    print(f">> {candidate.group}: {candidate.name}: {' '.join(said)}", file=sys.stderr)


def command_of(folder: Path, candidate: Candidate) -> list[str]:
    command = [sys.executable, "-m", "benchmarks.tune_attention", "--folder", str(folder)]
    return [*command, "--measure", str(CANDIDATES.index(candidate))]


def environment(folder: Path, candidate: Candidate) -> dict[str, str]:
    own = folder_of(folder, candidate)
    return {
        **os.environ,
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
            launches = count(command, "batch_attention", environment(folder, candidate), ROOT)
            counters: Any = dict(zip(group.cases, launches, strict=True))
        except (CountersError, ValueError) as error:
            counters = str(error)
            print(f">> no counters: {name}: {error}", file=sys.stderr)
        results[candidate]["counters"] = counters


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
