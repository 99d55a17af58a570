"""silu_and_mul beside torch.compile of the same formula."""

from __future__ import annotations

import ridgeline

from . import formulas
from .bench_norm import predicted_us
from .session import Session
from .table import Row

TITLE = "Activation, bf16"
PREDICTION = "bytes / 4,280 GB/s + 6 us: two inputs read, one output written"


def run(session: Session) -> list[Row]:
    rows = []
    hidden = 96 if session.dry_run else 14336
    for tokens in session.sizes([1, 64, 1024, 4096, 16384], [1, 4096], [3]):
        x = session.randn(tokens, 2 * hidden)
        size = tokens * hidden * x.element_size()
        rows.append(
            session.case(
                "silu_and_mul",
                f"[{tokens}, 2 * {hidden}]",
                lambda x=x: ridgeline.silu_and_mul(x),
                peers={"torch.compile": formulas.compiled(formulas.silu_and_mul, x)},
                num_read=2 * size,
                num_written=size,
                predicted_us=predicted_us(3 * size),
            )
        )
    return rows
