"""Where NVRTC and the CUDA headers come from: the packages that torch itself depends on.

Nothing here imports torch: the workers of the pool run this file too.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import importlib.util
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

UNKNOWN_TAG = "nvrtc_unknown"


class CompilerMissingError(RuntimeError):
    """NVRTC, its Python binding or the CUDA headers are not there; the message says what to do."""


@dataclass(frozen=True)
class Toolchain:
    """A loaded NVRTC, with the folder of the CUDA headers that belong to it."""

    nvrtc: Any
    version: tuple[int, int]
    compiler: str
    include: Path
    arch_numbers: tuple[int, ...]


def compiler_tag() -> str:
    """Return "nvrtc_<version>" from package metadata, without loading NVRTC.

    The tag is part of the names in the disk cache, so that another NVRTC compiles anew.
    """
    for version in _packaged_versions():
        return f"nvrtc_{version}"
    return UNKNOWN_TAG


@functools.lru_cache(maxsize=1)
def load() -> Toolchain:
    """Load NVRTC and find its headers.

    Raises
    ------
    CompilerMissingError
        If a part is missing, with the command that installs it.
    """
    try:
        from cuda import pathfinder
        from cuda.bindings import nvrtc
    except ImportError as error:
        raise CompilerMissingError(
            f"compiling a kernel needs the Python package cuda-bindings, which is not usable here "
            f"({error}). {_install_hint()}"
        ) from None
    _prefer_cuda_12()
    try:
        library = Path(pathfinder.load_nvidia_dynamic_lib("nvrtc").abs_path or "")
    except Exception as error:
        raise CompilerMissingError(
            f"the NVRTC library is not found ({_first_line(error)}). {_install_hint()}"
        ) from None
    _preload_builtins(library)
    result, major, minor = nvrtc.nvrtcVersion()
    if int(result) != 0:
        raise CompilerMissingError(f"{library} does not answer: {result}. {_install_hint()}")
    version = (int(major), int(minor))
    return Toolchain(
        nvrtc=nvrtc,
        version=version,
        compiler=_compiler_name(version),
        include=_find_headers(pathfinder, library, version[0]),
        arch_numbers=_arch_numbers(nvrtc),
    )


def _packaged_versions() -> list[str]:
    """Return the versions of the installed NVRTC packages, the one that is preferred first."""
    from importlib import metadata

    versions = []
    for major in (12, 13):
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions.append(metadata.version(_package("nvidia-cuda-nvrtc", major)))
    return versions


def _prefer_cuda_12() -> None:
    """Load the NVRTC of CUDA 12 where its package is installed, also beside that of CUDA 13.

    Why: what it compiles loads on drivers from R525 on, CUDA 13's from R580 on; and the finder,
    which takes the newest, keeps to one that is loaded already.
    """
    spec = importlib.util.find_spec("nvidia")
    for folder in (spec.submodule_search_locations if spec else None) or ():
        library = Path(folder) / "cuda_nvrtc" / "lib" / "libnvrtc.so.12"
        if library.is_file():
            with contextlib.suppress(OSError):
                ctypes.CDLL(str(library))
            return


def _package(stem: str, major: int) -> str:
    """Return the package of a CUDA component; the suffix -cuXX was dropped with CUDA 13."""
    return stem if major >= 13 else f"{stem}-cu{major}"


def _torch_cuda_major() -> int:
    """Return the CUDA major version of the installed torch wheel, 12 where it has none."""
    from importlib import metadata

    try:
        build = metadata.version("torch").partition("+cu")[2]
        return int(build[:2]) if build[:2].isdigit() else 12
    except metadata.PackageNotFoundError:
        return 12


def _install_hint(major: int | None = None) -> str:
    chosen = _torch_cuda_major() if major is None else major
    packages = [_package(f"nvidia-cuda-{part}", chosen) for part in ("nvrtc", "runtime")]
    return (
        f'Install what torch\'s CUDA builds bring: pip install "cuda-bindings=={chosen}.*" '
        f"cuda-pathfinder {' '.join(packages)}"
    )


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _preload_builtins(library: Path) -> None:
    """Load NVRTC's builtins before NVRTC asks for them.

    Why: some NVRTC builds have no RUNPATH and find the builtins only when they are loaded already.
    """
    for builtins in sorted(library.parent.glob("libnvrtc-builtins.so*")):
        try:
            ctypes.CDLL(str(builtins))
        except OSError:
            continue


def _arch_numbers(nvrtc: Any) -> tuple[int, ...]:
    """Return the architectures that NVRTC knows, such as 75 and 90; empty where it cannot say."""
    result, count = nvrtc.nvrtcGetNumSupportedArchs()
    if int(result) != 0:
        return ()
    result, archs = nvrtc.nvrtcGetSupportedArchs()
    return tuple(int(arch) for arch in archs[:count]) if int(result) == 0 else ()


def _compiler_name(version: tuple[int, int]) -> str:
    """Return "nvrtc 12.9.86": the package's version where it is the library that was loaded."""
    loaded = f"{version[0]}.{version[1]}"
    packaged = [text for text in _packaged_versions() if text.startswith(f"{loaded}.")]
    return f"nvrtc {packaged[0] if packaged else loaded}"


def _find_headers(pathfinder: Any, library: Path, major: int) -> Path:
    """Return the header folder that belongs to `library`.

    Headers of another CUDA version can lie in the same environment, so the neighbours of the
    library come first: the cu12 packages, the cu13 packages, a toolkit.
    """
    root = library.resolve().parent.parent
    candidates = [root.parent / "cuda_runtime" / "include", root / "include"]
    found = pathfinder.find_nvidia_header_directory("cudart")
    if found:
        candidates.append(Path(found))
    for folder in candidates:
        if (folder / "cuda_fp16.h").is_file() and _cuda_major(folder) == major:
            return folder
    raise CompilerMissingError(
        f"the headers of CUDA {major} (cuda_fp16.h) are not found beside {library}. "
        f"{_install_hint(major)}"
    )


def _cuda_major(include: Path) -> int:
    """Return the CUDA version that a header folder says it is of, 0 when it says nothing."""
    try:
        text = (include / "cuda_runtime_api.h").read_text(errors="replace")
    except OSError:
        return 0
    match = re.search(r"^#define CUDART_VERSION\s+(\d+)", text, re.MULTILINE)
    return int(match[1]) // 1000 if match else 0
