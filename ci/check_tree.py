"""The rules of the tree that no linter knows: `python3 ci/check_tree.py`.

Each rule is a function that yields what breaks it, among the files that git tracks.
"""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
MAX_LINES = 800
MAX_COLUMNS = 100
MAX_FILE_BYTES = 10_000_000
CODE = (".py", ".cpp", ".h", ".cuh")
SYSTEM_HEADERS = ("cuda_fp16.h", "cuda_bf16.h", "cuda_fp8.h")


def tracked() -> list[Path]:
    names = subprocess.run(
        ["git", "ls-files", "-z"], cwd=ROOT, check=True, capture_output=True, text=True
    ).stdout
    return [ROOT / name for name in names.split("\0") if name and (ROOT / name).is_file()]


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def code_lines(path: Path) -> list[str]:
    return path.read_text(encoding="utf-8").splitlines()


def lengths(files: list[Path]) -> Iterator[str]:
    """No file of code over 800 lines; no line over 100 columns (ruff knows Python's exceptions)."""
    for path in files:
        if path.suffix not in CODE:
            continue
        lines = code_lines(path)
        if len(lines) > MAX_LINES:
            yield f"{name_of(path)}: {len(lines)} lines, at most {MAX_LINES}"
        for number, line in enumerate(lines, 1):
            if len(line) > MAX_COLUMNS and path.suffix != ".py":
                yield f"{name_of(path)}:{number}: {len(line)} columns, at most {MAX_COLUMNS}"


def kernel_includes(files: list[Path]) -> Iterator[str]:
    """Kernels include their own headers and CUDA's number types: no torch, no host headers."""
    for path in files:
        if path.parts[len(ROOT.parts)] != "kernels" or path.suffix not in CODE:
            continue
        for number, line in enumerate(code_lines(path), 1):
            include = re.match(r'\s*#\s*include\s*([<"])([^>"]+)[>"]', line)
            if not include:
                continue
            kind, header = include.groups()
            if kind == "<" and header not in SYSTEM_HEADERS:
                yield f"{name_of(path)}:{number}: includes <{header}>, expected {SYSTEM_HEADERS}"
            if kind == '"' and not (ROOT / "kernels" / header).is_file():
                yield f'{name_of(path)}:{number}: includes "{header}", which kernels/ has not'


def host_code(files: list[Path]) -> Iterator[str]:
    """torch_ops/ holds no device code."""
    for path in files:
        if path.parts[len(ROOT.parts)] == "torch_ops" and path.suffix in (".cpp", ".h", ".py"):
            for number, line in enumerate(code_lines(path), 1):
                if re.search(r"__(global|device|shared)__", line.split("//")[0]):
                    yield f"{name_of(path)}:{number}: device code outside kernels/"


def no_products(files: list[Path]) -> Iterator[str]:
    """Nothing that a build makes is in git, and nothing large but the demo's weights and text."""
    made = (".so", ".o", ".a", ".whl", ".rlpack", ".cubin", ".ptx", ".pyc")
    for path in files:
        if path.suffix in made:
            yield f"{name_of(path)}: a build makes this; remove it from git"
        elif path.stat().st_size > MAX_FILE_BYTES:
            yield f"{name_of(path)}: {path.stat().st_size} bytes, at most {MAX_FILE_BYTES}"


def no_open_ends(files: list[Path]) -> Iterator[str]:
    """No TODO without an issue number, no banner comments."""
    for path in files:
        if path.suffix not in CODE or path == Path(__file__).resolve():
            continue
        for number, line in enumerate(code_lines(path), 1):
            if re.search(r"\b(TODO|FIXME|XXX)\b", line) and not re.search(r"#\d+", line):
                yield f"{name_of(path)}:{number}: an open end without an issue number"
            if re.match(r"\s*(//|#)\s*[-=*#/]{8,}", line):
                yield f"{name_of(path)}:{number}: a banner comment"


def family_files(files: list[Path]) -> Iterator[str]:
    """A family has its files in every layer: name = path."""
    families = {
        path.parts[len(ROOT.parts) + 1]
        for path in files
        if path.match("kernels/*/*.cuh") and path.parent.name != "common"
    }
    present = {name_of(path) for path in files}
    for family in sorted(families):
        expected = [
            f"kernels/{family}/params.h",
            f"torch_ops/csrc/ops/{family}.cpp",
            f"torch_ops/{family}.py",
        ]
        for name in expected:
            if name not in present:
                yield f"{name}: missing, though kernels/{family}/ is there"
        if not any(name.startswith(f"tests/test_{family}") for name in present):
            yield f"tests/test_{family}.py: missing, though kernels/{family}/ is there"


RULES = (lengths, kernel_includes, host_code, no_products, no_open_ends, family_files)


def main() -> int:
    files = tracked()
    problems = [problem for rule in RULES for problem in rule(files)]
    print("\n".join(problems) or f"tree: {len(files)} files keep {len(RULES)} rules")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
