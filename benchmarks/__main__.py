"""Runs the benchmarks and keeps what they found: `python -m benchmarks [NAME...]`.

Prints every table as it is measured; `--out FOLDER` also writes <date>_<device>_<commit>.json and
.md there. `--dry-run` goes through every benchmark on the CPU with tiny sizes and keeps nothing.
A first word stands for all names that begin with it, unless it is a name itself: `attention`.
"""

from __future__ import annotations

import argparse
import datetime
import importlib
import json
import os
import platform
import re
import subprocess
import sys
import time
import traceback
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from .session import Session
from .table import Row, markdown, summary

NAMES = (
    "norm",
    "activation",
    "quantization",
    "rope",
    "rope_append",
    "merge",
    "page",
    "sampling",
    "single_attention",
    "attention_prefill",
    "attention_decode",
    "attention_batches",
    "attention_variants",
    "host",
    "first_call",
)
ROOT = Path(__file__).resolve().parent.parent


def commit() -> str:
    """Short hash of the checkout, or what COMMIT says where the history did not travel along."""
    if os.environ.get("COMMIT"):
        return os.environ["COMMIT"]
    command = ["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"]
    result = subprocess.run(command, capture_output=True, text=True)
    return result.stdout.strip() or "unknown"


def circumstances(session: Session) -> dict[str, Any]:
    import ridgeline

    device = session.device
    facts: dict[str, Any] = {
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d"),
        "commit": commit(),
        "ridgeline": ridgeline.__version__,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
        "architecture": os.environ.get("RIDGELINE_ARCH", "native"),
        "device": "cpu (dry run)",
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        facts |= {
            "device": properties.name,
            "sms": properties.multi_processor_count,
            "l2_mb": properties.L2_cache_size / 1e6,
            "empty_kernel_us": session.timer.empty_us,
            "empty_kernel_net_us": session.timer.empty_net_us,
            "ceilings": asdict(session.ceilings),
        }
    return facts


def heading(facts: dict[str, Any]) -> str:
    lines = [
        f"# {facts['device']}, {facts['date']}, commit {facts['commit']}",
        "",
        f"ridgeline {facts['ridgeline']}, torch {facts['torch']} (CUDA {facts['cuda']}), Python "
        f"{facts['python']}, architecture {facts['architecture']}.",
    ]
    if "ceilings" in facts:
        c = facts["ceilings"]
        lines += [
            f"Measured here: read {c['read']:.0f}, write {c['write']:.0f}, copy {c['copy']:.0f} "
            "GB/s, "
            f"bf16 matmul {c['bf16_matmul']:.0f} TFLOP/s, an empty kernel "
            f"{facts['empty_kernel_us']:.1f} us, net {facts['empty_kernel_net_us']:.1f} us.",
        ]
    return "\n".join(lines)


def run_one(name: str, session: Session) -> tuple[list[Row], str]:
    """Rows and text of one benchmark; what it raises becomes its text."""
    module = importlib.import_module(f"benchmarks.bench_{name}")
    start = time.monotonic()
    text = f"## {module.TITLE}\n\nPrediction: {module.PREDICTION}.\n\n"
    try:
        rows: list[Row] = module.run(session)
    except Exception:
        return [], f"{text}FAILED\n\n```\n{traceback.format_exc()}```\n"
    text += f"{markdown(rows)}\n"
    means = summary(rows)
    if means:
        text += f"\nGeometric means: {means}.\n"
    if hasattr(module, "verdict"):
        text += f"\n{module.verdict(rows)}\n"
    print(f">> {name}: {len(rows)} cases in {time.monotonic() - start:.0f} s", file=sys.stderr)
    return rows, text


def save(folder: Path, facts: dict[str, Any], text: str, rows: dict[str, list[Row]]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    device = str(facts["device"]).lower().replace("nvidia ", "").replace(" ", "-")
    stem = folder / f"{facts['date']}_{device}_{facts['commit']}"
    content = {**facts, "rows": {name: [row.as_json() for row in rows[name]] for name in rows}}
    stem.with_name(stem.name + ".json").write_text(json.dumps(content, indent=1) + "\n")
    stem.with_name(stem.name + ".md").write_text(text)
    print(f">> written: {stem}.md and .json", file=sys.stderr)


def named(names: list[str]) -> list[str]:
    """The benchmarks that these names stand for, in order."""
    if not names:
        return list(NAMES)
    families = set(names) - set(NAMES)
    return [name for name in NAMES if name in names or name.split("_")[0] in families]


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(NAMES)}")
    parser.add_argument("--quick", action="store_true", help="a few sizes only, under 90 s")
    parser.add_argument("--dry-run", action="store_true", help="tiny sizes on the CPU")
    parser.add_argument(
        "--cells", type=re.compile, metavar="REGEX", help="attention: only cases that match"
    )
    parser.add_argument("--out", type=Path, help="folder for the .json and .md")
    arguments = parser.parse_args()
    unknown = set(arguments.names) - set(NAMES) - {name.split("_")[0] for name in NAMES}
    if unknown:
        parser.error(
            f"no such benchmark: {', '.join(sorted(unknown))}; expected {', '.join(NAMES)}"
        )
    if not arguments.dry_run and not torch.cuda.is_available():
        parser.error("no GPU here: benchmarks need one (--dry-run only checks that they run)")
    return arguments


def main() -> int:
    arguments = parse()
    torch.manual_seed(0)
    # Why: every shape is compiled for itself, which is what the peer is fastest with.
    torch._dynamo.config.recompile_limit = 256
    if arguments.dry_run:
        torch.compiler.set_stance("force_eager")
    device = torch.device("cpu" if arguments.dry_run else "cuda")
    session = Session(
        device, quick=arguments.quick, dry_run=arguments.dry_run, only=arguments.cells
    )
    facts = circumstances(session)
    texts = [heading(facts)]
    print(texts[0], flush=True)
    rows: dict[str, list[Row]] = {}
    for name in named(arguments.names):
        rows[name], text = run_one(name, session)
        texts.append(text)
        print(f"\n{text}", flush=True)
        # Why after each: a run that is cut short keeps what it has.
        if arguments.out and not arguments.dry_run:
            save(arguments.out, facts, "\n\n".join(part.rstrip() for part in texts) + "\n", rows)
    wrong = any("WRONG" in note for r in rows.values() for row in r for note in row.notes)
    failed = any("\nFAILED\n" in text for text in texts)
    return 1 if wrong or failed or not (arguments.cells or all(rows.values())) else 0


if __name__ == "__main__":
    sys.exit(main())
