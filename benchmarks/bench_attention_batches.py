"""Batches as serving has them: cascade, skewed, mixed and chunked ones, the schedule, invariance.

`attention` gets its work list, as all but one layer of a step do, unless a case says otherwise. The
goals follow from what the same kernels reach on even batches, measured in turns with them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import ridgeline
import torch
from torch import Tensor

from .attention_batch import Batch, Requests, Shape, note_error, warm
from .session import Entry, Session
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
CHUNKED = "chunked prefill: 512 on 32768"
CASCADE = "cascade: 256 x (32768 shared + 128)"
CHUNKED_SHARE, CASCADE_EXCESS, SKEWED_EXCESS = 0.9, 1.15, 1.15


def run(session: Session) -> list[Row]:
    warm(session.device, r"bfloat16.*HeadDims<128, 128>.*PagedKv<__nv_bfloat16>, StandardVariant")
    rows: list[Row] = []
    for part in (prefills, decodes, pod, mixed, schedules, invariance):
        rows += part(session)
    return rows


def small(session: Session, requests: Requests) -> Requests:
    """The same kind of batch for a dry run."""
    if not session.dry_run:
        return requests
    kinds = list(dict.fromkeys(requests))
    return [(min(qo, 3), min(kv, 40 + kind)) for kind, (qo, kv) in enumerate(kinds)]


def entry(session: Session, name: str, requests: Requests, shape: Shape = SHAPE) -> Entry:
    """A batch with its work list given."""
    batch = Batch.of(session, shape, small(session, requests))
    work = batch.schedule()
    only_decodes = batch.max_q_len == 1
    found = session.entry(
        name,
        "",
        partial(batch.attention, work),
        num_read=batch.num_bytes if only_decodes else 0.0,
        num_flops=0.0 if only_decodes else batch.num_flops,
    )
    note_error(found.row, batch, batch.attention(work))
    return found


def prefills(session: Session) -> list[Row]:
    """The prefill rate; new tokens on a long cache, and a shared prefix, which have to reach it."""
    full = replace(SHAPE, causal=False)
    entries = [entry(session, "prefill 2 x 8192, full", [(8192, 8192)] * 2, full)]
    if session.wants(CHUNKED):
        entries.append(entry(session, CHUNKED, [(512, 33280)]))
    if session.wants(CASCADE):
        case = Cascade.of(session, *((32, 3, 16) if session.dry_run else (32768, 256, 128)))
        entries += case.entries(session)
    rows = session.measure(entries)
    us_per_flop = rows[0].us / rows[0].num_flops
    for row in rows:
        if row.op == CHUNKED:
            row.goal_us = row.num_flops * us_per_flop / CHUNKED_SHARE
        elif row.op.startswith(CASCADE):
            row.goal_us = CASCADE_EXCESS * case.shared.num_flops * us_per_flop
    return rows


def decodes(session: Session) -> list[Row]:
    """The decode rate; one long request among short ones, which has to come near it."""
    entries = [entry(session, "decode 64 x 16384", [(1, 16384)] * 64)]
    if session.wants("skewed: 65536 and 63 x 512"):
        entries.append(entry(session, "skewed: 65536 and 63 x 512", SKEWED))
    even, *rest = session.measure(entries)
    for row in rest:
        needed_us = even.us * row.num_bytes / even.num_bytes
        row.goal_us = SKEWED_EXCESS * needed_us
        row.beside["its bytes at the decode rate"] = needed_us
        row.beside["its bytes at 4,500 GB/s"] = row.num_bytes / 4500e3
    return [even, *rest]


def mixed(session: Session) -> list[Row]:
    """Prefills beside decodes, against the two kinds one after the other."""
    name = "mixed: 8 x 1024 beside 120 x 4096"
    if not session.wants(name):
        return []
    parts = [
        entry(session, "its prefills", PREFILLS),
        entry(session, "its decodes", DECODES),
    ]
    both = entry(session, name, PREFILLS + DECODES)
    apart = partial(in_turn, [part.call for part in parts])
    both.peers["one after the other"] = session.timer.prepare(apart)
    both_row, *rows = session.measure([both, *parts])
    both_row.goal_us = both_row.peers["one after the other"]
    return [both_row, *rows]


def in_turn(calls: Sequence[Call]) -> None:
    for call in calls:
        call()


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

    def entries(self, session: Session) -> list[Entry]:
        """By ops and by the wrapper, and the levels alone."""
        works = [batch.schedule() for batch in (self.flat, self.shared, self.own)]
        found = []
        for name, call in (("ops", self.ops()), ("wrapper", self.wrapper())):
            found.append(
                session.entry(
                    f"{CASCADE}, {name}",
                    "",
                    call,
                    peers={"flat paging": lambda: partial(self.flat.attention, works[0])},
                    num_flops=self.shared.num_flops + self.own.num_flops,
                )
            )
            note_error(found[-1].row, self.flat, call())  # type: ignore[arg-type]
        for name, part, work in (
            ("its prefix", self.shared, works[1]),
            ("its rest", self.own, works[2]),
        ):
            call = partial(with_lse, part, work)
            found.append(session.entry(name, "", call, num_flops=part.num_flops))
        return found


def with_lse(batch: Batch, work: Tensor) -> tuple[Tensor, Tensor]:
    index: dict[str, Any] = dict(batch.index)
    both: tuple[Tensor, Tensor] = ridgeline.attention(
        batch.q, batch.kv, causal=batch.shape.causal, max_q_len=batch.max_q_len, schedule=work,
        return_lse=True, **index,
    )  # fmt: skip
    return both


def pod(session: Session) -> list[Row]:
    rows = []
    for length, size, kv_len in PODS:
        name = f"POD: {length} dense beside {size} x {kv_len}"
        if session.wants(name):
            prefill_shape = replace(SHAPE, place="ragged")
            prefill = Batch.of(session, prefill_shape, small(session, [(length, length)]))
            decode = Batch.of(session, SHAPE, small(session, [(1, kv_len)] * size))
            rows.append(pod_case(session, name, prefill, decode))
    return rows


def pod_case(session: Session, name: str, prefill: Batch, decode: Batch) -> Row:
    """A prefill over dense keys beside decodes, in one launch, against one after the other."""
    call = pod_call(prefill, decode)
    apart = partial(one_by_one, prefill, decode, decode.schedule())
    row = session.case(name, "", call, peers={"one after the other": lambda: apart}, net=False)
    row.goal_us = row.peers["one after the other"]
    for batch, out in zip((prefill, decode), call(), strict=True):
        note_error(row, batch, out)
    return row


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
        calls = [partial(batch.attention, batch.schedule()), partial(with_schedule, batch)]
        alone, both = session.timer.together([session.timer.prepare(call) for call in calls])
        row = Row("schedule", name, us=both - alone, goal_us=SCHEDULE_GOAL_US)
        row.beside = {"without": alone, "with": both}
        rows.append(row)
    return rows


def invariance(session: Session) -> list[Row]:
    """What batch_invariant=True costs."""
    batches = {"64 x 4096": [(1, 4096)] * 64, "skewed": SKEWED, "mixed": PREFILLS + DECODES}
    rows = []
    for name, requests in batches.items():
        if not session.wants(f"batch_invariant {name}"):
            continue
        plain = entry(session, f"plain {name}", requests)
        invariant = replace(SHAPE, invariant=True)
        row = entry(session, f"batch_invariant {name}", requests, invariant)
        us = session.measure([row, plain])[1].us
        row.row.peers["plain"] = us
        rows.append(row.row)
    return rows
