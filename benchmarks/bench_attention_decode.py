"""single_decode_with_kv_cache beside torch's flash and cuDNN kernels on the same memory."""

from __future__ import annotations

import ridgeline

from . import formulas
from .session import Session
from .table import Row

TITLE = "Decode, one request, bf16, head_dim 128, NHD"
PREDICTION = "bytes / 4,400 GB/s + 18 us: keys and values read once, partial results merged"
HEADS = ((32, 8), (32, 32), (64, 8))
HEAD_DIM = 128


def predicted_us(num_bytes: float) -> float:
    return num_bytes / 4400 / 1e3 + 18


def run(session: Session) -> list[Row]:
    rows = []
    lengths = session.sizes([1024, 4096, 16384, 32768, 65536, 131072], [4096, 65536], [37])
    for num_qo_heads, num_kv_heads in HEADS:
        for kv_len in lengths:
            q = session.randn(num_qo_heads, HEAD_DIM)
            k, v = (session.randn(kv_len, num_kv_heads, HEAD_DIM) for _ in range(2))
            num_bytes = 2 * k.numel() * k.element_size()
            q_row = q.unsqueeze(0)
            rows.append(
                session.case(
                    "decode",
                    f"{num_qo_heads}/{num_kv_heads} heads, kv {kv_len}, {num_bytes / 1e6:.0f} MB",
                    lambda q=q, k=k, v=v: ridgeline.single_decode_with_kv_cache(q, k, v),
                    peers={
                        f"sdpa {name}": formulas.sdpa(name, q_row, k, v, causal=False)
                        for name in formulas.BACKENDS
                    },
                    num_read=num_bytes,
                    predicted_us=predicted_us(num_bytes),
                )
            )
    return rows
