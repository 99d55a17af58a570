"""Text out of the model, byte by byte."""

from __future__ import annotations

import codecs
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass

import ridgeline
import torch
from torch import Tensor

from .llama import Llama


class Utf8Stream:
    """Turns bytes into text as they come: a character appears when its last byte is there.

    >>> stream = Utf8Stream()
    >>> [stream.feed(byte) for byte in "\u00e9!".encode()]
    ['', '\u00e9', '!']
    """

    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def feed(self, byte: int) -> str:
        """Take one byte; return the text that it completes."""
        return self._decoder.decode(bytes([byte]))

    def finish(self) -> str:
        """Return what is left: a replacement character when the last character is incomplete."""
        return self._decoder.decode(b"", final=True)


class WordWrap:
    """Breaks streamed text between words, so that no word is cut at the terminal's edge.

    >>> wrap = WordWrap(8)
    >>> wrap.feed("one two three") + wrap.finish()
    'one two\\nthree'
    """

    def __init__(self, width: int) -> None:
        self.width = width
        self._column = 0
        self._gap = ""
        self._word = ""

    def feed(self, text: str) -> str:
        """Take some text; return what can be shown now (all but an unfinished word)."""
        shown = []
        for character in text:
            if character not in " \n":
                self._word += character
                continue
            shown.append(self.finish())
            if character == "\n":
                shown.append("\n")
                self._column = 0
            else:
                self._gap = " "
        return "".join(shown)

    def finish(self) -> str:
        """Return the word so far, after the space or the line break that it needs."""
        if not self._word:
            return ""
        gap, word = self._gap, self._word
        self._gap = self._word = ""
        if self._column and self._column + len(gap) + len(word) > self.width:
            gap = "\n"
            self._column = 0
        else:
            self._column += len(gap)
        self._column += len(word)
        return gap + word


@dataclass(frozen=True)
class Sampler:
    """How the bytes of a text are chosen; a temperature of 0 is greedy.

    A draw follows from the seed, the byte's place in the text and the logits, and from nothing
    else: not from earlier draws, nor from other texts of a batch. The filters are those of
    `ridgeline.sample_from_logits`.

    >>> sampler = Sampler(temperature=1.0, top_k=2, seed=3)
    >>> logits = torch.tensor([[0.0, 1.0, 2.0]])
    >>> bool(sampler(logits, 5) == sampler(logits.expand(6, 3), 0)[5])
    True
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int = 0

    def __call__(self, logits: Tensor, place: int) -> Tensor:
        """Choose bytes that follow each other.

        Parameters
        ----------
        logits
            `[num_bytes, vocab_size]`.
        place
            That of the first byte in the text, which begins after the prompt.

        Returns
        -------
        Tensor
            `[num_bytes]`, int32.
        """
        return self.at(logits, torch.arange(place, place + len(logits), device=logits.device))

    def at(self, logits: Tensor, places: Tensor) -> Tensor:
        """Choose bytes whose places are `places [num_bytes]`, int64."""
        tokens, _, _ = ridgeline.sample_from_logits(
            logits,
            self.temperature,
            self.top_k,
            self.top_p,
            self.min_p,
            seed=self.seed,
            offset=places,
        )
        return tokens


#: What a text is chosen by where nothing else is said.
GREEDY = Sampler()


def wrong_setting(sampler: Sampler) -> tuple[str, object, str] | None:
    """Return the name and value of a setting out of its range, and what is expected, or None."""
    ranges = (
        ("temperature", 0 <= sampler.temperature < math.inf, "0 (greedy) or more"),
        ("top_k", 0 <= sampler.top_k < 1 << 31, "0 (off) or more"),
        ("top_p", 0 <= sampler.top_p <= 1, "0 to 1 (off)"),
        ("min_p", 0 <= sampler.min_p <= 1, "0 (off) to 1"),
        ("seed", -(1 << 63) <= sampler.seed < 1 << 63, "a whole number of 64 bits"),
    )
    for name, is_right, expected in ranges:
        if not is_right:
            return name, getattr(sampler, name), expected
    return None


@dataclass
class Speed:
    """Tokens and seconds of the two phases."""

    prefill_tokens: int = 0
    prefill_seconds: float = 0.0
    decode_tokens: int = 0
    decode_seconds: float = 0.0


def generate(
    model: Llama, prompt: bytes, num_tokens: int, sampler: Sampler, speed: Speed | None = None
) -> Iterator[int]:
    """Yield `num_tokens` bytes that continue `prompt`.

    Parameters
    ----------
    model
        Its context must hold prompt and continuation.
    prompt
        At least one byte.
    num_tokens
        How many bytes to write.
    sampler
        How each is chosen.
    speed
        Filled in as the text is written. Only the model's time counts, not the caller's.
    """
    speed = speed if speed is not None else Speed()
    cache = model.new_cache()
    tokens = torch.tensor(list(prompt), device=model.device)
    for step in range(num_tokens):
        start = time.perf_counter()
        # The choice reads the logits on the host, so the clock stops after the device is done.
        token = int(sampler(model.forward(tokens, cache)[-1:], step))
        seconds = time.perf_counter() - start
        if step == 0:
            speed.prefill_tokens, speed.prefill_seconds = len(prompt), seconds
        else:
            speed.decode_tokens += 1
            speed.decode_seconds += seconds
        yield token
        tokens = torch.tensor([token], device=model.device)
