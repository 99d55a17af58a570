"""What every job script shares: where things are, how to run a command, when a build is stale."""

from __future__ import annotations

import hashlib
import json
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BUILD = ROOT / "build"
DIST = ROOT / "dist"
MIN_PYTHON = (3, 10)

# Everything that ends up in the wheel or decides how it is made.
PACKAGE_SOURCES = ("pyproject.toml", "setup.py", "README.md", "kernels", "torch_ops", "aot")
PRODUCTS = ("__pycache__", "packs", "libridgeline.so")


def say(message: str) -> None:
    """One line of a job's own, told apart from the output of the tools that it runs."""
    print(f">> {message}", flush=True)


def stop(message: str) -> None:
    """End the job with a message and exit code 1."""
    sys.exit(f"error: {message}")


def run(
    command: Sequence[str | Path],
    *,
    env: Mapping[str, str] | None = None,
    cwd: Path = ROOT,
    check: bool = True,
) -> int:
    """Run a command with extra environment variables; a failure ends the job with its exit code."""
    words = [str(word) for word in command]
    code = subprocess.run(words, env={**os.environ, **(env or {})}, cwd=cwd).returncode
    if check and code:
        print(f"error: exit code {code} from: {shlex.join(words)}", file=sys.stderr, flush=True)
        sys.exit(code)
    return code


def files_of(names: Iterable[str]) -> list[Path]:
    """Every file under the given names, sorted; products of a build are left out."""
    found: set[Path] = set()
    for name in names:
        path = ROOT / name
        for file in [path] if path.is_file() else path.rglob("*"):
            if file.is_file() and not set(file.relative_to(ROOT).parts) & set(PRODUCTS):
                found.add(file)
    return sorted(found)


def digest_of(paths: Iterable[Path], *extra: str) -> str:
    """sha256 over names and contents, and over whatever else decides the result."""
    state = hashlib.sha256()
    for path in paths:
        content = path.read_bytes()
        state.update(f"{path.relative_to(ROOT)}\0{len(content)}\0".encode() + content)
    for word in extra:
        state.update(f"\0{word}".encode())
    return state.hexdigest()


def read_stamp(path: Path) -> dict[str, str]:
    """What an earlier run recorded; nothing if there was none or it was cut short."""
    try:
        stamp = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return stamp if isinstance(stamp, dict) else {}


def write_stamp(path: Path, stamp: Mapping[str, str]) -> None:
    """Record what was made, last of all, so that an interrupted run leaves no stamp."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(stamp, indent=1))
    temporary.replace(path)


class Stopwatch:
    """Seconds since it was made, as text."""

    def __init__(self) -> None:
        self.start = time.monotonic()

    def __str__(self) -> str:
        return f"{time.monotonic() - self.start:.0f} s"
