"""PERF's nine decode tables: `attention` beside torch's FlashAttention-2 and cuDNN.

Every cell is measured with padded dense keys and with pages of 16 tokens and of one. The best peer
of a table comes from peers.json, scaled by cuDNN's time here. The goal of a cell: where the bytes
need over 50 us, bytes / 4,500 GB/s + 8 us; elsewhere at least 95% of the best peer.
"""

from __future__ import annotations

from . import peers
from .attention_batch import Batch, Memory, Shape, measure_places, warm, whole_pages
from .bench_attention_prefill import page_lines, portable_lines
from .session import Facts, Session
from .table import Row, geometric_mean

TITLE = "Decode, bf16, head_dim 128"
PREDICTION = "bytes / 4,400 GB/s + 12 us, pages as padded"
PLACES = ("padded", "page 16", "page 1")


def run(session: Session) -> list[Row]:
    cells = []
    for heads in peers.decode_heads():
        every = peers.decode_cells(heads)
        if session.quick:
            every = [(1, 4096), (64, 4096)]
        if session.dry_run:
            every = [(2, 37)]
        cells += [(heads, *cell) for cell in every if wanted(session, heads, *cell)]
    if not cells:
        return []
    warm(session.device, r"bfloat16.*HeadDims<128, 128>, \w+<16>.*bfloat16>, StandardVariant")
    memory = Memory(session, max(size * whole_pages(n) * h[1] * 128 for h, size, n in cells))
    rows = []
    for heads, size, kv_len in cells:
        rows += measure(session, memory, heads, size, kv_len)
    return rows


def name_of(heads: tuple[int, int], size: int, kv_len: int) -> str:
    return f"{heads[0]}/{heads[1]} heads, {size} x {kv_len}"


def wanted(session: Session, heads: tuple[int, int], size: int, kv_len: int) -> bool:
    name = name_of(heads, size, kv_len)
    return any(session.wants(f"decode {name}, {place}") for place in PLACES)


def measure(
    session: Session, memory: Memory, heads: tuple[int, int], size: int, kv_len: int
) -> list[Row]:
    def expected(batch: Batch) -> Facts:
        return {"num_read": batch.num_bytes, "predicted_us": batch.num_bytes / 4400e3 + 12}

    def add_peers(row: Row, place: str, running: dict[str, float]) -> None:
        best = peers.decode_us(heads, place, size, kv_len, running)
        if best is not None and best[0] != "cudnn":
            portable = best[0] in peers.PORTABLE
            (row.peers if portable else row.beside)[f"{best[0]} (scaled)"] = best[1]
        traffic_us = row.num_bytes / 4500e3
        if traffic_us > 50:
            row.goal_us = traffic_us + 8
        elif best is not None:
            row.goal_us = best[1] / 0.95

    name = ("decode", name_of(heads, size, kv_len))
    shapes = [Shape(heads=heads, causal=False, place=place) for place in PLACES]
    requests = [(1, kv_len)] * size
    return measure_places(session, memory, name, shapes, requests, expected, add_peers)


def met(rows: list[Row]) -> str:
    return f"{sum(not row.misses_goal for row in rows)} of {len(rows)}"


def verdict(rows: list[Row]) -> str:
    """What the issues ask, table by table."""
    lines = portable_lines(rows)
    for place in PLACES:
        here = [row for row in rows if row.case.endswith(place)]
        large = [row for row in here if row.num_bytes > 50 * 4500e3]
        rest = [row for row in here if row not in large]
        ratios = [min((row.peers | row.beside).values()) / row.us for row in here if row.beside]
        mean = geometric_mean(ratios)
        if mean is not None:
            lines.append(
                f"- {place}: best peer of all / ours {mean:.3f} in the mean over {len(ratios)} "
                f"cells; bytes / 4,500 GB/s + 8 us met in {met(large)} large cells, 95% of the "
                f"table's peer in {met(rest)} others"
            )
    return "\n".join(["", *lines, *page_lines(rows, PLACES)])
