"""The wrappers in CUDA graphs: captured once, replayed with other lengths, tables and requests."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import oracle
import pytest
import ridgeline
import torch
from batch_problem import Batch, Inputs
from support import normal
from torch import Tensor
from wrapper_problem import (
    BUFFERS,
    DECODE,
    KINDS,
    MIXED,
    base,
    counted,
    make,
    plan,
    planned,
    run,
    with_buffers,
)

pytestmark = pytest.mark.gpu

GPU = torch.device("cuda", 0)
PAGES = 500
TOKENS = 120


def variants(kind: str) -> list[Batch]:
    """What one captured batch becomes: shorter, longer, fewer requests, none, many."""
    batch = base(kind).with_(heads=(8, 2), head_dims=(128, 128))
    if kind == "decode":
        found = [
            ((1, 900),) * 8,
            ((1, 5),) * 8,
            ((1, 1500), (1, 0), (1, 3)),
            (),
            ((1, 1),) * 7 + ((1, 4000),),
        ]
    else:
        found = [
            ((1, 900),) * 6 + ((60, 500), (7, 7)),
            ((1, 5),) * 8,
            ((60, 1500), (0, 3), (1, 0)),
            (),
            ((9, 700),) * 8,
        ]
    return [batch.with_(lengths=lengths, name=f"variant{i}") for i, lengths in enumerate(found)]


class Static:
    """Tensors at fixed addresses that take the contents of any variant."""

    def __init__(self, batch: Batch, rows: int) -> None:
        self.batch = batch
        requests = 8
        heads, dim = batch.heads, batch.head_dims[0]
        self.q = torch.zeros(rows, heads[0], dim, dtype=batch.dtype, device=GPU)
        shape = (PAGES, batch.page_size, heads[1], dim)
        if batch.form == "ragged":
            shape = (PAGES * 16, heads[1], dim)  # type: ignore[assignment]
        self.cache = tuple(torch.zeros(shape, dtype=batch.dtype, device=GPU) for _ in range(2))
        sizes = {
            "qo_indptr": requests + 1,
            "kv_indptr": requests + 1,
            "kv_indices": PAGES,
            "kv_last_page_len": requests,
            "kv_lens": requests,
        }
        wanted = variants_inputs(batch).index
        self.index = {
            name: torch.zeros(sizes[name], dtype=torch.int32, device=GPU) for name in wanted
        }

    def load(self, inputs: Inputs, with_index: bool = True) -> None:
        self.q.zero_()
        self.q[: len(inputs.q)] = inputs.q
        for target, source in zip(self.cache, inputs.cache, strict=True):
            target[: len(source)] = source
        for name, tensor in inputs.index.items() if with_index else ():
            target = self.index[name]
            target[: len(tensor)] = tensor
            if "indptr" in name:
                target[len(tensor) :] = tensor[-1]
            elif name != "kv_indices":
                target[len(tensor) :] = 0

    def inputs(self) -> Inputs:
        return Inputs(self.batch, self.q, self.cache, self.index, [], [])


def variants_inputs(batch: Batch) -> Inputs:
    return batch.with_(lengths=((1, 1),)).inputs(GPU, torch.Generator().manual_seed(0))


def capture(call: Callable[[], Any]) -> tuple[torch.cuda.CUDAGraph, Any]:
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = call()
    return graph, results


def replay(graph: torch.cuda.CUDAGraph, results: Any) -> list[Tensor]:
    for result in results:
        result.fill_(torch.nan)
    graph.replay()
    return [result.clone() for result in results]


def equal(got: Any, expected: Any) -> None:
    for name, one, other in zip(("out", "lse"), got, expected, strict=True):
        assert torch.equal(one, other), f"{name}: the graph's differs from the eager call's"


def padded(kind: str, batch: Batch) -> Batch:
    rows = 8 if kind == "decode" else TOKENS
    return batch.with_(padding=rows - sum(q for q, _ in batch.lengths))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("invariant", [False, True])
def test_contents_change_in_place(kind: str, invariant: bool, rng: torch.Generator) -> None:
    """Replays without a plan: the captured run contains its own schedule."""
    found = [padded(kind, b.with_(invariant=invariant)) for b in variants(kind)]
    static = Static(found[0], 8 if kind == "decode" else TOKENS)
    all_inputs = [batch.inputs(GPU, rng) for batch in found]
    static.load(all_inputs[0])
    wrapper = planned(kind, static.inputs())
    made = counted(wrapper)

    def layers() -> Any:
        run(wrapper, kind, static.inputs(), return_lse=True)
        return run(wrapper, kind, static.inputs(), return_lse=True)

    graph, results = capture(layers)
    assert len(made) == 1, "the first run of a capture makes the list, the second shares it"
    for inputs in (*all_inputs, all_inputs[0]):
        static.load(inputs)
        got = replay(graph, results)
        fresh = planned(kind, static.inputs())
        equal(got, run(fresh, kind, static.inputs(), return_lse=True))
        oracle.check(inputs.reference(), *got)


@pytest.mark.parametrize("kind", list(BUFFERS))
@pytest.mark.parametrize("host", [False, True])
def test_plan_then_replay(kind: str, host: bool, rng: torch.Generator) -> None:
    """With buffers a plan's contents reach the graph."""
    found = [padded(kind, batch) for batch in variants(kind)]
    wrapper = with_buffers(kind, found[0], GPU, 8, PAGES)
    static = Static(found[0], 8 if kind == "decode" else TOKENS)
    all_inputs = [batch.inputs(GPU, rng) for batch in found]
    plan(wrapper, kind, all_inputs[0], host)
    static.load(all_inputs[0], with_index=False)
    graph, results = capture(lambda: run(wrapper, kind, static.inputs(), return_lse=True))
    for inputs in (*all_inputs, all_inputs[0]):
        plan(wrapper, kind, inputs, host)
        static.load(inputs, with_index=False)
        got = replay(graph, results)
        equal(got, run(wrapper, kind, static.inputs(), return_lse=True))
        oracle.check(inputs.reference(), *got)


@pytest.mark.parametrize("kind", KINDS)
def test_graph_keeps_the_tensors_of_its_plan(kind: str, rng: torch.Generator) -> None:
    """Without buffers another plan is the eager runs' alone."""
    first, second = (base(kind).inputs(GPU, rng) for _ in range(2))
    wrapper = make(kind, first.batch, GPU)
    plan(wrapper, kind, first, host=True)
    expected = run(wrapper, kind, first, return_lse=True)
    graph, results = capture(lambda: run(wrapper, kind, first, return_lse=True))
    plan(wrapper, kind, second, host=True)
    garbage = [torch.full((n,), 10**6, dtype=torch.int32, device=GPU) for n in range(1, 60)]
    eager = run(wrapper, kind, second, return_lse=True)
    equal(replay(graph, results), expected)
    equal(run(wrapper, kind, second, return_lse=True), eager)
    assert len(garbage) == 59


def test_captures_share_a_wrapper(rng: torch.Generator) -> None:
    """Two graphs of one plan, of different sizes, in one pool; each has a list of its own."""
    inputs = MIXED.with_(padding=50).inputs(GPU, rng)
    wrapper = planned("prefill", inputs)
    made = counted(wrapper)
    live = sum(q for q, _ in MIXED.lengths)
    pool = torch.cuda.graph_pool_handle()
    graphs = []
    for rows in (live + 50, live + 7, live):
        q = inputs.q[:rows].clone()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=pool):
            results = [wrapper.run(q, inputs.cache) for _ in range(3)][-1:]
        graphs.append((graph, results, q))
    assert len(made) == 3
    for graph, results, q in graphs:
        (got,) = replay(graph, results)
        assert torch.equal(got, wrapper.run(q, inputs.cache))


def test_streams_of_a_capture(rng: torch.Generator) -> None:
    """A forked stream makes a list of its own: nothing orders it behind the other's."""
    inputs = MIXED.inputs(GPU, rng)
    wrapper = planned("prefill", inputs)
    expected = wrapper.run(inputs.q, inputs.cache)
    made = counted(wrapper)
    side = torch.cuda.Stream()

    def call() -> list[Tensor]:
        main = torch.cuda.current_stream()
        side.wait_stream(main)
        first = wrapper.run(inputs.q, inputs.cache)
        with torch.cuda.stream(side):
            second = wrapper.run(inputs.q, inputs.cache)
        main.wait_stream(side)
        return [first, second]

    graph, results = capture(call)
    assert len(made) == 2
    for got in replay(graph, results):
        assert torch.equal(got, expected)


def test_several_queries_a_request(rng: torch.Generator) -> None:
    """`q_len_per_req` with buffers: the starts of the queries stay at one address."""
    batch = DECODE.with_(lengths=((3, 40), (3, 3), (3, 700)), decode=False, causal=True)
    wrapper = with_buffers("decode", batch, GPU, 3, 200)
    first, second = batch.inputs(GPU, rng), batch.with_(lengths=((3, 9),) * 3).inputs(GPU, rng)
    plan(wrapper, "decode", first, q_len_per_req=3)
    static = Static(batch.with_(padding=0), 9)
    static.load(first, with_index=False)
    graph, results = capture(lambda: wrapper.run(static.q, static.cache, return_lse=True))
    for inputs in (second, first):
        plan(wrapper, "decode", inputs, q_len_per_req=3)
        static.load(inputs, with_index=False)
        oracle.check(inputs.reference(), *replay(graph, results))


def test_plan_inside_a_capture(rng: torch.Generator) -> None:
    """A plan of device tensors is recorded like any other work."""
    inputs = MIXED.inputs(GPU, rng)
    wrapper = make("prefill", MIXED, GPU)

    def call() -> list[Tensor]:
        plan(wrapper, "prefill", inputs, num_qo_tokens=len(inputs.q))
        return [wrapper.run(inputs.q, inputs.cache)]

    graph, results = capture(call)
    (got,) = replay(graph, results)
    assert torch.equal(got, wrapper.run(inputs.q, inputs.cache))
    assert torch.equal(got, inputs.call(return_lse=False))


def test_cascade(rng: torch.Generator) -> None:
    """Both levels' tables change in place; and by a plan, with buffers."""
    heads, page = (8, 2), 16
    pool = normal((PAGES, 2, page, 2, 128), torch.float16, GPU, rng)
    q = normal((6, 8, 128), torch.float16, GPU, rng)
    contents = [
        ([0, 6], [0, 20], 16, [0, 3, 6, 9, 12, 15, 18], [5] * 6),
        ([0, 4], [0, 3], 1, [0, 1, 2, 3, 7, 7, 7], [5, 16, 1, 3, 0, 0]),
        ([0, 6], [0, 120], 7, [0, 30, 31, 32, 33, 34, 35], [16, 1, 2, 3, 4, 5]),
    ]

    def arrays(step: int, device: torch.device) -> list[list[Tensor]]:
        starts, prefix, prefix_last, indptr, last = contents[step]
        rows: list[list[list[int]]] = [
            [starts, list(range(7))],
            [prefix, indptr],
            [list(range(300, 420)), list(range(120))],
            [[prefix_last], last],
        ]
        return [
            [torch.tensor(row, dtype=torch.int32, device=device) for row in pair] for pair in rows
        ]

    static = arrays(0, GPU)
    plain = ridgeline.MultiLevelCascadeAttentionWrapper(2)
    plain.plan(*static, *heads, 128, page)  # type: ignore[arg-type]
    graph, results = capture(lambda: plain.run(q, pool, return_lse=True))
    buffers = [[torch.empty_like(t) for t in pair] for pair in static]
    held = ridgeline.MultiLevelCascadeAttentionWrapper(2, None, "NHD", True, *buffers)
    assert held.is_cuda_graph_enabled
    held.plan(*arrays(0, GPU), *heads, 128, page)  # type: ignore[arg-type]
    held_graph, held_results = capture(lambda: held.run(q, pool, return_lse=True))
    for step in (0, 1, 2, 0):
        for pair, new in zip(static, arrays(step, GPU), strict=True):
            for target, source in zip(pair, new, strict=True):
                target.copy_(source)
        held.plan(*arrays(step, torch.device("cpu")), *heads, 128, page)  # type: ignore[arg-type]
        fresh = ridgeline.MultiLevelCascadeAttentionWrapper(2)
        fresh.plan(*static, *heads, 128, page)  # type: ignore[arg-type]
        expected = fresh.run(q, pool, return_lse=True)
        equal(replay(graph, results), expected)
        equal(replay(held_graph, held_results), expected)


def test_pod(rng: torch.Generator) -> None:
    found = [padded("decode", batch) for batch in variants("decode")]
    static = Static(found[0], 8)
    all_inputs = [batch.inputs(GPU, rng) for batch in found]
    static.load(all_inputs[0])
    q = normal((70, 8, 128), torch.float16, GPU, rng)
    k, v = (normal((300, 2, 128), torch.float16, GPU, rng) for _ in range(2))
    wrapper = ridgeline.PODWithPagedKVCacheWrapper(kv_layout="NHD")
    index = static.index
    table = (index["kv_indptr"], index["kv_indices"], index["kv_last_page_len"])
    wrapper.plan(*table, 8, 2, 128, 16)
    graph, results = capture(lambda: wrapper.run(q, k, v, static.q, static.cache, causal_p=True))
    for inputs in all_inputs:
        static.load(inputs)
        k.copy_(k.flip(0))
        got = replay(graph, results)
        wrapper.plan(*table, 8, 2, 128, 16)
        equal(got, wrapper.run(q, k, v, static.q, static.cache, causal_p=True))
