"""The architectures that packs are made for, and how a user names them."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable

DEFAULT_LIST = "7.5 8.0 8.6 8.9 9.0a"

# Shared memory that one block may opt in to, static and dynamic together, in bytes.
SMEM_LIMITS = {
    "sm_75": 64 << 10,
    "sm_80": 163 << 10,
    "sm_86": 99 << 10,
    "sm_89": 99 << 10,
    "sm_90a": 227 << 10,
}
REGISTERS_A_BLOCK = 64 << 10


class ArchError(ValueError):
    """An architecture list that cannot be understood, or that leaves nothing to build."""


def parse_torch_list(text: str, say: Callable[[str], None]) -> list[str]:
    """Read TORCH_CUDA_ARCH_LIST, such as "7.5;8.0 9.0a+PTX"; `say` hears what is left out.

    Returns
    -------
    list of str
        Such as ["sm_75", "sm_80", "sm_90a"]: known ones, each once, in order.
    """
    archs = set()
    for item in filter(None, re.split(r"[;,\s]+", text)):
        match = re.fullmatch(r"(\d+)\.(\d)([af]?)(\+PTX)?", item)
        if match is None:
            raise ArchError(
                f"TORCH_CUDA_ARCH_LIST: '{item}' is not an architecture; expected items such as "
                f"those of '{DEFAULT_LIST}'"
            )
        if match[4]:
            say(f"{item}: packs hold machine code only; for newer GPUs kernels come by JIT")
        arch = _known(f"sm_{match[1]}{match[2]}{match[3]}")
        if arch is None:
            say(f"{item}: left out, it has no pack of its own; such GPUs get kernels by JIT")
            continue
        archs.add(arch)
    if not archs:
        raise ArchError(
            f"TORCH_CUDA_ARCH_LIST: '{text}' names no architecture that packs are made for: "
            f"{DEFAULT_LIST}"
        )
    return [arch for arch in SMEM_LIMITS if arch in archs]


def parse_names(names: Iterable[str]) -> list[str]:
    """Read what `--arch` was given: "sm_80", "80" or "8.0", separated by commas or spaces."""
    archs = set()
    for name in names:
        for item in filter(None, re.split(r"[;,\s]+", name)):
            arch = _known("sm_" + item.removeprefix("sm_").replace(".", ""))
            if arch is None:
                raise ArchError(f"--arch: expected some of {', '.join(SMEM_LIMITS)}, got '{item}'")
            archs.add(arch)
    return [arch for arch in SMEM_LIMITS if arch in archs]


def _known(arch: str) -> str | None:
    """Return the architecture of the packs; Hopper's are built with its own instructions only."""
    arch = "sm_90a" if arch == "sm_90" else arch
    return arch if arch in SMEM_LIMITS else None
