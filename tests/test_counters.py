"""Decodes in one launch: counters that none share, left as zeros; two launches, the same bits."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import oracle
import pytest
import torch
from batch_problem import Batch, Inputs
from problem import Problem
from support import run_python

pytestmark = pytest.mark.gpu

GPU = torch.device("cuda", 0)
LONG = ((1, 20_000), *((1, 90 + i) for i in range(20)))
# Decodes that take one launch: where parts are few by the heads, the lengths or both.
ONE = [
    ((32, 8), LONG),
    ((32, 8), ((1, 90),) * 40),
    ((32, 8), ((1, 16),) * 256),
    ((32, 32), ((1, 128),) * 40),
    ((8, 2), ((1, 1),)),
    ((8, 2), ((1, 2_000),)),
    ((8, 2), ((1, 3_000), (1, 0), (1, 17))),
    ((8, 2), ((1, 16),) * 256),
    ((8, 1), ((1, 1_000),)),
    ((16, 1), ((1, 300), *((1, 20),) * 20)),
]
# With one KV head a request may have very many parts.
TWO = [((16, 1), LONG), ((8, 1), ((1, 40_000),))]
DIMS = [(64, 64), (192, 128), (256, 256)]
HEADS = [(32, 8), (8, 8), (8, 2), (16, 1), (6, 3)]


def batch(
    heads: tuple[int, int] = (32, 8),
    dims: tuple[int, int] = (128, 128),
    lengths: tuple[tuple[int, int], ...] = LONG,
) -> Batch:
    return Batch(lengths=lengths, heads=heads, head_dims=dims, decode=True)


def same(results: Any, expected: Any) -> None:
    for got, wanted in zip(results, expected, strict=True):
        assert torch.equal(got, wanted)


class Single:
    """A decode of one request, called as `Inputs` is."""

    def __init__(self, kv_len: int, heads: tuple[int, int], rng: torch.Generator) -> None:
        self.problem = Problem(decode=True, kv_len=kv_len, heads=heads, head_dims=(128, 128))
        self.inputs = self.problem.inputs(GPU, rng)

    def call(self) -> Any:
        return self.problem.call(*self.inputs)

    def reference(self) -> oracle.Reference:
        return self.problem.reference(*self.inputs)


def problems(rng: torch.Generator) -> Iterator[Single | Inputs]:
    yield Single(5_000, (32, 8), rng)
    yield Single(30_000, (16, 1), rng)
    yield batch().inputs(GPU, rng)
    yield batch((16, 1)).inputs(GPU, rng)


@pytest.mark.parametrize(
    ("heads", "dims"),
    [*((heads, (128, 128)) for heads in HEADS), *(((32, 8), dims) for dims in DIMS)],
    ids=str,
)
def test_again_and_again(
    heads: tuple[int, int], dims: tuple[int, int], rng: torch.Generator
) -> None:
    inputs = batch(heads, dims).inputs(GPU, rng)
    work = inputs.schedule()
    expected = inputs.call(schedule=work)
    oracle.check(inputs.reference(), *expected)
    for _ in range(20):
        same(inputs.call(schedule=work), expected)


@pytest.mark.parametrize(
    ("heads", "lengths", "count"),
    [*((*case, 1) for case in ONE), *((*case, 2) for case in TWO)],
    ids=lambda value: f"n{len(value)}" if isinstance(value, tuple) and len(value) != 2 else None,
)
def test_launches(
    heads: tuple[int, int],
    lengths: tuple[tuple[int, int], ...],
    count: int,
    rng: torch.Generator,
) -> None:
    inputs = batch(heads, lengths=lengths).inputs(GPU, rng)
    work = inputs.schedule()
    expected = inputs.call(schedule=work)
    oracle.check(inputs.reference(), *expected)
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        results = [inputs.call(schedule=work) for _ in range(3)]
        torch.cuda.synchronize()
    kernels = [event.name for event in profile.events() if "ridgeline" in event.name]
    assert len(kernels) == 3 * count, kernels
    for result in results:
        same(result, expected)


@pytest.mark.parametrize("heads", [(32, 8), (8, 2), (16, 1)], ids=str)
def test_single_requests(heads: tuple[int, int], rng: torch.Generator) -> None:
    for kv_len in (64, 1_000, 5_000, 40_000):
        single = Single(kv_len, heads, rng)
        expected = single.call()
        oracle.check(single.reference(), *expected)
        for _ in range(10):
            same(single.call(), expected)


def test_two_graphs_at_once(rng: torch.Generator) -> None:
    """Captured on one stream one after the other, replayed on two."""
    all_problems = list(problems(rng))
    expected = [problem.call() for problem in all_problems]
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in range(2)]
    graphs, results = [], []
    for _ in streams:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=streams[0]):
            results.append([problem.call() for problem in all_problems for _ in range(2)])
        graphs.append(graph)
    for _ in range(30):
        for stream, graph in zip(streams, graphs, strict=True):
            with torch.cuda.stream(stream):
                graph.replay()
    torch.cuda.synchronize()
    for of_graph in results:
        for i, result in enumerate(of_graph):
            same(result, expected[i // 2])


def test_a_fork_within_a_capture(rng: torch.Generator) -> None:
    """Two streams of one capture run side by side."""
    all_problems = list(problems(rng))
    expected = [problem.call() for problem in all_problems]
    torch.cuda.synchronize()
    side, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        side.wait_stream(torch.cuda.current_stream())
        results = []
        for problem in all_problems:
            with torch.cuda.stream(side):
                results.append(problem.call())
            results.append(problem.call())
        torch.cuda.current_stream().wait_stream(side)
    for _ in range(20):
        graph.replay()
        torch.cuda.synchronize()
        for i, result in enumerate(results):
            same(result, expected[i // 2])


def test_streams_at_once(rng: torch.Generator) -> None:
    all_problems = list(problems(rng))
    expected = [problem.call() for problem in all_problems]
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in range(3)]
    results = []
    for _ in range(20):
        for problem in all_problems:
            for stream in streams:
                with torch.cuda.stream(stream):
                    results.append(problem.call())
    torch.cuda.synchronize()
    for i, result in enumerate(results):
        same(result, expected[i // len(streams) % len(all_problems)])


@pytest.mark.parametrize("heads", [(32, 8), (16, 1)], ids=str)
def test_bad_lists_leave_no_count(heads: tuple[int, int], rng: torch.Generator) -> None:
    """After lists whose numbers of parts are wrong, and refused ones, good lists work."""
    inputs = batch(heads).inputs(GPU, rng)
    work = inputs.schedule()
    expected = inputs.call(schedule=work)
    for i in range(60):
        bad = work.clone()
        if i % 3 == 0:
            bad[0] ^= 2
        else:
            wrong = torch.rand(work.shape, generator=rng) < (0.3 if i % 3 == 1 else 0.02)
            values = torch.randint(-5, 60, work.shape, generator=rng, dtype=torch.int32)
            bad = torch.where(wrong.to(GPU), values.to(GPU), work)
            bad[0] = work[0]
        out, lse = inputs.call(schedule=bad)
        if i % 3 == 0:
            assert out.isnan().all()
            assert lse.isnan().all()
        same(inputs.call(schedule=work), expected)


def test_rows_that_no_record_writes(rng: torch.Generator) -> None:
    """Padding, and queries beyond max_q_len, within the one launch too."""
    lengths = ((1, 3_000), (4, 9_000), (2, 64), (0, 5), (3, 0))
    base = Batch(lengths=lengths, heads=(4, 2), head_dims=(128, 128), padding=5)
    inputs = base.with_(max_q_len=4).inputs(GPU, rng)
    out, lse = inputs.call()
    oracle.check(inputs.reference(), out, lse)
    cut, cut_lse = inputs.call(max_q_len=2)
    kept = torch.zeros(len(out), dtype=torch.bool)
    begin = 0
    for queries, _ in lengths:
        kept[begin : begin + min(queries, 2)] = True
        begin += queries
    assert (cut[~kept] == 0).all()
    assert (cut_lse[~kept] == -torch.inf).all()
    assert (cut[begin:] == 0).all()


def test_two_launches() -> None:
    """A capture has none: two launches, and the same bits; also where it is the first call."""
    code = """
import torch
from test_counters import GPU, HEADS, ONE, Single, batch
rng = torch.Generator().manual_seed(0)
problems = [batch(heads).inputs(GPU, rng) for heads in HEADS]
problems += [batch(heads, lengths=lengths).inputs(GPU, rng) for heads, lengths in ONE]
lists = [inputs.schedule() for inputs in problems]
singles = [Single(kv_len, (16, 1), rng) for kv_len in (5_000, 40_000)]
torch.cuda.synchronize()
graph = torch.cuda.CUDAGraph()
with torch.cuda.graph(graph):
    captured = [i.call(schedule=work) for i, work in zip(problems, lists)]
    captured += [single.call() for single in singles]
graph.replay()
eager = [i.call(schedule=work) for i, work in zip(problems, lists)]
eager += [single.call() for single in singles]
for results, expected in zip(captured, eager):
    assert torch.equal(results[0], expected[0]) and torch.equal(results[1], expected[1])
print("equal")
"""
    result = run_python(code)
    assert result.stdout.strip() == "equal", result.stderr
