"""Cascade, shared-prefix and POD wrappers: against float64 over the keys that a request sees."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import oracle
import pytest
import ridgeline
import torch
from batch_problem import Batch, Inputs
from support import normal, poison
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from wrapper_problem import DECODE, MIXED, plan, planned, run

HEADS, DIM, PAGE = (8, 2), 64, 16


def int32(values: list[int], device: torch.device) -> Tensor:
    return torch.tensor(values, dtype=torch.int32, device=device)


class Tree:
    """Requests whose keys are those of each group above them, then their own, in one pool.

    ``groups[level]`` has, for each node of the level, the number of requests below it and of its
    keys; the last level has a node a request.
    """

    def __init__(
        self,
        groups: list[list[tuple[int, int]]],
        q_lens: list[int],
        device: torch.device,
        rng: torch.Generator,
        kv_layout: str = "NHD",
    ) -> None:
        self.q_lens = q_lens
        total = sum(-(-length // PAGE) for level in groups for _, length in level)
        shape = (total + 2, 2, PAGE, HEADS[1], DIM)
        self.pool = normal(shape, torch.float16, device, rng)
        pages = torch.randperm(total + 2, generator=rng)[:total].tolist()
        self.keys: list[list[Tensor]] = [[] for _ in q_lens]
        self.levels: list[tuple[Tensor, ...]] = []
        for level in groups:
            starts, indptr, indices, last, request = [0], [0], [], [], 0
            for count, length in level:
                own = [pages.pop() for _ in range(-(-length // PAGE))]
                rows = self.pool[own].transpose(1, 2).flatten(0, 1)[:length]
                for member in range(request, request + count):
                    self.keys[member].append(rows)
                request += count
                starts.append(sum(q_lens[:request]))
                indices += own
                indptr.append(len(indices))
                last.append(length - (len(own) - 1) * PAGE if own else 0)
            assert request == len(q_lens)
            table = (starts, indptr, indices, last)
            self.levels.append(tuple(int32(values, device) for values in table))
        self.q = normal((sum(q_lens), HEADS[0], DIM), torch.float16, device, rng)
        if kv_layout == "HND":
            self.pool = self.pool.transpose(2, 3).contiguous()

    def arrays(self, host: bool = False) -> list[list[Tensor]]:
        return [[t.cpu() if host else t for t in array] for array in zip(*self.levels, strict=True)]

    def check(self, causal: bool, out: Tensor, lse: Tensor, **options: Any) -> None:
        begin, merges = 0, len(self.levels) - 1
        for q_len, parts in zip(self.q_lens, self.keys, strict=True):
            rows = slice(begin, begin + q_len)
            begin += q_len
            keys = torch.cat(parts)
            # Bottom-right alignment: causal over all keys is causal over a request's own.
            reference = oracle.attention(
                self.q[rows], keys[:, 0], keys[:, 1], causal=causal, **options
            )
            largest = keys[:, 1].double().abs().amax() if len(keys) else 0.0
            # Every level's output is rounded to float16, and so is every merge.
            bound = reference.out_bound + 2 * merges * 2.0**-11 * largest
            lse_bound = reference.lse_bound + merges * 2.0**-20
            oracle.check(
                oracle.Reference(reference.out, reference.lse, bound, lse_bound),
                out[rows],
                lse[rows],
            )


def flat_tree(device: torch.device, rng: torch.Generator, **options: Any) -> Tree:
    groups = [[(5, 200)], [(2, 33), (3, 16)], [(1, n) for n in (7, 1, 40, 5, 64)]]
    return Tree(groups, [3, 1, 8, 5, 2], device, rng, **options)


def trees(device: torch.device, rng: torch.Generator) -> list[Tree]:
    own = [(1, n) for n in (5, 16, 33, 1)]
    return [
        flat_tree(device, rng),
        flat_tree(device, rng, kv_layout="HND"),
        Tree([own], [5, 3, 1, 1], device, rng),
        Tree([[(4, 300)], own], [1] * 4, device, rng),
        Tree([[(1, 0), (3, 90)], own], [2, 9, 1, 1], device, rng),
        Tree([[(2, 50), (2, 0)], [(1, 0), (1, 4), (1, 0), (1, 2)]], [1, 2, 1, 2], device, rng),
    ]


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("number", range(6))
def test_cascade(number: int, causal: bool, device: torch.device, rng: torch.Generator) -> None:
    tree = trees(device, rng)[number]
    layout = "HND" if number == 1 else "NHD"
    wrapper = ridgeline.MultiLevelCascadeAttentionWrapper(
        len(tree.levels), kv_layout=layout, device=device
    )
    # A request's own keys may be fewer than its queries only where nothing is causal.
    causal = causal and number != 5 and number != 2
    for host in (False, True):
        wrapper.plan(*tree.arrays(host), *HEADS, DIM, PAGE, causal=causal)
        out, lse = wrapper.run(tree.q, tree.pool, return_lse=True)
        tree.check(causal, out, lse)
        assert torch.equal(wrapper.run(tree.q, tree.pool), out)
    work = wrapper.schedule(len(tree.q))
    assert len(work) == (len(tree.levels) + 1) // 2
    assert torch.equal(wrapper.run(tree.q, tree.pool, schedule=work), out)


def attention_ops(call: Callable[[], Any]) -> list[str]:
    """Names of the attention ops that a call runs, with their work lists."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        call()
    names = [event.name for event in profile.events() if "ridgeline" in event.name]
    return [name.split("::")[1] for name in names if "attention" in name]


def test_two_parts_are_one_launch(device: torch.device, rng: torch.Generator) -> None:
    tree = trees(device, rng)[3]
    cascade = ridgeline.MultiLevelCascadeAttentionWrapper(2, device=device)
    cascade.plan(*tree.arrays(), *HEADS, DIM, PAGE, max_q_len=1)
    shared = ridgeline.BatchDecodeWithSharedPrefixPagedKVCacheWrapper(device=device)
    shared.begin_forward(*tree.levels[1][1:], *HEADS, DIM, PAGE)
    prefix = tree.keys[0][0].unbind(1)
    inputs, prefill = pod_inputs(device, rng)
    pod = ridgeline.PODWithPagedKVCacheWrapper(device=device)
    index = inputs.index
    pod.plan(index["kv_indptr"], index["kv_indices"], index["kv_last_page_len"], 4, 2, 64, 16)
    batch, parts = batch_pod(device, rng)
    arguments = [one for part in parts for one in (part.q, part.cache)]
    for call in (
        lambda: cascade.run(tree.q, tree.pool),
        lambda: shared.forward(tree.q, *prefix, tree.pool),
        lambda: pod.run(*prefill, inputs.q, inputs.cache, causal_p=True),
        lambda: batch.run(*arguments, causal_p=True),
    ):
        assert attention_ops(call) == ["attention_pair_schedule", "attention_pair"]
        assert attention_ops(call) == ["attention_pair"]


def test_options_that_need_two_launches(device: torch.device, rng: torch.Generator) -> None:
    tree = flat_tree(device, rng)
    wrapper = ridgeline.MultiLevelCascadeAttentionWrapper(3, device=device)
    for options in ({"batch_invariant": True}, {"use_fp16_qk_reduction": True}):
        wrapper.plan(*tree.arrays(), *HEADS, DIM, PAGE, causal=True, **options)
        lists = wrapper.schedule(len(tree.q))
        assert len(lists) == 3
        out, lse = wrapper.run(tree.q, tree.pool, return_lse=True, schedule=lists)
        assert torch.equal(wrapper.run(tree.q, tree.pool), out)
        if "batch_invariant" in options:
            tree.check(True, out, lse)
            wrapper.plan(*tree.arrays(), *HEADS, DIM, PAGE, causal=True)
            lists = [level.schedule(len(tree.q)) for level in wrapper._levels]
            tree.check(True, *wrapper.run(tree.q, tree.pool, return_lse=True, schedule=lists))


def test_cascade_options(device: torch.device, rng: torch.Generator) -> None:
    tree = flat_tree(device, rng)
    wrapper = ridgeline.MultiLevelCascadeAttentionWrapper(3, device=device)
    assert wrapper.workspace_size() == 0
    assert not wrapper.is_cuda_graph_enabled
    wrapper.begin_forward(*tree.arrays(), *HEADS, DIM, PAGE, logits_soft_cap=9.0, sm_scale=0.2)
    out, lse = wrapper.run(tree.q, tree.pool, return_lse=True)
    tree.check(False, out, lse, logits_soft_cap=9.0, sm_scale=0.2)
    buffers = torch.empty_like(out), torch.empty_like(lse)
    poison(*buffers)
    assert wrapper.forward(tree.q, tree.pool, out=buffers[0], lse=buffers[1]) is buffers[0]
    assert torch.equal(buffers[0], out)
    assert torch.equal(buffers[1], lse)
    turned = wrapper.run(tree.q, tree.pool, return_lse=True, lse_base="log2", lse_layout="HN")[1]
    assert torch.allclose(turned.t(), lse * 1.4426950408889634)


def test_cascade_compiles(device: torch.device, rng: torch.Generator) -> None:
    torch._dynamo.reset()
    backend = CompileCounterWithBackend("aot_eager")
    wrapper = ridgeline.MultiLevelCascadeAttentionWrapper(2, device=device)

    @torch.compile(fullgraph=True, backend=backend)
    def step(q: Tensor, pool: Tensor) -> Tensor:
        return wrapper.run(wrapper.run(q, pool), pool)

    pool = normal((90, 2, PAGE, HEADS[1], DIM), torch.float16, device, rng)
    for count in (3, 5, 9, 4, 7):
        own = [(1, 20 + 21 * i) for i in range(count)]
        tree = Tree([[(2, 100), (count - 2, 60)], own], [1] * count, device, rng)
        pool[: len(tree.pool)] = tree.pool
        wrapper.plan(*tree.arrays(), *HEADS, DIM, PAGE)
        got = step(tree.q, pool)
        assert torch.equal(got, wrapper.run(wrapper.run(tree.q, pool), pool))
    assert backend.frame_count <= 2


@pytest.mark.parametrize("decode", [True, False])
@pytest.mark.parametrize("layout", ["NHD", "HND"])
def test_shared_prefix(
    decode: bool, layout: str, device: torch.device, rng: torch.Generator
) -> None:
    q_lens = [1, 1, 1] if decode else [4, 1, 7]
    own = [(1, n) for n in (20, 1, 64)] if decode else [(1, n) for n in (20, 1, 40)]
    tree = Tree([[(3, 77)], own], q_lens, device, rng, kv_layout=layout)
    shared = tree.keys[0][0]
    k, v = shared[:, 0], shared[:, 1]
    if layout == "HND":
        k, v = k.transpose(0, 1), v.transpose(0, 1)
    table = tree.levels[1]
    wrapper: Any
    if decode:
        wrapper = ridgeline.BatchDecodeWithSharedPrefixPagedKVCacheWrapper(
            None, layout, device=device
        )
        wrapper.begin_forward(*table[1:], *HEADS, DIM, PAGE)
    else:
        wrapper = ridgeline.BatchPrefillWithSharedPrefixPagedKVCacheWrapper(
            None, layout, device=device
        )
        wrapper.begin_forward(*table, *HEADS, DIM, PAGE)
    options: dict[str, Any] = {} if decode else {"causal": True}
    for sm_scale in (None, 0.3):
        out = wrapper.forward(tree.q, k, v, tree.pool, sm_scale=sm_scale, **options)
        cascade = ridgeline.MultiLevelCascadeAttentionWrapper(2, kv_layout=layout, device=device)
        arrays = tree.arrays()
        cascade.plan(*arrays, *HEADS, DIM, PAGE, sm_scale=sm_scale, causal=not decode)
        _, lse = cascade.run(tree.q, tree.pool, return_lse=True)
        tree.check(not decode, out, lse, sm_scale=sm_scale)
    wrapper.end_forward()
    assert wrapper.workspace_size() == 0
    with pytest.raises(NotImplementedError, match="'rope_theta'"):
        wrapper.forward(tree.q, k, v, tree.pool, rope_theta=1e4)


def pod_inputs(
    device: torch.device, rng: torch.Generator
) -> tuple[Inputs, tuple[Tensor, Tensor, Tensor]]:
    inputs = DECODE.inputs(device, rng)
    q = normal((40, 4, 64), torch.float16, device, rng)
    k, v = (normal((90, 2, 64), torch.float16, device, rng) for _ in range(2))
    return inputs, (q, k, v)


def test_pod(device: torch.device, rng: torch.Generator) -> None:
    inputs, prefill = pod_inputs(device, rng)
    wrapper = ridgeline.PODWithPagedKVCacheWrapper(device=device)
    index = inputs.index
    table = (index["kv_indptr"], index["kv_indices"], index["kv_last_page_len"])
    wrapper.plan(*table, 4, 2, 64, 16, logits_soft_cap=20.0)
    capped = DECODE.with_(logits_soft_cap=20.0)
    inputs.batch = capped
    out_p, out_d = wrapper.run(
        *prefill, inputs.q, inputs.cache, causal_p=True, window_left_p=30, return_lse_p=True,
        return_lse_d=True,
    )  # fmt: skip
    assert isinstance(out_p, tuple)
    assert isinstance(out_d, tuple)
    oracle.check(inputs.reference(), *out_d)
    reference = oracle.attention(*prefill, causal=True, window_left=30, logits_soft_cap=20.0)
    oracle.check(reference, *out_p)
    plain_p, plain_d = wrapper.run(
        *prefill, inputs.q, inputs.cache, causal_p=True, window_left_p=30, causal_d=True,
        kv_layout_d="NHD",
    )  # fmt: skip
    assert isinstance(plain_p, Tensor)
    assert isinstance(plain_d, Tensor)
    assert torch.equal(plain_p, out_p[0])
    assert torch.equal(plain_d, out_d[0])
    work = wrapper.schedule(40, 90, causal_p=True, window_left_p=30)
    given = wrapper.run(
        *prefill, inputs.q, inputs.cache, causal_p=True, window_left_p=30, schedule=work
    )
    assert all(torch.equal(a, b) for a, b in zip(given, (plain_p, plain_d), strict=True))
    changed = wrapper.run(
        *prefill, inputs.q, inputs.cache, window_left_d=9, sm_scale_d=0.3, return_lse_d=True
    )[1]
    expected = inputs.call(window_left=9, sm_scale=0.3)
    assert torch.equal(changed[0], expected[0])
    assert torch.equal(changed[1], expected[1])


def batch_pod(device: torch.device, rng: torch.Generator) -> tuple[Any, list[Inputs]]:
    parts = [batch.inputs(device, rng) for batch in (MIXED, DECODE.with_(decode=False))]
    wrapper = ridgeline.BatchPODWithPagedKVCacheWrapper(device=device)
    names = ("qo_indptr", "kv_indptr", "kv_indices", "kv_last_page_len")
    tables = [part.index[name] for part in parts for name in names]
    wrapper.plan(*tables, 4, 2, 64, 16, max_q_len_d=1)
    return wrapper, parts


def test_batch_pod(device: torch.device, rng: torch.Generator) -> None:
    wrapper, parts = batch_pod(device, rng)
    arguments = [one for part in parts for one in (part.q, part.cache)]
    got = wrapper.run(*arguments, causal_p=True, return_lse_p=True, return_lse_d=True)
    for part, result in zip(parts, got, strict=True):
        oracle.check(part.reference(), *result)
    plain = wrapper.run(*arguments, causal_p=True)
    assert torch.equal(plain[0], got[0][0])
    assert torch.equal(plain[1], got[1][0])
    open_mask = wrapper.run(*arguments, window_left_p=12, sm_scale_d=0.4)
    parts[0].batch = MIXED.with_(causal=False, window_left=12)
    assert torch.equal(open_mask[0], parts[0].call(return_lse=False))
    assert torch.equal(open_mask[1], parts[1].call(return_lse=False, sm_scale=0.4, max_q_len=1))
    counts = [len(part.q) for part in parts]
    given = wrapper.run(
        *arguments, causal_p=True, schedule=wrapper.schedule(*counts, causal_p=True)
    )
    assert torch.equal(given[1], plain[1])
    lists = (wrapper._prefill.schedule(counts[0]), wrapper._decode.schedule(counts[1]))
    apart = wrapper.run(*arguments, return_lse_d=True, schedule=lists)
    oracle.check(parts[1].reference(), *apart[1])


def test_pod_compiles(device: torch.device, rng: torch.Generator) -> None:
    torch._dynamo.reset()
    backend = CompileCounterWithBackend("aot_eager")
    wrapper = ridgeline.PODWithPagedKVCacheWrapper(device=device)

    @torch.compile(fullgraph=True, backend=backend)
    def step(q_p: Tensor, k_p: Tensor, v_p: Tensor, q_d: Tensor, k: Tensor, v: Tensor) -> Any:
        return wrapper.run(q_p, k_p, v_p, q_d, (k, v), causal_p=True)

    for count in (3, 5, 9, 4, 7):
        lengths = tuple((1, 30 + 37 * i) for i in range(count))
        inputs = DECODE.with_(lengths=lengths).inputs(device, rng)
        q = normal((20 + count, 4, 64), torch.float16, device, rng)
        k, v = (normal((50 + 3 * count, 2, 64), torch.float16, device, rng) for _ in range(2))
        index = inputs.index
        table = (index["kv_indptr"], index["kv_indices"], index["kv_last_page_len"])
        wrapper.plan(*table, 4, 2, 64, 16)
        got = step(q, k, v, inputs.q, *inputs.cache)
        expected = wrapper.run(q, k, v, inputs.q, inputs.cache, causal_p=True)
        assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
    assert backend.frame_count <= 2


@pytest.mark.gpu
def test_no_synchronisation(rng: torch.Generator) -> None:
    device = torch.device("cuda", 0)
    tree = flat_tree(device, rng)
    cascade = ridgeline.MultiLevelCascadeAttentionWrapper(3, device=device)
    decode, prefill = pod_inputs(device, rng)
    pod, parts = batch_pod(device, rng)
    single = ridgeline.PODWithPagedKVCacheWrapper(device=device)
    index = decode.index
    shared = ridgeline.BatchDecodeWithSharedPrefixPagedKVCacheWrapper(device=device)
    table = (index["kv_indptr"], index["kv_indices"], index["kv_last_page_len"])

    def everything() -> None:
        cascade.plan(*tree.arrays(), *HEADS, DIM, PAGE, causal=True)
        cascade.run(tree.q, tree.pool)
        single.plan(*table, 4, 2, 64, 16)
        single.run(*prefill, decode.q, decode.cache, causal_p=True)
        shared.begin_forward(*table, 4, 2, 64, 16)
        shared.forward(decode.q, *prefill[1:], decode.cache)
        pod.run(*(one for part in parts for one in (part.q, part.cache)), causal_p=True)

    everything()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        torch.cuda._sleep(1_000_000_000)
        everything()
        done = torch.cuda.Event()
        done.record()
        assert not done.query()
    finally:
        torch.cuda.set_sync_debug_mode("default")
        torch.cuda.synchronize()


@pytest.mark.gpu
def test_graphs_schedule_for_the_lengths_they_find(rng: torch.Generator) -> None:
    """Lengths change in place after the capture; an eager caller plans again."""
    device = torch.device("cuda", 0)
    tree = trees(device, rng)[3]
    cascade = ridgeline.MultiLevelCascadeAttentionWrapper(2, device=device)
    inputs, prefill = pod_inputs(device, rng)
    pod = ridgeline.PODWithPagedKVCacheWrapper(device=device)
    table = [inputs.index[name] for name in ("kv_indptr", "kv_indices", "kv_last_page_len")]

    def plan() -> None:
        cascade.plan(*tree.arrays(), *HEADS, DIM, PAGE)
        pod.plan(*table, 4, 2, 64, 16)

    def run() -> list[Tensor]:
        merged = cascade.run(tree.q, tree.pool)
        return [merged, *pod.run(*prefill, inputs.q, inputs.cache, causal_p=True)]  # type: ignore[list-item]

    plan()
    run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = run()
    changed = (tree.levels[0][3], table[2])
    planned = [tensor.clone() for tensor in changed]
    for lens in ([torch.ones_like(tensor) for tensor in changed], planned):
        for tensor, values in zip(changed, lens, strict=True):
            tensor.copy_(values)
        for result in results:
            result.fill_(torch.nan)
        graph.replay()
        plan()
        for got, expected in zip(results, run(), strict=True):
            assert torch.equal(got, expected)


def test_cascade_equals_flat_paging(device: torch.device, rng: torch.Generator) -> None:
    """The same keys as one level: the wrapper's other form of the same attention."""
    tree = Tree([[(3, 64)], [(1, n) for n in (7, 40, 16)]], [1, 1, 1], device, rng)
    wrapper = ridgeline.MultiLevelCascadeAttentionWrapper(2, device=device)
    wrapper.plan(*tree.arrays(), *HEADS, DIM, PAGE)
    out = wrapper.run(tree.q, tree.pool)
    batch = Batch(lengths=((1, 71), (1, 104), (1, 80)), heads=HEADS, decode=True, stacked=True)
    inputs = batch.inputs(device, rng)
    (_, _, prefix, _), (_, indptr, own, last) = (
        [t.tolist() for t in level] for level in tree.levels
    )
    flat = [prefix + own[indptr[i] : indptr[i + 1]] for i in range(3)]
    starts = [0, *torch.tensor([len(pages) for pages in flat]).cumsum(0).tolist()]
    inputs.q, inputs.cache = tree.q, tree.pool
    inputs.index = {
        "kv_indptr": int32(starts, device),
        "kv_indices": int32([page for pages in flat for page in pages], device),
        "kv_last_page_len": int32(last, device),
    }
    wrapper_flat = planned("decode", inputs)
    plan(wrapper_flat, "decode", inputs)
    assert torch.allclose(out, run(wrapper_flat, "decode", inputs), atol=5e-3)
