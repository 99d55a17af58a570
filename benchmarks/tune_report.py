"""The report of tune_attention.py: candidates side by side, and what the winner reaches."""

from __future__ import annotations

from typing import Any

from .roofline import Ceilings
from .session import MAX_DIFFERENCE
from .table import geometric_mean
from .tune_candidates import GROUPS, Candidate
from .tune_counters import describe

Result = dict[str, Any]


def report(
    facts: dict[str, Any],
    ceilings: Ceilings,
    results: dict[Candidate, Result],
    failed: dict[Candidate, str],
) -> str:
    lines = [
        f"# Attention candidates: {facts['device']}, {facts['date']}, commit {facts['commit']}",
        "",
        f"torch {facts['torch']}, architecture {facts['architecture']}, bf16; us, cold L2, graph "
        f"replay, median. Measured here: read {ceilings.read:.0f} GB/s, bf16 matmul "
        f"{ceilings.bf16_matmul:.0f} TFLOP/s.",
    ]
    for group in GROUPS:
        here = {c: r for c, r in results.items() if c.group == group}
        if here:
            lines += ["", f"## {group}", "", *group_lines(group, ceilings, here)]
    if failed:
        lines += ["", "## Not built", ""]
        lines += [f"- {c.group}: {c.name}: {why.splitlines()[-1]}" for c, why in failed.items()]
    return "\n".join(lines) + "\n"


def group_lines(group: str, ceilings: Ceilings, results: dict[Candidate, Result]) -> list[str]:
    cases = GROUPS[group].cases
    means = {c: mean_over_base(r, results) for c, r in results.items()}
    order = by_speed(results)
    head = ["candidate", "why", "speed", *cases, "registers", "smem", "CTAs/SM", "notes"]
    lines = [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]
    for candidate in order:
        cells = row_cells(candidate, results[candidate], means[candidate], cases)
        lines.append(f"| {' | '.join(cells)} |")
    first = winner(group, results)
    if first is not None:
        lines += ["", *winner_lines(first, results[first], ceilings)]
    return lines


def by_speed(results: dict[Candidate, Result]) -> list[Candidate]:
    return sorted(results, key=lambda c: mean_over_base(results[c], results) or 0.0, reverse=True)


def winner(group: str, results: dict[Candidate, Result]) -> Candidate | None:
    """The fastest of a group among those without problems."""
    here = {c: r for c, r in results.items() if c.group == group}
    valid = [c for c, r in here.items() if mean_over_base(r, here) and not problems(r)]
    return next((c for c in by_speed(here) if c in valid), None)


def mean_over_base(result: Result, results: dict[Candidate, Result]) -> float | None:
    """Speed beside the checkout's own kernels: the geometric mean over the cases."""
    base = next((r for c, r in results.items() if not c.tiles and not c.patches), None)
    if base is None or "cases" not in base or "cases" not in result:
        return None
    return geometric_mean(
        [base["cases"][name]["us"] / case["us"] for name, case in result["cases"].items()]
    )


def problems(result: Result) -> list[str]:
    if "error" in result:
        return [result["error"].splitlines()[-1][:160]]
    found = [f"spills {k['spills']}" for k in result["kernels"] if k["spills"] > 0]
    wrong = [n for n, case in result["cases"].items() if not case["error"] < MAX_DIFFERENCE]
    return found + [f"WRONG: {name}" for name in wrong]


def row_cells(
    candidate: Candidate, result: Result, mean: float | None, cases: tuple[str, ...]
) -> list[str]:
    kernels = result.get("kernels", [])

    def each(name: str) -> str:
        return " / ".join(str(value) for value in dict.fromkeys(k[name] for k in kernels))

    times = [f"{result['cases'][n]['us']:.1f}" if "cases" in result else "" for n in cases]
    speed = "" if mean is None else f"{mean:.3f}"
    facts = [each("registers"), each("smem"), each("ctas_per_sm")]
    return [candidate.name, candidate.why, speed, *times, *facts, "; ".join(problems(result))]


def winner_lines(candidate: Candidate, result: Result, ceilings: Ceilings) -> list[str]:
    lines = [f"First: {candidate.name}."]
    for kernel in result["kernels"]:
        lines.append(
            f"- `{kernel['kernel']}`: {kernel['registers']} registers, {kernel['smem']} bytes of "
            f"shared memory, {kernel['ctas_per_sm']} CTAs an SM, {100 * kernel['occupancy']:.0f}% "
            "of its threads"
        )
    for name, case in result["cases"].items():
        memory, math = ceilings.memory_us(case["bytes"]), ceilings.math_us(case["flops"])
        rate = (
            f"{case['flops'] / case['us'] / 1e6:.0f} TFLOP/s"
            if math > memory
            else f"{case['bytes'] / case['us'] / 1e3:.0f} GB/s"
        )
        share = 100 * max(memory, math) / case["us"]
        lines.append(f"- {name}: {case['us']:.1f} us, {rate}, {share:.0f}% of the roofline")
    counters = result.get("counters", {})
    if isinstance(counters, str):
        lines.append(f"- no counters: {counters}")
    else:
        lines += [f"- counters of {name}: {describe(found)}" for name, found in counters.items()]
    return lines
