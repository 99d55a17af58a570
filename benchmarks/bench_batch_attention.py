"""attention over a batch and its schedule, beside torch's flash and cuDNN kernels on dense caches.

`attention` is timed with a work list given, as all but one layer of a step have it; `with schedule`
makes its own. The dense peers read keys and values of the same lengths.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import ridgeline
import torch

from . import formulas
from .session import Session
from .table import Row

TITLE = "Batches, bf16, head_dim 128, 32 query and 8 key heads"
PREDICTION = (
    "decode: bytes / 4,300 GB/s + 18 us; prefill: 330 TFLOP/s + 20 us; schedule: 5 us in a graph"
)
HEADS = (32, 8)
HEAD_DIM = 128
PLACES = {"page 16": 16, "page 1": 1, "ragged": 0}


@dataclass
class Batch:
    """Requests of (qo_len, kv_len) over one cache, in pages or (page_size 0) ragged."""

    q: torch.Tensor
    kv: tuple[torch.Tensor, torch.Tensor]
    index: dict[str, torch.Tensor]
    page_size: int
    options: dict[str, Any]

    @classmethod
    def of(cls, session: Session, requests: list[tuple[int, int]], page_size: int) -> Batch:
        def ints(values: list[int]) -> torch.Tensor:
            return torch.tensor(values, dtype=torch.int32, device=session.device)

        def starts(counts: list[int]) -> torch.Tensor:
            return torch.tensor([0, *counts]).cumsum(0).int().to(session.device)

        qo_lens, kv_lens = [qo for qo, _ in requests], [kv for _, kv in requests]
        decodes = max(qo_lens) == 1
        q = session.randn(sum(qo_lens), HEADS[0], HEAD_DIM)
        index = {} if decodes else {"qo_indptr": starts(qo_lens)}
        if page_size:
            pages = [-(-length // page_size) for length in kv_lens]
            last = [n - (p - 1) * page_size for n, p in zip(kv_lens, pages, strict=True)]
            order = torch.randperm(sum(pages), device=session.device).int()
            index |= {"kv_indptr": starts(pages), "kv_indices": order}
            index["kv_last_page_len"] = ints(last)
            shape = (sum(pages), page_size, HEADS[1], HEAD_DIM)
        else:
            index["kv_indptr"] = starts(kv_lens)
            shape = (sum(kv_lens), HEADS[1], HEAD_DIM)
        kv = (session.randn(*shape), session.randn(*shape))
        options = {"causal": True, "max_q_len": 1 if decodes else None}
        return cls(q, kv, index, page_size, options)

    def schedule(self) -> torch.Tensor:
        index = {name: t for name, t in self.index.items() if name != "kv_indices"}
        return ridgeline.schedule(
            **index, **self.options, page_size=self.page_size or None,
            num_qo_tokens=self.q.shape[0], num_qo_heads=HEADS[0], num_kv_heads=HEADS[1],
            head_dim_qk=HEAD_DIM,
        )  # fmt: skip

    def attention(self, schedule: torch.Tensor | None = None) -> torch.Tensor:
        return ridgeline.attention(self.q, self.kv, **self.index, **self.options, schedule=schedule)


def flops(requests: list[tuple[int, int]]) -> int:
    seen = sum(qo * kv - qo * (qo - 1) // 2 for qo, kv in requests)
    return 4 * HEADS[0] * HEAD_DIM * seen


def cache_bytes(requests: list[tuple[int, int]]) -> int:
    return 2 * 2 * HEADS[1] * HEAD_DIM * sum(kv for _, kv in requests)


def measure(
    session: Session, name: str, requests: list[tuple[int, int]], page_size: int, dense: bool
) -> list[Row]:
    batch = Batch.of(session, requests, page_size)
    work = batch.schedule()
    decodes = requests[0][0] == 1 and len({qo for qo, _ in requests}) == 1
    peers = {}
    if dense:
        size, (qo_len, kv_len) = len(requests), requests[0]
        q = batch.q.view(size, qo_len, HEADS[0], HEAD_DIM)
        k, v = (t.view(size, kv_len, HEADS[1], HEAD_DIM) for t in batch.kv)
        peers = {
            f"sdpa {peer}": formulas.sdpa_batch(peer, q, k, v, causal=qo_len > 1)
            for peer in formulas.BACKENDS
        }
    num_bytes, num_flops = cache_bytes(requests), flops(requests)
    if decodes:
        numbers = {"num_read": num_bytes, "predicted_us": num_bytes / 4300e3 + 18}
    else:
        numbers = {"num_flops": num_flops, "predicted_us": num_flops / 330e6 + 20}
    rows = [session.case(name, "", lambda: batch.attention(work), peers=peers, **numbers)]
    rows.append(session.case(f"{name}, with schedule", "", batch.attention, peers={}, **numbers))
    return rows


def run(session: Session) -> list[Row]:
    if session.dry_run:
        mixed = [(3, 9), (1, 20)]
        return [row for size in (4, 0) for row in measure(session, "mixed", mixed, size, False)]
    decodes = [(1, 4096), (1, 65536), (16, 1024), (16, 16384), (64, 4096), (256, 1024)]
    prefills = [(4, 4096)] if session.quick else [(16, 1024), (4, 4096), (1, 16384)]
    rows = []
    for place, page_size in PLACES.items():
        for size, length in decodes[4:] if session.quick else decodes:
            name = f"decode {size} x {length}, {place}"
            rows += measure(session, name, [(1, length)] * size, page_size, page_size == 0)
        for size, length in prefills:
            name = f"prefill {size} x {length}, {place}"
            rows += measure(session, name, [(length, length)] * size, page_size, page_size == 0)
    others = {
        "skewed: 65536 and 63 x 512": [(1, 65536)] + [(1, 512)] * 63,
        "chunked: 512 on 32768": [(512, 33280)],
        "mixed: 8 x 1024 and 120 x 4096": [(1024, 1024)] * 8 + [(1, 4096)] * 120,
        "its prefills": [(1024, 1024)] * 8,
        "its decodes": [(1, 4096)] * 120,
    }
    for name, requests in others.items():
        rows += measure(session, name, requests, 16, False)
    return rows
