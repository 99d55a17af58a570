"""Paged caches as arguments: what the public functions and the CPU implementations share.

A pool of pages is a ``(k, v)`` tuple of 4-D tensors or one 5-D tensor with a dimension of 2 (keys,
values) after the pages; ops take the two tensors.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from . import _check

KV_LAYOUTS = {"NHD": 0, "HND": 1}
INDEX_DTYPES = (torch.int32, torch.int64)

PagedCache = Tensor | tuple[Tensor, Tensor]


def layout_code(op: str, kv_layout: str) -> int:
    """0 for NHD, 1 for HND; raises ValueError for anything else."""
    code = KV_LAYOUTS.get(kv_layout)
    if code is None:
        _check.fail(op, "kv_layout", "'NHD' or 'HND'", repr(kv_layout), "Pass one of these.")
    return code


def split(op: str, arg: str, cache: PagedCache, *, as_views: bool = True) -> tuple[Tensor, Tensor]:
    """Keys and values of a pool: the tuple as it is, or two views of the 5-D tensor.

    Without `as_views` that tensor twice, for ops that find the `halves` themselves: views cost the
    host 3 us. Within a graph torch keeps apart what an op writes, and needs them.
    """
    if isinstance(cache, Tensor):
        shape = cache.shape
        if len(shape) != 5 or shape[1] != 2:
            expected = "a (k, v) tuple or a tensor of 5 dimensions, the second of size 2 (k, v)"
            way_out = "Stack keys and values in dimension 1, or pass them as a tuple."
            _check.fail(op, arg, expected, f"shape {list(shape)}", way_out)
        if not as_views:
            return cache, cache
        # Why unbind: two views of one call take half the time of two calls.
        keys, values = cache.unbind(1)
        return keys, values
    if not isinstance(cache, (tuple, list)) or len(cache) != 2:
        got = f"{len(cache)} of them" if isinstance(cache, (tuple, list)) else type(cache).__name__
        _check.fail(op, arg, "a (k, v) tuple or a 5-D tensor", got, "Pass keys and values.")
    return cache[0], cache[1]


def halves(k_cache: Tensor, v_cache: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values as views, where both are one 5-D tensor."""
    keys = k_cache.select(1, 0) if k_cache.dim() == 5 else k_cache
    values = v_cache.select(1, 1) if v_cache.dim() == 5 else v_cache
    return keys, values


@dataclass(frozen=True)
class Pool:
    """Keys or values of a pool as ``[num_pages, page_size, num_heads, head_dim]``, whatever its
    layout; without heads, ``[num_pages, page_size, head_dim]``.
    """

    tokens: Tensor

    @property
    def num_pages(self) -> int:
        return self.tokens.shape[0]

    @property
    def page_size(self) -> int:
        return self.tokens.shape[1]


def checked_pool(op: str, arg: str, cache: Tensor, kv_layout: int) -> Pool:
    """A pool of rank 4 in one of the two layouts."""
    if kv_layout not in (0, 1):
        _check.fail(op, "kv_layout", "0 (NHD) or 1 (HND)", kv_layout, "Pass one of these.")
    _check.rank(op, arg, cache, 4)
    return _counted(op, arg, cache, cache if kv_layout == 0 else cache.transpose(1, 2))


def checked_latent_pool(op: str, arg: str, cache: Tensor) -> Pool:
    """A pool without heads, of rank 3."""
    _check.rank(op, arg, cache, 3)
    return _counted(op, arg, cache, cache)


def _counted(op: str, arg: str, cache: Tensor, tokens: Tensor) -> Pool:
    _check.last_stride(op, arg, cache)
    if tokens.shape[1] == 0:
        got = f"page_size 0 (shape {list(cache.shape)})"
        way_out = "Make the pool with a page_size of 1 or more."
        _check.fail(op, arg, "pages of at least 1 token", got, way_out)
    return Pool(tokens)


def check_indices(
    op: str,
    arg: str,
    tensor: Tensor,
    size: int,
    meaning: str,
    as_arg: str,
    other: Tensor,
) -> None:
    """A vector of `size` numbers, int32 or int64, on the device of `other`."""
    _check.same_device(op, arg, tensor, as_arg, other)
    _check.dtype(op, arg, tensor, INDEX_DTYPES)
    _check.rank(op, arg, tensor, 1)
    _check.shape(op, arg, tensor, (size,), meaning)
    _check.last_stride(op, arg, tensor)


def check_int32_vector(
    op: str,
    arg: str,
    tensor: Tensor,
    as_arg: str,
    other: Tensor,
    size: int | None = None,
    meaning: str = "",
) -> None:
    """A vector of int32 on the device of `other`, of `size` numbers if that is given."""
    _check.same_device(op, arg, tensor, as_arg, other)
    _check.dtype(op, arg, tensor, (torch.int32,))
    _check.rank(op, arg, tensor, 1)
    if size is not None:
        _check.shape(op, arg, tensor, (size,), meaning)
    _check.last_stride(op, arg, tensor)


def check_indptr(op: str, arg: str, tensor: Tensor, as_arg: str, other: Tensor) -> int:
    """Checks an indptr and returns the number of requests."""
    check_int32_vector(op, arg, tensor, as_arg, other)
    if tensor.shape[0] == 0:
        way_out = "An empty batch has one number, 0."
        _check.fail(op, arg, "shape [batch_size + 1]", [0], way_out)
    return tensor.shape[0] - 1


def check_page_table(
    op: str,
    kv_indices: Tensor,
    kv_indptr: Tensor,
    kv_last_page_len: Tensor | None,
    as_arg: str,
    other: Tensor,
) -> None:
    """Checks the index tensors; without the lengths of last pages where positions say all."""
    check_int32_vector(op, "kv_indices", kv_indices, as_arg, other)
    batch_size = check_indptr(op, "kv_indptr", kv_indptr, as_arg, other)
    if kv_last_page_len is None:
        return
    check_int32_vector(
        op, "kv_last_page_len", kv_last_page_len, as_arg, other, batch_size, "[batch_size]"
    )


def places(
    pool: Pool, requests: Tensor, positions: Tensor, kv_indices: Tensor, kv_indptr: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Where tokens lie: the rows of those that have a place, their pages and their slots (int64).

    A token has one if its request, its page there and that page of the pool exist.
    """
    requests, positions = requests.long(), positions.long()
    batch_size = kv_indptr.shape[0] - 1
    rows = torch.nonzero(
        (requests >= 0) & (requests < batch_size) & (positions >= 0) & (positions < 2**31)
    ).squeeze(1)
    begin = kv_indptr[:-1].long().clamp(0, kv_indices.shape[0])[requests[rows]]
    end = kv_indptr[1:].long().clamp(0, kv_indices.shape[0])[requests[rows]]
    at = begin + positions[rows] // pool.page_size
    rows, at = rows[at < end], at[at < end]
    pages = kv_indices.long()[at]
    inside = (pages >= 0) & (pages < pool.num_pages)
    rows, pages = rows[inside], pages[inside]
    return rows, pages, positions[rows] % pool.page_size
