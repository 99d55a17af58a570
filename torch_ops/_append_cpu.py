"""Appending to a paged cache on the CPU: checks and writes, for every op that appends."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from . import _check, _overlap, _paged
from ._paged import Pool

_FLOAT8 = (torch.float8_e4m3fn, torch.float8_e5m2)
_NARROWER = {
    torch.float16: _FLOAT8,
    torch.bfloat16: _FLOAT8,
    torch.float32: (*_FLOAT8, torch.float16, torch.bfloat16),
}


def split_scale(scale: float | Tensor | None) -> tuple[float, Tensor | None]:
    """A scale as ops take it: a number and a tensor, one of which says nothing."""
    if isinstance(scale, Tensor):
        return 1.0, scale
    return 1.0 if scale is None else scale, None


class Side:
    """New keys or values, their pool and their scale, checked."""

    def __init__(
        self,
        op: str,
        source_arg: str,
        source: Tensor,
        target_arg: str,
        target: Tensor,
        pool: Pool,
        scale_arg: str,
        scale: float,
        scales: Tensor | None,
    ) -> None:
        self.op = op
        self.source_arg, self.source = source_arg, source
        self.target_arg, self.target = target_arg, target
        self.pool = pool
        self.scale_arg, self.scale, self.scales = scale_arg, scale, scales

    def check_shapes(self, nnz: int) -> None:
        op, arg, source = self.op, self.source_arg, self.source
        _check.same_device(op, arg, source, self.target_arg, self.target)
        expected = (nnz, *self.pool.tokens.shape[2:])
        names = "[nnz, num_kv_heads, head_dim]" if len(expected) == 3 else "[nnz, head_dim]"
        _check.rank(op, arg, source, len(expected))
        _check.shape(op, arg, source, expected, f"{names}, as the cache's")
        _check.last_stride(op, arg, source)
        _overlap.writable(op, self.target_arg, self.target)
        _overlap.distinct(op, self.target_arg, self.target, arg, source)

    def check_conversion(self) -> None:
        source, target = self.source.dtype, self.target.dtype
        if source == target:
            if self.scales is not None or self.scale != 1.0:
                _check.fail(
                    self.op,
                    self.scale_arg,
                    "None or 1, since the cache has the dtype of what is appended",
                    "a tensor" if self.scales is not None else self.scale,
                    "Use a cache of lower precision, or divide beforehand.",
                )
            return
        if target not in _NARROWER.get(source, ()):
            expected = (
                f"dtype {source} (that of '{self.source_arg}') or a lower precision: float8_e4m3fn "
                "or float8_e5m2 from float16, bfloat16 or float32, float16 or bfloat16 from float32"
            )
            way_out = f"Convert '{self.source_arg}' first."
            raise TypeError(_check.message(self.op, self.target_arg, expected, target, way_out))

    def check_scale(self) -> None:
        op, arg, scales = self.op, self.scale_arg, self.scales
        if not (math.isfinite(self.scale) and self.scale > 0):
            _check.fail(op, arg, "a finite number > 0", self.scale, "1 changes nothing.")
        if scales is None:
            return
        _check.same_device(op, arg, scales, self.target_arg, self.target)
        _check.dtype(op, arg, scales, (torch.float32,))
        _check.rank(op, arg, scales, 0, 1)
        num_heads = self.pool.tokens.shape[2]
        if scales.numel() not in (1, num_heads):
            expected = f"1 number or one for each of the {num_heads} heads"
            _check.fail(op, arg, expected, list(scales.shape), "Pass a tensor of that shape.")

    def write(self, values: Tensor, pages: Tensor, slots: Tensor) -> None:
        """Writes a row of values, of the source's dtype or float32, to each place."""
        tokens = self.pool.tokens
        if values.dtype != tokens.dtype:
            scale = torch.tensor(self.scale) if self.scales is None else self.scales
            if scale.numel() > 1:
                scale = scale[:, None]
            values = values.float() * scale.float().reciprocal()
            if tokens.dtype in _FLOAT8:
                limit = torch.finfo(tokens.dtype).max
                values = values.clamp(-limit, limit)
            values = values.to(tokens.dtype)
        if tokens.dtype in _FLOAT8:  # which torch does not index
            tokens, values = tokens.view(torch.uint8), values.view(torch.uint8)
        tokens[pages, slots] = values


def check_append(
    sides: Sequence[Side],
    batch_indices: Tensor,
    positions: Tensor,
    kv_indices: Tensor,
    kv_indptr: Tensor,
    kv_last_page_len: Tensor | None,
) -> int:
    """Checks all arguments of an append and returns the number of tokens."""
    k, v = sides
    op, arg, cache = k.op, k.target_arg, k.target
    _check.same_device(op, v.target_arg, v.target, arg, cache)
    _check.same_dtype(op, v.target_arg, v.target, arg, cache)
    if k.pool.tokens.shape[:-1] != v.pool.tokens.shape[:-1]:
        _check.fail(
            op,
            v.target_arg,
            f"the shape of '{arg}', {list(cache.shape)}, but for the last dimension",
            list(v.target.shape),
            "Keys and values of a token have the same page, slot and head.",
        )
    nnz = positions.shape[0] if positions.dim() == 1 else 0
    _paged.check_indices(op, "positions", positions, nnz, "[nnz]", arg, cache)
    meaning = "[nnz], as 'positions'"
    _paged.check_indices(op, "batch_indices", batch_indices, nnz, meaning, arg, cache)
    _paged.check_page_table(op, kv_indices, kv_indptr, kv_last_page_len, arg, cache)
    for side in sides:
        side.check_shapes(nnz)
    _check.same_dtype(op, v.source_arg, v.source, k.source_arg, k.source)
    _overlap.distinct(op, v.target_arg, v.target, arg, cache)
    for side in sides:
        side.check_conversion()
        side.check_scale()
    return nnz


def append(
    sides: Sequence[Side],
    batch_indices: Tensor,
    positions: Tensor,
    kv_indices: Tensor,
    kv_indptr: Tensor,
    kv_last_page_len: Tensor,
) -> None:
    """Checks and writes the sources of both sides."""
    check_append(sides, batch_indices, positions, kv_indices, kv_indptr, kv_last_page_len)
    pool = sides[0].pool
    rows, *at = _paged.places(pool, batch_indices, positions, kv_indices, kv_indptr)
    for side in sides:
        side.write(side.source[rows], *at)
