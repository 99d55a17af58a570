"""The gated activations beside torch.compile of the same formulas."""

from __future__ import annotations

import ridgeline
import torch

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
        for op in ("silu_and_mul", "gelu_and_mul", "gelu_tanh_and_mul"):
            function, formula = getattr(ridgeline, op), getattr(formulas, op)
            rows.append(
                session.case(
                    op,
                    f"[{tokens}, 2 * {hidden}]",
                    lambda x=x, function=function: function(x),
                    peers={"torch.compile": formulas.compiled(formula, x)},
                    num_read=2 * size,
                    num_written=size,
                    predicted_us=predicted_us(3 * size),
                )
            )
        scale = torch.full((1,), 0.05, device=x.device)
        rows.append(
            session.case(
                "silu_and_mul to fp8",
                f"[{tokens}, 2 * {hidden}]",
                lambda x=x, scale=scale: ridgeline.silu_and_mul(x, scale=scale),
                peers={"torch.compile": formulas.compiled(formulas.silu_and_mul_fp8, x, scale)},
                num_read=2 * size,
                num_written=size / 2,
                predicted_us=predicted_us(2.5 * size),
            )
        )
    return rows
