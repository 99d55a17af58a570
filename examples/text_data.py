"""The corpus as tensors, and bits per byte on it."""

import gzip
import hashlib
import math
import re
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from corpus import fetch, split
from network import Network
from torch import Tensor

SAMPLE_BYTES = 8_192
WORD = re.compile(r"[a-z]+(?:'[a-z]+)*")


@dataclass
class Data:
    """Training and held-out bytes on the device, and what the model folder keeps of the corpus."""

    train: Tensor
    held_out: Tensor
    sample: str
    words: bytes
    sha256: str

    @classmethod
    def load(cls, path: Path | None, device: torch.device) -> "Data":
        """Read the corpus from `path`, or fetch it."""
        text = path.read_text(encoding="utf-8") if path else fetch()
        train, held_out = split(text)
        words = "\n".join(sorted(set(WORD.findall(text.lower())))) + "\n"
        return cls(
            train=as_bytes(train, device),
            held_out=as_bytes(held_out, device),
            sample=held_out.encode()[:SAMPLE_BYTES].decode(errors="ignore"),
            words=gzip.compress(words.encode(), mtime=0),
            sha256=hashlib.sha256(text.encode()).hexdigest(),
        )

    def crops(self, count: int, length: int) -> tuple[Tensor, Tensor]:
        """Return `count` random windows of the training text, and the same one byte later."""
        device = self.train.device
        starts = torch.randint(len(self.train) - length, (count, 1), device=device)
        windows = self.train[starts + torch.arange(length + 1, device=device)].long()
        return windows[:, :-1], windows[:, 1:]


def with_noise(tokens: Tensor, share: float) -> Tensor:
    """Return `tokens [batch, length]` with random bytes in place of a share of them, two in a row.

    Why: most of the 256 bytes never occur in the corpus. A model that never saw them loses its
    thread at the first accented letter of a prompt.
    """
    hit = torch.rand(tokens.shape, device=tokens.device) < share / 2
    hit[:, 1:] |= hit[:, :-1].clone()
    return torch.where(hit, torch.randint_like(tokens, 256), tokens)


def as_bytes(text: str, device: torch.device) -> Tensor:
    """Return the UTF-8 bytes of `text` as a uint8 tensor."""
    return torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8).to(device)


@torch.no_grad()
def bits_per_byte(network: Network, data: Tensor, max_windows: int | None = None) -> float:
    """Return the mean bits a byte of `data`.

    The text is cut into windows of the network's context; the first byte of a window is given,
    every later byte is predicted from those before it in the window. Windows overlap by one byte,
    so that every byte but the very first is counted once.
    """
    context = network.shape.context
    starts = list(range(0, len(data) - 1, context))
    if max_windows and len(starts) > max_windows:
        starts = starts[:: math.ceil(len(starts) / max_windows)]
    full = [s for s in starts if s + context < len(data)]
    batches = [full[i : i + 16] for i in range(0, len(full), 16)]
    batches += [[s] for s in starts if s + context >= len(data)]
    nats, count = 0.0, 0
    for batch in batches:
        windows = torch.stack([data[s : s + context + 1] for s in batch]).long()
        logits = network(windows[:, :-1]).float().flatten(0, 1)
        targets = windows[:, 1:].flatten()
        nats += F.cross_entropy(logits, targets, reduction="sum").item()
        count += len(targets)
    return nats / count / math.log(2)
