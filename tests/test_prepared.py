"""Runs that the library has prepared: which ones they are, and what ends them."""

from __future__ import annotations

import ctypes
from dataclasses import replace
from typing import Any

import pytest
import torch
from batch_problem import Batch, Inputs
from ridgeline import _list_report, _prepared, _work_lists, _wrapper
from ridgeline._prepared import RUNS_BEFORE
from support import poisoned_call
from torch import Tensor
from wrapper_problem import DECODE, MIXED, base, make, plan, planned, run

CPU = torch.device("cpu")
GPU = torch.device("cuda", 0)


class Library:
    """What stands for the library: the numbers that it gives and is asked for."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.prepared: list[tuple[Any, ...]] = []
        self.asked: list[int] = []
        self.result: Any = None
        monkeypatch.setattr(_wrapper, "PREPARE", self._prepare)
        monkeypatch.setattr(_wrapper, "PREPARED", self._run)
        monkeypatch.setattr(_wrapper, "PREPARED_LSE", self._run_lse)
        for module in (_wrapper, _work_lists):
            monkeypatch.setattr(module, "is_capturing", lambda _: False)

    def _prepare(self, *operands: Any) -> int:
        self.prepared.append(operands)
        return 1_000 + len(self.prepared)

    def _run(self, *operands: Any) -> Any:
        self.asked.append(operands[3])
        return self.result

    def _run_lse(self, *operands: Any) -> tuple[Any, Any]:
        return self._run(*operands), self.result


def pretended(kind: str, inputs: Inputs, **options: Any) -> Any:
    """A wrapper that takes the CPU for a GPU, but tells its ops lengths as the CPU needs them."""
    wrapper = planned(kind, inputs, **options)
    original = wrapper._problem_of

    def problem_of(options: Any) -> Any:
        wrapper._on_gpu = False
        problem = original(options)
        wrapper._on_gpu = True
        return problem

    wrapper._problem_of = problem_of
    wrapper._on_gpu = True
    return wrapper


def test_a_later_run_prepares(rng: torch.Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    library = Library(monkeypatch)
    inputs = DECODE.inputs(CPU, rng)
    wrapper = pretended("decode", inputs)
    wanted = inputs.call()
    library.result = "result"
    for _ in range(RUNS_BEFORE):
        assert torch.equal(run(wrapper, "decode", inputs), wanted[0])
    assert not library.prepared
    for _ in range(2):
        assert run(wrapper, "decode", inputs) == "result"
    assert len(library.prepared) == 1
    assert library.asked == [1_001, 1_001]
    assert run(wrapper, "decode", inputs, return_lse=True) == ("result", "result")
    assert run(wrapper, "decode", inputs, window_left=3) != "result"
    assert wrapper.run(inputs.q, inputs.cache, out=wanted[0]) is wanted[0]
    assert isinstance(run(wrapper, "decode", inputs, lse_base="log2"), Tensor)
    plan(wrapper, "decode", inputs)
    assert isinstance(run(wrapper, "decode", inputs), Tensor)


def test_what_is_prepared(rng: torch.Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    """The options of the plan, with the window that the run was given."""
    library = Library(monkeypatch)
    library.result = "result"
    inputs = MIXED.with_(window_left=50, logits_soft_cap=8.0).inputs(CPU, rng)
    wrapper = pretended("prefill", inputs, sm_scale=0.3)
    for window in (None, 7):
        for _ in range(RUNS_BEFORE + 2):
            run(wrapper, "prefill", inputs, window_left=window)
    index = inputs.index
    for operands, window in zip(library.prepared, (50, 7), strict=True):
        assert operands[0] is inputs.q
        assert operands[3] is index["kv_indices"]
        assert operands[6] is index["qo_indptr"]
        assert operands[7:] == (2, -1, window, 0.3, 8.0, 0, 1.0, 1e4, False)


def test_prepares_a_few_calls_at_most(
    rng: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each beside the ones before; then it asks no more."""
    library = Library(monkeypatch)
    inputs = DECODE.inputs(CPU, rng)
    wrapper = pretended("decode", inputs)
    most = _prepared.MOST_PREPARED
    for _ in range(RUNS_BEFORE + most + 4):
        run(wrapper, "decode", inputs)
    assert [operands[5] for operands in library.prepared] == [0, *range(1_001, 1_000 + most)]
    assert len(library.asked) == most


def test_a_report_that_comes(rng: torch.Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    """Calls ask for it until it has come, and are prepared once more with what it says."""
    library = Library(monkeypatch)
    inputs = MIXED.inputs(CPU, rng)
    wrapper = pretended("prefill", inputs)
    flags: list[int] = []
    monkeypatch.setattr(_wrapper, "NARROW_EAGER", lambda *operands: flags.append(operands[6]))
    for _ in range(RUNS_BEFORE):
        run(wrapper, "prefill", inputs)
    place = ctypes.c_int64(0)
    (key,) = wrapper._lists.eager
    wrapper._lists.reports[key] = _list_report.ListReport(ctypes.addressof(place), 7)
    library.result = "result"
    results = [run(wrapper, "prefill", inputs) for _ in range(3)]
    place.value = -5 << 32 | 7
    results += [run(wrapper, "prefill", inputs) for _ in range(3)]
    assert results == ["result"] * 6
    plain = wrapper._options.flags
    asked, told = plain + 16 + (7 << 32), plain + 32 + (-5 << 32)
    assert flags == [plain] * RUNS_BEFORE
    assert [operands[5] for operands in library.prepared] == [0, 0]
    assert [operands[7] for operands in library.prepared] == [asked, told]


def test_gradients_are_refused(rng: torch.Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    library = Library(monkeypatch)
    library.result = "result"
    inputs = DECODE.inputs(CPU, rng)
    wrapper = pretended("decode", inputs)
    for _ in range(RUNS_BEFORE + 1):
        run(wrapper, "decode", inputs)
    inputs.q.requires_grad_()
    with pytest.raises(RuntimeError, match="inference_mode"):
        run(wrapper, "decode", inputs)
    with torch.no_grad():
        assert run(wrapper, "decode", inputs) == "result"


def number_of(wrapper: Any, kind: str, inputs: Inputs) -> int:
    """Of a call that is prepared, with nothing left to wait for."""
    for _ in range(RUNS_BEFORE + 2):
        run(wrapper, kind, inputs)
        torch.cuda.synchronize()
    call = wrapper._calls[None]
    assert call is not None
    number: int = call.number
    return number


def served(number: int, q: Tensor, k: Tensor, v: Tensor) -> bool:
    out = _prepared.PREPARED(q, k, v, number)
    both = _prepared.PREPARED_LSE(q, k, v, number)
    assert [x is None for x in (*both, out)] in ([False] * 3, [True] * 3)
    return out is not None


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["decode", "prefill", "ragged", "batch"])
def test_which_calls_are_served(kind: str, rng: torch.Generator) -> None:
    """Those that differ in addresses alone."""
    inputs = base(kind).with_(stacked=False).inputs(GPU, rng)
    wrapper = make(kind, inputs.batch, GPU)
    plan(wrapper, kind, inputs)
    number = number_of(wrapper, kind, inputs)
    q, (k, v) = inputs.q, inputs.cache
    assert served(number, q, k, v)
    assert served(number, q.clone(), k.clone(), v.clone())
    assert not served(number + 1, q, k, v)
    assert not served(-1, q, k, v)
    assert not served(number, q[:-1], k, v)
    assert not served(number, q.transpose(0, 1).contiguous().transpose(0, 1), k, v)
    assert not served(number, q, k[:-1], v)
    assert not served(number, q, k, torch.cat((v, v), -1)[..., : v.shape[-1]])
    assert not served(number, *(x.bfloat16() for x in (q, k, v)))
    assert not served(number, q, k.unsqueeze(0), v)
    odd = torch.cat((q.flatten(), q.flatten()[:1]))[1:].view(q.shape)
    assert not served(number, odd, k, v)
    mine = torch.cat((q, q), 1)[:, : q.shape[1]]
    assert not served(number, mine, k, v)
    run(wrapper, kind, replace(inputs, q=mine))
    assert wrapper._calls[None].number == number
    assert served(number, mine, k, v)
    assert served(number, q, k, v)
    with torch.cuda.stream(torch.cuda.Stream()):
        assert served(number, q, k, v)
    torch.cuda.synchronize()
    with torch.cuda.graph(torch.cuda.CUDAGraph()):
        assert not served(number, q, k, v)
        q.clone()
    plan(wrapper, kind, inputs)
    assert not served(number, q, k, v)


@pytest.mark.gpu
def test_index_tensors_that_change(rng: torch.Generator) -> None:
    """Their contents are read anew; one that has moved ends the call."""
    inputs = DECODE.inputs(GPU, rng)
    wrapper = make("decode", inputs.batch, GPU)
    plan(wrapper, "decode", inputs)
    number = number_of(wrapper, "decode", inputs)
    pages = inputs.index["kv_indices"]
    k, v = (x.roll(1, 0) for x in inputs.cache)
    wanted = run(wrapper, "decode", inputs)
    pages.copy_((pages + 1) % len(k))
    assert torch.equal(wrapper.run(inputs.q, (k, v)), wanted)
    assert wrapper._calls[None].number == number
    pages.set_(pages.clone())
    assert not served(number, inputs.q, k, v)
    assert torch.equal(wrapper.run(inputs.q, (k, v)), wanted)


@pytest.mark.gpu
def test_layers_of_one_plan(rng: torch.Generator) -> None:
    """Each has a cache of its own, some a window of their own; every other q is a view."""
    inputs = MIXED.with_(heads=(8, 2), head_dims=(128, 128)).inputs(GPU, rng)
    wrapper = make("prefill", inputs.batch, GPU)
    plan(wrapper, "prefill", inputs)
    for i in range(24):
        q = inputs.q if i % 4 else torch.cat((inputs.q, inputs.q), 1)[:, :8]
        layer = replace(inputs, q=q, cache=tuple(x * (1 + i / 8) for x in inputs.cache))
        window = None if i % 3 else 40
        got = poisoned_call(
            GPU, run, wrapper, "prefill", layer, return_lse=True, window_left=window
        )
        wanted = layer.call(window_left=-1 if window is None else window)
        assert torch.equal(got[0], wanted[0])
        assert torch.equal(got[1], wanted[1])


@pytest.mark.gpu
def test_memory_goes_with_the_wrapper(rng: torch.Generator) -> None:
    def use() -> None:
        inputs = Batch(lengths=((1, 100),) * 400, decode=True).inputs(GPU, rng)
        number_of(planned("decode", inputs), "decode", inputs)

    use()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    for _ in range(3):
        use()
    assert torch.cuda.memory_allocated() == before
