"""Paged caches for tests: pools of random bytes in every memory layout, page tables with garbage
past their ends, and where a token must go, worked out one token at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

POOL_KINDS = ("pair", "stacked", "layers", "unaligned", "gaps")
PAGE_SIZES = (1, 3, 5, 16, 17, 64, 256)
Cache = Tensor | tuple[Tensor, ...]


@dataclass
class Pool:
    """A buffer of bytes and a paged cache inside it; everything else in the buffer is garbage."""

    buffer: Tensor
    view: Callable[[Tensor], Cache]

    @property
    def cache(self) -> Cache:
        """The cache as the ops take it."""
        return self.view(self.buffer)

    @property
    def pair(self) -> tuple[Tensor, ...]:
        cache = self.cache
        return (cache[:, 0], cache[:, 1]) if isinstance(cache, Tensor) else cache

    def clone(self) -> Pool:
        return Pool(self.buffer.clone(), self.view)

    def to(self, device: torch.device) -> Pool:
        return Pool(self.buffer.to(device, copy=True), self.view)

    def same_bytes(self, other: Pool) -> bool:
        return torch.equal(self.buffer.cpu(), other.buffer.cpu())


def random_bytes(size: int, rng: torch.Generator) -> Tensor:
    return torch.randint(0, 256, (size,), dtype=torch.uint8, generator=rng)


def make_pool(
    shapes: Sequence[tuple[int, ...]], dtype: torch.dtype, kind: str, rng: torch.Generator
) -> Pool:
    """A pool of keys and values of the two shapes on the CPU. "stacked" is one 5-D tensor, "layers"
    one that skips over two other layers' pages; both need the shapes alike. "unaligned" begins one
    element past 16 bytes; "gaps" has odd strides."""
    first, second = shapes
    sizes = [torch.Size(shape).numel() for shape in shapes]
    whole = 6 * max(sizes) + 1024

    def stacked(buffer: Tensor) -> Cache:
        return buffer.view(dtype)[: 2 * sizes[0]].view(first[0], 2, *first[1:])

    def layers(buffer: Tensor) -> Cache:
        flat = buffer.view(dtype)[: 6 * sizes[0]]
        return flat.view(first[0], 3, 2, *first[1:])[:, 1]

    def pair(buffer: Tensor) -> Cache:
        flat, start = buffer.view(dtype), 1 if kind == "unaligned" else 0
        begin = (start + sizes[0] + 15) // 16 * 16 + start
        return (
            flat[start : start + sizes[0]].view(first),
            flat[begin : begin + sizes[1]].view(second),
        )

    def gaps(buffer: Tensor) -> Cache:
        flat, views, begin = buffer.view(dtype), [], 0
        for shape in shapes:
            wide = torch.Size((*shape[:-1], shape[-1] + 3))
            views.append(flat[begin : begin + wide.numel()].view(wide)[..., : shape[-1]])
            begin += wide.numel()
        return tuple(views)

    if kind == "gaps":
        whole += 6 * sum(torch.Size(shape[:-1]).numel() for shape in shapes)
    views = {"stacked": stacked, "layers": layers, "gaps": gaps}
    return Pool(random_bytes(whole * dtype.itemsize, rng), views.get(kind, pair))


def pool_shape(kv_layout: str, num_pages: int, page_size: int, heads: int, dim: int) -> list[int]:
    inner = [page_size, heads] if kv_layout == "NHD" else [heads, page_size]
    return [num_pages, *inner, dim]


@dataclass
class Table:
    """A page table on the CPU; `indices` goes on with garbage past what indptr covers."""

    indices: Tensor
    indptr: Tensor
    last_page_len: Tensor
    page_size: int
    num_pages: int  # of the pool

    def to(self, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        """kv_indices, kv_indptr, kv_last_page_len."""
        return (
            self.indices.to(device),
            self.indptr.to(device),
            self.last_page_len.to(device),
        )


def make_table(lens: Sequence[int], page_size: int, rng: torch.Generator) -> Table:
    """Pages drawn at random from a pool that has a few more."""
    counts = [-(-length // page_size) for length in lens]
    num_pages = sum(counts) + 3
    indices = torch.randperm(num_pages, generator=rng)[: sum(counts)]
    garbage = torch.tensor([-1, 2**31 - 1, -(2**31), num_pages, 0])
    return Table(
        torch.cat([indices, garbage]).int(),
        torch.tensor([0, *counts]).cumsum(0).int(),
        torch.tensor([(n - 1) % page_size + 1 if n else 0 for n in lens], dtype=torch.int32),
        page_size,
        num_pages,
    )


def tokens_of(lens: Sequence[int], new: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Request and position of each new token, requests one after the other."""
    pairs = [
        (request, position)
        for request, (length, count) in enumerate(zip(lens, new, strict=True))
        for position in range(length - count, length)
    ]
    both = torch.tensor(pairs, dtype=torch.int32).reshape(-1, 2)
    return both[:, 0].contiguous(), both[:, 1].contiguous()


def places(requests: Tensor, positions: Tensor, table: Table) -> Iterator[tuple[int, int, int]]:
    """(row, page, slot) of every row that has a place, whatever the contents are."""
    indptr, indices = table.indptr.tolist(), table.indices.tolist()
    clamped = [min(max(n, 0), len(indices)) for n in indptr]
    for row, (request, position) in enumerate(
        zip(requests.tolist(), positions.tolist(), strict=True)
    ):
        if not (0 <= request < len(indptr) - 1 and 0 <= position < 2**31):
            continue
        at = clamped[request] + position // table.page_size
        if at < clamped[request + 1] and 0 <= indices[at] < table.num_pages:
            yield row, indices[at], position % table.page_size


def written(
    pool: Pool,
    keys: Tensor,
    values: Tensor,
    requests: Tensor,
    positions: Tensor,
    table: Table,
    kv_layout: str = "NHD",
) -> Pool:
    """A copy of a CPU pool with the tokens, already of its dtype, where they must go."""
    result = pool.clone()
    for cache, source in zip(result.pair, (keys, values), strict=True):
        tokens = cache.transpose(1, 2) if cache.dim() == 4 and kv_layout == "HND" else cache
        for row, page, slot in places(requests, positions, table):
            tokens[page, slot].copy_(source[row])
    return result
