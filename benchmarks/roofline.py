"""The ceilings of this GPU, measured in the process that measures the kernels."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch

from .timer import Timer

GEMM_SHAPES = ((8192, 8192, 8192), (4096, 7168, 16384))
STREAM_BYTES = 4 << 30


@dataclass(frozen=True)
class Ceilings:
    """GB/s (copy counts bytes read and written) and TFLOP/s."""

    read: float
    write: float
    copy: float
    bf16_matmul: float

    def memory_us(self, num_read: float, num_written: float = 0.0) -> float:
        """Time of the traffic alone, at the best rate seen for each direction."""
        read, write = max(self.read, self.copy), max(self.write, self.copy)
        return num_read / read / 1e3 + num_written / write / 1e3

    def math_us(self, num_flops: float) -> float:
        return num_flops / self.bf16_matmul / 1e6


NOTHING_MEASURED = Ceilings(read=1.0, write=1.0, copy=1.0, bf16_matmul=1.0)


def read_gbps(timer: Timer, source: torch.Tensor) -> float:
    """Reductions that read everything and write almost nothing; the fastest counts."""
    rows = source.view(-1, 1 << 14)
    times = [timer.time(lambda: rows.sum()), timer.time(lambda: rows.amax(dim=1))]
    return STREAM_BYTES / min(times) / 1e3


def memory_gbps(timer: Timer) -> tuple[float, float, float]:
    """Rates of reading, writing and copying 4 GiB; a copy counts both directions."""
    source = torch.empty(STREAM_BYTES // 4, dtype=torch.float32, device=timer.device).uniform_()
    target = torch.empty_like(source)
    write_us = timer.time(lambda: target.view(torch.int64).fill_(-1))
    copy_us = timer.time(lambda: target.copy_(source))
    size = STREAM_BYTES / 1e3
    return read_gbps(timer, source), size / write_us, 2 * size / copy_us


def matmul_tflops(timer: Timer) -> float:
    """The fastest of two bf16 matrix products on random data."""
    rate = 0.0
    for m, n, k in GEMM_SHAPES:
        a = torch.randn(m, k, device=timer.device, dtype=torch.bfloat16)
        b = torch.randn(k, n, device=timer.device, dtype=torch.bfloat16)
        out = torch.empty(m, n, device=timer.device, dtype=torch.bfloat16)
        us = timer.time(partial(torch.mm, a, b, out=out))
        rate = max(rate, 2 * m * n * k / us / 1e6)
    return rate


def measure(timer: Timer) -> Ceilings:
    """All of them; the memory is given back to the GPU afterwards."""
    read, write, copy = memory_gbps(timer)
    ceilings = Ceilings(read, write, copy, matmul_tflops(timer))
    torch.cuda.empty_cache()
    return ceilings
