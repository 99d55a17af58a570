"""`python -m ridgeline doctor`: what works here, what does not, and the way out."""

from __future__ import annotations

import os
import platform
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from . import __version__, _library, compiler
from .compiler import pack
from .compiler.native import Native

# A small kernel of the library, to see whether NVRTC and its headers work.
_PROBE = "activation/gated.cuh:gated<__half, 1, Silu>"
_MIN_FREE_BYTES = 64 << 20


@dataclass(frozen=True)
class Finding:
    """One line of the report; `way_out` says what to do when `state` is not "ok"."""

    state: str  # ok, note (does not hinder what this machine can do), or wrong
    subject: str
    text: str
    way_out: str = ""


def diagnose() -> list[Finding]:
    """Look at everything that a call on a GPU needs."""
    library = compiler.library()
    report = library.driver_report()
    has_gpu = bool(report["devices"])
    return [
        _versions(),
        _op_library(library),
        _driver(report),
        *_gpus(report),
        *_packs(library),
        _nvrtc(library, has_gpu),
        _cache(library),
        *_environment(),
    ]


def main() -> int:
    """Print the report; return 1 when something is wrong."""
    findings = diagnose()
    width = max(len(finding.subject) for finding in findings)
    for finding in findings:
        print(f"{finding.state:5}  {finding.subject:{width}}  {finding.text}")
        if finding.way_out:
            print(f"{'':5}  {'':{width}}  -> {finding.way_out}")
    wrong = sum(finding.state == "wrong" for finding in findings)
    print(f"\n{wrong} wrong" if wrong else "\nnothing is wrong")
    return 1 if wrong else 0


def _versions() -> Finding:
    cuda = f"CUDA {torch.version.cuda}" if torch.version.cuda else "without CUDA"
    return Finding(
        "ok",
        "versions",
        f"ridgeline {__version__}, torch {torch.__version__} ({cuda}), "
        f"Python {platform.python_version()}",
    )


def _op_library(library: Native) -> Finding:
    kernels_dir = library.kernels_dir()
    if not (kernels_dir / "common").is_dir():
        return Finding(
            "wrong",
            "library",
            f"{_library.PATH}; kernel sources are not in '{kernels_dir}'",
            "reinstall ridgeline, or point RIDGELINE_KERNELS_DIR at the sources",
        )
    return Finding("ok", "library", f"{_library.PATH}; kernel sources in {kernels_dir.resolve()}")


def _driver(report: dict[str, Any]) -> Finding:
    version = int(report["driver_version"])
    shown = f"serves CUDA {version // 1000}.{version % 1000 // 10}"
    if not report["error"]:
        if report["devices"] and not torch.version.cuda:
            return Finding(
                "wrong",
                "driver",
                f"{shown}, but this torch was built without CUDA",
                "install a CUDA build of torch (https://pytorch.org/get-started/locally)",
            )
        return Finding("ok", "driver", shown)
    if Path("/dev/nvidiactl").exists() or version:
        return Finding(
            "wrong", "driver", report["error"], "install or update the NVIDIA driver, 525 or newer"
        )
    return Finding(
        "note", "driver", f"{report['error']}", "none needed for the CPU, where every op runs too"
    )


def _gpus(report: dict[str, Any]) -> Iterator[Finding]:
    for gpu in report["devices"]:
        subject = f"GPU {gpu['index']}"
        text = f"{gpu['name']}, code for {gpu['arch']}"
        if gpu.get("error"):
            yield Finding("wrong", subject, f"{text}: {gpu['error']}")
        elif gpu["sm"] < 75:
            yield Finding("wrong", subject, text, "kernels need compute capability 7.5 or newer")
        elif gpu["pack"]:
            yield Finding("ok", subject, f"{text}, served by the pack {gpu['pack']}")
        else:
            yield Finding(
                "note",
                subject,
                f"{text}, no pack serves it: kernels are compiled on first use and cached",
                f"python -m ridgeline.aot build --arch {gpu['arch']}  (or: warmup)",
            )
    if not report["devices"]:
        yield Finding("note", "GPU", "none")


def _packs(library: Native) -> Iterator[Finding]:
    folder = library.pack_dir()
    files = sorted(folder.glob("*.rlpack")) if folder else []
    if not files:
        yield Finding("note", "packs", "none: every kernel is compiled on first use and cached")
    for file in files:
        try:
            slots = [slot for slot, _ in pack.read_entries(file.read_bytes())]
            stale = sum(library.entry_key(slot.name, file.stem) != slot.key for slot in slots)
        except (OSError, RuntimeError, pack.PackError) as error:
            yield Finding(
                "wrong",
                "pack",
                f"{file}: {error}",
                "reinstall ridgeline, or set RIDGELINE_PACK_DIR= (empty) to compile on first use",
            )
            continue
        text = f"{file}: {len(slots)} kernels, {file.stat().st_size / 1e6:.1f} MB"
        if stale:
            yield Finding(
                "note",
                "pack",
                f"{text}, {stale} of other kernel sources than these",
                "python -m ridgeline.aot build",
            )
        else:
            yield Finding("ok", "pack", text)


def _nvrtc(library: Native, has_gpu: bool) -> Finding:
    """Compile a small kernel: nothing less shows that compiler and headers fit together."""
    from .compiler import nvrtc, toolchain

    start = time.perf_counter()
    try:
        tools = toolchain.load()
        folder = str(library.kernels_dir())
        nvrtc.compile_kernel(_PROBE, "sm_80", "", library.compile_options(), folder)
    except Exception as error:
        # Without a GPU nothing has to be compiled.
        state = "wrong" if has_gpu else "note"
        text, _, way_out = str(error).partition(" Install ")
        return Finding(state, "NVRTC", text, f"install {way_out}" if way_out else "")
    seconds = time.perf_counter() - start
    return Finding(
        "ok", "NVRTC", f"{tools.compiler}, headers in {tools.include}, a kernel in {seconds:.2f} s"
    )


def _cache(library: Native) -> Finding:
    folder = library.cache_dir()
    if folder is None:
        return Finding(
            "note",
            "cache",
            "none: kernels that no pack has are compiled by every process",
            "set RIDGELINE_CACHE_DIR, or HOME",
        )
    way_out = "set RIDGELINE_CACHE_DIR to a writable folder with free space"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
        status = os.statvfs(folder)
    except OSError as error:
        return Finding("wrong", "cache", f"{folder}: not writable ({error.strerror})", way_out)
    free = status.f_bavail * status.f_frsize
    files = list(folder.glob("*/*.rlk"))
    size = sum(file.stat().st_size for file in files)
    text = f"{folder}: {len(files)} kernels, {size / 1e6:.1f} MB, {free / 1e9:.1f} GB free"
    if free < _MIN_FREE_BYTES:
        return Finding("wrong", "cache", text, way_out)
    return Finding("ok", "cache", text)


def _environment() -> Iterator[Finding]:
    for name in ("RIDGELINE_JIT", "RIDGELINE_ARCH", "RIDGELINE_PACK_DIR", "RIDGELINE_KERNELS_DIR"):
        if name in os.environ:
            yield Finding("note", name, repr(os.environ[name]))
