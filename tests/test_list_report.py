"""Prefills that leave nothing to add up: one launch, once the host has been told."""

from __future__ import annotations

from typing import Any

import oracle
import pytest
import torch
from batch_problem import Batch, Inputs
from ridgeline import _list_report
from torch import Tensor
from wrapper_problem import make, plan, run

pytestmark = pytest.mark.gpu

GPU = torch.device("cuda", 0)
WHOLE = ((40, 60), (1, 7), (17, 300), (5, 5))
CUT = ((40, 6_000), (1, 7), (17, 300), (5, 5))


def batch(lengths: tuple[tuple[int, int], ...], **changes: Any) -> Batch:
    return Batch(lengths=lengths, heads=(8, 2), head_dims=(128, 128), causal=True).with_(**changes)


def launches(wrapper: Any, inputs: Inputs, count: int = 3) -> tuple[float, list[Any]]:
    """Kernels of a run behind the first, and the results."""
    run(wrapper, "prefill", inputs)
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        results = [run(wrapper, "prefill", inputs, return_lse=True) for _ in range(count)]
        torch.cuda.synchronize()
    kernels = [event.name for event in profile.events() if "ridgeline" in event.name]
    return len(kernels) / count, results


def same(results: list[Any], expected: tuple[Tensor, Tensor]) -> None:
    for out, lse in results:
        assert torch.equal(out, expected[0])
        assert torch.equal(lse, expected[1])


@pytest.mark.parametrize(
    ("expected", "changes"),
    [
        pytest.param(expected, changes, id=name)
        for name, expected, changes in (
            ("whole", 1, {}),
            ("64", 1, {"head_dims": (64, 64), "page_size": 1}),
            ("many", 1, {"lengths": ((1, 16),) * 256}),
            ("by-tile", 1, {"lengths": ((700, 700),) * 40}),
            ("cut", 2, {"lengths": CUT}),
            ("padding", 2, {"padding": 5}),
            ("max-q-len", 2, {"max_q_len": 20}),
            ("invariant", 2, {"invariant": True}),
        )
    ],
)
def test_launches(expected: int, changes: dict[str, Any], rng: torch.Generator) -> None:
    inputs = batch(WHOLE).with_(**changes).inputs(GPU, rng)
    wrapper = make("prefill", inputs.batch, GPU)
    plan(wrapper, "prefill", inputs)
    count, results = launches(wrapper, inputs)
    assert count == expected
    wanted = inputs.call()
    if inputs.batch.max_q_len is None:
        oracle.check(inputs.reference(), *wanted)
    same(results, wanted)


def test_each_plan_has_its_own(rng: torch.Generator) -> None:
    """Whatever came before, and whether the first runs come before the report or not."""
    problems = [batch(lengths).inputs(GPU, rng) for lengths in (WHOLE, CUT)]
    wanted = [inputs.call() for inputs in problems]
    wrapper = make("prefill", problems[0].batch, GPU)
    for i in range(40):
        inputs = problems[i % 3 % 2]
        plan(wrapper, "prefill", inputs)
        results = [run(wrapper, "prefill", inputs, return_lse=True) for _ in range(3)]
        same(results, wanted[i % 3 % 2])
    for i in (0, 1, 0):
        plan(wrapper, "prefill", problems[i])
        assert launches(wrapper, problems[i])[0] == 1 + i


def test_a_capture_is_two_launches(rng: torch.Generator) -> None:
    """It schedules for lengths to come."""
    inputs = batch(WHOLE).inputs(GPU, rng)
    wrapper = make("prefill", inputs.batch, GPU)
    plan(wrapper, "prefill", inputs)
    assert launches(wrapper, inputs)[0] == 1
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = run(wrapper, "prefill", inputs, return_lse=True)
    wanted = inputs.call()
    for value in result:
        value.fill_(7)
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        graph.replay()
        torch.cuda.synchronize()
    assert sum("ridgeline" in event.name for event in profile.events()) == 3
    same([result], wanted)


def test_a_place_is_used_again(rng: torch.Generator) -> None:
    """Nobody takes another's report for its own."""
    inputs = batch(WHOLE).inputs(GPU, rng)
    wrapper = make("prefill", inputs.batch, GPU)
    plan(wrapper, "prefill", inputs)
    run(wrapper, "prefill", inputs)
    torch.cuda.synchronize()
    (own,) = wrapper._lists.reports.values()
    reports = [_list_report.new_report() for _ in range(1_100)]
    for report in reports:
        assert report is not None
        assert report.settled is None
        assert report.flags() & 48 == 16
    assert own.flags() & 48 == 32
    plan(wrapper, "prefill", inputs)
    run(wrapper, "prefill", inputs)
    torch.cuda.synchronize()
    (later,) = wrapper._lists.reports.values()
    assert later.flags() & 48 == 32
    assert all(report.flags() & 48 == 16 for report in reports if report)
