"""Style and rules: `make lint`, or one part of it: `python3 ci/lint.py mypy`; `--fix` repairs.

Parts: ruff (lint and format), mypy (--strict, over the import package as it is installed),
clang-format, tree (ci/check_tree.py and the README's matrix). Each runs, even when another failed.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

from common import BUILD, PRODUCTS, ROOT, run, say, stop
from demo import ensure_editable
from env import make_env

PARTS = ("ruff", "mypy", "clang-format", "tree")
CPP_FOLDERS = ("kernels", "torch_ops", "tests")
CPP_SUFFIXES = (".cuh", ".h", ".cpp")


def ruff(python: Path, fix: bool) -> bool:
    program = python.parent / "ruff"
    lint = run([program, "check", *(["--fix"] if fix else []), "."], check=False)
    layout = run([program, "format", *([] if fix else ["--check"]), "."], check=False)
    return lint == layout == 0


def mypy(python: Path, fix: bool) -> bool:
    """Check the package through links, laid out as pip installs it."""
    del fix
    package = BUILD / "mypy" / "ridgeline"
    shutil.rmtree(package, ignore_errors=True)
    package.mkdir(parents=True)
    for source in [*(ROOT / "torch_ops").iterdir(), ROOT / "aot"]:
        if source.exists() and source.name not in (*PRODUCTS, "csrc"):
            (package / source.name).symlink_to(source)
    command = [str(python), "-m", "mypy", "--strict", "--config-file", str(ROOT / "pyproject.toml")]
    command += ["--cache-dir", str(BUILD / "mypy_cache"), "--package", "ridgeline"]
    result = subprocess.run(command, cwd=package.parent, capture_output=True, text=True)
    for line in (result.stdout + result.stderr).splitlines():
        print(line.replace("ridgeline/aot/", "aot/").replace("ridgeline/", "torch_ops/"))
    return result.returncode == 0


def clang_format(python: Path, fix: bool) -> bool:
    files = [
        file
        for folder in CPP_FOLDERS
        for file in sorted((ROOT / folder).rglob("*"))
        if file.suffix in CPP_SUFFIXES
    ]
    if not files:
        return True
    mode = ["-i"] if fix else ["--dry-run", "-Werror"]
    return run([python.parent / "clang-format", *mode, *files], check=False) == 0


def tree(python: Path, fix: bool) -> bool:
    """The rules of the tree, and the README's matrix against the library's core table."""
    ensure_editable(python)
    matrix = [python, ROOT / "ci" / "readme_matrix.py", *(["--write"] if fix else ["--check"])]
    return (
        run([python, ROOT / "ci" / "check_tree.py"], check=False) == run(matrix, check=False) == 0
    )


def main() -> None:
    arguments = sys.argv[1:]
    fix = "--fix" in arguments
    wanted = [word for word in arguments if word != "--fix"] or list(PARTS)
    unknown = set(wanted) - set(PARTS)
    if unknown:
        stop(f"no such part: {', '.join(sorted(unknown))}; expected {', '.join(PARTS)} or --fix")
    python = make_env(".venv", "build", "demo", "lint")
    checks = {"ruff": ruff, "mypy": mypy, "clang-format": clang_format, "tree": tree}
    failed = []
    for part in wanted:
        good = checks[part](python, fix)
        say(f"{part}: {'ok' if good else 'FAILED'}")
        if not good:
            failed.append(part)
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
