"""`python -m ridgeline demo`."""

from __future__ import annotations

import argparse
import contextlib
import os
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import NoReturn, TextIO

import ridgeline
import torch

from .check import Verdict, check_bits_per_byte, check_words, compare_tokens, require_transformers
from .generate import Sampler, Speed, Utf8Stream, WordWrap, generate, wrong_setting
from .llama import Llama
from .model_folder import DemoError, ModelFolder

PROMPT = "The captain looked at Elizabeth, and"
NUM_TOKENS = 500
NUM_CHECKED_TOKENS = 256
DTYPES = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
}


class Parser(argparse.ArgumentParser):
    """Reports a wrong command line as one line, like every other error of the demo."""

    def error(self, message: str) -> NoReturn:
        raise DemoError(f"{message} (`{self.prog} --help` lists the options)")


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="python -m ridgeline demo",
        description="Write text with a small Llama that runs on Ridgeline's ops, and check it "
        "against transformers.",
    )
    add = parser.add_argument
    add("--model", metavar="DIR", help="model folder (default: examples/demo_model)")
    add("--prompt", metavar="TEXT", default=PROMPT, help="what to continue")
    add("--tokens", metavar="N", type=int, default=NUM_TOKENS, help="bytes to write (%(default)s)")
    add("--device", default="auto", help="auto (default), cpu, cuda or cuda:N")
    add("--dtype", default="auto", help="auto (default), float32, float16 or bfloat16")
    add("--temperature", metavar="T", type=float, default=0.7, help="0 is greedy (%(default)s)")
    add("--top-k", metavar="K", type=int, default=0, help="draw from the K likeliest; 0: all")
    add("--top-p", metavar="P", type=float, default=1.0, help="from the likeliest P of the mass")
    add(
        "--min-p",
        metavar="P",
        type=float,
        default=0.0,
        help="from those at least P times as likely as the best",
    )
    add("--seed", metavar="S", type=int, default=0, help="of the draws (%(default)s)")
    add("--no-check", action="store_true", help="write only, compare with nothing")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the demo.

    Returns
    -------
    int
        0; 1 when a comparison failed; 2 when the demo could not run as asked.
    """
    return exit_code_of(lambda: _run(_parser().parse_args(argv), sys.stdout))


def exit_code_of(run: Callable[[], int]) -> int:
    """Call `run`; report an error that says what to do as one line, and return 2 for it."""
    try:
        with _one_thread():
            return run()
    except DemoError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except (RuntimeError, ValueError, TypeError, NotImplementedError) as error:
        # Ridgeline's own errors say what is wrong and what to do; of others the traceback matters.
        if "ridgeline" not in str(error):
            raise
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nstopped", file=sys.stderr)
        return 130


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """Let torch compute on one CPU thread, unless OMP_NUM_THREADS says how many.

    Why: the steps of a model this small are too short to share. A second thread hardly helps, and
    on a busy machine every step waits for it: measured 17 times slower.
    """
    num_threads = torch.get_num_threads()
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(num_threads)


def _run(arguments: argparse.Namespace, out: TextIO) -> int:
    prompt = arguments.prompt.encode("utf-8", errors="surrogateescape")
    if not prompt:
        raise DemoError(f'--prompt is empty; give it some text, such as --prompt "{PROMPT}"')
    if arguments.tokens < 1:
        raise DemoError(f"--tokens {arguments.tokens}: expected at least 1")
    names = ("temperature", "top_k", "top_p", "min_p", "seed")
    sampler = Sampler(**{name: getattr(arguments, name) for name in names})
    if wrong := wrong_setting(sampler):
        name, value, expected = wrong
        raise DemoError(f"--{name.replace('_', '-')} {value}: expected {expected}")
    device = choose_device(arguments.device)
    dtype = choose_dtype(arguments.dtype, device)
    folder = ModelFolder.find(arguments.model)
    room = folder.config.context - len(prompt)
    if arguments.tokens > room:
        raise DemoError(
            f"a prompt of {len(prompt)} bytes and --tokens {arguments.tokens} are more than the "
            f"model's context of {folder.config.context}; "
            + (f"use --tokens {room} or fewer" if room > 0 else "shorten the prompt")
        )
    if not arguments.no_check:
        require_transformers()
    model = Llama.load(folder, device, dtype)
    print_header(folder, model, out)
    # The first calls load or compile kernels; the speeds below are those of the calls after.
    list(generate(model, prompt, 2, sampler))
    speed = Speed()
    tokens = _stream(model, prompt, arguments.tokens, sampler, speed, out)
    _print_speed(speed, out)
    if arguments.no_check:
        return 0
    greedy = tokens[:NUM_CHECKED_TOKENS]
    if arguments.temperature > 0:
        num_tokens = min(arguments.tokens, NUM_CHECKED_TOKENS)
        greedy = list(generate(model, prompt, num_tokens, Sampler()))
    text = bytes(tokens).decode(errors="replace")
    verdicts = {
        "words": check_words(folder, prompt.decode(errors="replace"), text),
        "held-out": check_bits_per_byte(folder, model),
        "transformers": compare_tokens(folder, model, prompt, greedy),
    }
    return print_verdicts("demo", verdicts, out)


def choose_device(name: str) -> torch.device:
    """Return the device that `--device` names."""
    num_gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if name == "auto":
        return torch.device("cuda" if num_gpus else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        device = torch.device("meta")
    if device.type not in ("cpu", "cuda"):
        raise DemoError(f"--device {name}: expected auto, cpu, cuda or cuda:N")
    if device.type == "cuda" and num_gpus == 0:
        raise DemoError(
            f"--device {name}: torch {torch.__version__} sees no CUDA GPU; "
            "use --device cpu, or ask `python -m ridgeline doctor` why"
        )
    if device.type == "cuda" and (device.index or 0) >= num_gpus:
        raise DemoError(f"--device {name}: the last GPU here is cuda:{num_gpus - 1}")
    return device


def choose_dtype(name: str, device: torch.device) -> torch.dtype:
    """Return the dtype that `--dtype` names."""
    on_gpu = device.type == "cuda"
    has_bf16 = (
        not on_gpu or ridgeline.supports("single_attention", device=device, dtype="bfloat16").ok
    )
    if name == "auto":
        name = ("bfloat16" if has_bf16 else "float16") if on_gpu else "float32"
    if name not in DTYPES:
        raise DemoError(f"--dtype {name}: expected auto, {', '.join(DTYPES)}")
    if name == "bfloat16" and not has_bf16:
        raise DemoError("--dtype bfloat16: this GPU has none (sm_75); use --dtype float16")
    return DTYPES[name]


def _stream(
    model: Llama, prompt: bytes, num_tokens: int, sampler: Sampler, speed: Speed, out: TextIO
) -> list[int]:
    """Write the prompt and its continuation as it comes; return the continuation's bytes."""
    on_terminal = out.isatty()
    bold = on_terminal and "NO_COLOR" not in os.environ
    width = min(shutil.get_terminal_size().columns, 100) if on_terminal else sys.maxsize
    wrap = WordWrap(width)
    stream = Utf8Stream()
    start, end = ("\033[1m", "\033[0m") if bold else ("", "")
    out.write(start + wrap.feed(prompt.decode(errors="replace")) + wrap.finish() + end)
    tokens = []
    for token in generate(model, prompt, num_tokens, sampler, speed):
        tokens.append(token)
        out.write(wrap.feed(stream.feed(token)))
        out.flush()
    out.write(wrap.feed(stream.finish()) + wrap.finish() + "\n\n")
    return tokens


def print_header(folder: ModelFolder, model: Llama, out: TextIO) -> None:
    """Say which model runs, in what, and where."""
    place = "the CPU"
    if model.device.type == "cuda":
        place = torch.cuda.get_device_name(model.device)
    dtype, cache_dtype = (
        str(dtype).removeprefix("torch.") for dtype in (model.embedding.dtype, model.cache_dtype)
    )
    if dtype != cache_dtype:
        dtype += f" (attention in {cache_dtype})"
    print(f"{folder.path}: {model.num_parameters:,} parameters, {dtype} on {place}", file=out)
    if folder.training:
        record = folder.training
        trained = f"trained {record.get('date')} on {record.get('device')}"
        print(f"{trained}: {record.get('tokens', 0):,} tokens", file=out)
    print(file=out)


def _print_speed(speed: Speed, out: TextIO) -> None:
    for name, tokens, seconds in (
        ("prefill", speed.prefill_tokens, speed.prefill_seconds),
        ("decode", speed.decode_tokens, speed.decode_seconds),
    ):
        if tokens:
            rate = f"{tokens / seconds:,.0f} tokens/s"
            print(f"{name:<13}{rate} ({tokens} in {1e3 * seconds:,.1f} ms)", file=out)


def print_verdicts(program: str, verdicts: dict[str, Verdict], out: TextIO) -> int:
    """Report what was checked; return the exit code."""
    for name, verdict in verdicts.items():
        print(f"{name:<13}{'ok' if verdict.ok else 'FAILED'}: {verdict.text}", file=out)
    failed = [name for name, verdict in verdicts.items() if not verdict.ok]
    end = f"FAILED: {', '.join(failed)}" if failed else "passed"
    print(f"\n{program} {end}", file=out)
    return 1 if failed else 0
