"""Rotary embedding, out of place and in place, beside torch.compile of the same formula."""

from __future__ import annotations

import ridgeline
import torch

from . import formulas
from .bench_norm import predicted_us
from .session import Session
from .table import Row
from .timer import Call

TITLE = "RoPE, bf16, 32 query and 8 key heads of 128"
PREDICTION = (
    "bytes / 4,280 GB/s + 6 us: q and k read once and written once, angles computed; of the table "
    "a float32 row for each token is read too; by request or from the table 0.7 us more at one "
    "token, for one more dependent load"
)
THETA = 1e4
NUM_PAIRS = 64
TABLE_ROW_BYTES = 2 * NUM_PAIRS * 4
MAX_REQUESTS = 64


def calls(session: Session, q: torch.Tensor, k: torch.Tensor) -> dict[str, Call]:
    tokens, device = q.shape[0], session.device
    positions = torch.arange(tokens, dtype=torch.int32, device=device)
    batch = min(tokens, MAX_REQUESTS)
    indptr = (torch.arange(batch + 1, device=device) * tokens // batch).int()
    offsets = indptr[:-1].clone()
    angles = positions[:, None] * THETA ** (-torch.arange(NUM_PAIRS, device=device) / NUM_PAIRS)
    table = torch.cat([angles.cos(), angles.sin()], dim=1)
    flat_q, flat_k = q.flatten(1), k.flatten(1)
    return {
        "apply_rope_pos_ids": lambda: ridgeline.apply_rope_pos_ids(
            q, k, positions, rope_theta=THETA
        ),
        "apply_rope_pos_ids_inplace": lambda: ridgeline.apply_rope_pos_ids_inplace(
            q, k, positions, rope_theta=THETA
        ),
        "apply_rope": lambda: ridgeline.apply_rope(q, k, indptr, offsets, rope_theta=THETA),
        "apply_llama31_rope_pos_ids": lambda: ridgeline.apply_llama31_rope_pos_ids(q, k, positions),
        "apply_rope_with_cos_sin_cache": lambda: ridgeline.apply_rope_with_cos_sin_cache(
            positions, flat_q, flat_k, 2 * NUM_PAIRS, table
        ),
    }


def run(session: Session) -> list[Row]:
    rows = []
    for tokens in session.sizes([1, 64, 1024, 4096, 16384], [1, 4096], [3]):
        q, k = session.randn(tokens, 32, 128), session.randn(tokens, 8, 128)
        positions = torch.arange(tokens, dtype=torch.int32, device=session.device)
        size = (q.numel() + k.numel()) * q.element_size()
        peer = formulas.compiled(formulas.rope, q, k, positions, THETA)
        for name, call in calls(session, q, k).items():
            table = tokens * TABLE_ROW_BYTES if name == "apply_rope_with_cos_sin_cache" else 0
            rows.append(
                session.case(
                    name,
                    f"[{tokens}, 40, 128]",
                    call,
                    peers={"torch.compile": peer} if name == "apply_rope_pos_ids" else {},
                    num_read=size + table,
                    num_written=size,
                    predicted_us=predicted_us(2 * size + table),
                )
            )
    return rows
