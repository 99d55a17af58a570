"""The wrappers over the inputs of batch_problem: how each is made, planned and run."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import oracle
import ridgeline
import torch
from batch_problem import Batch, Inputs
from support import poisoned_call
from torch import Tensor

KINDS = ("decode", "prefill", "ragged", "batch")
DECODE = Batch(lengths=((1, 100), (1, 1), (1, 257), (1, 0), (1, 64)), decode=True, name="decode")
MIXED = Batch(
    lengths=((1, 300), (37, 90), (0, 50), (1, 0), (1, 1), (5, 5), (70, 200), (0, 0)),
    causal=True,
    name="mixed",
)
# Names of the constructor's buffers, and which index tensor each holds.
BUFFERS = {
    "decode": {
        "paged_kv_indptr_buffer": "kv_indptr",
        "paged_kv_indices_buffer": "kv_indices",
        "paged_kv_last_page_len_buffer": "kv_last_page_len",
    },
    "prefill": {
        "qo_indptr_buf": "qo_indptr",
        "paged_kv_indptr_buf": "kv_indptr",
        "paged_kv_indices_buf": "kv_indices",
        "paged_kv_last_page_len_buf": "kv_last_page_len",
    },
    "ragged": {"qo_indptr_buf": "qo_indptr", "kv_indptr_buf": "kv_indptr"},
}
CLASSES: dict[str, Any] = {
    "decode": ridgeline.BatchDecodeWithPagedKVCacheWrapper,
    "prefill": ridgeline.BatchPrefillWithPagedKVCacheWrapper,
    "ragged": ridgeline.BatchPrefillWithRaggedKVCacheWrapper,
    "batch": ridgeline.BatchAttention,
}


def base(kind: str) -> Batch:
    """A batch that the kind of wrapper takes."""
    if kind == "decode":
        return DECODE
    return MIXED.with_(form={"prefill": "paged", "ragged": "ragged", "batch": "paged-lens"}[kind])


def make(kind: str, batch: Batch, device: torch.device, **options: Any) -> Any:
    return CLASSES[kind](kv_layout=batch.kv_layout, device=device, **options)


def with_buffers(kind: str, batch: Batch, device: torch.device, requests: int, pages: int) -> Any:
    """A wrapper for CUDA graphs, of that many requests and pages at most."""
    sizes = {"kv_indices": pages, "kv_last_page_len": requests}
    buffers = {
        name: torch.zeros(sizes.get(held, requests + 1), dtype=torch.int32, device=device)
        for name, held in BUFFERS[kind].items()
    }
    return make(kind, batch, device, use_cuda_graph=True, **buffers)


def plan(wrapper: Any, kind: str, inputs: Inputs, host: bool = False, **options: Any) -> None:
    """Plan the inputs' batch with all its options."""
    batch, index = inputs.batch, inputs.index
    index = {name: t.cpu() for name, t in index.items()} if host else index
    shared: dict[str, Any] = {
        "q_data_type": batch.dtype,
        "kv_data_type": batch.dtype,
        "logits_soft_cap": batch.logits_soft_cap,
        "batch_invariant": batch.invariant,
        **options,
    }
    if kind != "batch":
        shared["window_left"] = batch.window_left
        if batch.rope is not None:
            shared |= {"pos_encoding_mode": "ROPE_LLAMA"}
            shared |= {"rope_scale": batch.rope[0], "rope_theta": batch.rope[1]}
    if kind != "decode":
        shared = {"causal": batch.causal, "max_q_len": batch.max_q_len, **shared}
    heads, (dim_qk, dim_vo) = batch.heads, batch.head_dims
    kv_lens = index.get("kv_last_page_len", index.get("kv_lens"))
    if kind == "ragged":
        tables = (index["qo_indptr"], index["kv_indptr"])
        wrapper.plan(*tables, *heads, dim_qk, dim_vo, **shared)
        return
    table = (index["kv_indptr"], index["kv_indices"], kv_lens)
    if kind == "decode":
        wrapper.plan(*table, *heads, dim_qk, batch.page_size, head_dim_vo=dim_vo, **shared)
    elif kind == "prefill":
        wrapper.plan(index["qo_indptr"], *table, *heads, dim_qk, batch.page_size, dim_vo, **shared)
    else:
        wrapper.plan(index["qo_indptr"], *table, *heads, dim_qk, dim_vo, batch.page_size, **shared)


def run(wrapper: Any, kind: str, inputs: Inputs, **options: Any) -> Any:
    """Run on the inputs' tensors; `BatchAttention` returns the LSE in any case."""
    if kind == "ragged":
        return wrapper.run(inputs.q, *inputs.cache, **options)
    if kind == "batch":
        options.pop("return_lse", None)
    return wrapper.run(inputs.q, inputs.cache, **options)


def planned(kind: str, inputs: Inputs, host: bool = False, **options: Any) -> Any:
    wrapper = make(kind, inputs.batch, inputs.q.device)
    plan(wrapper, kind, inputs, host, **options)
    return wrapper


def check(kind: str, inputs: Inputs, host: bool = False) -> None:
    """Plan and run on poisoned memory; compare with float64, and bitwise with the function."""
    device = inputs.q.device
    wrapper = planned(kind, inputs, host)
    out, lse = poisoned_call(device, run, wrapper, kind, inputs, return_lse=True)
    assert out.is_contiguous()
    oracle.check(inputs.reference(), out, lse)
    expected = inputs.call()
    assert torch.equal(out, expected[0]), "out: not that of ridgeline.attention"
    assert torch.equal(lse, expected[1]), "lse: not that of ridgeline.attention"
    if kind != "batch":
        plain = poisoned_call(device, run, wrapper, kind, inputs)
        assert torch.equal(plain, out), "out: differs without LSE"
    for _ in range(4):
        again = poisoned_call(device, run, wrapper, kind, inputs, return_lse=True)
        assert torch.equal(again[0], out), "out: differs when run again"
        assert torch.equal(again[1], lse), "lse: differs when run again"
    if kind != "batch":
        plain = poisoned_call(device, run, wrapper, kind, inputs)
        assert torch.equal(plain, out), "out: differs without LSE, when run again"
    if device.type == "cuda":
        assert (wrapper._calls.get(None) is not None) == bool(len(inputs.q)), "not prepared"
    work = wrapper.schedule(len(inputs.q))
    given = poisoned_call(device, run, wrapper, kind, inputs, return_lse=True, schedule=work)
    assert torch.equal(given[0], out), "out: differs with a given work list"


def counted(wrapper: Any) -> list[tuple[Any, ...]]:
    """The work lists that a wrapper makes from now on, as a list that grows."""
    made: list[tuple[Any, ...]] = []
    original: Callable[..., Tensor] = wrapper._make_list

    def make_list(*args: Any) -> Tensor:
        made.append(args)
        return original(*args)

    wrapper._make_list = make_list
    return made
