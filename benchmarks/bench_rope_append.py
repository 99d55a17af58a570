"""The step from projection to attention in one launch, beside the separate kernels and a copy."""

from __future__ import annotations

from functools import partial

import ridgeline
import torch
from torch import Tensor

from . import formulas
from .bench_norm import EPS, predicted_us
from .bench_page import HEAD_DIM, HEADS, PAGE_SIZE, pool
from .session import Session
from .table import Row
from .timer import Call

TITLE = "RoPE and append, bf16 slices of one projection, 32 query and 8 key heads of 128"
PREDICTION = (
    "bytes / 4,280 GB/s + 6 us; up to 64 tokens three dependent loads, 2.5 us over an empty "
    "kernel and half the time of the separate kernels"
)
NUM_Q_HEADS = 32
THETA = 1e6
WIDTHS = [NUM_Q_HEADS * HEAD_DIM, HEADS * HEAD_DIM, HEADS * HEAD_DIM]


class Step:
    """One new token or many for each request, as slices of a projection's output."""

    def __init__(self, session: Session, tokens: int, norm: bool, kv_dtype: torch.dtype) -> None:
        device = session.device
        self.qkv = session.randn(tokens, sum(WIDTHS))
        self.q, self.k, self.v = (
            x.unflatten(1, (-1, HEAD_DIM)) for x in self.qkv.split(WIDTHS, dim=1)
        )
        batch = min(tokens, 64)
        new, length = tokens // batch, 1000 + tokens // batch
        pages_each = -(-length // PAGE_SIZE)
        self.cache = pool(session, batch * pages_each, kv_dtype)
        self.indices = torch.randperm(batch * pages_each, device=device).int()
        self.indptr = torch.arange(batch + 1, device=device).int() * pages_each
        self.last = torch.full((batch,), (length - 1) % PAGE_SIZE + 1, device=device).int()
        lens = torch.full((batch,), length, device=device).int()
        append_indptr = torch.arange(batch + 1, device=device).int() * new
        self.requests, self.positions = ridgeline.get_batch_indices_positions(
            append_indptr, lens, batch * new
        )
        self.weights = [session.randn(HEAD_DIM) for _ in range(2)] if norm else [None, None]
        first = self.indptr[self.requests.long()]
        self.pages = self.indices[first + self.positions // PAGE_SIZE].long()
        self.slots = (self.positions % PAGE_SIZE).long()

    def fused(self) -> Tensor:
        return ridgeline.rope_append_paged_kv_cache(
            self.q, self.k, self.v, self.requests, self.positions, self.cache, self.indices,
            self.indptr, q_weight=self.weights[0], k_weight=self.weights[1], rope_theta=THETA,
        )  # fmt: skip

    def separate(self) -> Tensor:
        q, k = self.q, self.k
        if self.weights[0] is not None and self.weights[1] is not None:
            q, k = ridgeline.rmsnorm(q, self.weights[0]), ridgeline.rmsnorm(k, self.weights[1])
            ridgeline.apply_rope_pos_ids_inplace(q, k, self.positions, rope_theta=THETA)
        else:
            q, k = ridgeline.apply_rope_pos_ids(q, k, self.positions, rope_theta=THETA)
        ridgeline.append_paged_kv_cache(
            k, self.v, self.requests, self.positions, self.cache, self.indices, self.indptr,
            self.last,
        )  # fmt: skip
        return q


def formula(
    q: Tensor, k: Tensor, v: Tensor, positions: Tensor, weights: list[Tensor | None],
    cache: Tensor, pages: Tensor, slots: Tensor,
) -> Tensor:  # fmt: skip
    q_weight, k_weight = weights
    if q_weight is not None and k_weight is not None:
        q, k = formulas.rmsnorm(q, q_weight, EPS), formulas.rmsnorm(k, k_weight, EPS)
    q, k = formulas.rope(q, k, positions, THETA)
    cache[:, 0].index_put_((pages, slots), k.to(cache.dtype))
    cache[:, 1].index_put_((pages, slots), v.to(cache.dtype))
    return q


def copy_of_the_bytes(source: Tensor) -> Call:
    target = torch.empty_like(source)

    def call() -> None:
        target.copy_(source)

    return call


def row(session: Session, tokens: int, norm: bool, kv_dtype: torch.dtype) -> Row:
    step = Step(session, tokens, norm, kv_dtype)
    peers = {"separate": lambda: step.separate}
    if kv_dtype == step.qkv.dtype:
        peers["torch.compile"] = formulas.compiled(
            formula, step.q, step.k, step.v, step.positions, step.weights, step.cache, step.pages,
            step.slots,
        )  # fmt: skip
        peers["copy"] = partial(copy_of_the_bytes, step.qkv)
    num_read = float(step.qkv.numel() * step.qkv.element_size())
    kept = step.q.numel() * step.q.element_size()
    num_written = kept + 2.0 * step.k.numel() * step.cache.element_size()
    kind = "qk-norm, " if norm else ""
    found = session.case(
        "rope_append_paged_kv_cache",
        f"[{tokens}, 32 + 8 + 8, 128] {kind}{str(kv_dtype).removeprefix('torch.')}",
        step.fused,
        peers=peers,
        num_read=num_read,
        num_written=num_written,
        predicted_us=6.9 if tokens <= 64 else predicted_us(num_read + num_written),
    )
    found.beside["separate, net"] = session.timer.net(step.separate)
    return found


def run(session: Session) -> list[Row]:
    rows = []
    for tokens in session.sizes([1, 64, 1024, 4096, 16384], [64, 16384], [3]):
        rows.append(row(session, tokens, True, torch.bfloat16))
        rows.append(row(session, tokens, False, torch.bfloat16))
        rows.append(row(session, tokens, True, torch.float8_e4m3fn))
    return rows
