"""Makes the candidates of tune_attention.py: patched kernels, and a library that knows the tiles.

What the host must know of a tile (threads, shared memory, keys a step) is compiled into the op
library, so every candidate has one of its own beside its copy of kernels/. Sources that no patch
touches are compiled once for all.
"""

from __future__ import annotations

import ast
import hashlib
import os
import re
import shutil
import subprocess
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

import torch

from .tune_candidates import Candidate

ROOT = Path(__file__).resolve().parent.parent
PARAMS = "kernels/attention/params.h"
TABLE = re.compile(r"constexpr TileConfig attention_tile\([^)]*\) \{\n")


class PatchError(ValueError):
    """A candidate whose patch does not fit this checkout."""


def folder_of(folder: Path, candidate: Candidate) -> Path:
    change = repr((candidate.tiles, candidate.patches))
    digest = hashlib.sha256(change.encode()).hexdigest()[:12]
    return folder / f"{candidate.group.replace(' ', '_')}_{digest}"


def patched(candidate: Candidate) -> dict[str, str]:
    """The files that a candidate changes, and their new text."""
    texts: dict[str, str] = {}

    def text(name: str) -> str:
        return texts.get(name) or (ROOT / name).read_text()

    for (qk, vo, rows), tile in candidate.tiles:
        found = TABLE.search(text(PARAMS))
        if found is None:
            raise PatchError(f"{PARAMS} has no attention_tile")
        values = ", ".join(str(value).lower() for value in tile)
        row = f"  if (head_dim_qk == {qk} && head_dim_vo == {vo} && tile_q == {rows} && sm >= 80)\n"
        row += f"    return {{{values}}};\n"
        texts[PARAMS] = text(PARAMS)[: found.end()] + row + text(PARAMS)[found.end() :]
    for name, old, new in candidate.patches:
        if text(name).count(old) != 1:
            raise PatchError(f"{name} has not exactly one '{old}'")
        texts[name] = text(name).replace(old, new)
    return texts


def build(folder: Path, candidates: Iterable[Candidate]) -> dict[Candidate, str]:
    """Make every candidate's folder; returns those that failed, and why."""
    failed: dict[Candidate, str] = {}
    for candidate in candidates:
        try:
            texts = patched(candidate)
            target = folder_of(folder, candidate)
            digest = hashlib.sha256(repr((_digest(), texts)).encode()).hexdigest()
            stamp = target / "stamp"
            if not stamp.exists() or stamp.read_text() != digest:
                _build_one(target, texts, *_base(folder / "objects"))
                stamp.write_text(digest)
        except (PatchError, subprocess.CalledProcessError, OSError) as error:
            output = getattr(error, "stderr", None) or str(error)
            failed[candidate] = str(output).strip()[-300:]
    return failed


def missing(folder: Path, candidates: Iterable[Candidate]) -> dict[Candidate, str]:
    """Those that `build` has not made in this folder."""
    places = {candidate: folder_of(folder, candidate) for candidate in candidates}
    return {
        c: f"{path} is not there" for c, path in places.items() if not (path / "stamp").exists()
    }


def _build_one(
    target: Path, texts: dict[str, str], objects: dict[Path, Path], uses: dict[Path, set[str]]
) -> None:
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(ROOT / "kernels", target / "kernels")
    for name, text in texts.items():
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        (target / name).write_text(text)
    own = dict(objects)
    jobs = []
    for source in objects:
        name = str(source.relative_to(ROOT))
        if uses[source] & set(texts) or name in texts:
            own[source] = target / f"{source.stem}.o"
            jobs.append((target / name if name in texts else source, own[source]))
    include = [target / "torch_ops" / "csrc", target / "kernels"]
    _compile_all(jobs, include)
    site = target / "site" / "ridgeline"
    shutil.copytree(
        ROOT / "torch_ops",
        site,
        ignore=shutil.ignore_patterns("csrc", "*.so", "packs", "__pycache__"),
    )
    _link(own.values(), site / "libridgeline.so")
    for path in target.glob("*.o"):
        path.unlink()


@cache
def _base(folder: Path) -> tuple[dict[Path, Path], dict[Path, set[str]]]:
    """Objects of all sources of this checkout, and the files of it that each is made from."""
    folder.mkdir(parents=True, exist_ok=True)
    sources = sorted((ROOT / "torch_ops" / "csrc").rglob("*.cpp"))
    objects = {source: folder / f"{source.parent.name}_{source.stem}.o" for source in sources}
    stamp = folder / "stamp"
    if not stamp.exists() or stamp.read_text() != _digest():
        _compile_all(list(objects.items()), [])
        stamp.write_text(_digest())
    uses = {}
    for source, target in objects.items():
        words = target.with_suffix(".d").read_text().replace("\\\n", " ").split()
        paths = [Path(word).resolve() for word in words if not word.endswith(":")]
        uses[source] = {str(p.relative_to(ROOT)) for p in paths if p.is_relative_to(ROOT)}
    return objects, uses


@cache
def _digest() -> str:
    """Of all that a library is made from."""
    hashed = hashlib.sha256((ROOT / "setup.py").read_bytes())
    for part in ("kernels", "torch_ops"):
        for path in sorted((ROOT / part).rglob("*")):
            if path.suffix in (".h", ".cuh", ".cpp", ".py"):
                hashed.update(str(path.relative_to(ROOT)).encode() + b"\0" + path.read_bytes())
    return hashed.hexdigest()


def _flags() -> list[str]:
    """COMPILE_FLAGS of setup.py."""
    for node in ast.parse((ROOT / "setup.py").read_text()).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "COMPILE_FLAGS":
            flags: list[str] = ast.literal_eval(node.value)
            return flags
    raise PatchError("setup.py has no COMPILE_FLAGS")


def _torch() -> Path:
    return Path(torch.__file__).resolve().parent


def _compile_all(jobs: list[tuple[Path, Path]], include: list[Path]) -> None:
    folders = [*include, ROOT / "torch_ops" / "csrc", ROOT / "kernels"]
    flags = [*_flags(), "-O1", *(f"-I{folder}" for folder in folders), "-MMD"]
    flags += ["-isystem", str(_torch() / "include"), "-include", "runtime/glibc.h"]

    def compile_one(job: tuple[Path, Path]) -> None:
        command = ["g++", *flags, "-c", str(job[0]), "-o", str(job[1])]
        subprocess.run(command, check=True, capture_output=True, text=True)

    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        list(pool.map(compile_one, jobs))


def _link(objects: Iterable[Path], target: Path) -> None:
    command = ["g++", "-shared", *map(str, objects), "-o", str(target), f"-L{_torch() / 'lib'}"]
    command += [f"-Wl,--version-script={ROOT / 'torch_ops' / 'csrc' / 'exports.map'}"]
    command += ["-Wl,--no-as-needed", "-ltorch", "-ltorch_cpu", "-ldl", "-pthread", "-Wl,-s"]
    subprocess.run(command, check=True, capture_output=True, text=True)
