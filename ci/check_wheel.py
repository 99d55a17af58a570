"""Checks a built wheel: `python3 ci/check_wheel.py dist/NAME.whl` (needs pyelftools, auditwheel).

One py3-none wheel under 40 MB, a pack and a manifest for every architecture, no library in NEEDED
that would tie it to one CUDA or one Python, no symbol version newer than the platform that it is
meant for has. Prints what was found; the exit code is 1 if anything is wrong.
"""

from __future__ import annotations

import io
import json
import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

from elftools.elf.dynamic import DynamicSection
from elftools.elf.elffile import ELFFile
from elftools.elf.gnuversions import GNUVerNeedSection

MAX_BYTES = 40_000_000
DEFAULT_ARCHS = "7.5 8.0 8.6 8.9 9.0a"
FORBIDDEN = ("libcudart", "libcuda.so", "libtorch_cuda", "libtorch_python", "libpython", "libnvrtc")
ALLOWED = ("libtorch.so", "libtorch_cpu.so", "libstdc++.so.6", "libgcc_s.so.1", "libc.so.6")
ALLOWED_OLD_GLIBC = ("libm.so.6", "libdl.so.2", "libpthread.so.0", "ld-linux-x86-64.so.2")
# What a manylinux_2_28 system has.
LIMITS = {"GLIBC": (2, 28), "GLIBCXX": (3, 4, 24), "CXXABI": (1, 3, 11), "GCC": (7, 0, 0)}
LIBRARY = "ridgeline/libridgeline.so"


class Report:
    """Prints each finding, counts those that are wrong."""

    def __init__(self) -> None:
        self.failures = 0

    def check(self, name: str, *, expected: str, got: str, ok: bool) -> None:
        print(
            f"{'ok  ' if ok else 'FAIL'}  {name}: {got}" + ("" if ok else f" (expected {expected})")
        )
        self.failures += not ok


def expected_packs() -> list[str]:
    archs = os.environ.get("TORCH_CUDA_ARCH_LIST") or DEFAULT_ARCHS
    return sorted("sm_" + arch.replace(".", "") for arch in re.split(r"[ ;]+", archs.strip()))


def version_tuple(text: str) -> tuple[int, ...]:
    return tuple(int(number) for number in re.findall(r"\d+", text))


def check_name(report: Report, wheel: Path) -> None:
    tag = "-".join(wheel.stem.split("-")[-3:])
    report.check(
        "tag",
        expected="py3-none-<platform>",
        got=tag,
        ok=re.fullmatch(r"py3-none-(linux|manylinux)[\w.]+", tag) is not None,
    )
    size = wheel.stat().st_size
    report.check("size", expected="under 40 MB", got=f"{size / 1e6:.2f} MB", ok=size < MAX_BYTES)


def check_contents(report: Report, archive: zipfile.ZipFile) -> None:
    names = archive.namelist()
    packs = sorted(Path(name).stem for name in names if name.endswith(".rlpack"))
    expected = expected_packs()
    report.check("packs", expected=" ".join(expected), got=" ".join(packs), ok=packs == expected)
    for pack in packs:
        manifest = f"ridgeline/packs/{pack}.json"
        size = archive.getinfo(f"ridgeline/packs/{pack}.rlpack").file_size
        text = f"{size / 1e6:.2f} MB, no manifest"
        if manifest in names:
            text = (
                f"{size / 1e6:.2f} MB, {kernel_count(json.loads(archive.read(manifest)))} kernels"
            )
        report.check(f"pack {pack}", expected=manifest, got=text, ok=manifest in names)
    for kind, wanted in (("kernel headers", ".cuh"), ("py.typed", "py.typed")):
        count = sum(name.endswith(wanted) for name in names)
        report.check(kind, expected="at least 1", got=str(count), ok=count > 0)
    strays = [n for n in names if re.search(r"(^|/)(tests|benchmarks|ci|__pycache__)/|\.cpp$", n)]
    report.check("stray files", expected="none", got=" ".join(strays) or "none", ok=not strays)
    metadata = next(name for name in names if name.endswith(".dist-info/METADATA"))
    requires = re.findall(r"^Requires-Dist: (.*)$", archive.read(metadata).decode(), re.MULTILINE)
    runtime = [line for line in requires if "extra ==" not in line]
    only_torch = len(runtime) == 1 and runtime[0].startswith("torch")
    report.check("run-time needs", expected="torch only", got=", ".join(runtime), ok=only_torch)


def kernel_count(manifest: object) -> int:
    kernels = manifest.get("kernels") if isinstance(manifest, dict) else manifest
    return len(kernels) if isinstance(kernels, (list, dict)) else 0


def check_library(report: Report, data: bytes) -> None:
    elf = ELFFile(io.BytesIO(data))
    dynamic = next(s for s in elf.iter_sections() if isinstance(s, DynamicSection))
    needed = [tag.needed for tag in dynamic.iter_tags() if tag.entry.d_tag == "DT_NEEDED"]
    unknown = [name for name in needed if name not in (*ALLOWED, *ALLOWED_OLD_GLIBC)]
    forbidden = [name for name in needed if name.startswith(FORBIDDEN)]
    report.check(
        "NEEDED", expected="no " + ", ".join(FORBIDDEN), got=" ".join(needed), ok=not forbidden
    )
    report.check(
        "NEEDED, known", expected="none else", got=" ".join(unknown) or "yes", ok=not unknown
    )

    highest: dict[str, tuple[int, ...]] = {}
    for section in elf.iter_sections():
        if not isinstance(section, GNUVerNeedSection):
            continue
        for _, versions in section.iter_versions():
            for version in versions:
                family, _, number = version.name.partition("_")
                if number and number[0].isdigit():
                    highest[family] = max(highest.get(family, ()), version_tuple(number))
    for family, limit in LIMITS.items():
        got = highest.get(family, ())
        report.check(
            f"{family} symbols",
            expected="at most " + ".".join(map(str, limit)) + ", as manylinux_2_28 has",
            got=".".join(map(str, got)) or "none",
            ok=got <= limit,
        )
    exported = [
        symbol.name
        for symbol in elf.get_section_by_name(".dynsym").iter_symbols()  # type: ignore[union-attr]
        if symbol["st_shndx"] != "SHN_UNDEF" and symbol.name
    ]
    foreign = [name for name in exported if not name.startswith(("ridgeline_", "RIDGELINE"))]
    report.check(
        "exported symbols",
        expected="ridgeline_* only",
        got=f"{len(exported)}, others: {' '.join(foreign[:8]) or 'none'}",
        ok=not foreign,
    )


def print_auditwheel(report: Report, wheel: Path) -> None:
    command = [sys.executable, "-m", "auditwheel", "show", "--json", str(wheel)]
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        report.check("auditwheel", expected="a verdict", got=result.stderr.strip(), ok=False)
        return
    verdict = json.loads(result.stdout)
    print(f"      auditwheel show: the symbols fit {verdict['sym_tag']}", end="")
    outside = verdict["external_libs"]
    print(f"; libraries outside the wheel: {', '.join(outside) or 'none'}")
    print(f"      platform tag reached: {wheel.stem.split('-')[-1]}")


def main() -> int:
    if len(sys.argv) != 2 or not Path(sys.argv[1]).is_file():
        sys.exit("usage: python3 ci/check_wheel.py dist/NAME.whl")
    wheel = Path(sys.argv[1])
    report = Report()
    print(f"checking {wheel.name}")
    check_name(report, wheel)
    with zipfile.ZipFile(wheel) as archive:
        check_contents(report, archive)
        if LIBRARY in archive.namelist():
            check_library(report, archive.read(LIBRARY))
        else:
            report.check("op library", expected=LIBRARY, got="missing", ok=False)
    print_auditwheel(report, wheel)
    print(
        f"{'FAILED: ' + str(report.failures) + ' checks' if report.failures else 'wheel is good'}"
    )
    return 1 if report.failures else 0


if __name__ == "__main__":
    sys.exit(main())
