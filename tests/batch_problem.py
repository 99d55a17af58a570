"""A batch of requests of any lengths: inputs in every form of cache, the call, the reference."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import oracle
import pytest
import ridgeline
import torch
from support import compile_rows, normal, poisoned_call, strided, supports_bf16_attention
from torch import Tensor

FORMS = ("paged", "paged-lens", "ragged", "padded")


@dataclass(frozen=True)
class Batch:
    """Lengths and options of one call; ``str()`` of it is the test's id."""

    lengths: tuple[tuple[int, int], ...] = ((1, 100), (1, 1))  # (qo_len, kv_len) of each request
    heads: tuple[int, int] = (4, 2)
    head_dims: tuple[int, int] = (64, 64)
    dtype: torch.dtype = torch.float16
    form: str = "paged"
    page_size: int = 16
    kv_layout: str = "NHD"
    causal: bool = False
    window_left: int = -1
    logits_soft_cap: float | None = None
    rope: tuple[float, float] | None = None
    invariant: bool = False
    max_q_len: int | None = None
    decode: bool = False  # no qo_indptr
    stacked: bool = False  # one 5-D pool
    padding: int = 0  # rows of q that belong to no request
    strided: bool = False  # q and the cache are views that step over garbage
    spare: int = 0  # with form "paged-lens": entries of each request's table past its pages
    name: str = ""
    note: str = field(default="", compare=False)

    def __str__(self) -> str:
        heads = "x".join(map(str, self.heads))
        dims = "x".join(map(str, dict.fromkeys(self.head_dims)))
        shown = "_".join(f"{q}q{k}" for q, k in self.lengths[:4])
        parts = [self.name or shown, f"n{len(self.lengths)}", f"h{heads}", f"d{dims}"]
        parts += [str(self.dtype).removeprefix("torch."), self.form, self.kv_layout]
        parts += [f"page{self.page_size}"] if self.form.startswith("paged") else []
        parts += ["causal"] if self.causal else []
        parts += [f"window{self.window_left}"] if self.window_left >= 0 else []
        parts += [f"cap{self.logits_soft_cap:g}"] if self.logits_soft_cap is not None else []
        parts += ["rope"] if self.rope else []
        parts += ["invariant"] if self.invariant else []
        parts += [f"max{self.max_q_len}"] if self.max_q_len is not None else []
        parts += ["decode"] if self.decode else []
        parts += ["stacked"] if self.stacked else []
        parts += [f"padding{self.padding}"] if self.padding else []
        parts += ["strided"] if self.strided else []
        parts += [f"spare{self.spare}"] if self.spare else []
        return "-".join(parts)

    def with_(self, **changes: Any) -> Batch:
        return replace(self, **changes)

    @property
    def paged(self) -> bool:
        return self.form.startswith("paged")

    def inputs(self, device: torch.device, rng: torch.Generator) -> Inputs:
        return Inputs.make(self, device, rng)

    def options(self) -> dict[str, Any]:
        options: dict[str, Any] = {
            "kv_layout": self.kv_layout,
            "causal": self.causal,
            "window_left": self.window_left,
            "logits_soft_cap": self.logits_soft_cap,
            "batch_invariant": self.invariant,
            "max_q_len": self.max_q_len,
        }
        if self.rope is not None:
            options |= {"pos_encoding_mode": "ROPE_LLAMA"}
            options |= {"rope_scale": self.rope[0], "rope_theta": self.rope[1]}
        return options

    def schedule_options(self) -> dict[str, Any]:
        return {
            "num_qo_heads": self.heads[0],
            "num_kv_heads": self.heads[1],
            "head_dim_qk": self.head_dims[0],
            "head_dim_vo": self.head_dims[1],
            "causal": self.causal,
            "window_left": self.window_left,
            "max_q_len": self.max_q_len,
            "batch_invariant": self.invariant,
            **({"page_size": self.page_size} if self.paged else {}),
        }


@dataclass
class Inputs:
    """Tensors of a call, and each request's keys and values as the reference takes them."""

    batch: Batch
    q: Tensor
    cache: Any
    index: dict[str, Tensor]
    keys: list[Tensor]  # [kv_len, num_kv_heads, head_dim]
    values: list[Tensor]

    @staticmethod
    def make(batch: Batch, device: torch.device, rng: torch.Generator) -> Inputs:
        tokens = sum(q for q, _ in batch.lengths)
        q = normal((tokens + batch.padding, batch.heads[0], batch.head_dims[0]), batch.dtype,
                   device, rng)  # fmt: skip
        keys, values = (
            [
                normal((length, batch.heads[1], dim), batch.dtype, device, rng)
                for _, length in batch.lengths
            ]
            for dim in batch.head_dims
        )
        index = {}
        if not batch.decode:
            index["qo_indptr"] = _indptr([q for q, _ in batch.lengths], device)
        lengths = [length for _, length in batch.lengths]
        if batch.form == "ragged":
            cache: Any = tuple(
                _joined(batch, parts, dim, device)
                for parts, dim in zip((keys, values), batch.head_dims, strict=True)
            )
            index["kv_indptr"] = _indptr(lengths, device)
        elif batch.form == "padded":
            cache = tuple(
                _padded(batch, parts, dim, device)
                for parts, dim in zip((keys, values), batch.head_dims, strict=True)
            )
            index["kv_lens"] = torch.tensor(lengths, dtype=torch.int32, device=device)
        else:
            cache = _paged(batch, keys, values, index, device, rng)
        if batch.strided:
            q = strided(q, 0)
            cache = strided(cache, 0) if batch.stacked else _gaps(*cache)
        return Inputs(batch, q, cache, index, keys, values)

    def call(self, call: Callable[..., Any] | None = None, **options: Any) -> Any:
        """Call the public function (or another of its signature)."""
        function = ridgeline.attention if call is None else call
        options = {"return_lse": True, **self.batch.options(), **options}
        return function(self.q, self.cache, **self.index, **options)

    def schedule(self) -> Tensor:
        index = {name: t for name, t in self.index.items() if name != "kv_indices"}
        return ridgeline.schedule(
            **index, num_qo_tokens=self.q.shape[0], **self.batch.schedule_options()
        )

    def operands(self, flags: int, schedule: Tensor | None = None) -> tuple[Any, ...]:
        """Arguments of the narrow op."""
        index = self.index
        lens = index.get("kv_last_page_len", index.get("kv_lens"))
        return (
            self.q, *self.cache, index.get("kv_indices"), schedule, index.get("qo_indptr"), flags,
            -1, -1, 0.125, index.get("kv_indptr"), lens,
        )  # fmt: skip

    def schedule_operands(self, flags: int) -> tuple[Any, ...]:
        """Arguments of the op that makes the work list."""
        index, batch = self.index, self.batch
        lens = index.get("kv_last_page_len", index.get("kv_lens"))
        page_size = batch.page_size if batch.paged else 1
        return (
            index.get("qo_indptr"), index.get("kv_indptr"), lens, flags, page_size, len(self.q),
            *batch.heads, *batch.head_dims, -1, -1,
        )  # fmt: skip

    def reference(self) -> oracle.Reference:
        """Each request alone, in float64; rows of no request see no key."""
        batch, parts, begin = self.batch, [], 0
        for (qo_len, _), k, v in zip(batch.lengths, self.keys, self.values, strict=True):
            parts.append(
                oracle.attention(
                    self.q[begin : begin + qo_len], k, v, causal=batch.causal,
                    window_left=batch.window_left, logits_soft_cap=batch.logits_soft_cap,
                    rope=batch.rope,
                )
            )  # fmt: skip
            begin += qo_len
        rest = (self.q.shape[0] - begin, batch.heads[0])
        zeros = self.q.new_zeros((*rest, batch.head_dims[1]), dtype=torch.float64)
        none = self.q.new_full(rest, -torch.inf, dtype=torch.float64)
        parts.append(oracle.Reference(zeros, none, zeros, none.new_zeros(rest)))
        return oracle.Reference(
            *(
                torch.cat([getattr(part, name) for part in parts])
                for name in ("out", "lse", "out_bound", "lse_bound")
            )
        )

    def check(self, call: Callable[..., Any] | None = None) -> None:
        """Call on poisoned memory, twice and with a work list of its own; compare."""
        device = self.q.device
        reference = self.reference()
        out, lse = poisoned_call(device, self.call, call)
        assert out.dtype == self.batch.dtype
        assert out.is_contiguous()
        oracle.check(reference, out, lse)
        again = poisoned_call(device, self.call, call)
        assert torch.equal(again[0], out), "out: not repeatable bitwise"
        assert torch.equal(again[1], lse), "lse: not repeatable bitwise"
        if call is None:
            narrow = poisoned_call(device, self.call, call, return_lse=False)
            assert torch.equal(narrow, out), "out: differs without LSE"
            listed = poisoned_call(device, self.call, call, schedule=self.schedule())
            assert torch.equal(listed[0], out), "out: differs with a given work list"


def compile_kernels(rotating: bool = False) -> None:
    """On a GPU: what batches of any shape launch, compiled by all cores at once."""
    compile_rows(
        lambda row: (
            row.op in ("attention", "attention_schedule")
            or (
                rotating
                and row.op == "attention_full"
                and row.kernel.endswith("__half>, RopeLlamaVariant>")
            )
        )
    )


def check(batch: Batch, device: torch.device, rng: torch.Generator) -> None:
    inputs = batch.inputs(device, rng)
    if batch.dtype == torch.bfloat16 and not supports_bf16_attention(device):
        with pytest.raises(RuntimeError, match="bfloat16"):
            inputs.call()
        return
    inputs.check()


def check_graph(inputs: Inputs) -> None:
    """A captured call and eager ones give the same bits, replay after replay."""
    expected = [result.clone() for result in inputs.call()]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = inputs.call()
    for _ in range(3):
        for result in results:
            result.fill_(torch.nan)
        graph.replay()
        again = inputs.call()
        for result, other, eager in zip(results, expected, again, strict=True):
            assert torch.equal(result, other)
            assert torch.equal(eager, other)


def _indptr(lengths: list[int], device: torch.device) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).to(torch.int32).to(device)


def _joined(batch: Batch, parts: list[Tensor], dim: int, device: torch.device) -> Tensor:
    """Requests one behind the other, with garbage after the last."""
    garbage = torch.full((5, batch.heads[1], dim), torch.nan, dtype=batch.dtype, device=device)
    joined = torch.cat([*parts, garbage])
    return joined.transpose(0, 1).contiguous() if batch.kv_layout == "HND" else joined


def _gaps(k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Keys with gaps between tokens or heads, values with gaps between their outermost rows."""
    return strided(k, k.dim() - 2), strided(v, 0, 3)


def _padded(batch: Batch, parts: list[Tensor], dim: int, device: torch.device) -> Tensor:
    longest = max([0, *(len(part) for part in parts)]) + 3
    shape = (len(parts), longest, batch.heads[1], dim)
    rows = torch.full(shape, torch.nan, dtype=batch.dtype, device=device)
    for row, part in zip(rows, parts, strict=True):
        row[: len(part)] = part
    return rows.transpose(1, 2).contiguous() if batch.kv_layout == "HND" else rows


def _paged(
    batch: Batch,
    keys: list[Tensor],
    values: list[Tensor],
    index: dict[str, Tensor],
    device: torch.device,
    rng: torch.Generator,
) -> Any:
    """A pool of pages in random order; whatever no request has is NaN, and the table is padded."""
    size = batch.page_size
    counts = [-(-len(k) // size) for k in keys]
    num_pages = sum(counts) + 3
    pages = torch.randperm(num_pages, generator=rng)[: sum(counts)]
    pool = [
        torch.full((num_pages, size, batch.heads[1], dim), torch.nan, dtype=batch.dtype,
                   device=device)
        for dim in batch.head_dims
    ]  # fmt: skip
    begin = 0
    for k, v, count in zip(keys, values, counts, strict=True):
        for place in range(count):
            page = pages[begin + place]
            rows = slice(place * size, (place + 1) * size)
            pool[0][page, : len(k[rows])] = k[rows]
            pool[1][page, : len(v[rows])] = v[rows]
        begin += count
    garbage = torch.tensor([-1, 2**31 - 1, num_pages])
    spare = garbage.repeat(batch.spare)[: batch.spare]
    table = [part for own in pages.split(counts) for part in (own, spare)] if counts else []
    index["kv_indices"] = torch.cat([*table, garbage]).to(torch.int32).to(device)
    index["kv_indptr"] = _indptr([count + batch.spare for count in counts], device)
    if batch.form == "paged-lens":
        lengths = [len(k) for k in keys]
        index["kv_lens"] = torch.tensor(lengths, dtype=torch.int32, device=device)
    else:
        last = [
            len(k) - (count - 1) * size if count else 0
            for k, count in zip(keys, counts, strict=True)
        ]
        index["kv_last_page_len"] = torch.tensor(last, dtype=torch.int32, device=device)
    if batch.kv_layout == "HND":
        pool = [part.transpose(1, 2).contiguous() for part in pool]
    if batch.stacked:
        return torch.stack(pool, 1)
    return tuple(pool)
