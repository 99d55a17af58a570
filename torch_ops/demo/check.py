"""What the demo asserts: tokens against transformers, bits per byte, words."""

from __future__ import annotations

import importlib
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .generate import GREEDY, Sampler
from .llama import Llama
from .model_folder import DemoError, ModelFolder

MIN_WORD_SHARE = 0.9
#: Fewer words than this say nothing about a share of 90%.
MIN_WORDS = 20
#: The model was evaluated in float32; rounding to 16 bits moves the figure by less than this.
BITS_TOLERANCE = 0.02
_WORD = re.compile(r"[a-z]+(?:'[a-z]+)*")


@dataclass(frozen=True)
class Verdict:
    """One line of the demo's report."""

    ok: bool
    text: str
    num_ties: int = 0


def require_transformers(way_out: str = "pass --no-check") -> None:
    """Raise a `DemoError` when transformers is not installed."""
    try:
        importlib.import_module("transformers")
    except ImportError:
        raise DemoError(
            "the demo compares itself with transformers, which is not installed; "
            f"run `pip install 'ridgeline[demo]'`, or {way_out}"
        ) from None


class Reference:
    """transformers' own model of the weights that `model` has, on the same device.

    Parameters
    ----------
    folder, model
        The weights, and our model of them.
    """

    def __init__(self, folder: ModelFolder, model: Llama) -> None:
        self.folder, self.model = folder, model

    @cached_property
    def exact(self) -> Any:
        """The model in float32."""
        return self._load(torch.float32)

    @cached_property
    def rounded(self) -> Any:
        """The model in the dtype of our attention, the coarsest of ours."""
        return self._load(self.model.cache_dtype)

    def _load(self, dtype: torch.dtype) -> Any:
        transformers: Any = importlib.import_module("transformers")
        transformers.utils.logging.set_verbosity_error()
        transformers.utils.logging.disable_progress_bar()
        reference = transformers.LlamaForCausalLM.from_pretrained(
            self.folder.path, dtype=dtype, local_files_only=True
        )
        # A byte that ends a text has no meaning here, whatever the config says.
        reference.generation_config.eos_token_id = None
        return reference.eval().to(self.model.device)

    @torch.inference_mode()
    def greedy(self, prompt: bytes, num_tokens: int) -> list[int]:
        """Return the tokens with which the float32 model continues `prompt`."""
        tokens = torch.tensor([*prompt], device=self.model.device)[None]
        whole = self.exact.generate(
            tokens,
            attention_mask=torch.ones_like(tokens),
            do_sample=False,
            min_new_tokens=num_tokens,
            max_new_tokens=num_tokens,
        )
        continuation: list[int] = whole[0, len(prompt) :].tolist()
        return continuation

    @torch.inference_mode()
    def logits(self, network: Any, prompt: bytes, ours: Sequence[int]) -> Tensor:
        """Return the float32 logits `[num_tokens, vocab_size]` that chose, or should, `ours`."""
        tokens = torch.tensor([*prompt, *ours], device=self.model.device)[None]
        logits: Tensor = network(tokens).logits[0, len(prompt) - 1 : -1].float().cpu()
        return logits

    def compare(self, prompt: bytes, ours: Sequence[int]) -> Verdict:
        """Compare tokens as `compare_tokens` does."""
        if self.model.cache_dtype == torch.float32:
            return judge_equal(ours, self.greedy(prompt, len(ours)))
        exact, rounded = (self.logits(net, prompt, ours) for net in (self.exact, self.rounded))
        return judge_tied(torch.tensor(ours), exact, rounded)


def compare_tokens(
    folder: ModelFolder, model: Llama, prompt: bytes, ours: Sequence[int]
) -> Verdict:
    """Compare our greedy tokens with those of transformers' `LlamaForCausalLM`.

    In float32, transformers writes a continuation of its own, which must be equal.

    Where our attention is 16-bit, transformers reads prompt and our tokens, and at every position
    our token must be its choice too, unless the dtype cannot tell the two apart: by the float32
    logits, our token is behind the best by no more than twice the rounding error of transformers'
    own 16-bit logits at that position (the largest difference from its float32 logits).

    Parameters
    ----------
    folder, model
        The weights, and our model of them.
    prompt
        What was continued.
    ours
        The greedy tokens of `model`.
    """
    return Reference(folder, model).compare(prompt, ours)


def judge_equal(
    ours: Sequence[int], theirs: Sequence[int], place: str = "in transformers"
) -> Verdict:
    """Compare two continuations token by token; `place` is where the second was made.

    >>> judge_equal([97, 98], [97, 99]).text
    'token 1 is 98 here and 99 in transformers, 1 of 2 equal before it'
    """
    pairs = list(zip(ours, theirs, strict=True))
    for position, (our, their) in enumerate(pairs):
        if our != their:
            return Verdict(
                False,
                f"token {position} is {our} here and {their} {place}, "
                f"{position} of {len(pairs)} equal before it",
            )
    return Verdict(True, f"{len(pairs)} of {len(pairs)} greedy tokens equal")


def judge_tied(
    ours: Tensor,
    exact: Tensor,
    rounded: Tensor,
    place: str = "in transformers",
    sampler: Sampler = GREEDY,
) -> Verdict:
    """Compare tokens with logits, and let those differ that the dtype cannot tell apart.

    Parameters
    ----------
    ours
        `[num_tokens]`, the tokens chosen: the first of a text.
    exact, rounded
        `[num_tokens, vocab_size]`, the logits in float32 and in the 16-bit dtype.
    place
        Where the 16-bit logits are from.
    sampler
        How tokens were chosen.
    """
    theirs = sampler(rounded, 0)
    different = (theirs != ours).nonzero()[:, 0].tolist()
    for position in different:
        token, other = int(ours[position]), int(theirs[position])
        error = float((exact[position] - rounded[position]).abs().max())
        if not could_choose(sampler, position, token, exact[position], error):
            apart = float(exact[position, other] - exact[position, token])
            return Verdict(
                False,
                f"token {position} is {token} here and {other} {place}: {apart:.3g} apart in "
                f"float32 logits, which rounding moves by {error:.3g}",
            )
    num_ties = len(different)
    ties = f", {num_ties} tied within the dtype" if num_ties else ""
    text = f"{len(ours) - num_ties} of {len(ours)} greedy tokens equal{ties}"
    return Verdict(True, text, num_ties)


def could_choose(sampler: Sampler, place: int, token: int, logits: Tensor, error: float) -> bool:
    """Tell whether logits within `error` of `logits [vocab_size]` lead to `token` at `place`.

    The token's own logit is raised. With all others lowered, a greedy choice takes it if it ever
    does. A draw goes through the tokens in order: with the lower ones lowered and the higher ones
    raised, more and more, it moves up, so a bisection finds whether it comes by.
    """
    side = torch.sign(torch.arange(len(logits)) - token)

    def chosen(others: Tensor) -> int:
        return int(sampler((logits + error * ((side == 0) + others))[None], place))

    if chosen(-side.abs()) == token:
        return True
    low, high = -1.0, 1.0
    for _ in range(24):
        middle = (low + high) / 2
        found = chosen(middle * side)
        if found == token:
            return True
        low, high = (middle, high) if found < token else (low, middle)
    return False


def bits_per_byte(model: Llama, text: Tensor) -> float:
    """Return the mean bits a byte of `text [num_bytes]`, in windows of the model's context.

    The first byte of a window is given, every later one is predicted; windows overlap by one byte.
    """
    nats, count = 0.0, 0
    for start in range(0, len(text) - 1, model.config.context):
        window = text[start : start + model.config.context + 1].to(model.device)
        logits = model.forward(window[:-1], model.new_cache())
        nats += F.cross_entropy(logits.float(), window[1:], reduction="sum").item()
        count += len(window) - 1
    return nats / count / math.log(2)


def check_bits_per_byte(folder: ModelFolder, model: Llama) -> Verdict:
    """State the bits per byte of the training's record, and compute those of the sample anew."""
    stated = folder.training.get("heldout_bits_per_byte")
    sample = folder.held_out_sample()
    sample_stated = folder.training.get("sample_bits_per_byte")
    if stated is None or sample is None or sample_stated is None:
        return Verdict(True, "not stated by this model folder")
    ours = bits_per_byte(model, sample)
    text = (
        f"{stated:.3f} bits per byte of held-out text (training.json); of its first "
        f"{len(sample):,} bytes {sample_stated:.3f} stated, {ours:.3f} here"
    )
    return Verdict(abs(ours - sample_stated) <= BITS_TOLERANCE, text)


def generated_words(prompt: str, text: str) -> list[str]:
    """Return the words of `text`, which continues `prompt`, in lower case.

    A word that begins in the prompt counts; one that may go on after the end does not.

    >>> generated_words("It was a plea", "sure, and the Cap")
    ['pleasure', 'and', 'the']
    """
    whole = (prompt + text).lower()
    words = []
    for match in _WORD.finditer(whole):
        if match.end() > len(prompt) and match.end() < len(whole):
            words.append(match.group())
    return words


def check_words(folder: ModelFolder, prompt: str, text: str) -> Verdict:
    """Check that nine of ten generated words occur in the corpus."""
    corpus = folder.words()
    if corpus is None:
        return Verdict(True, "this model folder has no list of its corpus's words")
    words = generated_words(prompt, text)
    if len(words) < MIN_WORDS:
        return Verdict(True, f"only {len(words)} generated: too few to judge")
    unknown = [word for word in words if word not in corpus]
    share = 1 - len(unknown) / len(words)
    shown = f" (not: {', '.join(unknown[:5])})" if unknown else ""
    text = f"{share:.1%} of {len(words)} generated words occur in the corpus{shown}"
    return Verdict(share >= MIN_WORD_SHARE, text)
