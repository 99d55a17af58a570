"""CUDA graphs, streams, threads and a second GPU: the launch path under real use."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import oracle
import pytest
import ridgeline
import torch
from problem import Problem
from support import normal, run_python
from torch import Tensor

PROBLEM = Problem(qo_len=50, kv_len=2000, heads=(8, 2), head_dims=(64, 64), causal=True)
DECODE = Problem(decode=True, kv_len=5000, heads=(8, 2), head_dims=(64, 64))


def every_family(x: Tensor, k: Tensor, v: Tensor) -> Callable[[], list[Tensor]]:
    """A call of each family on ``x [tokens, 8, 64]`` and ``k, v [kv_len, 2, 64]``."""
    tokens = x.shape[0]
    weight = torch.ones(64, dtype=x.dtype, device=x.device)
    positions = torch.arange(tokens, dtype=torch.int32, device=x.device)

    def call() -> list[Tensor]:
        normed = ridgeline.rmsnorm(x, weight)
        q, _ = ridgeline.apply_rope_pos_ids(normed, k[:tokens], positions)
        out, lse = ridgeline.single_prefill_with_kv_cache_return_lse(q, k, v, causal=True)
        step = ridgeline.single_decode_with_kv_cache(q[-1], k, v)
        merged, merged_lse = ridgeline.merge_state(out, lse, normed, lse)
        gated = ridgeline.silu_and_mul(merged.flatten(1))
        return [out, lse, step, merged, merged_lse, gated]

    return call


@pytest.fixture
def gpu_inputs(rng: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    gpu = torch.device("cuda", 0)
    x = normal((40, 8, 64), torch.float16, gpu, rng)
    k, v = (normal((3000, 2, 64), torch.float16, gpu, rng) for _ in range(2))
    return x, k, v


@pytest.mark.gpu
def test_graph_replays_with_new_contents(gpu_inputs: tuple[Tensor, Tensor, Tensor]) -> None:
    x, k, v = gpu_inputs
    call = every_family(x, k, v)
    expected = call()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = call()
    for result in captured:
        result.fill_(float("nan"))
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(captured, expected, strict=True))
    x.copy_(x.flip(0))
    v.copy_(v.flip(0))
    graph.replay()
    replayed = [result.clone() for result in captured]
    assert all(torch.equal(a, b) for a, b in zip(replayed, call(), strict=True))
    assert not torch.equal(replayed[0], expected[0])


@pytest.mark.gpu
def test_first_call_inside_a_capture() -> None:
    """A fresh process whose first call of every kernel happens while its stream is capturing."""
    code = """
import torch
import ridgeline
from test_graphs import every_family
torch.manual_seed(0)
x = torch.randn(40, 8, 64, device="cuda").half()
k, v = torch.randn(2, 3000, 2, 64, device="cuda").half()
call = every_family(x, k, v)
torch.cuda.synchronize()
graph = torch.cuda.CUDAGraph()
with torch.cuda.graph(graph):
    captured = call()
graph.replay()
assert all(torch.equal(a, b) for a, b in zip(captured, call(), strict=True))
print("equal")
"""
    result = run_python(code)
    assert result.stdout.strip() == "equal", result.stderr


@pytest.mark.gpu
def test_side_stream_orders_work(gpu_inputs: tuple[Tensor, Tensor, Tensor]) -> None:
    """Kernels run on torch's current stream: behind what it holds, not on the default one."""
    x, k, v = gpu_inputs
    call = every_family(x, k, v)
    expected = call()
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    contents = x.clone()
    x.zero_()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        x.copy_(contents)
        results = call()
    stream.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(results, expected, strict=True))


@pytest.mark.gpu
def test_second_gpu(second_device: torch.device, rng: torch.Generator) -> None:
    """The tensor's device counts, not the current one; and the current one stays as it was."""
    for problem in (PROBLEM, DECODE):
        q, k, v = problem.inputs(torch.device("cuda", 0), rng)
        first = problem.call(q, k, v)
        others = [t.to(second_device) for t in (q, k, v)]
        out, lse = problem.call(*others)
        assert out.device == second_device
        assert torch.cuda.current_device() == 0
        oracle.check(problem.reference(*others), out, lse)
        with torch.cuda.device(second_device):
            again = problem.call(q, k, v)
        assert torch.equal(again[0], first[0])
        with pytest.raises(RuntimeError, match="device cuda:1"):
            problem.call(others[0], k, v)
        problem.call(q, k, v)


def test_threads(device: torch.device, rng: torch.Generator) -> None:
    """Many threads, different kernels, each result as from one thread."""
    problems = [
        base.with_(head_dims=(dim, dim), kv_layout=layout)
        for base in (PROBLEM.with_(kv_len=300), DECODE.with_(kv_len=700))
        for dim in (40, 64, 128)
        for layout in ("NHD", "HND")
    ]
    inputs = [problem.inputs(device, rng) for problem in problems]
    barrier = threading.Barrier(len(problems))

    def work(index: int) -> Tensor:
        barrier.wait()
        if device.type != "cuda":
            return problems[index].call(*inputs[index])[0]
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.default_stream())
        with torch.cuda.stream(stream):
            out = problems[index].call(*inputs[index])[0]
        stream.synchronize()
        return out

    with ThreadPoolExecutor(len(problems)) as pool:
        results = list(pool.map(work, range(len(problems))))
    for problem, arguments, result in zip(problems, inputs, results, strict=True):
        assert torch.equal(result, problem.call(*arguments)[0]), str(problem)


@pytest.mark.gpu
def test_no_synchronisation(gpu_inputs: tuple[Tensor, Tensor, Tensor]) -> None:
    """A call returns before its kernels have run."""
    call = every_family(*gpu_inputs)
    call()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        torch.cuda._sleep(2_000_000_000)
        done = torch.cuda.Event()
        call()
        done.record()
        assert not done.query()
    finally:
        torch.cuda.set_sync_debug_mode("default")
        torch.cuda.synchronize()
