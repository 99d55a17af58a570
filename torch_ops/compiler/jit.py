"""What happens when neither a pack nor the cache has a kernel: compile it and keep it."""

from __future__ import annotations

import logging
import os
import time

from . import cache, nvrtc, toolchain
from .native import Native

_LOG = logging.getLogger("ridgeline")
_kept: dict[tuple[str, str], bytes] = {}  # by architecture and key; what the disk would not take


class JitForbiddenError(RuntimeError):
    """A kernel is missing and RIDGELINE_JIT=0 forbids compiling it."""


def obtain(native: Native, name: str, arch: str, key: str) -> bytes:
    """Return the entry of a kernel, from the cache or compiled into it.

    Raises
    ------
    JitForbiddenError
        If it has to be compiled and RIDGELINE_JIT=0.
    CompileError, CompilerMissingError
        If it cannot be compiled.
    """
    kept = _kept.get((arch, key))
    if kept is not None:
        return kept
    store = _store(native)
    if os.environ.get("RIDGELINE_JIT") == "0":
        found = store.read(arch, key)
        if found is None:
            raise JitForbiddenError(_missing(native, store, name, arch, key))
        return found
    return store.get_or_build(arch, key, lambda: _compile(native, name, arch, key))


def keep(native: Native, arch: str, key: str, data: bytes) -> None:
    """Store an entry that was compiled elsewhere: on disk, or in memory where that fails."""
    if not _store(native).write(arch, key, data):
        _kept[arch, key] = data


def _store(native: Native) -> cache.Cache:
    if native.cache_dir() is None and "RIDGELINE_CACHE_DIR" not in os.environ:
        cache.warn_once(None, OSError(0, "neither RIDGELINE_CACHE_DIR nor HOME is set"))
    return cache.Cache(native.cache_dir(), toolchain.compiler_tag())


def _compile(native: Native, name: str, arch: str, key: str) -> bytes:
    start = time.perf_counter()
    options, kernels_dir = native.compile_options(), str(native.kernels_dir())
    data = nvrtc.compile_kernel(name, arch, key, options, kernels_dir)
    _LOG.info("ridgeline: compiled %s for %s in %.2f s", name, arch, time.perf_counter() - start)
    return data


def _missing(native: Native, store: cache.Cache, name: str, arch: str, key: str) -> str:
    folder = native.pack_dir()
    pack = f"{folder / arch}.rlpack" if folder else "no pack folder (RIDGELINE_PACK_DIR is empty)"
    file = store.path(arch, key) or "no cache folder (set RIDGELINE_CACHE_DIR or HOME)"
    return (
        f"ridgeline: kernel '{name}' for {arch} is not compiled yet, and RIDGELINE_JIT=0 forbids "
        f"compiling it. Looked in: the pack {pack}; the cache {file}. Unset RIDGELINE_JIT, or "
        f"compile the kernel beforehand where compiling is allowed: "
        f"python -m ridgeline warmup --arch {arch} --kernel '{name}'"
    )
