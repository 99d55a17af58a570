"""What `--check` asserts: every request has the tokens that it gets alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from ridgeline.demo.check import Reference, Verdict, judge_equal, judge_tied
from ridgeline.demo.generate import Sampler, generate
from ridgeline.demo.llama import Llama
from ridgeline.demo.model_folder import ModelFolder

from .scheduler import Sequence as Served

Comparison = Callable[[bytes, Sequence[int]], Verdict]


def check_all(folder: ModelFolder, model: Llama, served: Sequence[Served]) -> dict[str, Verdict]:
    """Compare what was written with each request alone, and with transformers.

    Alone means: the demo's own loop, one request on a contiguous cache. In float32 all tokens are
    equal. In 16 bits a token may differ where the dtype cannot tell it from the best one, as
    `ridgeline.demo.check.compare_tokens` defines it; the 16-bit logits are then those of the model
    that is compared with.
    """
    reference = Reference(folder, model)

    def alone(prompt: bytes, ours: Sequence[int]) -> Verdict:
        if model.embedding.dtype == torch.float32:
            theirs = list(generate(model, prompt, len(ours), Sampler()))
            return judge_equal(ours, theirs, "alone")
        tokens = torch.tensor([*prompt, *ours[:-1]], device=model.device)
        rounded = model.forward(tokens, model.new_cache())[len(prompt) - 1 :].float().cpu()
        exact = reference.logits(reference.exact, prompt, ours)
        return judge_tied(torch.tensor(ours), exact, rounded, "alone")

    return {
        "complete": check_complete(served),
        "alone": compare(served, alone),
        "transformers": compare(served, reference.compare),
    }


def check_complete(served: Sequence[Served]) -> Verdict:
    """Check that every request has as many tokens as it asked for."""
    for sequence in served:
        found, wanted = len(sequence.written), sequence.request.max_tokens
        if found != wanted:
            text = f"request {sequence.request.name} has {found} of {wanted} tokens"
            return Verdict(False, text)
    return Verdict(True, f"{len(served)} of {len(served)} requests")


def compare(served: Sequence[Served], comparison: Comparison) -> Verdict:
    """Apply `comparison` to the tokens of every request."""
    num_tokens = num_tied = 0
    for sequence in served:
        verdict = comparison(sequence.request.prompt, sequence.written)
        if not verdict.ok:
            return Verdict(False, f"request {sequence.request.name}: {verdict.text}")
        num_tokens += len(sequence.written)
        num_tied += verdict.num_ties
    ties = f", {num_tied} tied within the dtype" if num_tied else ""
    return Verdict(True, f"{num_tokens - num_tied} of {num_tokens} greedy tokens equal{ties}")
