"""Batches as serving has them: cascade, skewed, mixed and chunked ones, the schedule, invariance.

`attention` gets its work list, as all but one layer of a step do, unless a case says otherwise. The
goals follow from what the same kernels reach in the first two cases.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import ridgeline
import torch
from torch import Tensor

from .attention_batch import Batch, Requests, Shape, note_error, warm
from .session import Session
from .table import Row
from .timer import Call

TITLE = "Batches of a serving step, bf16, head_dim 128, 32/8 heads, page 16"
PREDICTION = (
    "skewed: its bytes / 4,500 GB/s + 12 us; mixed: the sum of its parts less 15 us; schedule: "
    "4 us; cascade: the prefix's operations at the prefill rate + 50 us; POD: 5% less than its "
    "parts one after the other; batch_invariant: 10%"
)
SHAPE = Shape(causal=True)
SKEWED = [(1, 65536)] + [(1, 512)] * 63
# Queries of the prefill, decodes and their keys.
PODS = [(2048, 64, 4096), (4096, 32, 1024), (8192, 64, 4096)]
PREFILLS, DECODES = [(1024, 1024)] * 8, [(1, 4096)] * 120
SCHEDULE_GOAL_US = 5.0
ROUNDS = 5


@dataclass
class Rates:
    """What the kernels reach on even batches: microseconds an operation and a byte."""

    prefill: float
    decode: float


def run(session: Session) -> list[Row]:
    warm(session.device, r"bfloat16.*HeadDims<128, 128>.*PagedKv<__nv_bfloat16>, StandardVariant")
    rows = even(session)
    prefill, decode = rows
    rates = Rates(prefill.us / prefill.num_flops, decode.us / decode.num_bytes)
    for part in (chunked, skewed, cascade):
        rows += part(session, rates)
    return [*rows, *pod(session), *mixed(session), *schedules(session), *invariance(session)]


def small(session: Session, requests: Requests) -> Requests:
    """The same kind of batch for a dry run."""
    if not session.dry_run:
        return requests
    kinds = list(dict.fromkeys(requests))
    return [(min(qo, 3), min(kv, 40 + kind)) for kind, (qo, kv) in enumerate(kinds)]


def timed(session: Session, name: str, requests: Requests, shape: Shape = SHAPE) -> Row:
    """A batch with its work list given."""
    batch = Batch.of(session, shape, small(session, requests))
    work = batch.schedule()
    decodes = batch.max_q_len == 1
    row = session.case(
        name,
        "",
        partial(batch.attention, work),
        peers={},
        num_read=batch.num_bytes if decodes else 0.0,
        num_flops=0.0 if decodes else batch.num_flops,
        net=False,
    )
    note_error(row, batch, batch.attention(work))
    return row


def even(session: Session) -> list[Row]:
    prefill = timed(
        session, "prefill 2 x 8192, full", [(8192, 8192)] * 2, replace(SHAPE, causal=False)
    )
    decode = timed(session, "decode 64 x 16384", [(1, 16384)] * 64)
    return [prefill, decode]


def chunked(session: Session, rates: Rates) -> list[Row]:
    """New tokens on a long cache, at 90% of the prefill rate."""
    name = "chunked prefill: 512 on 32768"
    if not session.wants(name):
        return []
    row = timed(session, name, [(512, 33280)])
    row.goal_us = row.num_flops * rates.prefill / 0.9
    return [row]


def mixed(session: Session) -> list[Row]:
    """Prefills beside decodes, against the two kinds one after the other."""
    name = "mixed: 8 x 1024 beside 120 x 4096"
    if not session.wants(name):
        return []
    both = timed(session, name, PREFILLS + DECODES)
    parts = [timed(session, "its prefills", PREFILLS), timed(session, "its decodes", DECODES)]
    batches = [Batch.of(session, SHAPE, small(session, part)) for part in (PREFILLS, DECODES)]
    works = [batch.schedule() for batch in batches]

    def one_by_one() -> None:
        for batch, work in zip(batches, works, strict=True):
            batch.attention(work)

    both.goal_us = both.peers["one after the other"] = session.timer.time(one_by_one)
    return [both, *parts]


def skewed(session: Session, rates: Rates) -> list[Row]:
    """One long request among short ones, within 15% of what its bytes need."""
    name = "skewed: 65536 and 63 x 512"
    if not session.wants(name):
        return []
    row = timed(session, name, SKEWED)
    row.goal_us = 1.15 * row.num_bytes / 4500e3
    row.beside["its bytes at the decode rate"] = row.num_bytes * rates.decode
    return [row]


@dataclass
class Cascade:
    """Decodes that share a prefix in one pool, as two levels and as flat page tables."""

    flat: Batch
    shared: Batch  # all queries as one request over the prefix
    own: Batch

    @classmethod
    def of(cls, session: Session, prefix_len: int, size: int, own_len: int) -> Cascade:
        pages_own, pages_shared = own_len // SHAPE.page_size, prefix_len // SHAPE.page_size
        pages = torch.randperm(
            pages_shared + size * pages_own, device=session.device, dtype=torch.int32
        )
        first, rest = pages[:pages_shared].clone(), pages[pages_shared:].clone()
        every = (first.expand(size, -1), rest.view(size, pages_own))
        table = torch.cat(every, 1).flatten().contiguous()
        rows = (len(pages), SHAPE.page_size, SHAPE.heads[1], SHAPE.head_dims[0])
        kv = (session.randn(*rows), session.randn(*rows))
        prefix = replace(SHAPE, causal=False)
        decodes = [(1, prefix_len + own_len)] * size
        flat = Batch.of(session, SHAPE, decodes, pages=(table, kv))
        shared = Batch.of(session, prefix, [(size, prefix_len)], pages=(first, kv))
        own = Batch.of(session, SHAPE, [(1, own_len)] * size, pages=(rest, kv))
        shared.q = own.q = flat.q
        return cls(flat, shared, own)

    def ops(self) -> Call:
        """A launch for each level and a merge."""
        works = self.shared.schedule(), self.own.schedule()

        def call() -> Tensor:
            out, lse = with_lse(self.own, works[1])
            ridgeline.merge_state_in_place(out, lse, *with_lse(self.shared, works[0]))
            return out

        return call

    def wrapper(self) -> Call:
        """Both levels in one launch, and a merge."""
        levels = (self.shared, self.own)
        size = len(self.flat.requests)
        starts = torch.arange(size + 1, dtype=torch.int32, device=self.flat.q.device)
        wrapper = ridgeline.MultiLevelCascadeAttentionWrapper(2, device=self.flat.q.device)
        tables = [
            [level.index[name] for level in levels]
            for name in ("kv_indptr", "kv_indices", "kv_last_page_len")
        ]
        wrapper.plan(
            [starts[[0, size]], starts], tables[0], tables[1], tables[2], SHAPE.heads[0],
            SHAPE.heads[1], SHAPE.head_dims[0], SHAPE.page_size, causal=True,
            q_data_type=self.flat.q.dtype, max_q_len=1,
        )  # fmt: skip
        works = wrapper.schedule(size)
        return lambda: wrapper.run(self.flat.q, self.flat.kv, schedule=works)


def with_lse(batch: Batch, work: Tensor) -> tuple[Tensor, Tensor]:
    index: dict[str, Any] = dict(batch.index)
    both: tuple[Tensor, Tensor] = ridgeline.attention(
        batch.q, batch.kv, causal=batch.shape.causal, max_q_len=batch.max_q_len, schedule=work,
        return_lse=True, **index,
    )  # fmt: skip
    return both


def cascade(session: Session, rates: Rates) -> list[Row]:
    """A shared prefix, within 15% of the time of its products at the prefill rate."""
    name = "cascade: 256 x (32768 shared + 128)"
    if not session.wants(name):
        return []
    case = Cascade.of(session, *((32, 3, 16) if session.dry_run else (32768, 256, 128)))
    flat, works = case.flat, (case.flat.schedule(), case.shared.schedule(), case.own.schedule())
    rows = []
    for text, call in ((f"{name}, ops", case.ops()), (f"{name}, wrapper", case.wrapper())):
        row = session.case(
            text,
            "",
            call,
            peers={"flat paging": lambda: lambda: flat.attention(works[0])},
            num_flops=case.shared.num_flops + case.own.num_flops,
            net=False,
        )
        row.goal_us = 1.15 * case.shared.num_flops * rates.prefill
        note_error(row, flat, call())  # type: ignore[arg-type]
        rows.append(row)
    for text, part, work in (
        ("its prefix", case.shared, works[1]),
        ("its rest", case.own, works[2]),
    ):
        call = partial(with_lse, part, work)
        flops = part.num_flops
        rows.append(session.case(text, "", call, peers={}, num_flops=flops, net=False))
    return rows


def pod(session: Session) -> list[Row]:
    """One prefill over dense keys beside decodes, in one launch, against one after the other."""
    rows = []
    for length, size, kv_len in PODS:
        name = f"POD: {length} dense beside {size} x {kv_len}"
        if not session.wants(name):
            continue
        prefill_shape = replace(SHAPE, place="ragged")
        prefill = Batch.of(session, prefill_shape, small(session, [(length, length)]))
        decode = Batch.of(session, SHAPE, small(session, [(1, kv_len)] * size))
        work = decode.schedule()
        row = session.case(name, "", pod_call(prefill, decode), peers={}, net=False)
        row.goal_us = row.peers["one after the other"] = session.timer.time(
            partial(one_by_one, prefill, decode, work)
        )
        for batch, out in zip((prefill, decode), pod_call(prefill, decode)(), strict=True):
            note_error(row, batch, out)
        rows.append(row)
    return rows


def pod_call(prefill: Batch, decode: Batch) -> Callable[[], tuple[Tensor, Tensor]]:
    wrapper = ridgeline.PODWithPagedKVCacheWrapper(device=decode.q.device)
    index, shape = decode.index, decode.shape
    table = (index["kv_indptr"], index["kv_indices"], index["kv_last_page_len"])
    wrapper.plan(*table, *shape.heads, shape.head_dims[0], shape.page_size, q_data_type=shape.dtype)
    lengths = (len(prefill.q), len(prefill.kv[0]))
    work = wrapper.schedule(*lengths, causal_p=True)

    def call() -> Any:
        return wrapper.run(
            prefill.q, *prefill.kv, decode.q, decode.kv, causal_p=True, schedule=work
        )

    return call


def one_by_one(prefill: Batch, decode: Batch, work: Tensor) -> None:
    ridgeline.single_prefill_with_kv_cache(prefill.q, *prefill.kv, causal=True)
    decode.attention(work)


def with_schedule(batch: Batch) -> Tensor:
    return batch.attention(batch.schedule())


def schedules(session: Session) -> list[Row]:
    """A graph with the schedule minus the same graph without."""
    batches = {
        "1 x 4096": [(1, 4096)],
        "64 x 4096": [(1, 4096)] * 64,
        "256 x 1024": [(1, 1024)] * 256,
        "skewed": SKEWED,
        "mixed": PREFILLS + DECODES,
    }
    rows = []
    for name, requests in batches.items():
        if not session.wants(f"schedule {name}"):
            continue
        batch = Batch.of(session, SHAPE, small(session, requests))
        work = batch.schedule()
        # Why in turns: the clock of a GPU drifts by more than a schedule takes.
        times = [
            (
                session.timer.time(partial(batch.attention, work)),
                session.timer.time(partial(with_schedule, batch)),
            )
            for _ in range(ROUNDS)
        ]
        us = statistics.median(both - alone for alone, both in times)
        row = Row("schedule", name, us=us, goal_us=SCHEDULE_GOAL_US)
        row.beside = {"without": times[0][0], "with": times[0][1]}
        rows.append(row)
    return rows


def invariance(session: Session) -> list[Row]:
    """What batch_invariant=True costs."""
    batches = {"64 x 4096": [(1, 4096)] * 64, "skewed": SKEWED, "mixed": PREFILLS + DECODES}
    rows = []
    for name, requests in batches.items():
        if not session.wants(f"batch_invariant {name}"):
            continue
        plain = timed(session, f"plain {name}", requests)
        row = timed(session, f"batch_invariant {name}", requests, replace(SHAPE, invariant=True))
        row.peers["plain"] = plain.us
        rows.append(row)
    return rows
