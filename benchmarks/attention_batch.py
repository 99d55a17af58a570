"""The batches that the attention benchmarks measure: lengths, memory, the call, a check."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import ridgeline
import torch
from ridgeline import compiler
from torch import Tensor

from . import formulas
from .session import MAX_DIFFERENCE, Facts, Session
from .table import Row
from .timer import Call

PAGE_SIZES = {"page 16": 16, "page 1": 1}
MAX_CHECKED_QUERIES = 64
Requests = Sequence[tuple[int, int]]  # (qo_len, kv_len) of each


def whole_pages(length: int) -> int:
    """Tokens of the largest pages that hold so many."""
    size = max(PAGE_SIZES.values())
    return -(-length // size) * size


class Memory:
    """Keys and values of every case, allocated and filled once, viewed in each case's shape."""

    def __init__(self, session: Session, num_elements: int) -> None:
        self.flat = [
            torch.empty(num_elements, dtype=torch.bfloat16, device=session.device).normal_()
            for _ in range(2)
        ]

    def take(self, k_shape: Sequence[int], v_shape: Sequence[int]) -> tuple[Tensor, Tensor]:
        k, v = (
            flat[: torch.Size(shape).numel()].view(list(shape))
            for flat, shape in zip(self.flat, (k_shape, v_shape), strict=True)
        )
        return k, v


@dataclass(frozen=True)
class Shape:
    """What a batch has beside its lengths."""

    heads: tuple[int, int] = (32, 8)  # query, kv
    head_dims: tuple[int, int] = (128, 128)
    place: str = "page 16"  # or "page 1", "ragged", "padded"
    causal: bool = True
    window_left: int = -1
    invariant: bool = False
    dtype: torch.dtype = torch.bfloat16
    options: dict[str, Any] = field(default_factory=dict)  # more of ridgeline.attention

    @property
    def page_size(self) -> int:
        return PAGE_SIZES.get(self.place, 0)


@dataclass
class Batch:
    """Requests over one cache."""

    shape: Shape
    requests: Requests
    q: Tensor
    kv: tuple[Tensor, Tensor]
    index: dict[str, Tensor]

    @classmethod
    def of(
        cls,
        session: Session,
        shape: Shape,
        requests: Requests,
        memory: Memory | None = None,
        pages: tuple[Tensor, tuple[Tensor, Tensor]] | None = None,
    ) -> Batch:
        """Random queries; keys of their own, views of `memory`, or the given table and pool."""

        def ints(values: Sequence[int]) -> Tensor:
            return torch.tensor(values, dtype=torch.int32).to(session.device)

        def starts(counts: Sequence[int]) -> Tensor:
            return ints([0, *itertools.accumulate(counts)])

        qo_lens, kv_lens = [qo for qo, _ in requests], [kv for _, kv in requests]
        q = session.randn(sum(qo_lens), shape.heads[0], shape.head_dims[0], dtype=shape.dtype)
        index = {} if max(qo_lens) == 1 else {"qo_indptr": starts(qo_lens)}
        rows: list[int]
        if shape.page_size:
            size = shape.page_size
            counts = [-(-length // size) for length in kv_lens]
            total = sum(counts)
            index["kv_indptr"] = starts(counts)
            index["kv_last_page_len"] = ints([(n - 1) % size + 1 if n else 0 for n in kv_lens])
            index["kv_indices"] = (
                torch.randperm(total, device=session.device, dtype=torch.int32)
                if pages is None
                else pages[0]
            )
            rows = [total, size]
        elif shape.place == "ragged":
            index["kv_indptr"] = starts(kv_lens)
            rows = [sum(kv_lens)]
        else:
            index["kv_lens"] = ints(kv_lens)
            rows = [len(requests), max(kv_lens)]
        shapes = [[*rows, shape.heads[1], dim] for dim in shape.head_dims]
        if pages is not None:
            kv = pages[1]
        elif memory is not None:
            kv = memory.take(shapes[0], shapes[1])
        else:
            k, v = (session.randn(*dims, dtype=shape.dtype) for dims in shapes)
            kv = (k, v)
        return cls(shape, requests, q, kv, index)

    @property
    def max_q_len(self) -> int:
        return max(qo for qo, _ in self.requests)

    def schedule(self) -> Tensor:
        index = {name: t for name, t in self.index.items() if name != "kv_indices"}
        shape = self.shape
        return ridgeline.schedule(
            **index, page_size=shape.page_size or None, num_qo_tokens=self.q.shape[0],
            num_qo_heads=shape.heads[0], num_kv_heads=shape.heads[1],
            head_dim_qk=shape.head_dims[0], head_dim_vo=shape.head_dims[1], causal=shape.causal,
            window_left=shape.window_left, max_q_len=self.max_q_len,
            batch_invariant=shape.invariant,
        )  # fmt: skip

    def attention(self, schedule: Tensor | None = None) -> Tensor:
        shape = self.shape
        options: dict[str, Any] = {**self.index, **shape.options}
        out: Tensor = ridgeline.attention(
            self.q, self.kv, causal=shape.causal, window_left=shape.window_left,
            max_q_len=self.max_q_len, batch_invariant=shape.invariant, schedule=schedule,
            **options,
        )  # fmt: skip
        return out

    def dense(self) -> tuple[Tensor, Tensor, Tensor]:
        """q, k and v as [batch_size, length, heads, head_dim], for requests of equal lengths."""
        qo_len, kv_len = self.requests[0]
        q = self.q.view(len(self.requests), qo_len, *self.q.shape[1:])
        k, v = (t.view(len(self.requests), kv_len, *t.shape[-2:]) for t in self.kv)
        return q, k, v

    def peers(self, *, dense: bool) -> dict[str, Callable[[], Call]]:
        """What else runs here: torch's kernels where `dense`, FlashAttention-3 if it is there."""
        found: dict[str, Callable[[], Call]] = {}
        if dense:
            for name in formulas.BACKENDS:
                found[name] = formulas.sdpa_batch(name, *self.dense(), causal=self.shape.causal)
        if formulas.flash_attention_3() is not None:
            found["FlashAttention-3"] = self._flash_attention_3
        return found

    def _flash_attention_3(self) -> Call:
        """On the same cache, for requests of equal lengths."""
        op = formulas.flash_attention_3()
        assert op is not None
        qo_len, kv_len = self.requests[0]
        options: dict[str, Any] = {"is_causal": self.shape.causal}
        q, (k, v) = self.q, self.kv
        if self.shape.place == "ragged":
            starts = self.index["kv_indptr"] // kv_len
            options |= {"cu_seqlens_q": starts * qo_len, "cu_seqlens_k": self.index["kv_indptr"]}
            options |= {"max_seqlen_q": qo_len, "max_seqlen_k": kv_len}
        else:
            q = q.view(len(self.requests), qo_len, *q.shape[1:])
        if self.shape.page_size:
            lens = [kv for _, kv in self.requests]
            options["page_table"] = self.index["kv_indices"].view(len(lens), -1)
            options["seqused_k"] = torch.tensor(lens, dtype=torch.int32, device=q.device)
        return lambda: op(q, k, v, **options)[0].flatten(0, -3)

    @property
    def num_flops(self) -> float:
        """Multiplications and additions of the two products that the mask lets through."""
        pairs = sum(self._visible(qo, kv) for qo, kv in self.requests)
        return 2.0 * pairs * self.shape.heads[0] * sum(self.shape.head_dims)

    def _visible(self, qo_len: int, kv_len: int) -> int:
        left = self.shape.window_left
        if not self.shape.causal and left < 0:
            return qo_len * kv_len
        total = 0
        for diagonal in range(kv_len - qo_len, kv_len):
            begin = max(0, diagonal - left) if left >= 0 else 0
            total += max(0, (diagonal + 1 if self.shape.causal else kv_len) - begin)
        return total

    @property
    def num_bytes(self) -> float:
        """Of the keys and values."""
        row = sum(self.shape.head_dims) * self.shape.heads[1] * self.shape.dtype.itemsize
        return float(row * sum(kv for _, kv in self.requests))

    def keys_and_values(self, request: int) -> tuple[Tensor, Tensor]:
        """One request's, as [kv_len, num_kv_heads, head_dim]."""
        length = self.requests[request][1]
        k, v = self.kv
        if self.shape.place == "padded":
            return k[request, :length], v[request, :length]
        begin, end = self.index["kv_indptr"][request : request + 2].tolist()
        if self.shape.place == "ragged":
            return k[begin:end], v[begin:end]
        pages = self.index["kv_indices"][begin:end].long()
        k, v = (pool[pages].flatten(0, 1)[:length] for pool in (k, v))
        return k, v

    def error(self, out: Tensor) -> float:
        """Of the last queries of the first and of the last request, against float32."""
        worst = 0.0
        for request in dict.fromkeys((0, len(self.requests) - 1)):
            qo_len, kv_len = self.requests[request]
            end = sum(qo for qo, _ in self.requests[: request + 1])
            rows = slice(end - min(qo_len, MAX_CHECKED_QUERIES), end)
            exact = self._reference(self.q[rows], *self.keys_and_values(request))
            difference = (out[rows].float() - exact).norm() / exact.norm().clamp_min(1e-20)
            worst = max(worst, float(difference) if kv_len else float(out[rows].abs().max()))
        return worst

    def _reference(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attention of a request's last queries [n, num_qo_heads, head_dim] in float32."""
        shape, (num, kv_len) = self.shape, (len(q), len(k))
        group = shape.heads[0] // shape.heads[1]
        queries = q.float().view(num, shape.heads[1], group, -1).permute(1, 2, 0, 3).flatten(1, 2)
        logits = queries @ k.float().permute(1, 2, 0) * shape.head_dims[0] ** -0.5
        cap = shape.options.get("logits_soft_cap")
        if cap:
            logits = cap * torch.tanh(logits / cap)
        key = torch.arange(kv_len, device=q.device)
        diagonal = torch.arange(kv_len - num, kv_len, device=q.device).repeat(group).unsqueeze(1)
        hidden = key > diagonal if shape.causal else torch.zeros_like(key > diagonal)
        if shape.window_left >= 0:
            hidden |= key < diagonal - shape.window_left
        out = logits.masked_fill_(hidden, -torch.inf).softmax(-1) @ v.float().transpose(0, 1)
        rows: Tensor = out.view(shape.heads[1], group, num, -1).permute(2, 0, 1, 3).flatten(1, 2)
        return rows


def note_error(row: Row, batch: Batch, out: Tensor) -> None:
    """Keep a result's error in its row; a large one makes the run fail."""
    error = batch.error(out)
    row.difference = max(error, row.difference or 0.0)
    if not error < MAX_DIFFERENCE:
        row.notes.append(f"WRONG: {row.op} {row.case} differs from float32 by {error:.1e}")


def kernel_names(arch: str, pattern: str) -> list[str]:
    """The kernels of `attention` whose names match, and those that all of its calls launch."""
    names = {
        row.kernel
        for row in compiler.library().core_table
        if row.op in ("attention", "attention_full", "attention_schedule") and row.serves(arch)
    }
    return sorted(name for name in names if "HeadDims" not in name or re.search(pattern, name))


def warm(device: torch.device, pattern: str) -> None:
    """Compile `kernel_names` on all cores."""
    if device.type == "cuda":
        arch = compiler.library().driver_report()["devices"][device.index or 0]["arch"]
        ridgeline.warmup(kernel_names(arch, pattern), progress=False)


def measure_places(
    session: Session,
    memory: Memory,
    name: tuple[str, str],
    shapes: Sequence[Shape],
    requests: Requests,
    expected: Callable[[Batch], Facts],
    add_peers: Callable[[Row, str, dict[str, float]], None],
) -> list[Row]:
    """A cell, `name` = (op, case), in each form of cache, the first of which torch's kernels know.

    `expected` gives what a batch moves or computes and the predicted time, for `Session.entry`.
    `add_peers` is given the row, whose peers are portable ones and whose `beside` holds the others,
    the form of cache, and the times of torch's kernels.
    """
    op, case = name
    entries = []
    for shape in shapes:
        first = shape is shapes[0]
        if not first and not session.wants(f"{op} {case}, {shape.place}"):
            continue
        batch = Batch.of(session, shape, requests, memory)
        work = batch.schedule()
        facts = expected(batch)
        facts["peers"] = batch.peers(dense=first)
        call = partial(batch.attention, work)
        entry = session.entry(op, f"{case}, {shape.place}", call, **facts)
        note_error(entry.row, batch, batch.attention(work))
        entries.append((shape.place, entry))
    rows = session.measure([entry for _, entry in entries])
    running = {peer: us for peer, us in rows[0].peers.items() if peer in formulas.BACKENDS}
    for (place, _), row in zip(entries, rows, strict=True):
        measured = running | row.peers
        row.peers = {peer: us for peer, us in measured.items() if peer == "flash"}
        row.beside = {peer: us for peer, us in measured.items() if peer != "flash"}
        add_peers(row, place, running)
    return rows
