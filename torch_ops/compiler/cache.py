"""The write side of the disk cache: one file an entry, complete or absent.

A file is written under a temporary name in its folder, synced and renamed, so that a reader never
sees half of one, whatever kills the writer. A cache that cannot be written costs one warning and
compile time, never a call.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import logging
import os
import secrets
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from . import entry

_LOG = logging.getLogger("ridgeline")
_TEMPORARY_PREFIX = ".tmp-"
_STALE_SECONDS = 3600.0
_LOCK_PATIENCE_SECONDS = 120.0
_LOCK_POLL_SECONDS = 0.02
_warned = False


class Cache:
    """The disk cache in `folder` for one compiler; `folder` None keeps entries in memory only."""

    def __init__(self, folder: Path | None, tag: str) -> None:
        self._folder = folder
        self._tag = tag.replace(" ", "_").replace("/", "_")

    def path(self, arch: str, key: str) -> Path | None:
        """Return the file of an entry, None when there is no cache."""
        return self._folder / arch / f"{key}-{self._tag}.rlk" if self._folder else None

    def read(self, arch: str, key: str) -> bytes | None:
        """Return an entry's bytes, None when it is absent or not valid."""
        path = self.path(arch, key)
        if path is None:
            return None
        try:
            data = path.read_bytes()
            found = entry.unpack(data)
        except (FileNotFoundError, NotADirectoryError):
            return None
        except (OSError, entry.EntryError) as error:
            _LOG.info("ridgeline: %s is compiled anew: %s", path, error)
            return None
        return data if (found.key, found.arch) == (key, arch) else None

    def write(self, arch: str, key: str, data: bytes) -> bool:
        """Store an entry; return False, after one warning a process, when that is impossible."""
        path = self.path(arch, key)
        if path is None:
            return False
        try:
            write_atomically(path, data)
            _remove_stale(path.parent)
        except OSError as error:
            warn_once(self._folder, error)
            return False
        return True

    def get_or_build(self, arch: str, key: str, build: Callable[[], bytes]) -> bytes:
        """Return the entry, built once however many processes ask for it at the same time."""
        path = self.path(arch, key)
        if path is None:
            return build()
        with _locked(path):
            data = self.read(arch, key)
            if data is None:
                data = build()
                self.write(arch, key, data)
            return data


def write_atomically(path: Path, data: bytes) -> None:
    """Write a file so that its name stands for all of `data` or for what it stood for before."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{_TEMPORARY_PREFIX}{os.getpid()}-{secrets.token_hex(8)}")
    try:
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        try:
            view = memoryview(data)
            while view:
                view = view[os.write(descriptor, view) :]
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise
    _sync_folder(path.parent)


def warn_once(folder: Path | None, error: OSError) -> None:
    """Say, once a process, that kernels are not kept."""
    global _warned
    if _warned:
        return
    _warned = True
    where = f"in {folder} " if folder else ""
    _LOG.warning(
        "ridgeline: kernels compiled here cannot be kept %s(%s): they are used from memory and "
        "compiled again by the next process. Set RIDGELINE_CACHE_DIR to a writable folder with "
        'free space, or to "" for no cache and no warning.',
        where,
        error.strerror or type(error).__name__,
    )


def _sync_folder(folder: Path) -> None:
    """Make a rename last; file systems that cannot sync a folder need no help."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _remove_stale(folder: Path) -> None:
    """Remove temporary files whose writer was killed long ago."""
    oldest = time.time() - _STALE_SECONDS
    for leftover in folder.glob(f"{_TEMPORARY_PREFIX}*"):
        with contextlib.suppress(OSError):
            if leftover.stat().st_mtime < oldest:
                leftover.unlink()


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold the lock of an entry's file; where locking is impossible, go on without."""
    lock_path = path.with_suffix(".lock")
    descriptor = _acquire(lock_path)
    try:
        yield
    finally:
        if descriptor is not None:
            # Unlinked while still held, so that whoever waits sees that its file is gone.
            with contextlib.suppress(OSError):
                lock_path.unlink()
            os.close(descriptor)


def _acquire(lock_path: Path) -> int | None:
    deadline = time.monotonic() + _LOCK_PATIENCE_SECONDS
    while True:
        try:
            lock_path.parent.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(lock_path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        except OSError:
            return None
        try:
            if _try_lock(descriptor, deadline) and os.fstat(descriptor).st_nlink > 0:
                return descriptor
        except OSError:
            os.close(descriptor)
            return None
        os.close(descriptor)
        if time.monotonic() >= deadline:
            _LOG.warning("ridgeline: waited too long for %s; compiling without it", lock_path)
            return None


def _try_lock(descriptor: int, deadline: float) -> bool:
    """Wait for the lock until `deadline`; an OSError means that locking does not work here."""
    while time.monotonic() < deadline:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except OSError as error:
            if error.errno not in (errno.EWOULDBLOCK, errno.EINTR):
                raise
        if os.fstat(descriptor).st_nlink == 0:
            return False
        time.sleep(_LOCK_POLL_SECONDS)
    return False
