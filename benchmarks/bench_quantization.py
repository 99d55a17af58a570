"""Norms with 8-bit outputs, quantize and dequantize beside torch.compile of the same formulas."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import ridgeline
import torch

from . import formulas
from .bench_norm import EPS, predicted_us
from .session import Session
from .table import Row
from .timer import Call

TITLE = "Norms and quantization to fp8, bf16"
PREDICTION = (
    "bytes / 4,280 GB/s + 6 us: one pass; per tensor, from 16,384 numbers on, 1 us for one more "
    "launch, and a second read of what L2 does not hold"
)
HIDDEN = 4096


def run(session: Session) -> list[Row]:
    rows: list[Row] = []
    hidden = 128 if session.dry_run else HIDDEN
    for tokens in session.sizes([1, 64, 1024, 4096, 16384], [1, 4096], [3]):
        x, weight = session.randn(tokens, hidden), session.randn(hidden)
        size = x.numel() * x.element_size()

        def add(
            op: str,
            call: Call,
            formula: Callable[..., Any],
            *arguments: object,
            num_read: float = size,
            num_written: float = size / 2,
            case: str = f"[{tokens}, {hidden}]",
        ) -> None:
            rows.append(
                session.case(
                    op,
                    case,
                    call,
                    peers={"torch.compile": formulas.compiled(formula, *arguments)},
                    num_read=num_read,
                    num_written=num_written,
                    predicted_us=predicted_us(num_read + num_written),
                )
            )

        def normed(x: torch.Tensor = x, weight: torch.Tensor = weight) -> object:
            out = torch.empty_like(x, dtype=torch.float8_e4m3fn)
            return out, ridgeline.rmsnorm_quant(out, x, weight, eps=EPS)

        def quantized(granularity: str | int, x: torch.Tensor = x) -> Call:
            return lambda: ridgeline.quantize(x, torch.float8_e4m3fn, granularity)

        add("rmsnorm_quant, per token", normed, formulas.rmsnorm_per_token, x, weight, EPS)
        add("quantize, per token", quantized("token"), formulas.per_group, x, hidden)
        add("quantize, groups of 128", quantized(128), formulas.per_group, x, 128)
        add(
            "quantize, per tensor",
            quantized("tensor"),
            formulas.per_tensor,
            x,
            num_read=2 * size,
        )
        q, scale = ridgeline.quantize(x, torch.float8_e4m3fn)
        add(
            "dequantize, per token",
            lambda q=q, scale=scale: ridgeline.dequantize(q, scale),
            formulas.dequantize,
            q,
            scale,
            num_read=size / 2,
            num_written=size,
        )
    return rows
