"""Text out of the model, byte by byte."""

from __future__ import annotations

import codecs
import time
from collections.abc import Iterator
from dataclasses import dataclass, field

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


@dataclass
class Sampler:
    """Chooses the next byte; temperature 0 is greedy.

    Draws are made on the CPU, so that a seed gives the same text on every device up to rounding.
    """

    temperature: float = 0.0
    seed: int = 0
    generator: torch.Generator = field(init=False)

    def __post_init__(self) -> None:
        self.generator = torch.Generator().manual_seed(self.seed)

    def __call__(self, logits: Tensor) -> int:
        """Choose from `logits [vocab_size]`."""
        if self.temperature == 0:
            return int(logits.argmax())
        probs = torch.softmax(logits.float().cpu() / self.temperature, dim=0)
        return int(torch.multinomial(probs, 1, generator=self.generator))


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
        token = sampler(model.forward(tokens, cache)[-1])
        seconds = time.perf_counter() - start
        if step == 0:
            speed.prefill_tokens, speed.prefill_seconds = len(prompt), seconds
        else:
            speed.decode_tokens += 1
            speed.decode_seconds += seconds
        yield token
        tokens = torch.tensor([token], device=model.device)
