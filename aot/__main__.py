"""`python -m ridgeline.aot build | list | verify`."""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import ridgeline
from ridgeline import compiler
from ridgeline.compiler.toolchain import CompilerMissingError

from . import archs, manifest, plan
from .build import BuildError, build
from .verify import packed_archs, verify


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; return its exit code."""
    arguments = _parser().parse_args(argv)
    try:
        return int(arguments.run(arguments))
    except (archs.ArchError, BuildError, CompilerMissingError) as error:
        print(f"error: {error}", file=sys.stderr)
    except KeyboardInterrupt:
        print("interrupted: no pack was written", file=sys.stderr)
    return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m ridgeline.aot", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="command")
    arch_help = "some of " + ", ".join(archs.SMEM_LIMITS)

    command = commands.add_parser("build", help="compile the core kernels into packs")
    command.add_argument("--arch", nargs="+", help=f"{arch_help}; default: TORCH_CUDA_ARCH_LIST")
    command.add_argument("--out", type=Path, help="folder of the packs; default: the package's")
    command.add_argument("--jobs", type=int, help="parallel compilers; default: what fits")
    command.set_defaults(run=_build)

    command = commands.add_parser("list", help="print what the packs hold")
    command.add_argument("folder", type=Path, nargs="?", help="default: the package's")
    command.add_argument("--arch", nargs="+", help=arch_help)
    command.add_argument("--planned", action="store_true", help="print what `build` would compile")
    command.set_defaults(run=_list)

    command = commands.add_parser("verify", help="check packs against sources and core table")
    command.add_argument("folder", type=Path, nargs="?", help="default: the package's")
    command.add_argument("--arch", nargs="+", help=f"{arch_help}; default: all that are there")
    command.set_defaults(run=_verify)
    return parser


def _build(arguments: argparse.Namespace) -> int:
    chosen = _chosen(arguments.arch)
    start = time.monotonic()
    built = build(
        compiler.library(), chosen, arguments.out or _default_folder(), num_workers=arguments.jobs
    )
    print(
        f"{built.num_kernels} kernels in {len(built.files)} packs, {built.num_compiled} compiled, "
        f"{time.monotonic() - start:.0f} s"
    )
    return 0


def _list(arguments: argparse.Namespace) -> int:
    if arguments.planned:
        for arch in _chosen(arguments.arch):
            for name in plan.core_kernels(compiler.library().core_table, arch):
                print(f"{arch:7} {name}")
        return 0
    folder = arguments.folder or _default_folder()
    found = packed_archs(folder)
    chosen = [arch for arch in found if arch in archs.parse_names(arguments.arch or found)]
    if not chosen:
        print(f"{folder} has no packs; `python -m ridgeline.aot build` makes them")
        return 1
    print(f"{'arch':7}{'regs':>5}{'static':>8}{'dynamic':>8}{'spills':>7}{'KB':>7}  kernel")
    for arch in chosen:
        described = json.loads(manifest.manifest_file(folder, arch).read_bytes())
        for kernel in described["kernels"]:
            spills = kernel["spill_stores"] + kernel["spill_loads"]
            print(
                f"{arch:7}{kernel['registers']:5}{kernel['static_smem']:8}"
                f"{kernel['dynamic_smem']:8}{spills:7}{kernel['entry_size'] / 1e3:7.1f}  "
                f"{kernel['name']}"
            )
        print(
            f"{arch:7}{len(described['kernels'])} kernels, {described['pack_size'] / 1e6:.2f} MB, "
            f"{described['compiler']}"
        )
    return 0


def _verify(arguments: argparse.Namespace) -> int:
    folder = arguments.folder or _default_folder()
    chosen = archs.parse_names(arguments.arch) if arguments.arch else packed_archs(folder)
    if not chosen:
        print(f"error: {folder} has no packs", file=sys.stderr)
        return 1
    wrong = [line for arch in chosen for line in verify(compiler.library(), folder, arch)]
    for line in wrong:
        print(f"error: {line}", file=sys.stderr)
    if wrong:
        print("`python -m ridgeline.aot build` makes the packs anew", file=sys.stderr)
        return 1
    print(f"{folder}: the packs of {', '.join(chosen)} are complete and sound")
    return 0


def _chosen(names: Sequence[str] | None) -> list[str]:
    if names:
        return archs.parse_names(names)
    listed = os.environ.get("TORCH_CUDA_ARCH_LIST") or archs.DEFAULT_LIST
    return archs.parse_torch_list(listed, print)


def _default_folder() -> Path:
    return compiler.library().pack_dir() or Path(ridgeline.__file__).parent / "packs"


if __name__ == "__main__":
    sys.exit(main())
