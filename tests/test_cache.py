"""The disk cache: what may go wrong with it, and that no call ever fails for it."""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import resource
import shutil
import signal
import subprocess
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import ridgeline
import torch
from kernel_fixtures import KERNEL, StandIn, made_entry, write_kernels
from ridgeline.compiler import cache, entry, jit, nvrtc, pack, toolchain
from support import run_python

NUM_PROCESSES = 16
KEY = entry.unpack(made_entry()).key
ENTRY = made_entry()

# Obtains KERNEL through the installed package and prints the size of the entry; what was compiled
# and what was warned of goes to stderr, a line each.
OBTAIN = f"""
import logging
logging.basicConfig(level=logging.INFO, format="%(message)s")
from ridgeline import compiler
for arch in ("sm_80", "sm_86"):
    data = compiler.obtain({KERNEL!r}, arch)
    compiler.library().check_entry(data)
    print(len(data))
"""


@pytest.fixture(autouse=True)
def fresh_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache, "_warned", False)


@pytest.fixture
def kernels_dir(tmp_path: Path) -> Path:
    return write_kernels(tmp_path / "kernels")


@pytest.fixture
def store(tmp_path: Path) -> cache.Cache:
    return cache.Cache(tmp_path / "cache", "nvrtc_1.2.3")


def environment(kernels_dir: Path, **values: str) -> dict[str, str]:
    return {"RIDGELINE_KERNELS_DIR": str(kernels_dir), "RIDGELINE_PACK_DIR": "", **values}


def files_under(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.rglob("*") if path.is_file())


# One file


def test_path_is_that_of_the_contract(store: cache.Cache, tmp_path: Path) -> None:
    assert store.path("sm_80", KEY) == tmp_path / "cache" / "sm_80" / f"{KEY}-nvrtc_1.2.3.rlk"


def test_tag_becomes_part_of_a_file_name(tmp_path: Path) -> None:
    path = cache.Cache(tmp_path, "my nvrtc/1").path("sm_80", KEY)
    assert path is not None
    assert path.name == f"{KEY}-my_nvrtc_1.rlk"


def test_write_then_read(store: cache.Cache, tmp_path: Path) -> None:
    assert store.read("sm_80", KEY) is None
    assert store.write("sm_80", KEY, ENTRY)
    assert store.read("sm_80", KEY) == ENTRY
    assert files_under(tmp_path) == [f"{KEY}-nvrtc_1.2.3.rlk"]


@pytest.mark.parametrize(
    "content",
    [b"", ENTRY[:10], ENTRY[:-1], ENTRY[:-1] + bytes([ENTRY[-1] ^ 1]), made_entry(key="f" * 64)],
    ids=["empty", "prefix", "truncated", "corrupted", "another kernel's"],
)
def test_damaged_file_is_replaced(store: cache.Cache, content: bytes) -> None:
    path = store.path("sm_80", KEY)
    assert path is not None
    path.parent.mkdir(parents=True)
    path.write_bytes(content)
    assert store.read("sm_80", KEY) is None
    assert store.get_or_build("sm_80", KEY, lambda: ENTRY) == ENTRY
    assert path.read_bytes() == ENTRY


def test_sound_file_is_not_built_again(store: cache.Cache) -> None:
    store.write("sm_80", KEY, ENTRY)

    def build() -> bytes:
        raise AssertionError("built again")

    assert store.get_or_build("sm_80", KEY, build) == ENTRY


def test_failed_build_leaves_no_file(store: cache.Cache, tmp_path: Path) -> None:
    def build() -> bytes:
        raise RuntimeError("does not compile")

    with pytest.raises(RuntimeError, match="does not compile"):
        store.get_or_build("sm_80", KEY, build)
    assert files_under(tmp_path) == []


def test_old_temporary_files_are_removed(store: cache.Cache, tmp_path: Path) -> None:
    folder = tmp_path / "cache" / "sm_80"
    folder.mkdir(parents=True)
    old, young = folder / ".tmp-1-old", folder / ".tmp-2-young"
    for leftover in (old, young):
        leftover.write_bytes(ENTRY[:50])
    os.utime(old, (0, 0))
    store.write("sm_80", KEY, ENTRY)
    assert not old.exists()
    assert young.exists()


# Nowhere to write


class FullDisk:
    """Stands in for os.write: takes `room` bytes, then the disk is full."""

    def __init__(self, room: int) -> None:
        self.room = room
        self.write = os.write

    def __call__(self, descriptor: int, data: bytes) -> int:
        if self.room <= 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        written = self.write(descriptor, data[: self.room])
        self.room -= written
        return written


def test_full_disk_costs_one_warning(
    store: cache.Cache,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(cache.os, "write", FullDisk(room=100))
    with caplog.at_level(logging.WARNING, "ridgeline"):
        for arch in ("sm_80", "sm_86"):
            data = made_entry(arch=arch, key=KEY)
            assert store.get_or_build(arch, KEY, lambda data=data: data) == data
    assert len(caplog.records) == 1
    assert "No space left on device" in caplog.text
    assert "RIDGELINE_CACHE_DIR" in caplog.text
    assert files_under(tmp_path) == []


def test_write_that_the_system_refuses_half_way(
    store: cache.Cache, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A limit on file sizes is the nearest thing to a full disk that needs no mount."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (256, hard))
    try:
        assert store.get_or_build("sm_80", KEY, lambda: ENTRY) == ENTRY
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "File too large" in caplog.text
    assert files_under(tmp_path) == []


def check_survived(result: subprocess.CompletedProcess[str], reason: str) -> None:
    """Two kernels were compiled and served, with one warning that says why and what to do."""
    assert result.returncode == 0, result.stderr
    assert len(result.stdout.split()) == 2
    assert result.stderr.count("ridgeline: compiled ") == 2
    assert result.stderr.count("cannot be kept") == 1
    assert reason in result.stderr
    assert "RIDGELINE_CACHE_DIR" in result.stderr


def obtain_at_home(kernels_dir: Path, home: str | None) -> subprocess.CompletedProcess[str]:
    """Run OBTAIN with this HOME and no other word on where the cache lies."""
    code = f"""
import os
for name in ("HOME", "XDG_CACHE_HOME", "RIDGELINE_CACHE_DIR"):
    os.environ.pop(name, None)
if {home!r}:
    os.environ["HOME"] = {home!r}
"""
    return run_python(code + OBTAIN, environment(kernels_dir))


def test_read_only_home_is_survived(kernels_dir: Path) -> None:
    """The folders of /sys take no new files, from root neither."""
    check_survived(obtain_at_home(kernels_dir, "/sys"), "in /sys/.cache/ridgeline")


def test_home_that_does_not_exist_is_survived(kernels_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    check_survived(obtain_at_home(kernels_dir, f"{tmp_path}/file/home"), "Not a directory")


def test_missing_home_is_survived(kernels_dir: Path) -> None:
    check_survived(obtain_at_home(kernels_dir, None), "neither RIDGELINE_CACHE_DIR nor HOME is set")


def test_switched_off_cache_is_silent(
    kernels_dir: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("RIDGELINE_CACHE_DIR", "")
    library = StandIn(kernels_dir, None)
    assert jit.obtain(library, KERNEL, "sm_80", KEY)  # type: ignore[arg-type]
    assert not caplog.records


# Many at once


def test_sixteen_processes_on_a_cold_cache_compile_once(kernels_dir: Path, tmp_path: Path) -> None:
    """Forked after the import, so that they really ask at the same moment."""
    code = f"""
import hashlib, logging, os, sys
logging.basicConfig(level=logging.INFO, format="%(message)s")
from ridgeline import compiler
start, go = os.pipe()
children = []
for _ in range({NUM_PROCESSES}):
    child = os.fork()
    if child == 0:
        os.close(go)
        os.read(start, 1)
        data = compiler.obtain({KERNEL!r}, "sm_80")
        os.write(1, hashlib.sha256(data).hexdigest().encode() + b"\\n")
        os._exit(0)
    children.append(child)
os.close(go)
sys.exit(max(os.waitpid(child, 0)[1] for child in children))
"""
    folder = tmp_path / "cache"
    result = run_python(code, environment(kernels_dir, RIDGELINE_CACHE_DIR=str(folder)))
    assert result.returncode == 0, result.stderr
    digests = result.stdout.split()
    assert len(digests) == NUM_PROCESSES
    assert len(set(digests)) == 1
    assert result.stderr.count("ridgeline: compiled ") == 1
    (left,) = files_under(folder)
    assert left.endswith(".rlk")


def test_threads_of_a_process_compile_once(
    kernels_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []
    compile_kernel = nvrtc.compile_kernel

    def counted(*arguments: str) -> bytes:
        calls.append(arguments)
        return compile_kernel(*arguments)

    monkeypatch.setattr(nvrtc, "compile_kernel", counted)
    library = StandIn(kernels_dir, tmp_path / "cache")
    found: list[bytes] = []

    def obtain() -> None:
        found.append(jit.obtain(library, KERNEL, "sm_80", KEY))  # type: ignore[arg-type]

    threads = [threading.Thread(target=obtain) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 8
    assert len(set(found)) == len(calls) == 1


@pytest.mark.parametrize("moment", ["write", "fsync", "replace"])
def test_writer_killed_in_mid_write(store: cache.Cache, tmp_path: Path, moment: str) -> None:
    """kill -9 with half a file written, before the sync, before the rename; the lock held."""
    child = os.fork()
    if child == 0:
        write = os.write

        def die(*arguments: Any) -> None:
            if moment == "write":
                write(arguments[0], arguments[1][:200])
            os.kill(os.getpid(), signal.SIGKILL)

        setattr(os, moment, die)
        store.get_or_build("sm_80", KEY, lambda: ENTRY)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    assert files_under(tmp_path), "the child died before it wrote"
    assert store.read("sm_80", KEY) is None
    assert store.get_or_build("sm_80", KEY, lambda: ENTRY) == ENTRY
    assert store.read("sm_80", KEY) == ENTRY


def test_lock_of_a_dead_process_does_not_hold(store: cache.Cache) -> None:
    path = store.path("sm_80", KEY)
    assert path is not None
    path.parent.mkdir(parents=True)
    path.with_suffix(".lock").touch()
    start = time.monotonic()
    assert store.get_or_build("sm_80", KEY, lambda: ENTRY) == ENTRY
    assert time.monotonic() - start < 5
    assert files_under(path.parent) == [path.name]


def test_stuck_holder_of_the_lock_only_delays(
    store: cache.Cache, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cache, "_LOCK_PATIENCE_SECONDS", 0.2)
    path = store.path("sm_80", KEY)
    assert path is not None
    path.parent.mkdir(parents=True)
    with path.with_suffix(".lock").open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        assert store.get_or_build("sm_80", KEY, lambda: ENTRY) == ENTRY
    assert store.read("sm_80", KEY) == ENTRY


def test_file_system_without_locks(store: cache.Cache, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_locks(descriptor: int, operation: int) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(cache.fcntl, "flock", no_locks)
    assert store.get_or_build("sm_80", KEY, lambda: ENTRY) == ENTRY
    assert store.read("sm_80", KEY) == ENTRY


# What C++ finds by itself


@pytest.fixture(scope="module")
def lookup(tmp_path_factory: pytest.TempPathFactory, repository: Path) -> list[str]:
    """Return the command of a C++ program that looks kernels up: library beside torch's own."""
    compiler = shutil.which(os.environ.get("CXX", "g++"))
    if compiler is None:
        pytest.skip("needs g++, or another C++ compiler named by CXX")
    program = tmp_path_factory.mktemp("cpp") / "lookup_main"
    source = repository / "tests" / "cpp" / "lookup_main.cpp"
    torch_lib = Path(torch.__file__).parent / "lib"
    command = [compiler, "-std=c++17", "-Wall", "-Werror", str(source), "-o", str(program)]
    subprocess.run([*command, f"-Wl,-rpath,{torch_lib}", "-ldl"], check=True)
    library = Path(ridgeline.__file__).parent / "libridgeline.so"
    return [str(program), str(library)]


def run_lookup(
    lookup: list[str], kernels_dir: Path, *arguments: str, **values: str
) -> subprocess.CompletedProcess[str]:
    torch_lib = Path(torch.__file__).parent / "lib"
    env = {"LD_LIBRARY_PATH": str(torch_lib), **environment(kernels_dir), **values}
    return subprocess.run([*lookup, *arguments], env=env, capture_output=True, text=True)


@pytest.fixture(scope="module")
def key(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The key of KERNEL for sm_80, wherever its sources lie."""
    code = (
        f"from ridgeline import compiler; print(compiler.library().entry_key({KERNEL!r}, 'sm_80'))"
    )
    result = run_python(code, environment(write_kernels(tmp_path_factory.mktemp("kernels"))))
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


def test_cpp_program_finds_what_python_wrote(
    lookup: list[str], kernels_dir: Path, key: str, tmp_path: Path
) -> None:
    cache_dir, pack_dir = tmp_path / "cache", tmp_path / "packs"
    where = {"RIDGELINE_CACHE_DIR": str(cache_dir), "RIDGELINE_PACK_DIR": str(pack_dir)}
    data = made_entry(key=key)

    nothing = run_lookup(lookup, kernels_dir, KERNEL, "sm_80", **where)
    assert (nothing.returncode, nothing.stdout) == (0, "\n"), nothing.stderr

    store = cache.Cache(cache_dir, toolchain.compiler_tag())
    store.write("sm_80", key, data)
    path = store.path("sm_80", key)
    cached = run_lookup(lookup, kernels_dir, KERNEL, "sm_80", str(path), **where)
    assert (cached.returncode, cached.stdout) == (0, "cache\n"), cached.stderr

    packed = pack.write([data, made_entry("probe/other.cuh:other<1>")])
    cache.write_atomically(pack_dir / "sm_80.rlpack", packed)
    found = run_lookup(lookup, kernels_dir, KERNEL, "sm_80", **where)
    assert (found.returncode, found.stdout) == (0, "pack\n"), found.stderr


@pytest.mark.parametrize("size", [0, 1, 300, 70_000, 1_000_000])
def test_cpp_decompresses_entries_of_any_size(
    lookup: list[str], kernels_dir: Path, tmp_path: Path, size: int
) -> None:
    path = tmp_path / "entry.rlk"
    path.write_bytes(made_entry(size=size))
    result = run_lookup(lookup, kernels_dir, KERNEL, "sm_80", str(path))
    assert result.returncode == 0, result.stderr


def test_cpp_passes_over_a_damaged_cache_entry(
    lookup: list[str], kernels_dir: Path, key: str, tmp_path: Path
) -> None:
    store = cache.Cache(tmp_path, "nvrtc_1")
    store.write("sm_80", key, made_entry(key=key)[:-1])
    result = run_lookup(lookup, kernels_dir, KERNEL, "sm_80", RIDGELINE_CACHE_DIR=str(tmp_path))
    assert (result.returncode, result.stdout) == (0, "\n"), result.stderr


@pytest.mark.parametrize("position", [20, 60, -1], ids=["checksum", "index", "entry"])
def test_cpp_names_a_damaged_pack(
    lookup: list[str], kernels_dir: Path, key: str, tmp_path: Path, position: int
) -> None:
    packed = bytearray(pack.write([made_entry(key=key)]))
    packed[position] ^= 1
    path = tmp_path / "sm_80.rlpack"
    path.write_bytes(packed)
    result = run_lookup(lookup, kernels_dir, KERNEL, "sm_80", RIDGELINE_PACK_DIR=str(tmp_path))
    assert result.returncode == 1
    assert str(path) in result.stderr
    assert "reinstall ridgeline" in result.stderr


def test_entry_of_an_older_compiler_serves_a_process_without_one(
    lookup: list[str], kernels_dir: Path, key: str, tmp_path: Path
) -> None:
    cache.Cache(tmp_path, "nvrtc_11").write("sm_80", key, made_entry(key=key))
    result = run_lookup(lookup, kernels_dir, KERNEL, "sm_80", RIDGELINE_CACHE_DIR=str(tmp_path))
    assert (result.returncode, result.stdout) == (0, "cache\n"), result.stderr
