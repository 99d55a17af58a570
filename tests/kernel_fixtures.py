"""A small folder of kernels, and a stand-in for the op library, for the compiler's tests."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from pathlib import Path

from ridgeline.compiler import entry
from ridgeline.compiler.native import CoreRow

OPTIONS = "-std=c++17 -default-device"
KERNEL = "probe/scale.cuh:scale<float, 3>"

_SCALE = """#pragma once
#include "common/factor.cuh"
#include <cuda_fp16.h>
namespace ridgeline {
struct ScaleParams { float* data; };
template <typename T, int kTimes>
__global__ void scale(const __grid_constant__ ScaleParams params) {
  __shared__ float values[32];
  values[threadIdx.x % 32] = params.data[threadIdx.x];
  __syncthreads();
  params.data[threadIdx.x] = values[31 - threadIdx.x % 32] * T(kTimes) * factor();
}
}  // namespace ridgeline
"""
_FACTOR = """#pragma once
namespace ridgeline { __device__ inline float factor() { return 2.0f; } }
"""
_BROKEN = """#pragma once
namespace ridgeline {
struct BrokenParams { float* data; };
template <typename T>
__global__ void broken(const __grid_constant__ BrokenParams params) {
  params.data[0] = undeclared_name;
}
}  // namespace ridgeline
"""


def write_kernels(folder: Path) -> Path:
    """Fill `folder` with kernels that compile in a tenth of a second, and one that does not."""
    for name, text in (
        ("probe/scale.cuh", _SCALE),
        ("common/factor.cuh", _FACTOR),
        ("probe/broken.cuh", _BROKEN),
    ):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return folder


def made_entry(name: str = KERNEL, arch: str = "sm_80", key: str = "", size: int = 1000) -> bytes:
    """Return a sound entry that no compiler made."""
    raw = b"".join(hashlib.sha256(f"{name}{i}".encode()).digest() for i in range(size // 32 + 1))
    raw = raw[:size]
    return entry.Entry(
        name=name,
        arch=arch,
        kind="cubin",
        lowered="_Zprobe",
        registers=32,
        static_smem=128,
        spill_stores=0,
        spill_loads=0,
        stack=0,
        raw_size=len(raw),
        raw_sha256=hashlib.sha256(raw).hexdigest(),
        compiler="nvrtc 12.9.86",
        key=key or hashlib.sha256(f"{name} {arch}".encode()).hexdigest(),
        payload=entry.deflate(raw),
    ).pack()


@dataclass
class StandIn:
    """What the compiler asks of the op library, for folders and core rows that a test chooses."""

    kernels: Path
    cache: Path | None
    packs: Path | None = None
    core_table: tuple[CoreRow, ...] = ()

    def compile_options(self) -> str:
        return OPTIONS

    def kernels_dir(self) -> Path:
        return self.kernels

    def cache_dir(self) -> Path | None:
        return self.cache

    def pack_dir(self) -> Path | None:
        return self.packs

    def entry_key(self, name: str, arch: str) -> str:
        sources = b"".join(path.read_bytes() for path in sorted(self.kernels.rglob("*.cuh")))
        return hashlib.sha256(f"{name} {arch} ".encode() + sources).hexdigest()


def core_row(kernel: str = KERNEL, **values: int | bool | str) -> CoreRow:
    """Return a row that serves every SM, but for the values given."""
    row = CoreRow("probe", kernel, 75, 999, True, 128, 0, "a test")
    return replace(row, **values)  # type: ignore[arg-type]
