"""Small helpers of the test files: poisoned memory, the architecture under test, subprocesses."""

from __future__ import annotations

import contextlib
import os
import random
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import ridgeline
import torch
from ridgeline import compiler
from ridgeline.compiler.native import CoreRow
from torch.utils import deterministic

Result = TypeVar("Result")
POISON_SIZES = tuple(512 << shift for shift in range(16))


def sm_under_test(device: torch.device) -> int:
    """Compute capability of the code path that runs on `device`, such as 75 or 90; CPU: 0."""
    if device.type != "cuda":
        return 0
    forced = os.environ.get("RIDGELINE_ARCH")
    if forced:
        return int(forced.rstrip("a"))
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def compile_rows(wanted: Callable[[CoreRow], bool]) -> None:
    """On a GPU: compile the rows of the core table that it serves, by all cores at once.

    Not loaded: the driver assembles an older architecture's kernels one by one.
    """
    if not torch.cuda.is_available():
        return
    library = compiler.library()
    arch = library.driver_report()["devices"][0]["arch"]
    rows = [row for row in library.core_table if row.serves(arch) and wanted(row)]
    ridgeline.warmup(list(dict.fromkeys(row.kernel for row in rows)), arch=arch, progress=False)


# What an index tensor must never hold.
GARBAGE = (-(2**31), -1, 2**31 - 1, 10**9, 7)


def call_with_garbage(call: Callable[[], object], *index: torch.Tensor) -> None:
    """Call with each index tensor full of each bad value, then with a mixture of all."""
    draw = random.Random(5)
    for tensor in index:
        contents = tensor.clone()
        for value in GARBAGE:
            tensor.fill_(value)
            call()
        mixture = [draw.choice((*GARBAGE, 1, 3, 90)) for _ in range(tensor.numel())]
        tensor.copy_(torch.tensor(mixture, dtype=tensor.dtype))
        call()
        tensor.copy_(contents)


def broken_lists(work: torch.Tensor, rng: torch.Generator) -> Iterator[torch.Tensor]:
    """Work lists with the tag of a good one, and bad values or numbers drawn at random."""
    for value in GARBAGE:
        noise = torch.randint(-100, 3000, work.shape, generator=rng, dtype=torch.int32)
        for broken in (torch.full_like(work, value), noise.to(work.device)):
            broken[0] = work[0]
            yield broken


def supports_bf16_attention(device: torch.device) -> bool:
    """Turing has no bf16 tensor cores: there bf16 attention raises."""
    return device.type == "cpu" or sm_under_test(device) >= 80


@contextlib.contextmanager
def poisoned_memory(device: torch.device, *like: torch.Tensor) -> Iterator[None]:
    """Inside, memory that a kernel was to write and did not reads as NaN.

    Two nets: torch fills what `torch.empty` returns with NaN, and free blocks of CUDA's caching
    allocator (of common sizes, and of the sizes of the tensors in `like`) are filled with 0xFF,
    which is NaN in float32, float16 and bfloat16, for allocations that bypass the first.
    """
    if device.type == "cuda":
        sizes = [*POISON_SIZES, *(t.numel() * t.element_size() for t in like)]
        blocks = [
            torch.full((max(size, 1),), 0xFF, dtype=torch.uint8, device=device)
            for size in sizes
            for _ in range(2)
        ]
        del blocks
    was_deterministic = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    was_filling = deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    deterministic.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(was_deterministic, warn_only=warn_only)
        deterministic.fill_uninitialized_memory = was_filling


def poisoned_call(
    device: torch.device, function: Callable[..., Result], *args: Any, **kwargs: Any
) -> Result:
    """Call `function` with every fresh allocation poisoned (see `poisoned_memory`)."""
    with poisoned_memory(device):
        return function(*args, **kwargs)


def poison(*tensors: torch.Tensor) -> None:
    """Fill tensors that a call is about to overwrite (`out=` buffers) with NaN."""
    for tensor in tensors:
        tensor.fill_(float("nan"))


def run_python(
    code: str, env: Mapping[str, str] | None = None, timeout: float = 120.0
) -> subprocess.CompletedProcess[str]:
    """Run `code` in a fresh interpreter of this environment; `env` is added to os.environ.

    It can import the test files, and what PYTHONPATH names already.
    """
    path = [str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    return subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(path), **(env or {})},
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )


def normal(
    shape: tuple[int, ...],
    dtype: torch.dtype,
    device: torch.device,
    rng: torch.Generator,
    scale: float = 1.0,
) -> torch.Tensor:
    """Normal deviates, drawn on the CPU so that every device sees the same numbers."""
    values = torch.randn(shape, generator=rng, dtype=torch.float32) * scale
    return values.to(dtype).to(device)


def strided(tensor: torch.Tensor, dim: int = 0, factor: int = 2) -> torch.Tensor:
    """The same values as a view that steps over `factor - 1` rows of garbage along `dim`."""
    shape = list(tensor.shape)
    shape[dim] *= factor
    backing = torch.full(shape, float("nan"), dtype=tensor.dtype, device=tensor.device)
    index = [slice(None)] * tensor.dim()
    index[dim] = slice(0, None, factor)
    view = backing[tuple(index)]
    view.copy_(tensor)
    return view
