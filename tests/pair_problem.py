"""Two batches as the segments of `attention_pair`: operands, the call, the check."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import oracle
import torch
from batch_problem import Batch, Inputs
from support import compile_rows, poisoned_call
from torch import Tensor

OPS = torch.ops.ridgeline


def compile_kernels() -> None:
    """On a GPU: what pairs launch, compiled by all cores at once, but for what only the JIT has."""
    compile_rows(
        lambda row: (
            row.op in ("attention_pair", "attention_pair_schedule")
            and ("bfloat16" not in row.kernel or "HeadDims<128, 128>" in row.kernel)
        )
    )


def flags_of(batch: Batch) -> int:
    return (
        (1 if batch.kv_layout == "HND" else 0)
        + (2 if batch.causal else 0)
        + (8 if batch.form == "paged-lens" else 0)
    )


@dataclass
class Pair:
    """Inputs of both segments; `single`: the first is one request that has all queries and keys."""

    a: Inputs
    b: Inputs
    single: bool = False

    @staticmethod
    def of(
        a: Batch, b: Batch, device: torch.device, rng: torch.Generator, single: bool = False
    ) -> Pair:
        first, second = a.inputs(device, rng), b.inputs(device, rng)
        if single:
            ((_, kv_len),) = a.lengths
            first.cache = tuple(
                part[:, :kv_len] if a.kv_layout == "HND" else part[:kv_len] for part in first.cache
            )
        return Pair(first, second, single)

    def index(self, inputs: Inputs) -> tuple[Tensor | None, ...]:
        """kv_indices, qo_indptr, kv_indptr, kv_lens."""
        if self.single and inputs is self.a:
            return (None,) * 4
        index = inputs.index
        lens = index.get("kv_last_page_len", index.get("kv_lens"))
        return index.get("kv_indices"), index.get("qo_indptr"), index.get("kv_indptr"), lens

    def operands(self) -> tuple[Any, ...]:
        """The tensors of both, as the op takes them."""
        tensors: list[Any] = []
        for inputs in (self.a, self.b):
            cache = inputs.cache if isinstance(inputs.cache, tuple) else (inputs.cache,) * 2
            tensors += [inputs.q, *cache, *self.index(inputs)]
        return tuple(tensors)

    def numbers(self) -> tuple[int, ...]:
        """Flags, longest queries and windows of both."""
        batches = (self.a.batch, self.b.batch)
        longest = (-1 if of.max_q_len is None else of.max_q_len for of in batches)
        return (*map(flags_of, batches), *longest, *(of.window_left for of in batches))

    def call(self, schedule: Tensor | None = None, sm_scale: float | None = None) -> Any:
        cap = self.a.batch.logits_soft_cap or 0.0
        with torch.no_grad():
            return OPS.attention_pair(*self.operands(), schedule, *self.numbers(), sm_scale, cap)

    def schedule_operands(self) -> tuple[Any, ...]:
        a, b = self.a.batch, self.b.batch
        flags, longest, windows = (self.numbers()[i : i + 2] for i in (0, 2, 4))
        keys = self.a.cache[0].shape[1 if a.kv_layout == "HND" else 0] if self.single else 0
        page_size = a.page_size if a.paged and not self.single else 1
        return (
            *self.index(self.a)[1:], *self.index(self.b)[1:], *flags, page_size, b.page_size,
            len(self.a.q), len(self.b.q), *a.heads, *a.head_dims, *longest, *windows, keys,
        )  # fmt: skip

    def schedule(self) -> Tensor:
        work: Tensor = OPS.attention_pair_schedule(*self.schedule_operands())
        return work

    def check(self) -> tuple[Tensor, Tensor]:
        """Call on poisoned memory, twice and with a work list; compare both with float64."""
        device, num = self.a.q.device, len(self.a.q)
        out, lse = poisoned_call(device, self.call)
        assert out.dtype == self.a.batch.dtype
        assert out.is_contiguous()
        for inputs, rows in ((self.a, slice(None, num)), (self.b, slice(num, None))):
            oracle.check(inputs.reference(), out[rows], lse[rows])
        work = poisoned_call(device, self.schedule)
        for again in (poisoned_call(device, self.call), poisoned_call(device, self.call, work)):
            assert torch.equal(again[0], out), "out: not repeatable bitwise"
            assert torch.equal(again[1], lse), "lse: not repeatable bitwise"
        return out, lse
