"""single_prefill_with_kv_cache beside torch's flash and cuDNN kernels on the same memory."""

from __future__ import annotations

import ridgeline

from . import formulas
from .session import Session
from .table import Row

TITLE = "Prefill, one request, bf16, head_dim 128, NHD"
PREDICTION = (
    "operations / 340 TFLOP/s + 12 us: warp-level mma (no wgmma) reaches about half of the matmul "
    "rate; a causal mask halves the operations"
)
HEADS = ((32, 8), (32, 32))
HEAD_DIM = 128


def predicted_us(num_flops: float) -> float:
    return num_flops / 340 / 1e6 + 12


def num_flops(length: int, num_heads: int, causal: bool) -> float:
    """Multiplications and additions of the two products that the mask lets through."""
    pairs = length * (length + 1) / 2 if causal else float(length) ** 2
    return 4 * pairs * num_heads * HEAD_DIM


def run(session: Session) -> list[Row]:
    rows = []
    lengths = session.sizes([512, 1024, 2048, 4096, 8192, 16384, 32768], [1024, 8192], [29])
    for num_qo_heads, num_kv_heads in HEADS:
        for causal in (True, False):
            for length in lengths:
                q = session.randn(length, num_qo_heads, HEAD_DIM)
                k, v = (session.randn(length, num_kv_heads, HEAD_DIM) for _ in range(2))
                flops = num_flops(length, num_qo_heads, causal)
                rows.append(
                    session.case(
                        "prefill",
                        f"{num_qo_heads}/{num_kv_heads} heads, {length}"
                        + (", causal" if causal else ""),
                        lambda q=q, k=k, v=v, c=causal: ridgeline.single_prefill_with_kv_cache(
                            q, k, v, causal=c
                        ),
                        peers={
                            f"sdpa {name}": formulas.sdpa(name, q, k, v, causal=causal)
                            for name in formulas.BACKENDS
                        },
                        num_read=(q.numel() + 2 * k.numel()) * q.element_size(),
                        num_written=q.numel() * q.element_size(),
                        num_flops=flops,
                        predicted_us=predicted_us(flops),
                    )
                )
    return rows
