"""The command line: `python -m ridgeline doctor | kernels | warmup | demo`."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from . import _model, compiler
from .compiler import pack
from .compiler.entry import EntryError, unpack


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; return its exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    if words[:1] == ["demo"]:
        # The demo has options, and help, of its own.
        from .demo import main as demo

        return int(demo(words[1:]) or 0)
    arguments = _parser().parse_args(words)
    try:
        return int(arguments.run(arguments))
    except (RuntimeError, ValueError, TypeError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
    return 1


def entry() -> None:
    """Serve the console script `ridgeline`."""
    sys.exit(main())


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m ridgeline", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="command")

    command = commands.add_parser(
        "doctor", help="what works here, and the way out of what does not"
    )
    command.set_defaults(run=_doctor)

    command = commands.add_parser("kernels", help="list what is in the packs and in the cache")
    command.add_argument("--arch", help="one architecture only, such as sm_90a")
    command.set_defaults(run=_kernels)

    command = commands.add_parser(
        "warmup",
        help="compile and load what a model needs",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="fields of a model:\n"
        + "\n".join(f"  {name}: {meaning}" for name, meaning in _model.FIELDS.items()),
    )
    command.add_argument(
        "model",
        nargs="*",
        help="a Hugging Face config.json or the folder of one, or fields such as num_qo_heads=32 "
        "head_dim=128",
    )
    command.add_argument("--kernel", nargs="+", help="names of kernels instead of a model")
    command.add_argument("--device", help="such as cuda:1; default: the current one")
    command.add_argument("--arch", help="compile for it into the cache only; needs no GPU")
    command.add_argument("--quiet", action="store_true", help="no progress")
    command.set_defaults(run=_warmup)

    commands.add_parser("demo", help="a small language model, through every op", add_help=False)
    return parser


def _doctor(arguments: argparse.Namespace) -> int:
    del arguments
    from . import doctor

    return doctor.main()


def _kernels(arguments: argparse.Namespace) -> int:
    library = compiler.library()
    folder, cache_dir = library.pack_dir(), library.cache_dir()
    wanted = arguments.arch or "*"
    num_listed = 0
    for file in sorted(folder.glob(f"{wanted}.rlpack")) if folder else []:
        slots = pack.read_index(file.read_bytes())
        print(f"{file}: {len(slots)} kernels")
        for slot in sorted(slots, key=lambda slot: slot.name):
            print(f"  {slot.size / 1e3:7.1f} KB  {slot.name}")
        num_listed += len(slots)
    for arch_dir in sorted(cache_dir.glob(wanted)) if cache_dir else []:
        lines = [_cached(file) for file in arch_dir.glob("*.rlk")]
        print(f"{arch_dir}: {len(lines)} kernels")
        for line in sorted(lines):
            print(f"  {line}")
        num_listed += len(lines)
    if not num_listed:
        print("no kernels yet: they are compiled on first use, or by `python -m ridgeline warmup`")
    return 0


def _cached(file: Path) -> str:
    try:
        data = file.read_bytes()
        found = unpack(data)
    except (OSError, EntryError) as error:
        return f"damaged, will be compiled anew: {file.name} ({error})"
    current = compiler.library().entry_key(found.name, found.arch) == found.key
    note = "" if current else "  (of other sources)"
    return f"{len(data) / 1e3:7.1f} KB  {found.name}  {found.compiler}{note}"


def _warmup(arguments: argparse.Namespace) -> int:
    from .warmup import warmup

    if bool(arguments.model) == bool(arguments.kernel):
        raise ValueError("warmup: expected a model or --kernel names")
    report = warmup(
        arguments.kernel or _described(arguments.model),
        device=arguments.device,
        arch=arguments.arch,
        progress=not arguments.quiet,
    )
    print(
        f"{len(report.kernels)} kernels for {report.arch}: {report.num_packed} from the pack, "
        f"{report.num_cached} from the cache, {report.num_compiled} compiled, "
        f"{report.seconds:.1f} s"
    )
    return 0


def _described(words: Sequence[str]) -> Any:
    """Return the model that the command line describes, as `warmup` takes it."""
    if all("=" in word for word in words):
        return {name: _value(text) for name, _, text in (word.partition("=") for word in words)}
    if len(words) != 1:
        raise ValueError(f"warmup: expected one config.json, or fields only, got {words}")
    path = Path(words[0])
    path = path / "config.json" if path.is_dir() else path
    if not path.is_file():
        raise ValueError(
            f"warmup: '{words[0]}' is neither a config.json nor a folder of one, nor name=value"
        )
    try:
        return SimpleNamespace(**json.loads(path.read_text()))
    except (TypeError, ValueError) as error:
        raise ValueError(f"warmup: {path} is not a config: {error}") from None


def _value(text: str) -> object:
    try:
        return json.loads(text)
    except ValueError:
        return {"True": True, "False": False}.get(text, text)
