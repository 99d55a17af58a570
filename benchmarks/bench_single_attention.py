"""single_decode and single_prefill beside torch's flash and cuDNN kernels on the same memory."""

from __future__ import annotations

import ridgeline

from . import formulas
from .session import Session
from .table import Row

TITLE = "One request, bf16, head_dim 128, NHD"
PREDICTION = (
    "decode: bytes / 4,400 GB/s + 18 us: keys and values read once, partial results merged; "
    "prefill: operations / 340 TFLOP/s + 12 us: warp-level mma reaches half of the matmul rate"
)
HEAD_DIM = 128


def run(session: Session) -> list[Row]:
    rows = []
    for heads in ((32, 8), (32, 32), (64, 8)):
        kv_lens = [1024, 4096, 16384, 32768, 65536, 131072]
        for kv_len in session.sizes(kv_lens, [4096, 65536], [37]):
            rows.append(decode(session, heads, kv_len))
    for heads in ((32, 8), (32, 32)):
        for causal in (True, False):
            lengths = [512, 1024, 2048, 4096, 8192, 16384, 32768]
            for length in session.sizes(lengths, [1024, 8192], [29]):
                rows.append(prefill(session, heads, length, causal))
    return rows


def decode(session: Session, heads: tuple[int, int], kv_len: int) -> Row:
    q = session.randn(heads[0], HEAD_DIM)
    k, v = (session.randn(kv_len, heads[1], HEAD_DIM) for _ in range(2))
    num_bytes = 2 * k.numel() * k.element_size()
    q_row = q.unsqueeze(0)
    return session.case(
        "decode",
        f"{heads[0]}/{heads[1]} heads, kv {kv_len}, {num_bytes / 1e6:.0f} MB",
        lambda: ridgeline.single_decode_with_kv_cache(q, k, v),
        peers={
            f"sdpa {name}": formulas.sdpa(name, q_row, k, v, causal=False)
            for name in formulas.BACKENDS
        },
        num_read=num_bytes,
        predicted_us=num_bytes / 4400e3 + 18,
    )


def prefill(session: Session, heads: tuple[int, int], length: int, causal: bool) -> Row:
    q = session.randn(length, heads[0], HEAD_DIM)
    k, v = (session.randn(length, heads[1], HEAD_DIM) for _ in range(2))
    pairs = length * (length + 1) / 2 if causal else float(length) ** 2
    num_flops = 4 * pairs * heads[0] * HEAD_DIM
    return session.case(
        "prefill",
        f"{heads[0]}/{heads[1]} heads, {length}{', causal' if causal else ''}",
        lambda: ridgeline.single_prefill_with_kv_cache(q, k, v, causal=causal),
        peers={
            f"sdpa {name}": formulas.sdpa(name, q, k, v, causal=causal)
            for name in formulas.BACKENDS
        },
        num_read=(q.numel() + 2 * k.numel()) * q.element_size(),
        num_written=q.numel() * q.element_size(),
        num_flops=num_flops,
        predicted_us=num_flops / 340e6 + 12,
    )
