"""Serve many requests at once with the demo's model, and check every token: `make serve`.

    python examples/serve.py --requests examples/serve_requests.jsonl --check

Continuous batching on Ridgeline's ops: a pool of KV pages, prefixes that are shared, prompts that
are computed in chunks beside the decodes, and on a GPU a CUDA graph for each step of decodes.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TextIO

import torch
from ridgeline.demo import cli
from ridgeline.demo.check import Verdict, require_transformers
from ridgeline.demo.llama import Llama
from ridgeline.demo.model_folder import DemoError, ModelFolder
from serving.check import check_all, check_compared, read_tokens
from serving.display import make_display
from serving.engine import Totals, serve
from serving.pool import PagePool
from serving.requests import check_context, read_requests
from serving.runner import Runner
from serving.scheduler import Scheduler
from serving.summary import print_summary, write_results

HERE = Path(__file__).resolve().parent


def _parser() -> argparse.ArgumentParser:
    parser = cli.Parser(
        prog="python examples/serve.py",
        description="Serve requests from a file with a small Llama that runs on Ridgeline's ops.",
    )
    add = parser.add_argument
    add(
        "--requests",
        metavar="FILE",
        type=Path,
        default=HERE / "serve_requests.jsonl",
        help="JSON lines of arrival (seconds), prompt, max_tokens and, if you like, id, "
        "temperature, top_k, top_p, min_p, seed",
    )
    add("--model", metavar="DIR", default=str(HERE / "demo_model"), help="model folder")
    add("--device", default="auto", help="auto (default), cpu, cuda or cuda:N")
    add("--dtype", default="auto", help="auto (default), float32, float16 or bfloat16")
    add("--pages", metavar="N", type=int, default=96, help="pages of the pool (%(default)s)")
    add("--page-size", metavar="N", type=int, default=16, help="tokens of a page (%(default)s)")
    add("--max-requests", metavar="N", type=int, default=16, help="that run at once (%(default)s)")
    add("--max-batch-tokens", metavar="N", type=int, default=256, help="of a step (%(default)s)")
    add("--graphs", default="auto", help="CUDA graphs: auto (default: on a GPU), on or off")
    add("--plain", action="store_true", help="lines instead of a live table")
    add("--out", metavar="FILE", type=Path, help="write texts, tokens and times as JSON lines")
    add("--check", action="store_true", help="compare with each request alone and transformers")
    add("--compare", metavar="FILE", type=Path, help="compare with tokens that --out wrote")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Serve a file of requests.

    Returns
    -------
    int
        0; 1 when a comparison failed; 2 when it could not run as asked.
    """
    return cli.exit_code_of(lambda: _run(_parser().parse_args(argv), sys.stdout))


def _run(arguments: argparse.Namespace, out: TextIO) -> int:
    _check_limits(arguments)
    _check_out(arguments.out)
    device = cli.choose_device(arguments.device)
    dtype = cli.choose_dtype(arguments.dtype, device)
    use_graphs = _choose_graphs(arguments.graphs, device)
    requests = read_requests(arguments.requests)
    folder = ModelFolder.find(arguments.model)
    check_context(requests, folder.config.context)
    others = read_tokens(arguments.compare, requests) if arguments.compare else None
    limits = (arguments.max_requests, arguments.max_batch_tokens)
    scheduler = Scheduler(requests, PagePool(arguments.pages, arguments.page_size), *limits)
    if arguments.check:
        require_transformers("leave --check out")
    if device.type == "cuda":
        torch.cuda.set_device(device.index or 0)
    model = Llama.load(folder, device, dtype)
    cli.print_header(folder, model, out)
    runner = Runner(model, arguments.pages, arguments.page_size, *limits, use_graphs)
    totals = Totals()
    display = make_display(scheduler, out, arguments.plain)
    try:
        for progress in serve(scheduler, runner, totals):
            display.show(progress)
    finally:
        display.close()
    print_summary(scheduler, runner, totals, out)
    if arguments.out:
        write_results(arguments.out, scheduler.sequences)
    verdicts: dict[str, Verdict] = {}
    if arguments.check:
        verdicts |= check_all(folder, model, scheduler.sequences)
    if others is not None:
        verdicts["compared"] = check_compared(others, folder, model, scheduler.sequences)
    return cli.print_verdicts("serve", verdicts, out) if verdicts else 0


def _check_limits(arguments: argparse.Namespace) -> None:
    for name in ("pages", "page_size", "max_requests"):
        value = getattr(arguments, name)
        if value < 1:
            raise DemoError(f"--{name.replace('_', '-')} {value}: expected at least 1")
    if arguments.max_batch_tokens <= arguments.max_requests:
        raise DemoError(
            f"--max-batch-tokens {arguments.max_batch_tokens}: expected more than --max-requests "
            f"{arguments.max_requests}, so that prompts get a share of every step"
        )


def _check_out(path: Path | None) -> None:
    if path is not None and (path.is_dir() or not path.parent.is_dir()):
        what = "is a folder" if path.is_dir() else f"there is no folder {path.parent}"
        raise DemoError(f"--out {path}: {what}; pass a file to write")


def _choose_graphs(name: str, device: torch.device) -> bool:
    if name not in ("auto", "on", "off"):
        raise DemoError(f"--graphs {name}: expected auto, on or off")
    if name == "on" and device.type != "cuda":
        raise DemoError("--graphs on: CUDA graphs need a GPU; use --graphs auto, or --device cuda")
    return name != "off" and device.type == "cuda"


if __name__ == "__main__":
    sys.exit(main())
