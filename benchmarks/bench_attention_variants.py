"""What options and other shapes cost in prefill: none below 85% of the plain rate of its length."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import torch

from .attention_batch import Batch, Shape, note_error, warm
from .session import Entry, Session
from .table import Row

TITLE = (
    "Prefill of other shapes and with options, ragged, causal; the goal is 85% of the plain rate"
)
PREDICTION = "the plain rate for windows and groups, 90% of it with a soft cap, 80% at head_dim 256"
PLAIN = Shape(place="ragged")
HALF = replace(PLAIN, dtype=torch.float16)
VARIANTS = {
    "head_dim 64": (4096, replace(PLAIN, head_dims=(64, 64))),
    "head_dim 256": (4096, replace(PLAIN, head_dims=(256, 256))),
    "head_dim 192, 128": (4096, replace(PLAIN, head_dims=(192, 128))),
    "window 4096": (16384, replace(PLAIN, window_left=4096)),
    "soft cap 30": (4096, replace(PLAIN, options={"logits_soft_cap": 30.0})),
    "28/4 heads": (4096, replace(PLAIN, heads=(28, 4))),
    "64/8 heads": (4096, replace(PLAIN, heads=(64, 8))),
    "float16": (4096, HALF),
    "float16, fp16 logits": (4096, replace(HALF, options={"use_fp16_qk_reduction": True})),
}
NUM_TOKENS = 16384
SHARE = 0.85


def run(session: Session) -> list[Row]:
    chosen = {name: case for name, case in VARIANTS.items() if session.wants(name)}
    if not chosen:
        return []
    warm(session.device, r"(bfloat16|half).*Heights<16, (64|128)>, RaggedKv.*StandardVariant")
    rows = []
    for length in sorted({length for length, _ in chosen.values()}):
        shapes = {name: shape for name, (at, shape) in chosen.items() if at == length}
        rows += measure(session, length, {"plain": PLAIN, **shapes})
    return rows


def measure(session: Session, length: int, shapes: dict[str, Shape]) -> list[Row]:
    """Shapes of one length in turns; the first has the plain rate."""
    plain, *others = session.measure(
        [entry(session, name, length, shape) for name, shape in shapes.items()]
    )
    for row in others:
        row.goal_us = row.num_flops / plain.num_flops * plain.us / SHARE
    for row in (plain, *others):
        row.beside, row.peers = row.peers, {}
    return [plain, *others]


def entry(session: Session, name: str, length: int, shape: Shape) -> Entry:
    size = NUM_TOKENS // length
    if session.dry_run:
        size, length = 2, 7
        shape = replace(shape, heads=(shape.heads[0] // shape.heads[1], 1))
    batch = Batch.of(session, shape, [(length, length)] * size)
    work = batch.schedule()
    plain = shape.window_left < 0 and not shape.options
    found = session.entry(
        name,
        f"{size} x {length}",
        partial(batch.attention, work),
        peers=batch.peers(dense=True) if plain else {},
        num_flops=batch.num_flops,
    )
    note_error(found.row, batch, batch.attention(work))
    return found
