"""Float64 references of the sampling tests, from the definitions alone, and a test of draws."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

BOUNDARY = 1e-6  # of top-p: tokens this near to it may fall either way


@dataclass(frozen=True)
class Filter:
    """What a case keeps of a row."""

    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    temperature: float = 1.0
    joint: bool = False


def distribution(x: Tensor, from_logits: bool, temperature: float = 1.0) -> Tensor:
    """The row's probabilities in float64, before any filter."""
    x = x.double().cpu()
    if from_logits:
        return torch.softmax(x / (temperature if temperature > 0 else 1.0), dim=-1)
    return x / x.sum(-1, keepdim=True)


def support(x: Tensor, from_logits: bool, how: Filter) -> tuple[Tensor, Tensor]:
    """Masks of the tokens that must be kept, and of those that may be."""
    probs = distribution(x, from_logits, how.temperature)
    vocab = x.shape[-1]
    order = torch.sort(x.double().cpu(), dim=-1, descending=True, stable=True).indices
    ordered = probs.gather(-1, order)
    rank = torch.arange(vocab)
    k = 1 if how.temperature == 0 else how.top_k if 0 < how.top_k < vocab else vocab
    first = rank < k
    left = 1.0 if how.joint else (ordered * first).sum(-1, keepdim=True)
    before = (ordered.cumsum(-1) - ordered) / left
    greedy_or_off = how.temperature == 0 or how.top_p >= 1
    ratio = ordered / ordered[..., :1]
    masks = []
    for sign in (-1, 1):
        kept = first & (ordered > 0)
        if not greedy_or_off:
            kept = kept & ((before < how.top_p + sign * BOUNDARY) | (rank == 0))
        if how.temperature > 0:
            kept = kept & (ratio >= how.min_p * (1 - sign * 1e-12))
        masks.append(torch.zeros_like(kept).scatter_(-1, order, kept))
    return masks[0], masks[1]


def chi_square(counts: Tensor, probs: Tensor) -> tuple[float, float]:
    """The statistic of draws against exact probabilities, and what one run in 10^9 exceeds.

    Tokens of which fewer than five are expected are one cell.
    """
    counts, probs = counts.double().cpu(), probs.double().cpu()
    assert counts[probs == 0].sum() == 0
    expected = probs * counts.sum()
    small = expected < 5
    observed = torch.cat([counts[~small], counts[small].sum()[None]])
    expected = torch.cat([expected[~small], expected[small].sum()[None]])
    cells = expected > 1
    statistic = float(((observed - expected)[cells] ** 2 / expected[cells]).sum())
    degrees = max(int(cells.sum()) - 1, 1)
    spread = 2 / (9 * degrees)
    return statistic, degrees * (1 - spread + 6 * math.sqrt(spread)) ** 3


def philox(seed: int, offset: int, draw: int = 0) -> int:
    """64 bits of Philox4x32-10, in Python's integers."""
    mask = 0xFFFFFFFF
    key = [seed & mask, (seed >> 32) & mask]
    x = [offset & mask, (offset >> 32) & mask, draw, 0]
    for _ in range(10):
        a, b = 0xD2511F53 * x[0], 0xCD9E8D57 * x[2]
        x = [(b >> 32) ^ x[1] ^ key[0], b & mask, (a >> 32) ^ x[3] ^ key[1], a & mask]
        key = [(key[0] + 0x9E3779B9) & mask, (key[1] + 0xBB67AE85) & mask]
    return x[1] << 32 | x[0]
