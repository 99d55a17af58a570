"""Sets everything up, then lets the demo model write: `make demo`.

Installs the library of this checkout into .venv (editable, no kernel packs: on a GPU its kernels
come by JIT) and runs `python -m ridgeline demo`. The variables of
VARIABLES are passed on.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path

from build_wheel import compiler_version
from common import BUILD, ROOT, Stopwatch, digest_of, files_of, read_stamp, run, say, write_stamp
from env import make_env

VARIABLES = (
    "MODEL",
    "PROMPT",
    "TOKENS",
    "DEVICE",
    "DTYPE",
    "TEMPERATURE",
    "TOP_K",
    "TOP_P",
    "MIN_P",
    "SEED",
)
LIBRARY_SOURCES = ("pyproject.toml", "setup.py", "torch_ops/csrc", "kernels", "aot")


def ensure_editable(python: Path) -> None:
    """Build the op library in place and install the checkout, unless nothing changed."""
    stamp_file = python.parent.parent / ".ridgeline-editable.json"
    digest = digest_of(files_of(LIBRARY_SOURCES), compiler_version(), str(ROOT))
    library = ROOT / "torch_ops" / "libridgeline.so"
    if library.exists() and read_stamp(stamp_file) == {"sources": digest}:
        return
    watch = Stopwatch()
    say("compiling the op library")
    pip = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    run([*pip, "--no-build-isolation", "--no-deps", "--editable", "."])
    write_stamp(stamp_file, {"sources": digest})
    say(f"ridgeline is installed in .venv after {watch}")


def run_with_options(arguments: Sequence[str | Path], variables: Sequence[str]) -> int:
    """Set .venv up and run its Python; each variable that is set becomes an option."""
    BUILD.mkdir(exist_ok=True)
    compiler_version()
    python = make_env(".venv", "build", "demo")
    ensure_editable(python)
    command: list[str | Path] = [python, *arguments]
    for variable in variables:
        if os.environ.get(variable):
            command += [f"--{variable.lower().replace('_', '-')}", os.environ[variable]]
    return run(command, check=False)


def main() -> None:
    sys.exit(run_with_options(["-m", "ridgeline", "demo"], VARIABLES))


if __name__ == "__main__":
    main()
