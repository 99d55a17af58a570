"""PERF's four prefill tables: `attention` over batches beside torch's FlashAttention-2 and cuDNN.

Every cell is measured with ragged keys and with pages of 16 tokens and of one. `attention` gets its
work list, as all but one layer of a step do. FlashInfer's times come from peers.json, scaled.
The goal is to be ahead of both portable peers.
"""

from __future__ import annotations

from itertools import pairwise

from . import peers
from .attention_batch import Batch, Memory, Shape, measure_places, warm, whole_pages
from .session import Facts, Session
from .table import Row, geometric_mean

TITLE = "Prefill, batches of 16,384 tokens, bf16, head_dim 128"
PREDICTION = "operations / 340 TFLOP/s + 15 us, pages as ragged"
PLACES = ("ragged", "page 16", "page 1")
NUM_TOKENS = 16384
FLOOR = 0.7  # of the best portable peer: no cell may be slower


def name_of(heads: tuple[int, int], causal: bool, length: int) -> str:
    return f"{heads[0]}/{heads[1]} heads, {'causal' if causal else 'full'}, {length}"


def run(session: Session) -> list[Row]:
    lengths = session.sizes(peers.lengths(), [1024, 8192], [5])
    num_tokens = 10 if session.dry_run else NUM_TOKENS
    cells = [
        (*table, length)
        for table in peers.prefill_tables()
        for length in lengths
        if any(session.wants(f"prefill {name_of(*table, length)}, {p}") for p in PLACES)
    ]
    if not cells:
        return []
    warm(session.device, r"bfloat16.*HeadDims<128, 128>.*bfloat16>, StandardVariant")
    sizes = {length: max(1, num_tokens // length) for length in lengths}
    memory = Memory(session, max(sizes[n] * whole_pages(n) * h[1] * 128 for h, _, n in cells))
    rows = []
    for heads, causal, length in cells:
        rows += measure(session, memory, heads, causal, length, sizes[length])
    return rows


def measure(
    session: Session,
    memory: Memory,
    heads: tuple[int, int],
    causal: bool,
    length: int,
    size: int,
) -> list[Row]:
    def expected(batch: Batch) -> Facts:
        return {"num_flops": batch.num_flops, "predicted_us": batch.num_flops / 340e6 + 15}

    def add_peers(row: Row, place: str, running: dict[str, float]) -> None:
        cell = (heads, causal, length, running)
        ragged = place == "ragged"
        fa2 = peers.prefill_us(f"FlashInfer fa2 {place if ragged else 'page 16'}", *cell)
        fa3 = peers.prefill_us(f"FlashAttention-3 {'varlen' if ragged else place}", *cell)
        if fa2 is not None:
            row.peers["FlashInfer fa2 (scaled)"] = fa2
        if fa3 is not None and "FlashAttention-3" not in row.beside:
            row.beside["FlashAttention-3 (scaled)"] = fa3
        if row.peers:
            row.goal_us = min(row.peers.values())

    name = ("prefill", name_of(heads, causal, length))
    shapes = [Shape(heads=heads, causal=causal, place=place) for place in PLACES]
    requests = [(length, length)] * size
    return measure_places(session, memory, name, shapes, requests, expected, add_peers)


def verdict(rows: list[Row]) -> str:
    """What the issues ask: the worst cell beside portable peers, and what pages cost."""
    return "\n".join(["", *portable_lines(rows), *page_lines(rows, PLACES)])


def portable_lines(rows: list[Row]) -> list[str]:
    known = [row for row in rows if row.ratio is not None]
    if not known:
        return []
    worst = min(known, key=lambda row: row.ratio or 0.0)
    below = [row for row in known if (row.ratio or 0.0) < FLOOR]
    ahead = sum((row.ratio or 0.0) >= 1.0 for row in known)
    return [
        f"- ahead of the best portable peer in {ahead} of {len(known)} cells; the worst is at "
        f"{100 * (worst.ratio or 0.0):.0f}%: {worst.op} {worst.case}",
        f"- under {100 * FLOOR:.0f}% of it: {', '.join(row.case for row in below) or 'none'}",
    ]


def page_lines(rows: list[Row], places: tuple[str, ...]) -> list[str]:
    """How much longer each form of cache takes than the one before it."""
    times = {(row.case.rsplit(", ", 1)[0], row.case.rsplit(", ", 1)[1]): row.us for row in rows}
    lines = []
    for before, after in pairwise(places):
        ratios = {
            cell: times[cell, after] / us
            for (cell, place), us in times.items()
            if place == before and (cell, after) in times
        }
        if ratios:
            worst = max(ratios, key=lambda cell: ratios[cell])
            mean = geometric_mean(list(ratios.values()))
            lines.append(
                f"- {after} over {before}: {mean:.3f} in the mean, {ratios[worst]:.3f} at most "
                f"({worst})"
            )
    return lines
