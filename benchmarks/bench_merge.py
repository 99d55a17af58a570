"""merge_state and merge_states beside torch.compile of the same formula."""

from __future__ import annotations

import ridgeline
import torch

from . import formulas
from .bench_norm import predicted_us
from .session import Session
from .table import Row

TITLE = "Merging attention states, bf16, 32 heads of 128"
PREDICTION = "bytes / 4,280 GB/s + 6 us: every state read once, one state written"


def run(session: Session) -> list[Row]:
    rows = []
    for tokens in session.sizes([1, 64, 4096], [64], [3]):
        v_a, v_b = session.randn(tokens, 32, 128), session.randn(tokens, 32, 128)
        s_a, s_b = (session.randn(tokens, 32, dtype=torch.float32) for _ in range(2))
        size = v_a.numel() * v_a.element_size() + s_a.numel() * 4
        rows.append(
            session.case(
                "merge_state",
                f"[{tokens}, 32, 128]",
                lambda a=v_a, s=s_a, b=v_b, t=s_b: ridgeline.merge_state(a, s, b, t),
                peers={
                    "torch.compile": formulas.compiled(formulas.merge_state, v_a, s_a, v_b, s_b)
                },
                num_read=2 * size,
                num_written=size,
                predicted_us=predicted_us(3 * size),
            )
        )
        states = 8
        v = session.randn(tokens, states, 32, 128)
        s = session.randn(tokens, states, 32, dtype=torch.float32)
        rows.append(
            session.case(
                "merge_states",
                f"[{tokens}, {states}, 32, 128]",
                lambda v=v, s=s: ridgeline.merge_states(v, s),
                peers={"torch.compile": formulas.compiled(formulas.merge_states, v, s)},
                num_read=states * size,
                num_written=size,
                predicted_us=predicted_us((states + 1) * size),
            )
        )
    return rows
