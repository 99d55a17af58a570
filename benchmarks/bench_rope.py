"""apply_rope_pos_ids, out of place and in place, beside torch.compile of the same formula."""

from __future__ import annotations

import ridgeline
import torch

from . import formulas
from .bench_norm import predicted_us
from .session import Session
from .table import Row

TITLE = "RoPE, bf16, 32 query and 8 key heads of 128"
PREDICTION = "bytes / 4,280 GB/s + 6 us: q and k read once and written once, angles computed"
THETA = 1e4


def run(session: Session) -> list[Row]:
    rows = []
    for tokens in session.sizes([1, 64, 1024, 4096, 16384], [1, 4096], [3]):
        q, k = session.randn(tokens, 32, 128), session.randn(tokens, 8, 128)
        positions = torch.arange(tokens, dtype=torch.int32, device=session.device)
        size = (q.numel() + k.numel()) * q.element_size()
        peer = formulas.compiled(formulas.rope, q, k, positions, THETA)
        rows.append(
            session.case(
                "apply_rope_pos_ids",
                f"[{tokens}, 40, 128]",
                lambda q=q, k=k, p=positions: ridgeline.apply_rope_pos_ids(
                    q, k, p, rope_theta=THETA
                ),
                peers={"torch.compile": peer},
                num_read=size,
                num_written=size,
                predicted_us=predicted_us(2 * size),
            )
        )
        rows.append(
            session.case(
                "apply_rope_pos_ids_inplace",
                f"[{tokens}, 40, 128]",
                lambda q=q, k=k, p=positions: ridgeline.apply_rope_pos_ids_inplace(
                    q, k, p, rope_theta=THETA
                ),
                peers={},
                num_read=size,
                num_written=size,
                predicted_us=predicted_us(2 * size),
            )
        )
    return rows
