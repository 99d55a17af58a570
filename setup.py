"""Builds the op library with the host's C++ compiler, and the kernel packs when asked to.

`RIDGELINE_BUILD_PACK=1` also compiles the core kernels (`python -m ridgeline.aot build`) into the
wheel; without it kernels come by JIT. `RIDGELINE_PLAT_NAME` names the wheel's platform tag.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
LIBRARY = "libridgeline.so"

COMPILE_FLAGS = [
    "-std=c++20",
    "-O2",
    "-fPIC",
    "-fvisibility=hidden",
    "-fvisibility-inlines-hidden",
    "-fno-gnu-unique",
    "-Wall",
    "-Wextra",
    "-Werror",
    # Why: LibTorch's stable ABI as torch 2.10 has it, so that one binary serves every later torch.
    "-DTORCH_TARGET_VERSION=0x020a000000000000",
]


def torch_root() -> Path:
    try:
        import torch
    except ImportError:
        sys.exit(
            "ridgeline builds against torch >= 2.10, which is not installed here. Install torch "
            "first, then run: pip install --no-build-isolation ."
        )
    return Path(torch.__file__).resolve().parent


class BuildLibrary(build_ext):
    """One shared library, compiled and linked by the C++ compiler directly."""

    def get_ext_filename(self, fullname: str) -> str:
        return str(Path(*fullname.split(".")[:-1]) / LIBRARY)

    def build_extension(self, ext: Extension) -> None:
        torch_dir = torch_root()
        compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("c++") or "g++"
        objects_dir = Path(self.build_temp)
        objects_dir.mkdir(parents=True, exist_ok=True)
        include = torch_dir / "include"
        flags = [*COMPILE_FLAGS, f"-I{ROOT / 'torch_ops' / 'csrc'}", f"-I{ROOT / 'kernels'}"]
        flags += ["-isystem", str(include), "-include", "runtime/glibc.h"]

        def compile_one(source: str) -> Path:
            path = Path(source)
            output = objects_dir / f"{path.parent.name}_{path.stem}.o"
            subprocess.run([compiler, *flags, "-c", source, "-o", str(output)], check=True)
            return output

        with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
            objects = list(pool.map(compile_one, ext.sources))

        target = Path(self.get_ext_fullpath(ext.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        link = [
            compiler,
            "-shared",
            *map(str, objects),
            "-o",
            str(target),
            f"-Wl,--version-script={ROOT / 'torch_ops' / 'csrc' / 'exports.map'}",
            f"-L{torch_dir / 'lib'}",
            # Why: torch loads its libraries RTLD_LOCAL, so their symbols resolve only through
            # DT_NEEDED entries of this one.
            "-Wl,--no-as-needed",
            "-ltorch",
            "-ltorch_cpu",
            # Why: before glibc 2.34 dlopen is in a library of its own.
            "-ldl",
            "-Wl,--as-needed",
            "-pthread",
            "-Wl,-s",
        ]
        subprocess.run(link, check=True)
        if os.environ.get("RIDGELINE_BUILD_PACK") == "1":
            self.build_packs(target.parent)

    def build_packs(self, package_dir: Path) -> None:
        root = package_dir.parent
        if self.editable_mode:
            sys.exit(
                "RIDGELINE_BUILD_PACK=1 is for wheels; in a checkout run: "
                "python -m ridgeline.aot build"
            )
        path = [str(root), *filter(None, [os.environ.get("PYTHONPATH")])]
        env = {**os.environ, "PYTHONPATH": os.pathsep.join(path)}
        out = package_dir / "packs"
        command = [sys.executable, "-m", "ridgeline.aot", "build", "--out", str(out)]
        if subprocess.run(command, env=env).returncode:
            sys.exit("error: the kernel packs were not built; the reason is above")


class PlatformWheel(bdist_wheel):
    """Tags the wheel py3-none-<platform>: the library has no Python ABI in it."""

    def finalize_options(self) -> None:
        super().finalize_options()
        self.root_is_pure = False

    def get_tag(self) -> tuple[str, str, str]:
        platform = os.environ.get("RIDGELINE_PLAT_NAME") or super().get_tag()[2]
        return "py3", "none", platform


sources = [str(p.relative_to(ROOT)) for p in sorted((ROOT / "torch_ops" / "csrc").rglob("*.cpp"))]
setup(
    ext_modules=[Extension("ridgeline.libridgeline", sources)],
    cmdclass={"build_ext": BuildLibrary, "bdist_wheel": PlatformWheel},
)
