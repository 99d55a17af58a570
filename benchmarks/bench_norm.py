"""The norms beside torch.compile of the same formulas."""

from __future__ import annotations

import ridgeline

from . import formulas
from .session import Session
from .table import Row

TITLE = "Norm, bf16"
PREDICTION = "bytes / 4,280 GB/s + 6 us: one pass, each element read once and written once"
EPS = 1e-6


def predicted_us(num_bytes: float) -> float:
    return num_bytes / 4280 / 1e3 + 6


def shapes(session: Session) -> list[tuple[int, int]]:
    tokens = session.sizes([1, 64, 1024, 4096, 16384], [1, 4096], [3])
    hidden = session.sizes([4096], [4096], [64])[0]
    wide = [] if session.dry_run else [(4096, 8192)]
    return [(count, hidden) for count in tokens] + wide


def run(session: Session) -> list[Row]:
    rows = []
    for tokens, hidden in shapes(session):
        x, weight = session.randn(tokens, hidden), session.randn(hidden)
        size = x.numel() * x.element_size()
        rows.append(
            session.case(
                "rmsnorm",
                f"[{tokens}, {hidden}]",
                lambda x=x, weight=weight: ridgeline.rmsnorm(x, weight, EPS),
                peers={"torch.compile": formulas.compiled(formulas.rmsnorm, x, weight, EPS)},
                num_read=size,
                num_written=size,
                predicted_us=predicted_us(2 * size),
            )
        )
        for op, formula in (
            ("gemma_rmsnorm", formulas.gemma_rmsnorm),
            ("layernorm", formulas.layernorm),
        ):
            vectors = [weight, weight] if op == "layernorm" else [weight]
            function = getattr(ridgeline, op)
            rows.append(
                session.case(
                    op,
                    f"[{tokens}, {hidden}]",
                    lambda f=function, x=x, vectors=vectors: f(x, *vectors, EPS),
                    peers={"torch.compile": formulas.compiled(formula, x, *vectors, EPS)},
                    num_read=size,
                    num_written=size,
                    predicted_us=predicted_us(2 * size),
                )
            )
    for tokens, hidden in shapes(session):
        x, residual = session.randn(tokens, hidden), session.randn(tokens, hidden)
        weight = session.randn(hidden)
        size = x.numel() * x.element_size()
        peer = formulas.compiled(formulas.fused_add_rmsnorm, x, residual, weight, EPS)
        rows.append(
            session.case(
                "fused_add_rmsnorm",
                f"[{tokens}, {hidden}]",
                lambda x=x, residual=residual, weight=weight: ridgeline.fused_add_rmsnorm(
                    x, residual, weight, EPS
                ),
                peers={"torch.compile": peer},
                num_read=2 * size,
                num_written=2 * size,
                predicted_us=predicted_us(4 * size),
            )
        )
    return rows
