"""From logits or probabilities to tokens, beside torch's sort, topk, multinomial and softmax.

Seeds are given, so that only the samplers are timed. Tokens are random: peers return nothing to
compare, but for the softmax.
"""

from __future__ import annotations

from collections.abc import Callable

import ridgeline
import torch

from . import formulas
from .session import Session
from .table import Row
from .timer import Call

TITLE = "Sampling, vocabulary 128,256, float32"
PREDICTION = (
    "one read of the rows, bytes / 4,550 GB/s, where at most 256 tokens are kept or all, two where "
    "more are; 8 us for two launches that depend on each other, 14 for four. Goals, top-k 50 and "
    "top-p 0.9: 15 us for 1 row, 30 for 64, 110 for 512; 85% of the bytes' speed without filters"
)
FILTERS = ((50, 0.9), (1000, 0.95), (0, 0.9))


def predicted_us(num_bytes: float, num_reads: int = 1) -> float:
    return num_reads * num_bytes / 4550 / 1e3 + (8 if num_reads == 1 else 14)


def plain(function: Callable[..., object], *arguments: object) -> Callable[[], Call]:
    return lambda: lambda: function(*arguments)


def filtered(session: Session, logits: torch.Tensor, seed: torch.Tensor, case: str) -> list[Row]:
    size = logits.numel() * logits.element_size()
    rows = []
    for top_k, top_p in FILTERS:
        peers = {"torch sort": plain(formulas.sample_by_sort, logits, top_k or None, top_p)}
        if top_k:
            peers["torch topk"] = plain(formulas.sample_by_topk, logits, top_k, top_p)
        rows.append(
            session.case(
                "sample_from_logits",
                f"{case}, top-k {top_k or 'off'}, top-p {top_p}",
                lambda k=top_k, p=top_p: ridgeline.sample_from_logits(logits, 1.0, k, p, seed=seed)[
                    0
                ],
                peers=peers,
                num_read=size,
                predicted_us=predicted_us(size, 1 if 0 < top_k <= 256 else 2),
            )
        )
    return rows


def unfiltered(session: Session, logits: torch.Tensor, seed: torch.Tensor, case: str) -> list[Row]:
    size = logits.numel() * logits.element_size()
    probs = torch.softmax(logits, dim=-1)
    peers = {"torch.multinomial": plain(formulas.multinomial, probs)}
    return [
        session.case(
            "sampling_from_probs",
            case,
            lambda: ridgeline.sampling_from_probs(probs, seed=seed),
            peers=peers,
            num_read=size,
            predicted_us=predicted_us(size),
        ),
        session.case(
            "sampling_from_logits",
            case,
            lambda: ridgeline.sampling_from_logits(logits, seed=seed),
            peers={},
            num_read=size,
            predicted_us=predicted_us(size),
        ),
        session.case(
            "sample_from_logits",
            f"{case}, greedy",
            lambda: ridgeline.sample_from_logits(logits, 0.0, seed=seed)[0],
            peers={"torch.argmax": plain(torch.argmax, logits, -1)},
            num_read=size,
            predicted_us=predicted_us(size),
        ),
        session.case(
            "top_p_sampling_from_probs 0.9",
            case,
            lambda: ridgeline.top_p_sampling_from_probs(probs, 0.9, seed=seed),
            peers={},
            num_read=size,
            predicted_us=predicted_us(size, 2),
        ),
        session.case(
            "top_k 50",
            case,
            lambda: ridgeline.top_k(logits, 50, sorted=True),
            peers={"torch.topk": plain(torch.topk, logits, 50)},
            num_read=size,
            predicted_us=predicted_us(size),
        ),
        session.case(
            "softmax",
            case,
            lambda: ridgeline.softmax(logits),
            peers={"torch.softmax": plain(torch.softmax, logits, -1)},
            num_read=size,
            num_written=size,
            predicted_us=2 * size / 4280 / 1e3 + 9,
        ),
        session.case(
            "top_p_renorm_probs 0.9",
            case,
            lambda: ridgeline.top_p_renorm_probs(probs, 0.9),
            peers={},
            num_read=size,
            num_written=size,
        ),
    ]


def run(session: Session) -> list[Row]:
    vocab = session.sizes([128_256], [128_256], [500])[0]
    rows = []
    for batch in session.sizes([1, 64, 512], [1, 64, 512], [2]):
        seed = torch.arange(batch, device=session.device)
        for spread in (1.0, 4.0):
            logits = session.randn(batch, vocab, dtype=torch.float32) * spread
            case = f"[{batch}, {vocab}] x {spread:g}"
            rows += filtered(session, logits, seed, case)
        rows += unfiltered(session, logits, seed, f"[{batch}, {vocab}]")
    return rows
