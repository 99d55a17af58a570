"""Copying pages between paged caches, on one device or to and from pinned host memory."""

from __future__ import annotations

import torch
from torch import Tensor

from . import _check, _overlap, _paged
from ._ops import cpu_impl, fake_impl, find_op, refuse_grad
from ._paged import PagedCache

__all__ = ["copy_pages"]

_COPY = find_op("copy_pages")
_COPY_INPLACE = find_op("copy_pages_inplace")


def copy_pages(
    src_kv_cache: PagedCache, dst_kv_cache: PagedCache, src_pages: Tensor, dst_pages: Tensor
) -> None:
    """Copy whole pages of one paged cache to pages of another, or of the same one.

    Page ``src_pages[i]`` goes to page ``dst_pages[i]``; pairs with a page number that its pool does
    not have are skipped. Within one pool no page may be both a source and a destination, and no
    destination may come twice: which contents it then gets is not defined.

    Parameters
    ----------
    src_kv_cache, dst_kv_cache : (Tensor, Tensor) or Tensor
        Pools of one dtype, with pages alike; ``(k, v)`` with 4-D tensors in either layout, or
        with 3-D ones (MLA: ckv and kpe), or one 5-D tensor. Each on the device of `src_pages`, or,
        for a copy on a GPU, in pinned host memory (``pin_memory=True``): the GPU reads or writes it
        directly, in the order of the current stream. Host memory must live, and is complete, until
        the stream has got there. Pass the same object twice to copy within one pool.
    src_pages, dst_pages : Tensor
        ``[num_copies]``, int32 or int64, on one device, which does the copy.

    Raises
    ------
    TypeError, ValueError
        On the CPU, for an argument that does not fit; the message names it.
    RuntimeError
        The same on CUDA; on both, when grad mode is on and an argument requires grad.

    Examples
    --------
    >>> import torch, ridgeline
    >>> pool, host = torch.ones(4, 2, 16, 1, 8), torch.zeros(2, 2, 16, 1, 8)
    >>> ridgeline.copy_pages(pool, host, torch.tensor([3]), torch.tensor([1]))
    >>> host.mean((1, 2, 3, 4)).tolist()
    [0.0, 1.0]
    """
    op = "copy_pages"
    src_k, src_v = _paged.split(op, "src_kv_cache", src_kv_cache)
    dst_k, dst_v = _paged.split(op, "dst_kv_cache", dst_kv_cache)
    refuse_grad(op, src_k, src_v, dst_k, dst_v)
    if src_kv_cache is dst_kv_cache or (src_k is dst_k and src_v is dst_v):
        # Why an op of its own: a compiler must copy a pool that is both an input and an output.
        _COPY_INPLACE(_with_heads(dst_k), _with_heads(dst_v), src_pages, dst_pages)
        return
    pools = [_with_heads(t) for t in (src_k, src_v, dst_k, dst_v)]
    _COPY(*pools, src_pages, dst_pages)


def _with_heads(cache: Tensor) -> Tensor:
    return cache.unsqueeze(1) if cache.dim() == 3 else cache


def _copy(
    names: tuple[str, str], source: Tensor, target: Tensor, src_pages: Tensor, dst_pages: Tensor
) -> None:
    op, (src, dst) = "copy_pages", names
    _check.same_device(op, src, source, "src_pages", src_pages)
    _check.same_device(op, dst, target, "src_pages", src_pages)
    _check.rank(op, src, source, 4)
    _check.rank(op, dst, target, 4)
    _check.same_dtype(op, dst, target, src, source)
    if source.shape[1:] != target.shape[1:]:
        _check.fail(
            op,
            dst,
            f"pages like those of '{src}', {list(source.shape)}",
            list(target.shape),
            "Both pools need one page size, layout, number of heads and head_dim.",
        )
    _check.last_stride(op, src, source)
    _check.last_stride(op, dst, target)
    _overlap.writable(op, dst, target)
    src_pages, dst_pages = src_pages.long(), dst_pages.long()
    known = (src_pages >= 0) & (src_pages < source.shape[0])
    known &= (dst_pages >= 0) & (dst_pages < target.shape[0])
    if source.dtype.itemsize == 1:  # among them the 8-bit floats, which torch does not index
        source, target = source.view(torch.uint8), target.view(torch.uint8)
    target[dst_pages[known]] = source[src_pages[known]]


def _check_pages(src_pages: Tensor, dst_pages: Tensor) -> None:
    op, as_arg = "copy_pages", ("src_pages", src_pages)
    num_copies = src_pages.shape[0] if src_pages.dim() == 1 else 0
    _paged.check_indices(op, *as_arg, num_copies, "[num_copies]", *as_arg)
    meaning = "[num_copies], as 'src_pages'"
    _paged.check_indices(op, "dst_pages", dst_pages, num_copies, meaning, *as_arg)


def _check_same_pages(k_arg: str, k: Tensor, v_arg: str, v: Tensor) -> None:
    if k.shape[0] != v.shape[0]:
        _check.fail(
            "copy_pages",
            v_arg,
            f"{k.shape[0]} pages, as '{k_arg}'",
            list(v.shape),
            "Keys and values of a token lie in the same page.",
        )


@cpu_impl("copy_pages")
def _copy_cpu(
    src_k_cache: Tensor,
    src_v_cache: Tensor,
    dst_k_cache: Tensor,
    dst_v_cache: Tensor,
    src_pages: Tensor,
    dst_pages: Tensor,
) -> None:
    _check_pages(src_pages, dst_pages)
    if src_k_cache.dim() > 0 and dst_k_cache.dim() > 0:
        _check_same_pages("src_k_cache", src_k_cache, "src_v_cache", src_v_cache)
        _check_same_pages("dst_k_cache", dst_k_cache, "dst_v_cache", dst_v_cache)
    names = ("src_k_cache", "dst_k_cache"), ("src_v_cache", "dst_v_cache")
    _copy(names[0], src_k_cache, dst_k_cache, src_pages, dst_pages)
    _copy(names[1], src_v_cache, dst_v_cache, src_pages, dst_pages)


@cpu_impl("copy_pages_inplace")
def _copy_inplace_cpu(
    k_cache: Tensor, v_cache: Tensor, src_pages: Tensor, dst_pages: Tensor
) -> None:
    _check_pages(src_pages, dst_pages)
    _check_same_pages("k_cache", k_cache, "v_cache", v_cache)
    _copy(("k_cache", "k_cache"), k_cache, k_cache, src_pages, dst_pages)
    _copy(("v_cache", "v_cache"), v_cache, v_cache, src_pages, dst_pages)


@fake_impl("copy_pages")
def _copy_fake(*_: object) -> None:
    return None


@fake_impl("copy_pages_inplace")
def _copy_inplace_fake(*_: object) -> None:
    return None
