"""The paged key-value cache: appending tokens, and the numbers that go with a page table.

Index tensors are never read on the host, and their contents are not trusted: a token whose place
does not exist (a request, a page of it or a page of the pool that is not there) is skipped, and
nothing outside the pool is read or written.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import _check, _paged
from ._append_cpu import Side, append, split_scale
from ._ops import cpu_impl, fake_impl, find_op, refuse_grad
from ._paged import PagedCache

__all__ = [
    "append_paged_kv_cache",
    "append_paged_mla_kv_cache",
    "get_batch_indices_positions",
    "get_seq_lens",
]

_APPEND = find_op("append_paged_kv_cache")
_APPEND_MLA = find_op("append_paged_mla_kv_cache")
_BATCH_INDICES = find_op("get_batch_indices_positions")
_SEQ_LENS = find_op("get_seq_lens")


def append_paged_kv_cache(
    append_key: Tensor,
    append_value: Tensor,
    batch_indices: Tensor,
    positions: Tensor,
    paged_kv_cache: PagedCache,
    kv_indices: Tensor,
    kv_indptr: Tensor,
    kv_last_page_len: Tensor,
    kv_layout: str = "NHD",
    *,
    k_scale: float | Tensor | None = None,
    v_scale: float | Tensor | None = None,
) -> None:
    """Write new keys and values to their places in a paged cache, in place.

    Token i goes to slot ``positions[i] % page_size`` of the page
    ``kv_indices[kv_indptr[b] + positions[i] // page_size]``, with ``b = batch_indices[i]``. Rows
    of -1 (padding), and rows whose request, position or page does not exist, are skipped. Two rows
    for one place leave either of them there.

    Parameters
    ----------
    append_key, append_value : Tensor
        ``[nnz, num_kv_heads, head_dim]``, of one dtype; the head_dim of values may differ. Any
        strides but a last one of 1; what is aligned to 16 bytes is faster.
    batch_indices, positions : Tensor
        ``[nnz]``, int32 or int64: each token's request and its position there, as
        `get_batch_indices_positions` gives them.
    paged_kv_cache : (Tensor, Tensor) or Tensor
        ``(k, v)``, each ``[max_num_pages, page_size, num_kv_heads, head_dim]`` (NHD) or
        ``[max_num_pages, num_kv_heads, page_size, head_dim]`` (HND), or both in one tensor with a
        dimension of 2 after the pages. Any strides but a last one of 1. Any dtype, if it is that of
        `append_key`; otherwise one of lower precision: float8_e4m3fn or float8_e5m2 for float16,
        bfloat16 and float32 (saturating; NaN stays NaN), float16 or bfloat16 for float32.
    kv_indices : Tensor
        ``[kv_indptr[-1]]`` or longer, int32: pages of the requests.
    kv_indptr : Tensor
        ``[batch_size + 1]``, int32.
    kv_last_page_len : Tensor
        ``[batch_size]``, int32. Its contents are not looked at: positions say where tokens go.
    kv_layout : {"NHD", "HND"}
    k_scale, v_scale : float or Tensor, optional
        What keys and values are divided by on their way into a cache of lower precision (multiplied
        by the reciprocal in float32), so that attention with the same scales sees them as they
        were: a number, or float32 of one number or ``[num_kv_heads]``.

    Raises
    ------
    TypeError, ValueError
        On the CPU, for an argument that does not fit; the message names it.
    RuntimeError
        The same on CUDA; on both, when grad mode is on and an argument requires grad.

    Examples
    --------
    >>> import torch, ridgeline
    >>> cache = torch.zeros(3, 2, 4, 1, 2)  # 3 pages of 4 tokens, 1 head of 2
    >>> indices, indptr, last = (torch.tensor(x, dtype=torch.int32) for x in ([2], [0, 1], [2]))
    >>> batch, positions = torch.tensor([0]), torch.tensor([1])
    >>> key = torch.ones(1, 1, 2)
    >>> ridgeline.append_paged_kv_cache(
    ...     key, 2 * key, batch, positions, cache, indices, indptr, last
    ... )
    >>> cache[2, :, 1].flatten().tolist()
    [1.0, 1.0, 2.0, 2.0]
    """
    op = "append_paged_kv_cache"
    k_cache, v_cache = _paged.split(op, "paged_kv_cache", paged_kv_cache)
    refuse_grad(op, append_key, append_value, k_cache, v_cache)
    k_value, k_scales = split_scale(k_scale)
    v_value, v_scales = split_scale(v_scale)
    layout = _paged.layout_code(op, kv_layout)
    _APPEND(append_key, append_value, batch_indices, positions, k_cache, v_cache, kv_indices,
        kv_indptr, kv_last_page_len, layout, k_value, v_value, k_scales, v_scales,
    )  # fmt: skip


def append_paged_mla_kv_cache(
    append_ckv: Tensor,
    append_kpe: Tensor,
    batch_indices: Tensor,
    positions: Tensor,
    ckv_cache: Tensor,
    kpe_cache: Tensor,
    kv_indices: Tensor,
    kv_indptr: Tensor,
    kv_last_page_len: Tensor,
    *,
    ckv_scale: float | None = None,
    kpe_scale: float | None = None,
) -> None:
    """Write new latent vectors and rotated keys to their places in a paged MLA cache, in place.

    Parameters
    ----------
    append_ckv, append_kpe : Tensor
        ``[nnz, head_dim_ckv]`` and ``[nnz, head_dim_kpe]``, of one dtype.
    batch_indices, positions : Tensor
        As in `append_paged_kv_cache`.
    ckv_cache, kpe_cache : Tensor
        ``[max_num_pages, page_size, head_dim_ckv]`` and ``[max_num_pages, page_size,
        head_dim_kpe]``; dtypes as in `append_paged_kv_cache`.
    kv_indices, kv_indptr, kv_last_page_len : Tensor
        As in `append_paged_kv_cache`.
    ckv_scale, kpe_scale : float, optional
        What the values are divided by on their way into a cache of lower precision.

    Raises
    ------
    TypeError, ValueError, RuntimeError
        As in `append_paged_kv_cache`.

    Examples
    --------
    >>> import torch, ridgeline
    >>> ckv_cache, kpe_cache = torch.zeros(3, 4, 2), torch.zeros(3, 4, 1)
    >>> indices, indptr, last = (torch.tensor(x, dtype=torch.int32) for x in ([2], [0, 1], [2]))
    >>> batch, positions = torch.tensor([0]), torch.tensor([1])
    >>> ridgeline.append_paged_mla_kv_cache(
    ...     torch.ones(1, 2), torch.ones(1, 1), batch, positions, ckv_cache, kpe_cache, indices,
    ...     indptr, last
    ... )
    >>> ckv_cache[2, 1].tolist()
    [1.0, 1.0]
    """
    refuse_grad("append_paged_mla_kv_cache", append_ckv, append_kpe, ckv_cache, kpe_cache)
    _APPEND_MLA(append_ckv, append_kpe, batch_indices, positions, ckv_cache, kpe_cache,
        kv_indices, kv_indptr, kv_last_page_len,
        1.0 if ckv_scale is None else ckv_scale, 1.0 if kpe_scale is None else kpe_scale,
    )  # fmt: skip


def get_batch_indices_positions(
    append_indptr: Tensor, seq_lens: Tensor, nnz: int
) -> tuple[Tensor, Tensor]:
    """Tell for every appended token its request and its position there.

    Parameters
    ----------
    append_indptr : Tensor
        ``[batch_size + 1]``, int32: where each request's new tokens begin.
    seq_lens : Tensor
        ``[batch_size]``, int32: the requests' lengths with the new tokens.
    nnz : int
        How many rows to tell of; those past ``append_indptr[-1]`` are padding.

    Returns
    -------
    batch_indices, positions : Tensor
        ``[nnz]``, int32; -1 and -1 for padding, which `append_paged_kv_cache` skips.

    Examples
    --------
    >>> import torch, ridgeline
    >>> indptr = torch.tensor([0, 1, 3], dtype=torch.int32)
    >>> seq_lens = torch.tensor([4, 2], dtype=torch.int32)
    >>> batch_indices, positions = ridgeline.get_batch_indices_positions(indptr, seq_lens, 4)
    >>> batch_indices.tolist(), positions.tolist()
    ([0, 1, 1, -1], [3, 0, 1, -1])
    """
    result: tuple[Tensor, Tensor] = _BATCH_INDICES(append_indptr, seq_lens, nnz)
    return result


def get_seq_lens(kv_indptr: Tensor, kv_last_page_len: Tensor, page_size: int) -> Tensor:
    """Tell how many tokens each request's pages hold.

    Parameters
    ----------
    kv_indptr : Tensor
        ``[batch_size + 1]``, int32: pages.
    kv_last_page_len : Tensor
        ``[batch_size]``, int32: tokens in each request's last page; taken as at most `page_size`.
    page_size : int

    Returns
    -------
    Tensor
        ``[batch_size]``, int32; 0 for requests without pages.

    Examples
    --------
    >>> import torch, ridgeline
    >>> indptr = torch.tensor([0, 2, 2], dtype=torch.int32)
    >>> last_page_len = torch.tensor([3, 0], dtype=torch.int32)
    >>> ridgeline.get_seq_lens(indptr, last_page_len, 16)
    tensor([19,  0], dtype=torch.int32)
    """
    lens: Tensor = _SEQ_LENS(kv_indptr, kv_last_page_len, page_size)
    return lens


@cpu_impl("append_paged_kv_cache")
def _append_kv_cpu(
    append_key: Tensor,
    append_value: Tensor,
    batch_indices: Tensor,
    positions: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    kv_indices: Tensor,
    kv_indptr: Tensor,
    kv_last_page_len: Tensor,
    kv_layout: int = 0,
    k_scale: float = 1.0,
    v_scale: float = 1.0,
    k_scales: Tensor | None = None,
    v_scales: Tensor | None = None,
) -> None:
    op = "append_paged_kv_cache"
    k_pool = _paged.checked_pool(op, "k_cache", k_cache, kv_layout)
    v_pool = _paged.checked_pool(op, "v_cache", v_cache, kv_layout)
    sides = (
        Side(op, "append_key", append_key, "k_cache", k_cache, k_pool,
              "k_scale", k_scale, k_scales),
        Side(op, "append_value", append_value, "v_cache", v_cache, v_pool,
              "v_scale", v_scale, v_scales),
    )  # fmt: skip
    append(sides, batch_indices, positions, kv_indices, kv_indptr, kv_last_page_len)


@cpu_impl("append_paged_mla_kv_cache")
def _append_mla_cpu(
    append_ckv: Tensor,
    append_kpe: Tensor,
    batch_indices: Tensor,
    positions: Tensor,
    ckv_cache: Tensor,
    kpe_cache: Tensor,
    kv_indices: Tensor,
    kv_indptr: Tensor,
    kv_last_page_len: Tensor,
    ckv_scale: float = 1.0,
    kpe_scale: float = 1.0,
) -> None:
    op = "append_paged_mla_kv_cache"
    ckv_pool = _paged.checked_latent_pool(op, "ckv_cache", ckv_cache)
    kpe_pool = _paged.checked_latent_pool(op, "kpe_cache", kpe_cache)
    sides = (
        Side(op, "append_ckv", append_ckv, "ckv_cache", ckv_cache, ckv_pool,
              "ckv_scale", ckv_scale, None),
        Side(op, "append_kpe", append_kpe, "kpe_cache", kpe_cache, kpe_pool,
              "kpe_scale", kpe_scale, None),
    )  # fmt: skip
    append(sides, batch_indices, positions, kv_indices, kv_indptr, kv_last_page_len)


@cpu_impl("get_batch_indices_positions")
def _batch_indices_cpu(append_indptr: Tensor, seq_lens: Tensor, nnz: int) -> tuple[Tensor, Tensor]:
    op = "get_batch_indices_positions"
    as_arg = "append_indptr", append_indptr
    batch_size = _paged.check_indptr(op, *as_arg, *as_arg)
    _paged.check_int32_vector(op, "seq_lens", seq_lens, *as_arg, batch_size, "[batch_size]")
    if not 0 <= nnz < 2**31:
        expected = "a number of tokens from 0 to 2^31 - 1"
        _check.fail(op, "nnz", expected, nnz, "It is the number of rows to append.")
    batch_indices = torch.full((nnz,), -1, dtype=torch.int32)
    positions = batch_indices.clone()
    if batch_size == 0:
        return batch_indices, positions
    tokens = torch.arange(nnz)
    begins = append_indptr[:-1].long()
    requests = (torch.searchsorted(begins, tokens, right=True) - 1).clamp(0, batch_size - 1)
    ends = append_indptr[1:].long()[requests]
    found = (begins[requests] <= tokens) & (tokens < ends)
    batch_indices[found] = requests[found].int()
    positions[found] = (seq_lens.long()[requests] - ends + tokens)[found].int()
    return batch_indices, positions


@cpu_impl("get_seq_lens")
def _seq_lens_cpu(kv_indptr: Tensor, kv_last_page_len: Tensor, page_size: int) -> Tensor:
    op = "get_seq_lens"
    as_arg = "kv_indptr", kv_indptr
    batch_size = _paged.check_indptr(op, *as_arg, *as_arg)
    last, meaning = kv_last_page_len, "[batch_size]"
    _paged.check_int32_vector(op, "kv_last_page_len", last, *as_arg, batch_size, meaning)
    if not 1 <= page_size < 2**31:
        expected = "a number of tokens from 1 to 2^31 - 1"
        _check.fail(op, "page_size", expected, page_size, "Pass the page_size of the cache.")
    num_pages = kv_indptr[1:].long() - kv_indptr[:-1].long()
    lens = (num_pages - 1) * page_size + last.long().clamp(0, page_size)
    return lens.where(num_pages > 0, 0).int()


@fake_impl("append_paged_kv_cache")
def _append_fake(*_: object) -> None:
    return None


@fake_impl("append_paged_mla_kv_cache")
def _append_mla_fake(*_: object) -> None:
    return None


@fake_impl("get_batch_indices_positions")
def _batch_indices_fake(append_indptr: Tensor, _: Tensor, nnz: int) -> tuple[Tensor, Tensor]:
    return append_indptr.new_empty((nnz,)), append_indptr.new_empty((nnz,))


@fake_impl("get_seq_lens")
def _seq_lens_fake(_: Tensor, kv_last_page_len: Tensor, *__: object) -> Tensor:
    return torch.empty_like(kv_last_page_len)
