"""Batch attention into tensors that the caller gives: `out=` and `lse=` of functions, wrappers and
the op `attention_out`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from batch_problem import FORMS, Batch, Inputs
from elementwise import untouched_outside
from support import poison
from torch import Tensor
from wrapper_problem import KINDS, base, planned, run

OP = torch.ops.ridgeline.attention_out
MIXED = base("prefill")
Results = tuple[Tensor, Tensor]

# How `out` lies in memory that holds more: name, and a view of [tokens, heads, head_dim].
LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": torch.empty_like,
    "every other token": lambda x: x.new_empty((2 * len(x), *x.shape[1:]))[::2],
    "some heads": lambda x: x.new_empty((len(x), x.shape[1] + 3, x.shape[2]))[:, 2:-1],
    "some columns": lambda x: x.new_empty((*x.shape[:2], x.shape[2] + 24))[..., 8:-16],
    "heads first": lambda x: x.new_empty((x.shape[1], len(x), x.shape[2])).transpose(0, 1),
}


def results_like(layout: str, out: Tensor, lse: Tensor) -> Results:
    """Results of that layout; all of their memory is NaN."""
    view = LAYOUTS[layout](out)
    storage = view.new_empty(0).set_(view.untyped_storage())
    logs = torch.empty_like(lse)
    poison(storage, logs)
    return view, logs


def outside_is_nan(view: Tensor) -> bool:
    """Whether the memory around a view is as `results_like` left it."""
    return view._base is None or untouched_outside(view)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("form", FORMS, ids=str)
def test_functions(form: str, layout: str, device: torch.device, rng: torch.Generator) -> None:
    inputs = MIXED.with_(form=form, padding=3).inputs(device, rng)
    out, lse = inputs.call()
    view, logs = results_like(layout, out, lse)
    given = inputs.call(out=view, lse=logs)
    assert given[0] is view
    assert given[1] is logs
    assert torch.equal(view, out)
    assert torch.equal(logs, lse)
    assert outside_is_nan(view)
    view, logs = results_like(layout, out, lse)
    assert inputs.call(out=view, return_lse=False) is view
    assert torch.equal(view, out)
    assert torch.equal(inputs.call(lse=logs, return_lse=False), out)
    assert torch.equal(logs, lse)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", KINDS)
def test_wrappers(kind: str, layout: str, device: torch.device, rng: torch.Generator) -> None:
    inputs = base(kind).inputs(device, rng)
    wrapper = planned(kind, inputs)
    out, lse = run(wrapper, kind, inputs, return_lse=True)
    view, logs = results_like(layout, out, lse)
    given = run(wrapper, kind, inputs, out=view, lse=logs, return_lse=True)
    assert given[0] is view
    assert given[1] is logs
    assert torch.equal(view, out)
    assert torch.equal(logs, lse)
    assert outside_is_nan(view)


def test_options(device: torch.device, rng: torch.Generator) -> None:
    """With all that the narrow op does not have, and a scale of its own."""
    batch = MIXED.with_(logits_soft_cap=20.0, window_left=30, rope=(2.0, 1e4))
    inputs = batch.inputs(device, rng)
    for options in ({}, {"sm_scale": 0.07}, {"schedule": inputs.schedule()}):
        out, lse = inputs.call(**options)
        view, logs = results_like("some heads", out, lse)
        inputs.call(out=view, lse=logs, **options)
        assert torch.equal(view, out)
        assert torch.equal(logs, lse)


def test_forms_of_the_lse(device: torch.device, rng: torch.Generator) -> None:
    inputs = MIXED.inputs(device, rng)
    for lse_base in ("ln", "log2"):
        for lse_layout in ("NH", "HN"):
            options = {"lse_base": lse_base, "lse_layout": lse_layout}
            out, lse = inputs.call(**options)
            view, logs = results_like("contiguous", out, lse)
            assert inputs.call(out=view, lse=logs, **options)[1] is logs
            assert torch.equal(view, out)
            assert torch.equal(logs, lse)


@pytest.mark.gpu
@pytest.mark.parametrize("invariant", [False, True])
@pytest.mark.parametrize("decode", [False, True])
def test_cut_tiles(decode: bool, invariant: bool, rng: torch.Generator) -> None:
    """Long requests, whose tiles several CTAs share, into views."""
    lengths = ((1, 9_000), (1, 3_000), (1, 20)) if decode else ((1, 9_000), (300, 5_000), (3, 3))
    batch = Batch(lengths=lengths, head_dims=(128, 128), causal=True, invariant=invariant)
    inputs = batch.with_(max_q_len=1 if decode else None).inputs(torch.device("cuda", 0), rng)
    inputs.check()
    out, lse = inputs.call()
    for layout in LAYOUTS:
        view, logs = results_like(layout, out, lse)
        inputs.call(out=view, lse=logs)
        assert torch.equal(view, out)
        assert torch.equal(logs, lse)
        assert outside_is_nan(view)


def op_operands(inputs: Inputs, out: Tensor, lse: Tensor | None) -> tuple[Any, ...]:
    return (out, lse, *inputs.operands(flags=2))


def test_op_mutates_and_returns_nothing(device: torch.device, rng: torch.Generator) -> None:
    inputs = MIXED.inputs(device, rng)
    out, lse = inputs.call(sm_scale=0.125)
    view, logs = results_like("some heads", out, lse)
    assert OP(*op_operands(inputs, view, None)) is None
    assert torch.equal(view, out)
    assert OP(*op_operands(inputs, view, logs)) is None
    assert torch.equal(logs, lse)


def wrong_results(inputs: Inputs, out: Tensor, lse: Tensor) -> list[tuple[dict[str, Tensor], str]]:
    tokens, heads, dim = out.shape
    flat = out.new_empty(2 * out.numel())
    return [
        ({"out": out[1:]}, r"'out'.*shape \[\d+, 4, 64\] = \[num_tokens, num_qo_heads"),
        ({"out": out[0]}, "'out'.*shape"),
        ({"out": out.to(torch.float32)}, "'out'.*dtype torch.float16"),
        ({"out": out.transpose(1, 2).contiguous().transpose(1, 2)}, "'out'.*last dimension"),
        ({"out": out.new_empty((tokens, heads, dim + 4))[..., :dim]}, "'out'.*16 bytes"),
        ({"out": flat[1 : 1 + out.numel()].view(out.shape)}, "'out'.*16 bytes"),
        ({"out": out[:1].expand(out.shape)}, "'out'.*distinct"),
        ({"out": inputs.q}, "'out'.*overlaps 'q'"),
        ({"lse": lse[:, :1]}, r"'lse'.*shape"),
        ({"lse": lse.double()}, "'lse'.*dtype torch.float32"),
        ({"lse": lse.t().contiguous().t()}, "'lse'.*contiguous"),
        ({"lse": lse[:1].expand(lse.shape)}, "'lse'.*(distinct|contiguous)"),
        (
            {
                "out": flat[: out.numel()].view(out.shape),
                "lse": flat[: 2 * lse.numel()].view(torch.float32).view(lse.shape),
            },
            "'lse'.*overlaps 'out'",
        ),
    ]


def test_wrong_results(device: torch.device, rng: torch.Generator) -> None:
    """Refused by name, in the op and in the function; nothing is written."""
    inputs = MIXED.inputs(device, rng)
    out, lse = inputs.call()
    for wrong, match in wrong_results(inputs, out, lse):
        with pytest.raises((ValueError, RuntimeError, TypeError), match=match):
            OP(*op_operands(inputs, **{"out": out, "lse": lse, **wrong}))
        with pytest.raises((ValueError, RuntimeError, TypeError), match=match):
            inputs.call(**{"out": out, "lse": lse, **wrong})
    k = inputs.cache[0]
    inside = k.flatten()[: out.numel()].view(out.shape)
    with pytest.raises((ValueError, RuntimeError), match="'out'.*overlaps 'k'"):
        inputs.call(out=inside)
    again = inputs.call()
    assert torch.equal(again[0], out)


def test_gradients_are_refused(device: torch.device, rng: torch.Generator) -> None:
    inputs = MIXED.inputs(device, rng)
    out, lse = inputs.call()
    for name, target in (("out", out), ("lse", lse)):
        with pytest.raises(RuntimeError, match="inference_mode"):
            inputs.call(**{name: target.clone().requires_grad_()})


@pytest.mark.gpu
def test_results_on_another_device(rng: torch.Generator) -> None:
    inputs = MIXED.inputs(torch.device("cuda", 0), rng)
    out, lse = inputs.call()
    for wrong in ({"out": out.cpu()}, {"lse": lse.cpu()}):
        with pytest.raises(RuntimeError, match="device cuda:0"):
            inputs.call(**wrong)


@pytest.mark.parametrize("kind", KINDS)
def test_compiled(kind: str, device: torch.device, rng: torch.Generator) -> None:
    """Whole graphs write the tensors that they are given."""
    inputs = base(kind).inputs(device, rng)
    wrapper = planned(kind, inputs)
    out, lse = run(wrapper, kind, inputs, return_lse=True)
    view, logs = results_like("some heads", out, lse)
    torch._dynamo.reset()

    @torch.compile(fullgraph=True, backend="aot_eager")
    def call(q: Tensor, cache: Any, out: Tensor, lse: Tensor) -> Any:
        caches = cache if kind == "ragged" else (cache,)
        return wrapper.run(q, *caches, out=out, lse=lse)

    with torch.inference_mode():
        call(inputs.q, inputs.cache, view, logs)
    assert torch.equal(view, out)
    assert torch.equal(logs, lse)
    assert outside_is_nan(view)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", KINDS)
def test_captured(kind: str, rng: torch.Generator) -> None:
    inputs = base(kind).inputs(torch.device("cuda", 0), rng)
    wrapper = planned(kind, inputs)
    out, lse = run(wrapper, kind, inputs, return_lse=True)
    view, logs = results_like("some heads", out, lse)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run(wrapper, kind, inputs, out=view, lse=logs)
    poison(view, logs)
    graph.replay()
    assert torch.equal(view, out)
    assert torch.equal(logs, lse)


@pytest.mark.gpu
def test_no_temporary_results(rng: torch.Generator) -> None:
    """With both results given, a run allocates less than either of them takes."""
    device = torch.device("cuda", 0)
    batch = base("decode").with_(lengths=((1, 20),) * 512, heads=(64, 1), head_dims=(256, 256))
    inputs = batch.inputs(device, rng)
    wrapper = planned("decode", inputs)
    out, lse = run(wrapper, "decode", inputs, return_lse=True)
    sizes = out.numel() * out.element_size()
    for options in ({"out": out}, {"out": out, "lse": lse}):
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run(wrapper, "decode", inputs, **options)
        assert torch.cuda.max_memory_allocated() - before < sizes
