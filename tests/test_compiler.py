"""From a kernel's name to an entry: format, NVRTC, its errors, the pool of workers."""

from __future__ import annotations

import os
import signal
import struct
import subprocess
import sys
import time
from pathlib import Path

import pytest
import ridgeline
from kernel_fixtures import KERNEL, OPTIONS, StandIn, made_entry, write_kernels
from ridgeline import compiler
from ridgeline.compiler import entry, jit, nvrtc, pool, toolchain
from support import run_python

RMSNORM = "norm/rmsnorm.cuh:rmsnorm<__nv_bfloat16, __nv_bfloat16, 8>"
KEY = "0" * 64


@pytest.fixture(scope="module")
def kernels_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_kernels(tmp_path_factory.mktemp("kernels"))


def compile_probe(kernels_dir: Path, name: str = KERNEL, arch: str = "sm_80") -> entry.Entry:
    return entry.unpack(nvrtc.compile_kernel(name, arch, KEY, OPTIONS, str(kernels_dir)))


# The entry


def test_entry_round_trip() -> None:
    data = made_entry()
    found = entry.unpack(data)
    assert found.name == KERNEL
    assert found.pack() == data
    assert len(found.raw()) == found.raw_size == 1000


def test_entry_is_accepted_by_the_cpp_runtime() -> None:
    compiler.library().check_entry(made_entry())


def corrupted(data: bytes, position: int) -> bytes:
    return data[:position] + bytes([data[position] ^ 1]) + data[position + 1 :]


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: data[:0],
        lambda data: data[:20],
        lambda data: data[:-1],
        lambda data: data + b"\0",
        lambda data: b"RLKERN00" + data[8:],
        lambda data: corrupted(data, 9),
        lambda data: corrupted(data, 30),
        lambda data: corrupted(data, 60),
        lambda data: corrupted(data, len(data) - 1),
    ],
    ids=["empty", "prefix", "short", "long", "magic", "size", "sha256", "header", "payload"],
)
def test_damaged_entry_is_refused_by_python_and_cpp(damage) -> None:  # type: ignore[no-untyped-def]
    data = damage(made_entry())
    with pytest.raises(entry.EntryError):
        entry.unpack(data)
    with pytest.raises(RuntimeError):
        compiler.library().check_entry(data)


def test_entry_whose_sizes_overflow_is_refused() -> None:
    data = made_entry()
    data = data[:8] + struct.pack("<II", 0xFFFFFFFF, 0xFFFFFFFF) + data[16:]
    with pytest.raises(entry.EntryError):
        entry.unpack(data)
    with pytest.raises(RuntimeError):
        compiler.library().check_entry(data)


# NVRTC


def test_cubin_and_its_report(kernels_dir: Path) -> None:
    found = compile_probe(kernels_dir)
    assert found.kind == "cubin"
    assert found.raw().startswith(b"\x7fELF")
    assert found.lowered.startswith("_ZN9ridgeline5scale")
    assert found.registers > 0
    assert found.static_smem == 128
    assert found.spill_stores == found.spill_loads == 0
    assert found.compiler.startswith("nvrtc 1")


def test_ptx_ends_with_a_zero_and_has_no_report(kernels_dir: Path) -> None:
    found = compile_probe(kernels_dir, arch="compute_75")
    assert found.kind == "ptx"
    assert ".target sm_75" in found.raw().decode()
    assert found.raw().endswith(b"\0")
    assert (found.registers, found.spill_stores) == (-1, -1)


def test_compiling_twice_gives_the_same_bytes_wherever_the_sources_lie(
    kernels_dir: Path, tmp_path: Path
) -> None:
    assert compile_probe(kernels_dir) == compile_probe(write_kernels(tmp_path / "elsewhere"))


def test_spills_are_counted(tmp_path: Path) -> None:
    (tmp_path / "spill.cuh").write_text(
        """namespace ridgeline {
template <int kSize> __global__ void __launch_bounds__(1024, 2) spill(float* data) {
  float values[kSize];
  for (int i = 0; i < kSize; ++i) values[i] = data[i * 1024 + threadIdx.x];
  __syncthreads();
  for (int i = 0; i < kSize; ++i) data[i * 1024 + threadIdx.x] = values[kSize - 1 - i] * data[i];
}
}
"""
    )
    found = compile_probe(tmp_path, "spill.cuh:spill<128>")
    assert found.spill_stores > 0
    assert found.spill_loads > 0


def test_a_core_kernel_of_the_package_compiles() -> None:
    found = entry.unpack(compiler.obtain(RMSNORM, "sm_90a"))
    assert found.name == RMSNORM
    assert found.key == compiler.library().entry_key(RMSNORM, "sm_90a")
    assert found.spill_stores == 0
    compiler.library().check_entry(found.pack())


@pytest.mark.parametrize(
    ("name", "arch", "expected"),
    [
        ("probe/broken.cuh:broken<float>", "sm_80", "probe/broken.cuh:6: "),
        ("probe/scale.cuh:scael<float, 3>", "sm_80", '"scael" is undefined'),
        ("probe/absent.cuh:scale<float, 3>", "sm_80", "probe/absent.cuh"),
        (KERNEL, "sm_199", "does not know this architecture; it knows"),
    ],
    ids=["error", "template-id", "header", "architecture"],
)
def test_compile_error_shows_kernel_options_and_first_error(
    kernels_dir: Path, name: str, arch: str, expected: str
) -> None:
    with pytest.raises(nvrtc.CompileError) as caught:
        compile_probe(kernels_dir, name, arch)
    message = str(caught.value)
    assert f"kernel '{name}' does not compile for {arch}: " in message
    assert expected in message.splitlines()[0]
    assert f"{OPTIONS} -arch={arch}" in message
    assert caught.value.log


def test_name_without_template_id_is_refused(kernels_dir: Path) -> None:
    with pytest.raises(ValueError, match="is not a kernel name"):
        compile_probe(kernels_dir, "probe/scale.cuh")


def test_missing_binding_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cuda.bindings", None)
    monkeypatch.setitem(sys.modules, "cuda.bindings.nvrtc", None)
    with pytest.raises(toolchain.CompilerMissingError, match=r'pip install "cuda-bindings=='):
        toolchain.load.__wrapped__()


def test_missing_nvrtc_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    # Why both: the binding keeps the finder that it sees when it is imported first.
    from cuda import pathfinder
    from cuda.bindings import nvrtc as _binding  # noqa: F401

    def not_found(name: str) -> None:
        raise RuntimeError(f"{name} is not here")

    monkeypatch.setattr(pathfinder, "load_nvidia_dynamic_lib", not_found)
    with pytest.raises(toolchain.CompilerMissingError, match="nvidia-cuda-nvrtc"):
        toolchain.load.__wrapped__()


def test_missing_headers_say_what_to_install(tmp_path: Path) -> None:
    class Pathfinder:
        @staticmethod
        def find_nvidia_header_directory(_: str) -> None:
            return None

    with pytest.raises(toolchain.CompilerMissingError, match="nvidia-cuda-runtime-cu12"):
        toolchain._find_headers(Pathfinder, tmp_path / "lib" / "libnvrtc.so.12", 12)


def test_tag_needs_no_nvrtc() -> None:
    code = (
        "import sys, ridgeline; from ridgeline.compiler import toolchain;"
        "print(toolchain.compiler_tag(), 'cuda.bindings.nvrtc' in sys.modules)"
    )
    result = run_python(code)
    assert result.returncode == 0, result.stderr
    tag, loaded = result.stdout.split()
    assert tag.startswith("nvrtc_1")
    assert loaded == "False"


# The callback and the environment


def test_import_loads_no_compiler() -> None:
    code = """
import sys, torch
before = set(sys.modules)
import ridgeline
added = set(sys.modules) - before
print(sorted(name for name in added if name.startswith(("cuda", "ridgeline.compiler."))))
"""
    result = run_python(code)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == "['ridgeline.compiler.native']"


def test_no_exception_crosses_the_callback(monkeypatch: pytest.MonkeyPatch) -> None:
    def explode(*arguments: object) -> bytes:
        raise SystemExit("out of cheese")

    monkeypatch.setattr(jit, "obtain", explode)
    messages: list[str] = []
    monkeypatch.setattr(
        type(compiler.library()), "supply_error", lambda _, text: messages.append(text)
    )
    assert compiler._callbacks is not None
    assert compiler._callbacks[0](KERNEL.encode(), b"sm_80", KEY.encode()) == 1
    assert "out of cheese" in messages[0]
    assert KERNEL in messages[0]


def test_forbidden_jit_says_what_is_missing_and_where(
    monkeypatch: pytest.MonkeyPatch, kernels_dir: Path, tmp_path: Path
) -> None:
    monkeypatch.setenv("RIDGELINE_JIT", "0")
    library = StandIn(kernels_dir, tmp_path / "cache", tmp_path / "packs")
    with pytest.raises(jit.JitForbiddenError) as caught:
        jit.obtain(library, KERNEL, "sm_80", KEY)  # type: ignore[arg-type]
    message = str(caught.value)
    for part in (
        KERNEL,
        "sm_80",
        f"{tmp_path}/packs/sm_80.rlpack",
        f"{tmp_path}/cache/sm_80/{KEY}",
    ):
        assert part in message
    assert "Unset RIDGELINE_JIT" in message


def test_forbidden_jit_still_takes_what_the_cache_has(
    monkeypatch: pytest.MonkeyPatch, kernels_dir: Path, tmp_path: Path
) -> None:
    library = StandIn(kernels_dir, tmp_path / "cache")
    compiled = jit.obtain(library, KERNEL, "sm_80", KEY)  # type: ignore[arg-type]
    monkeypatch.setenv("RIDGELINE_JIT", "0")
    assert jit.obtain(library, KERNEL, "sm_80", KEY) == compiled  # type: ignore[arg-type]


def test_key_follows_the_included_headers(tmp_path: Path) -> None:
    kernels = write_kernels(tmp_path)
    code = (
        "import ridgeline; from ridgeline import compiler;"
        f"print(compiler.library().entry_key('{KERNEL}', 'sm_80'))"
    )

    def key() -> str:
        result = run_python(code, {"RIDGELINE_KERNELS_DIR": str(kernels)})
        assert result.returncode == 0, result.stderr
        return result.stdout.strip()

    first = key()
    (kernels / "probe" / "broken.cuh").write_text("// another kernel's header\n")
    assert key() == first
    factor = kernels / "common" / "factor.cuh"
    factor.write_text(factor.read_text().replace("2.0f", "3.0f"))
    assert key() != first


# The pool


def outcomes(jobs: list[pool.Job], kernels_dir: Path, **how: int) -> dict[pool.Job, pool.Outcome]:
    found = pool.compile_all(jobs, OPTIONS, str(kernels_dir), **how)
    return {outcome.job: outcome for outcome in found}


def test_pool_compiles_what_compiles_and_reports_what_does_not(kernels_dir: Path) -> None:
    good = [pool.Job(f"probe/scale.cuh:scale<float, {i}>", "sm_80", KEY) for i in range(4)]
    bad = pool.Job("probe/broken.cuh:broken<float>", "sm_80", KEY)
    found = outcomes([*good, bad], kernels_dir, num_workers=2)
    assert [entry.unpack(found[job].entry or b"").name for job in good] == [
        job.name for job in good
    ]
    assert found[bad].entry is None
    assert "probe/broken.cuh:6: " in found[bad].error


def test_pool_and_process_give_the_same_bytes(kernels_dir: Path) -> None:
    job = pool.Job(KERNEL, "sm_80", KEY)
    assert outcomes([job], kernels_dir)[job].entry == compile_probe(kernels_dir).pack()


def test_pool_of_no_jobs_ends() -> None:
    assert outcomes([], Path()) == {}


FAKE_WORKER = """
import base64, json, os, signal, sys, time
sys.stdin.readline()
for line in sys.stdin:
    name = json.loads(line)["name"]
    if name == "dies":
        os.kill(os.getpid(), signal.SIGKILL)
    if name == "exits":
        sys.exit(3)
    if name == "missing":
        print(json.dumps({"error": "no compiler", "missing": True, "seconds": 0}), flush=True)
    if name.startswith("sleeps"):
        os.write(2, b"%d\\n" % os.getpid())
        time.sleep(600)
    print(json.dumps({"entry": base64.b64encode(name.encode()).decode(), "seconds": 0}), flush=True)
"""


@pytest.fixture
def fake_worker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "worker.py"
    path.write_text(FAKE_WORKER)
    monkeypatch.setattr(pool, "_WORKER", path)
    return path


def fake_jobs(*names: str) -> list[pool.Job]:
    return [pool.Job(name, "sm_80", KEY) for name in names]


@pytest.mark.parametrize(("name", "how"), [("dies", "SIGKILL"), ("exits", "exit code 3")])
def test_dead_worker_fails_its_kernel_only(fake_worker: Path, name: str, how: str) -> None:
    jobs = fake_jobs("a", name, "b", "c")
    found = outcomes(jobs, Path(), num_workers=1)
    assert [found[job].entry for job in jobs] == [b"a", None, b"b", b"c"]
    assert f"kernel '{name}' for sm_80" in found[jobs[1]].error
    assert how in found[jobs[1]].error


def test_pool_without_compiler_says_so_once(fake_worker: Path) -> None:
    with pytest.raises(toolchain.CompilerMissingError, match="no compiler"):
        outcomes(fake_jobs("missing", "a"), Path(), num_workers=1)


def is_running(process_id: int) -> bool:
    try:
        os.kill(process_id, 0)
    except ProcessLookupError:
        return False
    return True


def test_ctrl_c_ends_the_workers(fake_worker: Path) -> None:
    # Why the handler: a job in the background of a shell inherits that it ignores interrupts.
    code = f"""
import pathlib, signal
signal.signal(signal.SIGINT, signal.default_int_handler)
from ridgeline.compiler import pool
pool._WORKER = pathlib.Path({str(fake_worker)!r})
jobs = [pool.Job(f"sleeps {{i}}", "sm_80", "") for i in range(2)]
try:
    list(pool.compile_all(jobs, "", "", num_workers=2))
except KeyboardInterrupt:
    print("interrupted", flush=True)
"""
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stderr is not None
    workers = [int(process.stderr.readline()) for _ in range(2)]
    process.send_signal(signal.SIGINT)
    assert process.stdout.readline() == "interrupted\n"
    assert process.wait(timeout=30) == 0
    deadline = time.monotonic() + 10
    while any(map(is_running, workers)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(map(is_running, workers))


def test_number_of_workers_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(64)))
    monkeypatch.setattr(pool, "_available_memory", lambda: 5 << 30)
    monkeypatch.delenv("MAX_JOBS", raising=False)
    assert pool.default_workers() == 5
    monkeypatch.setenv("MAX_JOBS", "2")
    assert pool.default_workers() == 2
    monkeypatch.setattr(pool, "_available_memory", lambda: 1 << 20)
    assert pool.default_workers() == 1


# On a GPU

FIRST_CALL = """
import logging, time
logging.basicConfig(level=logging.INFO, format="%(message)s")
import torch, ridgeline
x = torch.randn(4, 4096, device="cuda", dtype=torch.bfloat16)
w = torch.ones(4096, device="cuda", dtype=torch.bfloat16)
torch.cuda.synchronize()
start = time.perf_counter()
y = ridgeline.rmsnorm(x, w)
torch.cuda.synchronize()
print(f"seconds {time.perf_counter() - start:.3f}")
"""


@pytest.mark.gpu
@pytest.mark.once
def test_first_call_compiles_and_the_next_process_does_not(tmp_path: Path) -> None:
    env = {"RIDGELINE_CACHE_DIR": str(tmp_path), "RIDGELINE_PACK_DIR": "", "PATH": ""}
    first, second = run_python(FIRST_CALL, env), run_python(FIRST_CALL, env)
    assert first.returncode == 0, first.stderr
    assert second.returncode == 0, second.stderr
    assert first.stderr.count("ridgeline: compiled ") == 1
    assert "ridgeline: compiled " not in second.stderr


@pytest.mark.gpu
@pytest.mark.once
def test_warmup_leaves_nothing_to_compile(tmp_path: Path) -> None:
    code = f"""
import logging
logging.basicConfig(level=logging.INFO, format="%(message)s")
import ridgeline
report = ridgeline.warmup(["{RMSNORM}"], progress=False)
assert report.num_compiled == 1, report
{FIRST_CALL}
"""
    env = {"RIDGELINE_CACHE_DIR": str(tmp_path), "RIDGELINE_PACK_DIR": ""}
    result = run_python(code, env)
    assert result.returncode == 0, result.stderr
    assert "ridgeline: compiled " not in result.stderr


def test_version_is_that_of_the_package() -> None:
    from importlib import metadata

    assert ridgeline.__version__ == metadata.version("ridgeline")
