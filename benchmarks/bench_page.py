"""Appending to a paged cache beside an indexed write of torch, copies of pages, packed masks."""

from __future__ import annotations

from functools import partial

import ridgeline
import torch
from torch import Tensor

from .bench_norm import predicted_us
from .session import Session
from .table import Row
from .timer import Call

TITLE = "Paged KV cache, 8 heads of 128, page size 16; masks of bits"
PREDICTION = (
    "bytes / 4,280 GB/s + 6 us; one token at batch 64: three dependent loads, 2.5 us over an empty "
    "kernel; pages to host memory: bytes / 50 GB/s"
)
HEADS, HEAD_DIM, PAGE_SIZE = 8, 128, 16
HOST_GBPS = 50.0


def pool(session: Session, num_pages: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    shape = (num_pages, 2, PAGE_SIZE, HEADS, HEAD_DIM)
    return torch.zeros(shape, dtype=dtype, device=session.device)


def indexed_write(cache: Tensor, key: Tensor, value: Tensor, pages: Tensor, slots: Tensor) -> Call:
    """What torch alone does when it is told the pages and slots."""
    keys, values = cache[:, 0], cache[:, 1]

    def call() -> None:
        keys.index_put_((pages, slots), key)
        values.index_put_((pages, slots), value)

    return call


def append_row(session: Session, batch: int, new: int, kv_dtype: torch.dtype) -> Row:
    """`new` tokens for each of `batch` requests that had 1000."""
    device, length = session.device, 1000 + new
    pages_each = -(-length // PAGE_SIZE)
    cache = pool(session, batch * pages_each, kv_dtype)
    indices = torch.randperm(batch * pages_each, device=device).int()
    indptr = torch.arange(batch + 1, device=device).int() * pages_each
    last = torch.full((batch,), (length - 1) % PAGE_SIZE + 1, device=device).int()
    append_indptr = torch.arange(batch + 1, device=device).int() * new
    lens = torch.full((batch,), length, device=device).int()
    requests, positions = ridgeline.get_batch_indices_positions(append_indptr, lens, batch * new)
    key, value = (session.randn(batch * new, HEADS, HEAD_DIM) for _ in range(2))
    pages = indices[indptr[requests.long()] + positions // PAGE_SIZE].long()
    peers = {}
    if kv_dtype == key.dtype:
        write = partial(indexed_write, cache, key, value, pages, (positions % PAGE_SIZE).long())
        peers["index_put_"] = write
    num_read = 2.0 * key.numel() * key.element_size()
    num_written = 2.0 * key.numel() * cache.element_size()
    small = num_read < 1 << 20
    return session.case(
        "append_paged_kv_cache",
        f"[{batch} x {new}, 8, 128] {str(kv_dtype).removeprefix('torch.')}",
        lambda: ridgeline.append_paged_kv_cache(
            key, value, requests, positions, cache, indices, indptr, last
        ),
        peers=peers,
        num_read=num_read,
        num_written=num_written,
        predicted_us=6.9 if small else predicted_us(num_read + num_written),
    )


def copy_row(session: Session, count: int, to: str) -> Row:
    source, pages = pool(session, 2 * count), torch.arange(count, device=session.device).int()
    target, target_pages = pool(session, 2 * count), pages + count
    if to == "host":
        target = torch.zeros(target.shape, dtype=target.dtype)
        target = target if session.dry_run else target.pin_memory()
    size = source.numel() * source.element_size() / 2
    return session.case(
        "copy_pages",
        f"{count} pages to {to}",
        lambda: ridgeline.copy_pages(source, target, pages, target_pages),
        peers={},
        num_read=size,
        num_written=size,
        predicted_us=predicted_us(2 * size) if to == "device" else size / HOST_GBPS / 1e3 + 6,
    )


def number_rows(session: Session, batch: int) -> list[Row]:
    device = session.device
    indptr = torch.arange(batch + 1, device=device).int()
    lens = torch.full((batch,), 16, device=device).int()
    return [
        session.case(
            "get_batch_indices_positions",
            f"{batch} requests, {batch} tokens",
            lambda: ridgeline.get_batch_indices_positions(indptr, lens, batch),
            peers={},
        ),
        session.case(
            "get_seq_lens",
            f"{batch} requests",
            lambda: ridgeline.get_seq_lens(indptr, lens, 16),
            peers={},
        ),
    ]


def packbits_rows(session: Session, num_bits: int) -> list[Row]:
    x = session.randn(num_bits) > 0
    indptr = torch.linspace(0, num_bits, 65, device=session.device).int()
    read, written = float(num_bits), num_bits / 8
    return [
        session.case(
            "packbits",
            f"{num_bits} bits",
            lambda: ridgeline.packbits(x, "little"),
            peers={},
            num_read=read,
            num_written=written,
            predicted_us=predicted_us(read + written),
        ),
        session.case(
            "segment_packbits",
            f"{num_bits} bits, 64 segments",
            lambda: ridgeline.segment_packbits(x, indptr, "little"),
            peers={},
            num_read=read,
            num_written=written,
            predicted_us=predicted_us(read + written) + 3,
        ),
    ]


def run(session: Session) -> list[Row]:
    rows = []
    for batch in session.sizes([1, 64, 256], [64], [2]):
        rows.append(append_row(session, batch, 1, torch.bfloat16))
    for new in session.sizes([16, 256, 1024], [1024], [3]):
        rows.append(append_row(session, 16, new, torch.bfloat16))
        rows.append(append_row(session, 16, new, torch.float8_e4m3fn))
    for count in session.sizes([16, 1024], [1024], [2]):
        rows.append(copy_row(session, count, "device"))
        rows.append(copy_row(session, count, "host"))
    for batch in session.sizes([64, 512], [64], [2]):
        rows += number_rows(session, batch)
    for num_bits in session.sizes([1 << 16, 1 << 24, 1 << 28], [1 << 24], [1000]):
        rows += packbits_rows(session, num_bits)
    return rows
