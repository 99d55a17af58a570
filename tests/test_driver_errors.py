"""What is wrong with the machine: no driver, an old one, damaged packs and cache entries.

Each runs in a process of its own, where RIDGELINE_LIBCUDA, RIDGELINE_PACK_DIR and
RIDGELINE_CACHE_DIR stand for the machine, and each process must go on working after the error.
Without a GPU the kernel is loaded directly; with one, ops are called too.
"""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
from support import run_python

pytestmark = pytest.mark.once

KERNEL = "norm/rmsnorm.cuh:rmsnorm<__half, __half, 8>"

LOAD = f"""
import torch, ridgeline
from ridgeline.compiler import library
for _ in range(2):
    try:
        library().load({KERNEL!r}, 0)
    except RuntimeError as error:
        print(error)
q = torch.randn(4, 64)
k = torch.randn(9, 2, 64)
assert ridgeline.single_decode_with_kv_cache(q, k, k).isfinite().all()
"""

CALL = """
import torch, ridgeline
q = torch.randn(4, 64, device="cuda").half()
k = torch.randn(9, 2, 64, device="cuda").half()
for call in (
    lambda: ridgeline.single_decode_with_kv_cache(q, k, k),
    lambda: torch.ops.ridgeline.single_attention(q, k, k),
):
    try:
        call()
        print("no error")
    except RuntimeError as error:
        print(error)
assert (q * 2).sum().isfinite()
assert ridgeline.single_decode_with_kv_cache(q.cpu(), k.cpu(), k.cpu()).isfinite().all()
"""

CALL_AND_COMPARE = """
import torch, ridgeline
torch.manual_seed(0)
q = torch.randn(4, 64, device="cuda").half()
k = torch.randn(9, 2, 64, device="cuda").half()
try:
    out = ridgeline.single_decode_with_kv_cache(q, k, k)
    expected = ridgeline.single_decode_with_kv_cache(q.cpu(), k.cpu(), k.cpu())
    torch.testing.assert_close(out.cpu(), expected, rtol=2e-3, atol=2e-3)
    print("right")
except RuntimeError as error:
    print(error)
"""

FAKE_DRIVER = r"""
#include <cstdint>
extern "C" int cuDriverGetVersion(int* version) { *version = DRIVER_VERSION; return 0; }
static int refuse() { return 999; }
extern "C" int cuGetProcAddress_v2(const char*, void** function, int, uint64_t, int*) {
  *function = HAS_FUNCTIONS ? reinterpret_cast<void*>(&refuse) : nullptr;
  return HAS_FUNCTIONS ? 0 : 500;
}
"""


def fake_driver(folder: Path, version: int, has_functions: bool) -> Path:
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("needs g++ to build a stand-in for the driver")
    source, library = folder / "driver.cpp", folder / "libcuda_stand_in.so"
    source.write_text(FAKE_DRIVER)
    defines = [f"-DDRIVER_VERSION={version}", f"-DHAS_FUNCTIONS={int(has_functions)}"]
    subprocess.run(
        [compiler, "-shared", "-fPIC", *defines, str(source), "-o", str(library)], check=True
    )
    return library


def lines(code: str, env: dict[str, str]) -> list[str]:
    result = run_python(code, env)
    assert result.returncode == 0, result.stderr
    return result.stdout.strip().splitlines()


PROGRAMS = [LOAD, pytest.param(CALL, marks=pytest.mark.gpu)]


@pytest.mark.parametrize("program", PROGRAMS, ids=["load", "call"])
def test_no_driver(program: str, tmp_path: Path) -> None:
    missing = str(tmp_path / "no_such_driver.so")
    messages = lines(program, {"RIDGELINE_LIBCUDA": missing})
    assert len(messages) == 2
    for message in messages:
        assert missing in message
        assert "Install an NVIDIA driver" in message


@pytest.mark.parametrize("program", PROGRAMS, ids=["load", "call"])
@pytest.mark.parametrize(
    ("version", "has_functions", "words"),
    [
        (11040, True, ("11.4", "12.0 or newer", "Update the driver")),
        (12040, False, ("no function", "Update the driver")),
        (12040, True, ("does not start", "nvidia-smi")),
    ],
    ids=["too-old", "incomplete", "broken"],
)
def test_driver_that_does_not_serve(
    version: int, has_functions: bool, words: tuple[str, ...], program: str, tmp_path: Path
) -> None:
    driver = fake_driver(tmp_path, version, has_functions)
    messages = lines(program, {"RIDGELINE_LIBCUDA": str(driver)})
    assert len(messages) == 2
    for message in messages:
        assert all(word in message for word in words), message


DAMAGES = {
    "empty": b"",
    "short": b"RLPACK01\x10",
    "foreign": b"not a pack at all, but long enough to have a header of one" * 4,
    "index-cut": b"RLPACK01\xff\xff\x00\x00" + bytes(32) + b"a few bytes of index",
}


@pytest.mark.gpu
@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_pack_under_a_call(damage: str, tmp_path: Path) -> None:
    """A pack that cannot be read is an error that names the file, not a silent recompile."""
    for arch in ("sm_75", "sm_80", "sm_86", "sm_89", "sm_90a", "sm_100", "sm_120"):
        (tmp_path / f"{arch}.rlpack").write_bytes(DAMAGES[damage])
    env = {"RIDGELINE_PACK_DIR": str(tmp_path), "RIDGELINE_CACHE_DIR": "", "RIDGELINE_ARCH": ""}
    messages = lines(CALL, env)
    assert len(messages) == 2
    for message in messages:
        assert str(tmp_path) in message
        assert ".rlpack" in message


@pytest.mark.gpu
@pytest.mark.parametrize("damage", ["cut", "flipped", "empty"])
def test_damaged_cache_entry_under_a_call(damage: str, tmp_path: Path) -> None:
    """It is compiled anew; where compiling is forbidden the error names the file."""
    env = {"RIDGELINE_CACHE_DIR": str(tmp_path), "RIDGELINE_PACK_DIR": ""}
    assert lines(CALL_AND_COMPARE, env) == ["right"]
    entries = sorted(tmp_path.rglob("*.rlk"))
    assert entries, "the call left nothing in the cache"

    def spoil() -> None:
        for entry in entries:
            content = entry.read_bytes()
            middle = len(content) // 2
            flipped = content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]
            entry.write_bytes({"cut": content[:middle], "flipped": flipped, "empty": b""}[damage])

    spoil()
    message = " ".join(lines(CALL_AND_COMPARE, {**env, "RIDGELINE_JIT": "0"}))
    assert "RIDGELINE_JIT" in message
    assert any(str(entry) in message for entry in entries), message
    assert lines(CALL_AND_COMPARE, env) == ["right"]
    assert lines(CALL_AND_COMPARE, {**env, "RIDGELINE_JIT": "0"}) == ["right"]


@pytest.mark.gpu
def test_nothing_to_run_and_no_compiling(tmp_path: Path) -> None:
    env = {"RIDGELINE_CACHE_DIR": str(tmp_path), "RIDGELINE_PACK_DIR": "", "RIDGELINE_JIT": "0"}
    messages = lines(CALL, env)
    assert len(messages) == 2
    for message in messages:
        assert "RIDGELINE_JIT=0 forbids" in message
        assert "warmup" in message
