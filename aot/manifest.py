"""The manifest beside each pack: what the assembler said about every kernel."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ridgeline.compiler import entry, pack

from .plan import Need


def pack_file(folder: Path, arch: str) -> Path:
    return folder / f"{arch}.rlpack"


def manifest_file(folder: Path, arch: str) -> Path:
    return folder / f"{arch}.json"


def describe(arch: str, options: str, packed: bytes, needs: Mapping[str, Need]) -> dict[str, Any]:
    """Return the manifest of a pack; the same pack gives the same manifest."""
    kernels = []
    compilers = set()
    for slot, found in pack.read_entries(packed):
        compilers.add(found.compiler)
        data = packed[slot.offset : slot.offset + slot.size]
        kernels.append(_kernel(found, data, needs[found.name]))
    return {
        "arch": arch,
        "compiler": ", ".join(sorted(compilers)),
        "options": options,
        "pack_size": len(packed),
        "pack_sha256": hashlib.sha256(packed).hexdigest(),
        "kernels": sorted(kernels, key=lambda kernel: str(kernel["name"])),
    }


def to_bytes(manifest: Mapping[str, Any]) -> bytes:
    return (json.dumps(manifest, indent=1) + "\n").encode()


def _kernel(found: entry.Entry, data: bytes, need: Need) -> dict[str, Any]:
    return {
        "name": found.name,
        "key": found.key,
        "lowered": found.lowered,
        "registers": found.registers,
        "block": need.block,
        "static_smem": found.static_smem,
        "dynamic_smem": need.dynamic_smem,
        "spill_stores": found.spill_stores,
        "spill_loads": found.spill_loads,
        "stack": found.stack,
        "cubin_size": found.raw_size,
        "cubin_sha256": found.raw_sha256,
        "entry_size": len(data),
        "entry_sha256": hashlib.sha256(data).hexdigest(),
    }
