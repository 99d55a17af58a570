"""What `--check` and `--compare` assert: the tokens are those that they should be."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from ridgeline.demo.check import Reference, Verdict, could_choose, judge_equal, judge_tied
from ridgeline.demo.generate import generate
from ridgeline.demo.llama import Llama
from ridgeline.demo.model_folder import DemoError, ModelFolder
from torch import Tensor

from .requests import Request
from .scheduler import Sequence as Served

Comparison = Callable[[Request, Sequence[int]], Verdict]


def check_all(folder: ModelFolder, model: Llama, served: Sequence[Served]) -> dict[str, Verdict]:
    """Compare what was written with each request alone, and greedy texts with transformers.

    Alone means: the demo's own loop, one request on a contiguous cache, with the same seed. In
    float32 all tokens are equal. In 16 bits a token may differ where the dtype cannot tell it from
    the other, as `ridgeline.demo.check.judge_tied` defines it; the 16-bit logits are then those of
    the model that is compared with.
    """
    reference = Reference(folder, model)

    def alone(request: Request, ours: Sequence[int]) -> Verdict:
        prompt, sampler = request.prompt, request.sampler
        if model.cache_dtype == torch.float32:
            theirs = list(generate(model, prompt, len(ours), sampler))
            return judge_equal(ours, theirs, "alone")
        rounded = logits_of(model, prompt, ours)
        exact = reference.logits(reference.exact, prompt, ours)
        return judge_tied(torch.tensor(ours), exact, rounded, "alone", sampler)

    def in_transformers(request: Request, ours: Sequence[int]) -> Verdict:
        return reference.compare(request.prompt, ours)

    greedy = [sequence for sequence in served if sequence.request.sampler.temperature == 0]
    return {
        "complete": check_complete(served),
        "alone": compare(served, alone),
        "transformers": compare(greedy, in_transformers, "greedy tokens"),
    }


def logits_of(model: Llama, prompt: bytes, tokens: Sequence[int]) -> Tensor:
    """Return the logits `[num_tokens, vocab_size]` that choose `tokens`, float32 on the CPU."""
    read = torch.tensor([*prompt, *tokens[:-1]], device=model.device)
    return model.forward(read, model.new_cache())[len(prompt) - 1 :].float().cpu()


def check_complete(served: Sequence[Served]) -> Verdict:
    """Check that every request has as many tokens as it asked for."""
    for sequence in served:
        found, wanted = len(sequence.written), sequence.request.max_tokens
        if found != wanted:
            text = f"request {sequence.request.name} has {found} of {wanted} tokens"
            return Verdict(False, text)
    return Verdict(True, f"{len(served)} of {len(served)} requests")


def compare(served: Sequence[Served], comparison: Comparison, what: str = "tokens") -> Verdict:
    """Apply `comparison` to the tokens of every request."""
    num_tokens = num_tied = 0
    for sequence in served:
        verdict = comparison(sequence.request, sequence.written)
        if not verdict.ok:
            return Verdict(False, f"request {sequence.request.name}: {verdict.text}")
        num_tokens += len(sequence.written)
        num_tied += verdict.num_ties
    ties = f", {num_tied} tied within the dtype" if num_tied else ""
    return Verdict(True, f"{num_tokens - num_tied} of {num_tokens} {what} equal{ties}")


def read_tokens(path: Path, requests: Sequence[Request]) -> dict[str, list[int]]:
    """Read the tokens of `requests` from a file that `--out` wrote.

    Raises
    ------
    DemoError
        When the file cannot be read, or has no tokens of one of the requests.
    """
    try:
        lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        tokens = {str(line["id"]): [int(token) for token in line["tokens"]] for line in lines}
    except (OSError, ValueError, KeyError, TypeError) as error:
        what = f"{type(error).__name__}: {error}"
        raise DemoError(f"--compare {path}: expected a file that --out wrote ({what})") from None
    for request in requests:
        if len(tokens.get(request.name, [])) != request.max_tokens:
            raise DemoError(
                f"--compare {path}: expected {request.max_tokens} tokens of request "
                f"{request.name}, found {len(tokens.get(request.name, []))}; pass what --out wrote "
                "for the same requests"
            )
    return tokens


def check_compared(
    others: Mapping[str, Sequence[int]],
    folder: ModelFolder,
    model: Llama,
    served: Sequence[Served],
) -> Verdict:
    """Compare with the tokens of another run, of another device or with other options.

    Where a text parts from the other, what follows is another text, and counts as different. Both
    tokens must then be such as rounding can lead to: `could_choose`, for this model's own error.
    """
    exact_model = Llama.load(folder, torch.device("cpu"), torch.float32)
    num_equal = num_tokens = 0
    partings = []
    for sequence in served:
        request, ours, theirs = sequence.request, sequence.written, others[sequence.request.name]
        pairs = enumerate(zip(ours, theirs, strict=True))
        place = next((at for at, (our, their) in pairs if our != their), len(ours))
        num_equal += place
        num_tokens += len(ours)
        if place == len(ours):
            continue
        exact, rounded = (
            logits_of(net, request.prompt, ours[: place + 1])[-1] for net in (exact_model, model)
        )
        error = float((exact - rounded).abs().max())
        our, their = ours[place], theirs[place]
        apart = f"{float((exact[our] - exact[their]).abs()):.2g} apart in float32 logits"
        if request.sampler.temperature > 0:
            apart = "drawn from float32 logits"
        text = (
            f"request {request.name}, token {place}: {our} here and {their} there, {apart}, which "
            f"rounding moves by {error:.2g}"
        )
        choices = (our, their)
        if not all(could_choose(request.sampler, place, token, exact, error) for token in choices):
            return Verdict(False, text)
        partings.append(text)
    return Verdict(True, "; ".join([f"{num_equal} of {num_tokens} tokens equal", *partings]))
