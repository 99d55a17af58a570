"""What others reach, from peers.json: figures of another run, scaled to this one.

A peer that cannot run here is given the time it would take beside a peer that does: its figure
there, times (the running peer's time here) / (the running peer's figure there).
"""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

FILE = Path(__file__).with_name("peers.json")
FA2 = "FlashAttention-2 (torch SDPA) dense"
CUDNN = "cuDNN 9.19 (torch SDPA) dense"
RUNNING = {"flash": FA2, "cudnn": CUDNN}  # by the names of formulas.BACKENDS
# Kernels of FlashInfer that any GPU from sm_80 on runs.
PORTABLE = ("FI cuda_cores", "FI tensor_fa2")


@cache
def _tables() -> dict[str, Any]:
    content: dict[str, Any] = json.loads(FILE.read_text())
    return content


def lengths() -> list[int]:
    """Of the prefill tables."""
    return list(_tables()["prefill"]["lengths"])


def prefill_tables() -> list[tuple[tuple[int, int], bool]]:
    """Heads and causal mask of each table."""
    return [((t["heads"][0], t["heads"][1]), t["causal"]) for t in _tables()["prefill"]["tables"]]


def decode_cells(heads: tuple[int, int]) -> list[tuple[int, int]]:
    """Batch size and keys of every cell of these heads' tables."""
    table, kv_lens = _decode_table(heads, "padded"), _tables()["decode"]["kv_lens"]
    rows = table["best_us"].items()
    return [(int(size), kv_lens[i]) for size, row in rows for i in range(len(row))]


def decode_heads() -> list[tuple[int, int]]:
    pairs = [tuple(table["heads"]) for table in _tables()["decode"]["tables"]]
    return list(dict.fromkeys(pairs))


def prefill_us(
    peer: str, heads: tuple[int, int], causal: bool, length: int, here: dict[str, float]
) -> float | None:
    """Microseconds of a peer, by those that `here` has of running peers; None where unknown."""
    if length not in lengths():
        return None
    for table in _tables()["prefill"]["tables"]:
        if tuple(table["heads"]) != heads or table["causal"] != causal:
            continue
        at = lengths().index(length)
        for name, figure in RUNNING.items():
            if name in here:
                # The same operations: rates are to each other as times the other way round.
                return float(here[name] * table["tflops"][figure][at] / table["tflops"][peer][at])
    return None


def decode_us(
    heads: tuple[int, int], place: str, size: int, kv_len: int, here: dict[str, float]
) -> tuple[str, float] | None:
    """Name and microseconds of the best peer of a cell; only cuDNN, the best dense one, scales."""
    best = _decode_best(heads, place, size, kv_len)
    dense = _decode_best(heads, "padded", size, kv_len)
    if best is None or dense is None or "cudnn" not in here:
        return None
    return best[0], here["cudnn"] * best[1] / dense[1]


def _decode_table(heads: tuple[int, int], place: str) -> dict[str, Any]:
    tables: list[dict[str, Any]] = _tables()["decode"]["tables"]
    return next(t for t in tables if tuple(t["heads"]) == heads and t["place"] == place)


def _decode_best(
    heads: tuple[int, int], place: str, size: int, kv_len: int
) -> tuple[str, float] | None:
    kv_lens = _tables()["decode"]["kv_lens"]
    if heads not in decode_heads() or kv_len not in kv_lens:
        return None
    row = _decode_table(heads, place)["best_us"].get(str(size), [])
    at = kv_lens.index(kv_len)
    return (row[at][0], row[at][1]) if at < len(row) else None
