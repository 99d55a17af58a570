"""Tests the built wheel in an environment of its own: `make test`.

.venv-test gets torch, the test tools and the wheel of dist/, nothing from the source tree. pytest
runs outside the tree, so that `import ridgeline` can only find the installed package (a test
asserts it). ARGS is passed on to pytest: make test ARGS="-k rmsnorm".
"""

from __future__ import annotations

import os
import secrets
import shlex
import sys
import tempfile
from pathlib import Path

from build_wheel import ensure_wheel
from common import ROOT, Stopwatch, run, say
from env import make_env

WORKERS = 2


def install(wheel: Path) -> Path:
    """Install the wheel alone, from the file; returns the environment's Python."""
    python = make_env(".venv-test", "test", "cuda12")
    pip = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    run([*pip, "--no-index", "--no-deps", "--force-reinstall", wheel])
    return python


def pytest(python: Path, arguments: list[str]) -> int:
    with tempfile.TemporaryDirectory(prefix="ridgeline-test-") as folder:
        env = {
            "RIDGELINE_TEST_PREFIX": str(ROOT / ".venv-test"),
            "RIDGELINE_CACHE_DIR": str(Path(folder) / "cache"),
            # Why: every worker takes its random numbers from one seed, which a failure prints.
            "RIDGELINE_TEST_SEED": os.environ.get("RIDGELINE_TEST_SEED")
            or str(secrets.randbelow(2**31)),
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": "",
            "PYTHONDONTWRITEBYTECODE": "1",
        }
        command = [python, "-m", "pytest", "-c", ROOT / "pyproject.toml", "--rootdir", ROOT]
        command += ["--numprocesses", str(WORKERS), *arguments, ROOT / "tests"]
        return run(command, env=env, cwd=Path(folder), check=False)


def main() -> None:
    watch = Stopwatch()
    wheel = ensure_wheel()
    run([ROOT / ".venv" / "bin" / "python", ROOT / "ci" / "check_wheel.py", wheel])
    python = install(wheel)
    code = pytest(python, shlex.split(os.environ.get("ARGS", "")))
    say(f"make test: {'passed' if code == 0 else f'pytest ended with {code}'} after {watch}")
    sys.exit(code)


if __name__ == "__main__":
    main()
