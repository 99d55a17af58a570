"""The batch wrappers: values against float64, plans, shared work lists, the compiler, errors."""

from __future__ import annotations

import ctypes
import math
from typing import Any

import oracle
import pytest
import ridgeline
import torch
from batch_problem import Batch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from ridgeline import _list_report, _work_lists, _wrapper
from support import poison, supports_bf16_attention
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from wrapper_problem import (
    DECODE,
    KINDS,
    MIXED,
    base,
    check,
    counted,
    make,
    plan,
    planned,
    run,
    with_buffers,
)

Case = tuple[str, Batch]


def cases() -> list[Case]:
    """Every wrapper with every option that it has."""
    found: list[Case] = []
    for kind in KINDS:
        one = base(kind)
        changes: list[dict[str, Any]] = [
            {},
            {"kv_layout": "HND"},
            {"dtype": torch.bfloat16, "head_dims": (128, 128)},
            {"heads": (6, 2), "head_dims": (40, 40)},
            {"logits_soft_cap": 20.0},
            {"invariant": True},
        ]
        if kind != "batch":
            changes += [
                {"window_left": 33},
                {"head_dims": (192, 128)},
                {"rope": (2.0, 5e5)},
                {"rope": (1.0, 1e4), "logits_soft_cap": 8.0, "window_left": 100},
            ]
        if kind != "ragged":
            changes += [{"page_size": 1}, {"page_size": 5, "stacked": True, "kv_layout": "HND"}]
        if kind != "decode":
            changes += [{"causal": False}, {"padding": 9}, {"lengths": (), "name": "none"}]
            changes += [{"lengths": ((4, 90), (3, 7), (4, 4)), "name": "verify", "max_q_len": 4}]
        found += [(kind, one.with_(**change)) for change in changes]
    return found


@pytest.mark.parametrize("case", cases(), ids=lambda case: f"{case[0]}-{case[1]}")
def test_values(case: Case, device: torch.device, rng: torch.Generator) -> None:
    kind, batch = case
    if batch.dtype == torch.bfloat16 and not supports_bf16_attention(device):
        pytest.skip("no bf16 tensor cores")
    check(kind, batch.inputs(device, rng))


@pytest.mark.parametrize("kind", KINDS)
def test_index_tensors_on_the_host(kind: str, device: torch.device, rng: torch.Generator) -> None:
    check(kind, base(kind).inputs(device, rng), host=True)


@given(
    lengths=st.lists(st.tuples(st.integers(0, 5), st.integers(0, 60)), max_size=6),
    kind=st.sampled_from(("prefill", "ragged", "batch")),
    page_size=st.sampled_from((1, 3, 16)),
    layout=st.sampled_from(("NHD", "HND")),
    causal=st.booleans(),
    invariant=st.booleans(),
    padding=st.integers(0, 3),
    seed=st.integers(0, 2**31),
)
@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
def test_any_batch(
    lengths: list[tuple[int, int]],
    kind: str,
    page_size: int,
    layout: str,
    causal: bool,
    invariant: bool,
    padding: int,
    seed: int,
    device: torch.device,
) -> None:
    batch = base(kind).with_(
        lengths=tuple(lengths), page_size=page_size, kv_layout=layout, causal=causal,
        invariant=invariant, padding=padding,
    )  # fmt: skip
    check(kind, batch.inputs(device, torch.Generator().manual_seed(seed)))


def test_several_queries_a_request(device: torch.device, rng: torch.Generator) -> None:
    batch = DECODE.with_(lengths=((3, 40), (3, 3), (3, 200)), decode=False, causal=True)
    inputs = batch.inputs(device, rng)
    wrapper = make("decode", batch, device)
    plan(wrapper, "decode", inputs, q_len_per_req=3)
    expected = inputs.call(max_q_len=3)
    got = wrapper.run_return_lse(inputs.q, inputs.cache, q_len_per_req=3)
    assert torch.equal(got[0], expected[0])
    assert torch.equal(got[1], expected[1])
    with pytest.raises(ValueError, match="'q_len_per_req'"):
        wrapper.run(inputs.q, inputs.cache, q_len_per_req=2)


@pytest.mark.parametrize("kind", KINDS)
def test_out_lse_and_their_forms(kind: str, device: torch.device, rng: torch.Generator) -> None:
    inputs = base(kind).inputs(device, rng)
    wrapper = planned(kind, inputs)
    out, lse = run(wrapper, kind, inputs, return_lse=True)
    buffers = torch.empty_like(out), torch.empty_like(lse)
    poison(*buffers)
    result = run(wrapper, kind, inputs, out=buffers[0], lse=buffers[1])
    assert (result[0] if kind == "batch" else result) is buffers[0]
    assert torch.equal(buffers[0], out)
    assert torch.equal(buffers[1], lse)
    turned = run(wrapper, kind, inputs, return_lse=True, lse_base="log2", lse_layout="HN")[1]
    assert torch.allclose(turned.t(), lse * 1.4426950408889634)
    if kind != "batch":
        poison(buffers[0])
        assert run(wrapper, kind, inputs, out=buffers[0]) is buffers[0]
        assert torch.equal(buffers[0], out)
        again = wrapper.run_return_lse(
            inputs.q, *(inputs.cache if kind == "ragged" else (inputs.cache,))
        )
        assert torch.equal(again[1], lse)


def test_older_verbs(device: torch.device, rng: torch.Generator) -> None:
    """`forward` has options of its own; the plan's stay what they were."""
    for kind in ("decode", "prefill", "ragged"):
        inputs = base(kind).with_(causal=False).inputs(device, rng)
        wrapper = make(kind, inputs.batch, device)
        wrapper.reset_workspace_buffer(torch.empty(8), torch.empty(8))
        assert type(wrapper).begin_forward is type(wrapper).plan
        plan(wrapper, kind, inputs)
        cache = inputs.cache if kind == "ragged" else (inputs.cache,)
        plain = run(wrapper, kind, inputs)
        options: dict[str, Any] = {"window_left": 20, "logits_soft_cap": 7.0, "sm_scale": 0.3}
        expected = inputs.call(**options)
        got = wrapper.forward_return_lse(inputs.q, *cache, **options)
        assert torch.equal(got[0], expected[0])
        assert torch.equal(got[1], expected[1])
        assert torch.equal(wrapper.forward(inputs.q, *cache, **options), expected[0])
        if kind != "decode":
            causal = wrapper.forward(inputs.q, *cache, causal=True)
            assert torch.equal(causal, inputs.call(causal=True)[0])
        assert torch.equal(run(wrapper, kind, inputs), plain)
        wrapper.end_forward()
        assert wrapper.workspace_size(3, batch_size=4) == 0
        assert not wrapper.is_cuda_graph_enabled


def test_fast_decode_plan(device: torch.device, rng: torch.Generator) -> None:
    inputs = DECODE.inputs(device, rng)
    wrapper = make("decode", DECODE, device)
    index = inputs.index
    ridgeline.fast_decode_plan(
        wrapper, index["kv_indptr"], index["kv_indices"], index["kv_last_page_len"], 4, 2, 64, 16
    )
    assert torch.equal(wrapper.run(inputs.q, inputs.cache), inputs.call()[0])


def test_window_and_soft_cap_of_a_layer(device: torch.device, rng: torch.Generator) -> None:
    inputs = DECODE.inputs(device, rng)
    wrapper = planned("decode", inputs)
    made = counted(wrapper)
    expected = inputs.call(window_left=9)[0]
    for _ in range(3):
        assert torch.equal(wrapper.run(inputs.q, inputs.cache, window_left=9), expected)
        assert torch.equal(wrapper.run(inputs.q, inputs.cache), inputs.call()[0])
    assert len(made) == 1, "a list for each window, made once"
    mixed = base("batch").inputs(device, rng)
    batch = planned("batch", mixed)
    got = batch.run(mixed.q, mixed.cache, logits_soft_cap=9.0)
    assert torch.equal(got[0], mixed.call(logits_soft_cap=9.0)[0])
    with pytest.raises(ValueError, match="'logits_soft_cap'"):
        batch.run(mixed.q, mixed.cache, logits_soft_cap=-1.0)


@pytest.mark.parametrize("kind", KINDS)
def test_layers_share_a_work_list(kind: str, device: torch.device, rng: torch.Generator) -> None:
    inputs = base(kind).inputs(device, rng)
    wrapper = make(kind, inputs.batch, device)
    made = counted(wrapper)
    plan(wrapper, kind, inputs, host=True)
    assert len(made) == 1, "plan launches the schedule"
    for _ in range(3):
        run(wrapper, kind, inputs, return_lse=True)
    assert len(made) == 1
    plan(wrapper, kind, inputs)
    for _ in range(3):
        run(wrapper, kind, inputs)
    assert len(made) == 2
    others = base(kind).with_(lengths=base(kind).lengths[:3]).inputs(device, rng)
    plan(wrapper, kind, others)
    assert torch.equal(run(wrapper, kind, others, return_lse=True)[0], others.call()[0])


def test_a_capture_has_a_list_of_its_own(
    rng: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which list a run takes, with a pretended capture; test_wrapper_graphs.py has real ones."""
    inputs = MIXED.inputs(torch.device("cpu"), rng)
    wrapper = planned("prefill", inputs)
    wrapper._on_gpu = True
    state: dict[str, Any] = {"capture": None}
    for module in (_wrapper, _work_lists):
        monkeypatch.setattr(module, "is_capturing", lambda _: state["capture"] is not None)
    monkeypatch.setattr(_work_lists, "current_capture", lambda _: state["capture"])
    made = counted(wrapper)

    def lists_made(*captures: tuple[int, int] | None) -> int:
        made.clear()
        for capture in captures:
            state["capture"] = capture
            run(wrapper, "prefill", inputs)
        return len(made)

    assert lists_made(None, None) == 0
    assert lists_made((1, 7), (1, 7), (1, 7)) == 1
    assert lists_made((1, 8), (1, 8), (1, 7)) == 1, "one for each stream of a capture"
    assert lists_made((2, 7), (2, 7)) == 1
    assert lists_made(None) == 0, "the plan's own list is still there"


def test_a_run_leaves_out_what_is_the_default(rng: torch.Generator) -> None:
    """On a GPU, where a scale is a float: the default in any spelling, but no neighbour of it."""
    batch = base("decode").with_(head_dims=(128, 128))
    wrapper = planned("decode", batch.inputs(torch.device("cpu"), rng))
    wrapper._on_gpu = True

    def problem(sm_scale: float | None) -> tuple[Any, ...]:
        return wrapper._problem_of(wrapper._options._replace(sm_scale=sm_scale))

    for scale in (None, 128**-0.5, 1 / math.sqrt(128), 1 / 128**0.5):
        assert problem(scale) == ()
    for scale in (128**-0.5 * (1 + 2**-22), 0.0, 1.0, -(128**-0.5)):
        assert problem(scale)[-1] == scale


def test_a_run_asks_for_a_report_and_passes_it_on(
    rng: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of its plan's list; test_list_report.py has real reports."""
    inputs = MIXED.inputs(torch.device("cpu"), rng)
    wrapper = planned("prefill", inputs)
    flags: list[int] = []
    monkeypatch.setattr(_wrapper, "NARROW_EAGER", lambda *operands: flags.append(operands[6]))
    wrapper.run(inputs.q, inputs.cache)
    place = ctypes.c_int64(0)
    (key,) = wrapper._lists.eager
    wrapper._lists.reports[key] = _list_report.ListReport(ctypes.addressof(place), 7)
    for place.value in (0, -5 << 32 | 6, -5 << 32 | 7, 0):
        wrapper.run(inputs.q, inputs.cache)
    plan(wrapper, "prefill", inputs)
    wrapper.run(inputs.q, inputs.cache)
    plain = wrapper._options.flags
    asked, told = plain + 16 + (7 << 32), plain + 32 + (-5 << 32)
    assert flags == [plain, asked, asked, told, told, plain]


@pytest.mark.parametrize("kind", ["decode", "prefill", "ragged"])
def test_fewer_requests_than_the_buffers(
    kind: str, device: torch.device, rng: torch.Generator
) -> None:
    batch = base(kind)
    capacity = len(batch.lengths) + 3
    wrapper = with_buffers(kind, batch, device, capacity, 200)
    assert wrapper.is_cuda_graph_enabled
    for lengths in (batch.lengths, batch.lengths[:2], batch.lengths[::-1]):
        rows = capacity if kind == "decode" else 120
        live = sum(q for q, _ in lengths)
        inputs = batch.with_(lengths=lengths, padding=rows - live).inputs(device, rng)
        for host in (False, True):
            plan(wrapper, kind, inputs, host)
            out, lse = run(wrapper, kind, inputs, return_lse=True)
            oracle.check(inputs.reference(), out, lse)
            assert not out[live:].any()
            assert lse[live:].eq(-torch.inf).all()


@pytest.mark.parametrize("kind", KINDS)
def test_five_plans_compile_twice_at_most(
    kind: str, device: torch.device, rng: torch.Generator
) -> None:
    torch._dynamo.reset()
    backend = CompileCounterWithBackend("aot_eager")
    batch = base(kind)
    wrapper = make(kind, batch, device)

    @torch.compile(fullgraph=True, backend=backend)
    def step(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        first = wrapper.run(q, k, v) if kind == "ragged" else wrapper.run(q, (k, v))
        first = first[0] if kind == "batch" else first
        second = wrapper.run(first, k, v) if kind == "ragged" else wrapper.run(first, (k, v))
        return second[0] if kind == "batch" else second

    for count in (3, 5, 9, 2, 7):
        lengths = tuple((1 if kind == "decode" else 1 + i % 4, 30 + 37 * i) for i in range(count))
        inputs = batch.with_(lengths=lengths).inputs(device, rng)
        plan(wrapper, kind, inputs, host=count == 9)
        got = step(inputs.q, *inputs.cache)
        inputs.q = inputs.call()[0]
        assert torch.equal(got, inputs.call()[0])
    assert backend.frame_count <= 2
    assert not wrapper._lists.captured


def test_an_explicit_list_compiles(device: torch.device, rng: torch.Generator) -> None:
    """One schedule in the graph, passed to every layer."""
    torch._dynamo.reset()
    backend = CompileCounterWithBackend("aot_eager")
    inputs = MIXED.inputs(device, rng)
    wrapper = planned("prefill", inputs)

    @torch.compile(fullgraph=True, backend=backend)
    def step(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        work = wrapper.schedule(q.shape[0])
        for _ in range(2):
            q = wrapper.run(q, (k, v), schedule=work)
        return q

    got = step(inputs.q, *inputs.cache)
    names = [str(node.target) for node in backend.graphs[0].graph.nodes]
    assert sum("attention_schedule" in name for name in names) == 1
    inputs.q = inputs.call()[0]
    assert torch.equal(got, inputs.call()[0])


def test_validate_names_the_request(device: torch.device, rng: torch.Generator) -> None:
    inputs = MIXED.inputs(device, rng)
    wrapper = planned("prefill", inputs, validate=True)
    good = wrapper.run(inputs.q, inputs.cache)
    inputs.index["kv_indices"][1] = 10**6
    plan(wrapper, "prefill", inputs)
    wrapper.run(inputs.q, inputs.cache)
    plan(wrapper, "prefill", inputs, validate=True)
    for _ in range(2):
        with pytest.raises(ValueError, match=r"'kv_indices'.*request \d"):
            wrapper.run(inputs.q, inputs.cache)
    again = MIXED.inputs(device, rng)
    plan(wrapper, "prefill", again)
    assert wrapper.run(again.q, again.cache).shape == good.shape


@pytest.mark.gpu
@pytest.mark.parametrize("kind", KINDS)
def test_no_synchronisation(kind: str, rng: torch.Generator) -> None:
    inputs = base(kind).inputs(torch.device("cuda", 0), rng)
    hosted = base(kind).inputs(torch.device("cuda", 0), rng)
    hosted.index = {name: t.cpu() for name, t in hosted.index.items()}
    wrapper = planned(kind, inputs)
    run(wrapper, kind, inputs, return_lse=True)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        plan(wrapper, kind, hosted)
        run(wrapper, kind, hosted)
        torch.cuda._sleep(1_000_000_000)
        plan(wrapper, kind, inputs)
        run(wrapper, kind, inputs)
        run(wrapper, kind, inputs, return_lse=True)
        done = torch.cuda.Event()
        done.record()
        assert not done.query()
    finally:
        torch.cuda.set_sync_debug_mode("default")
        torch.cuda.synchronize()


@pytest.mark.gpu
def test_second_gpu(second_device: torch.device, rng: torch.Generator) -> None:
    """The device of the tensors counts, not the current one."""
    for kind in KINDS:
        check(kind, base(kind).inputs(second_device, rng), host=True)
    assert torch.cuda.current_device() == 0
