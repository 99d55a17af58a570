"""Check packs against their manifests, the current sources and the core table."""

from __future__ import annotations

import json
from pathlib import Path

from ridgeline.compiler import pack
from ridgeline.compiler.native import Native

from . import manifest, plan
from .archs import SMEM_LIMITS


def packed_archs(folder: Path) -> list[str]:
    """Return the architectures that `folder` has packs of."""
    return [arch for arch in SMEM_LIMITS if manifest.pack_file(folder, arch).is_file()]


def verify(native: Native, folder: Path, arch: str) -> list[str]:
    """Return what is wrong with an architecture's pack; empty when nothing is.

    Checked: index and every entry against their sha256, every key against the current sources,
    spills and limits, completeness against the core table, and the manifest against the pack.
    """
    path = manifest.pack_file(folder, arch)
    needs = plan.core_kernels(native.core_table, arch)
    try:
        data = path.read_bytes()
        entries = list(pack.read_entries(data))
    except OSError as error:
        return [f"{path}: cannot be read: {error.strerror}"]
    except pack.PackError as error:
        return [f"{path}: {error}"]

    wrong = []
    for slot, found in entries:
        if slot.name not in needs:
            wrong.append(f"{path}: kernel '{slot.name}' is not in the core table")
        elif found.arch != arch:
            wrong.append(f"{path}: kernel '{slot.name}' is for {found.arch}")
        elif native.entry_key(slot.name, arch) != slot.key:
            wrong.append(f"{path}: kernel '{slot.name}' was built from other sources or options")
        else:
            wrong += [f"{path}: {problem}" for problem in plan.problems(found, needs[slot.name])]
    absent = sorted(set(needs) - {slot.name for slot, _ in entries})
    wrong += [f"{path}: kernel '{name}' is missing" for name in absent]
    return wrong or _verify_manifest(native, folder, arch, data)


def _verify_manifest(native: Native, folder: Path, arch: str, packed: bytes) -> list[str]:
    path = manifest.manifest_file(folder, arch)
    try:
        written = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        return [f"{path}: cannot be read: {error}"]
    needs = plan.core_kernels(native.core_table, arch)
    expected = manifest.describe(arch, native.compile_options(), packed, needs)
    return [] if written == expected else [f"{path}: does not describe the pack beside it"]
