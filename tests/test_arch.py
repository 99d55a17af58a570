"""Which architecture's code runs: `--arch 75` must mean that `__CUDA_ARCH__` was 750."""

from __future__ import annotations

import ctypes
from pathlib import Path

import pytest
import torch
from ridgeline import compiler
from ridgeline.compiler import entry, nvrtc
from support import run_python, sm_under_test

PROBE = """#pragma once
namespace ridgeline {
struct ProbeParams { int* arch; };
template <int kUnused>
__global__ void probe(const __grid_constant__ ProbeParams params) {
#ifdef __CUDA_ARCH__
  *params.arch = __CUDA_ARCH__;
#endif
}
}  // namespace ridgeline
"""

CALL_EVERY_FAMILY = """
import torch
from test_graphs import every_family
x = torch.randn(40, 8, 64, device="cuda").half()
k, v = torch.randn(2, 300, 2, 64, device="cuda").half()
every_family(x, k, v)()
torch.cuda.synchronize()
"""


def launch(image: bytes, name: str, out: torch.Tensor) -> None:
    """Launch a kernel of one pointer with one thread, through the driver and nothing of ours."""
    driver = ctypes.CDLL("libcuda.so.1")
    module, function = ctypes.c_void_p(), ctypes.c_void_p()
    assert driver.cuModuleLoadData(ctypes.byref(module), image) == 0
    assert driver.cuModuleGetFunction(ctypes.byref(function), module, name.encode()) == 0
    pointer = ctypes.c_void_p(out.data_ptr())
    arguments = (ctypes.c_void_p * 1)(ctypes.addressof(pointer))
    one, none = ctypes.c_uint(1), ctypes.c_uint(0)
    grid_and_block = [one] * 6
    torch.cuda.synchronize()
    error = driver.cuLaunchKernel(function, *grid_and_block, none, None, arguments, None)
    assert error == 0
    torch.cuda.synchronize()
    assert driver.cuModuleUnload(module) == 0


def arch_of_the_runtime() -> str:
    """The architecture that this process resolves kernels for, such as "compute_80"."""
    report = compiler.library().driver_report()
    arch: str = report["devices"][0]["arch"]
    return arch


@pytest.mark.gpu
def test_probe_sees_the_architecture_under_test(tmp_path: Path) -> None:
    device = torch.device("cuda", 0)
    (tmp_path / "probe.cuh").write_text(PROBE)
    arch = arch_of_the_runtime()
    options = compiler.library().compile_options()
    data = nvrtc.compile_kernel("probe.cuh:probe<0>", arch, "0" * 64, options, str(tmp_path))
    compiled = entry.unpack(data)
    out = torch.zeros(1, dtype=torch.int32, device=device)
    launch(compiled.raw(), compiled.lowered, out)
    assert out.item() == 10 * sm_under_test(device)


@pytest.mark.gpu
def test_ops_run_the_architecture_under_test(tmp_path: Path) -> None:
    """Every kernel that a process compiles for its ops is of that architecture."""
    env = {"RIDGELINE_CACHE_DIR": str(tmp_path), "RIDGELINE_PACK_DIR": ""}
    result = run_python(CALL_EVERY_FAMILY, env)
    assert result.returncode == 0, result.stderr
    arch = arch_of_the_runtime()
    files = sorted(tmp_path.rglob("*.rlk"))
    assert len(files) >= 5
    for file in files:
        kernel = entry.unpack(file.read_bytes())
        assert kernel.arch == arch, kernel.name
        if arch.startswith("compute_"):
            assert f".target sm_{arch.removeprefix('compute_')}".encode() in kernel.raw()


@pytest.mark.gpu
def test_newer_architecture_than_the_gpu_is_refused() -> None:
    code = """
import torch, ridgeline
x = torch.randn(4, 64, device="cuda").half()
try:
    ridgeline.rmsnorm(x, x[0])
except RuntimeError as error:
    print(error)
"""
    for value, words in (("999", "newer than"), ("Hopper", "expected a compute capability")):
        result = run_python(code, {"RIDGELINE_ARCH": value})
        assert words in result.stdout, result.stderr
