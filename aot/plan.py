"""What belongs into the packs, and what a kernel in one must satisfy."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from ridgeline.compiler.entry import Entry
from ridgeline.compiler.native import CoreRow
from ridgeline.compiler.pool import Job

from .archs import REGISTERS_A_BLOCK, SMEM_LIMITS

_REGISTER_GRANULARITY = 8


@dataclass(frozen=True)
class Need:
    """What a launch of a kernel takes: bytes of dynamic shared memory, threads of a block."""

    dynamic_smem: int
    block: int


def core_kernels(table: Iterable[CoreRow], arch: str) -> dict[str, Need]:
    """Return the kernels of an architecture's pack, sorted by name."""
    needs: dict[str, Need] = {}
    for row in table:
        if not (row.core and row.serves(arch)):
            continue
        other = needs.get(row.kernel, Need(0, 0))
        needs[row.kernel] = Need(
            max(row.dynamic_smem, other.dynamic_smem), max(row.block, other.block)
        )
    return dict(sorted(needs.items()))


def order(jobs: Sequence[Job]) -> list[Job]:
    """Order jobs for the pool: attention, the longest, first; the SMs of a kernel together."""
    return sorted(jobs, key=lambda job: (not job.name.startswith("attention/"), job.name, job.arch))


def problems(found: Entry, need: Need) -> list[str]:
    """Return why a compiled kernel may not go into a pack; empty when it may."""
    where = f"kernel '{found.name}' for {found.arch}"
    if found.kind != "cubin" or found.registers < 0:
        return [f"{where}: the assembler's report is missing (a {found.kind})"]
    reasons = []
    if found.spill_stores or found.spill_loads:
        reasons.append(
            f"{where}: spills registers ({found.spill_stores} bytes stored, "
            f"{found.spill_loads} bytes loaded)"
        )
    smem, limit = found.static_smem + need.dynamic_smem, SMEM_LIMITS[found.arch]
    if smem > limit:
        reasons.append(
            f"{where}: takes {smem} bytes of shared memory ({found.static_smem} static, "
            f"{need.dynamic_smem} dynamic), the limit is {limit}"
        )
    registers = -(-found.registers // _REGISTER_GRANULARITY) * _REGISTER_GRANULARITY * need.block
    if registers > REGISTERS_A_BLOCK:
        reasons.append(
            f"{where}: a block of {need.block} threads takes {registers} registers, the limit is "
            f"{REGISTERS_A_BLOCK}"
        )
    return reasons
