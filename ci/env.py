"""Makes an environment that a job runs in: `python3 ci/env.py FOLDER GROUP...`.

A group is a file of ci/requirements/. The environment is a venv of the Python that runs this.
torch comes from one of two places, and the first line printed says which:

- an active environment (venv or conda) that has torch >= 2.10 is linked by a `.pth` file: nothing
  is installed into it. `ENV=active` links any Python's torch, `ENV=own` links none.
- else `pip install $TORCH` (default torch==2.13.0) installs it in the venv.

A second call with the same arguments takes no time: a stamp file records what is there.
"""

from __future__ import annotations

import importlib.metadata
import os
import re
import shlex
import shutil
import site
import subprocess
import sys
from pathlib import Path

from common import MIN_PYTHON, ROOT, Stopwatch, digest_of, read_stamp, run, say, stop, write_stamp

DEFAULT_TORCH = "torch==2.13.0"
MIN_TORCH = (2, 10)
REQUIREMENTS = ROOT / "ci" / "requirements"
CPU_TORCH_HINT = (
    'TORCH="torch==2.13.0 --index-url https://download.pytorch.org/whl/cpu" chooses the CPU build, '
    "which needs no CUDA packages"
)


def active_torch() -> str | None:
    """Version of the torch that this Python has, if it may be linked and is new enough."""
    choice = os.environ.get("ENV") or "auto"
    if choice not in ("auto", "own", "active"):
        stop(f"ENV={choice}: expected auto, own or active")
    in_environment = sys.prefix != sys.base_prefix or os.environ.get("CONDA_PREFIX") == sys.prefix
    if choice == "own" or (choice == "auto" and not in_environment):
        return None
    try:
        version = importlib.metadata.version("torch")
    except importlib.metadata.PackageNotFoundError:
        version = "none"
    numbers = tuple(int(n) for n in re.findall(r"\d+", version)[:2])
    if numbers >= MIN_TORCH:
        return version
    if choice == "active":
        stop(f"ENV=active: expected torch >= 2.10 in {sys.prefix}, got {version}")
    return None


def source_of_torch() -> tuple[str, list[str]]:
    """A description that the stamp records, and the pip arguments (empty: linked)."""
    wanted = os.environ.get("TORCH") or DEFAULT_TORCH
    version = active_torch() if wanted == DEFAULT_TORCH else None
    if version:
        return f"torch {version} of the environment {sys.prefix}", []
    return wanted, shlex.split(wanted)


def create(folder: Path) -> None:
    """A new venv in `folder`, whatever was there before."""
    shutil.rmtree(folder, ignore_errors=True)
    command = [sys.executable, "-m", "venv", str(folder)]
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        shutil.rmtree(folder, ignore_errors=True)
        stop(
            f"{shlex.join(command)} failed:\n{result.stdout}{result.stderr}"
            "On Debian and Ubuntu the package python3-venv is needed."
        )


def pip_install(python: Path, arguments: list[str], *, hint: str = "") -> None:
    quiet = ["--quiet", "--quiet", "--disable-pip-version-check"]
    command = [str(python), "-m", "pip", "install", *quiet, *arguments]
    if run(command, check=False):
        stop(f"pip could not install: {shlex.join(arguments)}. {hint}")


def install_torch(folder: Path, python: Path, description: str, arguments: list[str]) -> None:
    if not arguments:
        say(f"{folder.name}: using {description}; nothing is installed into it")
        target = next(folder.glob("lib/python*/site-packages")) / "ridgeline-linked-torch.pth"
        target.write_text("\n".join(site.getsitepackages()) + "\n")
        return
    say(f"{folder.name}: installing {description} (once; {CPU_TORCH_HINT})")
    pip_install(python, arguments, hint=CPU_TORCH_HINT + ".")


def cuda_of_torch(python: Path) -> str:
    """CUDA version that the environment's torch was built for, "" for a CPU build."""
    code = "import torch; print(torch.version.cuda or '')"
    return subprocess.run(
        [str(python), "-c", code], check=True, capture_output=True, text=True
    ).stdout.strip()


def install_group(folder: Path, python: Path, group: str) -> None:
    file = REQUIREMENTS / f"{group}.txt"
    arguments = ["-r", str(file)]
    # Why: a torch of CUDA 13 brings cuda-bindings 13, which must stay; the packs need NVRTC 12.
    if group == "cuda12" and cuda_of_torch(python).startswith("13"):
        arguments += ["--upgrade", "--target", str(folder / "cuda12")]
    say(f"{folder.name}: installing {file.relative_to(ROOT)}")
    pip_install(python, arguments)


def make_env(name: str, *groups: str) -> Path:
    """Make or complete the environment `name` under the root; returns its Python."""
    if sys.version_info < MIN_PYTHON:
        stop(
            f"Python >= 3.10 is needed, this is {sys.version.split()[0]}; PYTHON=... names another"
        )
    watch = Stopwatch()
    folder = ROOT / name
    python = folder / "bin" / "python"
    stamp_file = folder / ".ridgeline-stamp.json"
    description, arguments = source_of_torch()
    base = {"python": f"{sys.version} in {sys.base_prefix}", "torch": description}

    stamp = read_stamp(stamp_file)
    changed = False
    if not python.exists() or {key: stamp.get(key) for key in base} != base:
        create(folder)
        install_torch(folder, python, description, arguments)
        stamp, changed = dict(base), True
    for group in groups:
        digest = digest_of([REQUIREMENTS / f"{group}.txt"])
        if stamp.get(group) != digest:
            install_group(folder, python, group)
            stamp[group], changed = digest, True
    if changed:
        write_stamp(stamp_file, stamp)
        say(f"{name}: ready after {watch}")
    return python


def build_path(name: str) -> dict[str, str]:
    """Variables with which the environment `name` finds CUDA 12's tools for the packs."""
    overlay = ROOT / name / "cuda12"
    return {"PYTHONPATH": str(overlay)} if overlay.is_dir() else {}


if __name__ == "__main__":
    if len(sys.argv) < 3:
        stop("usage: python3 ci/env.py FOLDER GROUP... (groups: files of ci/requirements)")
    make_env(sys.argv[1], *sys.argv[2:])
