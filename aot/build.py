"""Compile the core kernels and write one pack and one manifest an architecture."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from ridgeline.compiler import cache, entry, pack, pool, toolchain
from ridgeline.compiler.native import Native
from ridgeline.compiler.progress import Progress

from . import manifest, plan


class BuildError(RuntimeError):
    """Kernels that did not compile or may not go into a pack."""


@dataclass(frozen=True)
class Built:
    """What a build did: packs written, kernels in them, how many were compiled for it."""

    files: tuple[Path, ...]
    num_kernels: int
    num_compiled: int


def build(
    native: Native,
    archs: Sequence[str],
    out: Path,
    *,
    num_workers: int | None = None,
    say: Callable[[str], None] = print,
) -> Built:
    """Build the packs of `archs` into the folder `out`.

    Kernels that the disk cache has under the same key and compiler are taken from there, and what
    is compiled goes there, so that one run of CI compiles each kernel once.

    Raises
    ------
    BuildError
        If a kernel does not compile, spills registers or exceeds its SM's shared memory. No pack
        is written then.
    """
    needs = {arch: plan.core_kernels(native.core_table, arch) for arch in archs}
    jobs = [
        pool.Job(name, arch, native.entry_key(name, arch)) for arch in archs for name in needs[arch]
    ]
    store = cache.Cache(native.cache_dir(), toolchain.compiler_tag())
    entries: dict[pool.Job, bytes] = {}
    for job in jobs:
        cached = store.read(job.arch, job.key)
        if cached is not None:
            entries[job] = cached
    missing = plan.order([job for job in jobs if job not in entries])
    say(f"{len(jobs)} kernels for {', '.join(archs)}: {len(jobs) - len(missing)} are cached")
    errors = _compile(native, store, missing, entries, num_workers)
    for job, data in entries.items():
        errors += plan.problems(entry.unpack(data), needs[job.arch][job.name])
    if errors:
        raise BuildError("\n".join(errors))

    files, compiler = [], ""
    for arch in archs:
        packed = pack.write([data for job, data in entries.items() if job.arch == arch])
        described = manifest.describe(arch, native.compile_options(), packed, needs[arch])
        cache.write_atomically(manifest.pack_file(out, arch), packed)
        cache.write_atomically(manifest.manifest_file(out, arch), manifest.to_bytes(described))
        files.append(manifest.pack_file(out, arch))
        compiler = described["compiler"]
        say(f"{files[-1]}: {len(needs[arch])} kernels, {len(packed) / 1e6:.2f} MB, {compiler}")
    if not compiler.startswith("nvrtc 12."):
        say(
            f"note: what {compiler} compiled needs the driver of its CUDA version; that of "
            f"nvidia-cuda-nvrtc-cu12 loads on every driver from 525 on"
        )
    return Built(tuple(files), len(jobs), len(missing))


def _compile(
    native: Native,
    store: cache.Cache,
    missing: Sequence[pool.Job],
    entries: dict[pool.Job, bytes],
    num_workers: int | None,
) -> list[str]:
    """Compile `missing` into `entries` and the cache; return what went wrong."""
    errors = []
    outcomes = pool.compile_all(
        missing, native.compile_options(), str(native.kernels_dir()), num_workers=num_workers
    )
    with contextlib.closing(outcomes), Progress(len(missing)) as progress:
        for outcome in outcomes:
            if outcome.entry is None:
                errors.append(outcome.error)
            else:
                entries[outcome.job] = outcome.entry
                store.write(outcome.job.arch, outcome.job.key, outcome.entry)
            progress.step(f"{outcome.job.arch} {outcome.job.name} ({outcome.seconds:.1f} s)")
    return errors
