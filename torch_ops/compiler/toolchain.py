"""Where NVRTC and the CUDA headers come from: the packages that torch itself depends on.

Nothing here imports torch: the workers of the pool run this file too.
"""

from __future__ import annotations

import ctypes
import functools
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
    from importlib import metadata

    try:
        major = int(metadata.version("cuda-bindings").split(".")[0])
        return f"nvrtc_{metadata.version(_package('nvidia-cuda-nvrtc', major))}"
    except (metadata.PackageNotFoundError, ValueError):
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
            f"({error}). {_install_hint(_torch_cuda_major())}"
        ) from None
    major = _bindings_major()
    try:
        library = Path(pathfinder.load_nvidia_dynamic_lib("nvrtc").abs_path or "")
    except Exception as error:
        raise CompilerMissingError(
            f"the NVRTC library of CUDA {major} is not found ({_first_line(error)}). "
            f"{_install_hint(major)}"
        ) from None
    _preload_builtins(library)
    result, *version = nvrtc.nvrtcVersion()
    if int(result) != 0:
        raise CompilerMissingError(f"{library} does not answer: {result}. {_install_hint(major)}")
    result, arch_numbers = _supported_archs(nvrtc)
    number = (int(version[0]), int(version[1]))
    return Toolchain(
        nvrtc=nvrtc,
        version=number,
        compiler=_compiler_name(number),
        include=_find_headers(pathfinder, library, major),
        arch_numbers=arch_numbers if result == 0 else (),
    )


def _package(stem: str, major: int) -> str:
    """Return the package of a CUDA component; the suffix -cuXX was dropped with CUDA 13."""
    return stem if major >= 13 else f"{stem}-cu{major}"


def _bindings_major() -> int:
    import cuda.bindings

    return int(str(cuda.bindings.__version__).split(".")[0])


def _torch_cuda_major() -> int:
    """Return the CUDA major version of the installed torch wheel, 12 where it has none."""
    from importlib import metadata

    try:
        build = metadata.version("torch").partition("+cu")[2]
        return int(build[:2]) if build[:2].isdigit() else 12
    except metadata.PackageNotFoundError:
        return 12


def _install_hint(major: int) -> str:
    packages = [_package(f"nvidia-cuda-{part}", major) for part in ("nvrtc", "runtime")]
    return (
        f'Install what torch\'s CUDA builds bring: pip install "cuda-bindings=={major}.*" '
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


def _supported_archs(nvrtc: Any) -> tuple[int, tuple[int, ...]]:
    result, numbers = nvrtc.nvrtcGetNumSupportedArchs()
    if int(result) != 0:
        return int(result), ()
    result, archs = nvrtc.nvrtcGetSupportedArchs()
    return int(result), tuple(int(arch) for arch in archs[:numbers])


def _compiler_name(version: tuple[int, int]) -> str:
    """Return "nvrtc 12.9.86": the package's version where it is the library that was loaded."""
    loaded = f"{version[0]}.{version[1]}"
    packaged = compiler_tag().removeprefix("nvrtc_")
    return f"nvrtc {packaged}" if packaged.startswith(f"{loaded}.") else f"nvrtc {loaded}"


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
        if (folder / "cuda_fp16.h").is_file():
            return folder
    raise CompilerMissingError(
        f"the CUDA headers (cuda_fp16.h) are not found beside {library}. {_install_hint(major)}"
    )
