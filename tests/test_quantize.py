"""quantize and dequantize: float64 formulas, properties of the round trip, every number."""

from __future__ import annotations

from typing import Any

import hypothesis
import pytest
import ridgeline
import torch
from elementwise import (
    DTYPES,
    FLOAT32_UNIT,
    VIEWS,
    Wrong,
    assert_quantized,
    assert_raises,
    assert_refuses_grad,
    assert_rounded,
    captured,
    half_ulp,
    largest_number,
    view_of,
    without_recompilation,
)
from hypothesis import strategies as st
from support import normal, poisoned_call
from torch import Tensor

FORMATS = (torch.float8_e4m3fn, torch.float8_e5m2, torch.int8)
GRANULARITIES = ("tensor", "token", 64)
HIDDEN = (64, 192, 1024, 4096, 131072)


def by_group(x: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """Both in float64 and of shapes that multiply: one row of `x` for each scale."""
    if scale.numel() == 1:
        return x.double(), scale.double().reshape(())
    return x.double().unflatten(-1, (scale.shape[-1], -1)), scale.double().unsqueeze(-1)


def check_scale(x: Tensor, scale: Tensor, dtype: torch.dtype) -> None:
    groups, _ = by_group(x, scale)
    most = groups.abs().nan_to_num(0, torch.finfo(torch.float32).max)
    most = most.amax() if scale.numel() == 1 else most.amax(-1)
    wanted = (most / largest_number(dtype)).clamp(min=torch.finfo(torch.float32).tiny)
    error = (scale.double().reshape(wanted.shape) - wanted).abs()
    assert scale.dtype == torch.float32
    assert bool((error <= wanted * 2.0**-22).all())


def check_numbers(x: Tensor, scale: Tensor, q: Tensor) -> None:
    groups, divisor = by_group(x, scale)
    quotient = groups / divisor
    slack = (quotient.abs() * (3 * FLOAT32_UNIT)).reshape(x.shape)
    assert_quantized(q, quotient.reshape(x.shape), slack)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("quant", FORMATS, ids=str)
@pytest.mark.parametrize("granularity", GRANULARITIES, ids=str)
@pytest.mark.parametrize("hidden", HIDDEN)
def test_round_trip(
    device: torch.device,
    hidden: int,
    granularity: str | int,
    quant: torch.dtype,
    dtype: torch.dtype,
    rng: torch.Generator,
) -> None:
    x = normal((3 if hidden > 4096 else 19, hidden), dtype, device, rng, scale=5.0)
    q, scale = poisoned_call(device, ridgeline.quantize, x, quant, granularity)
    assert q.dtype == quant
    assert q.is_contiguous()
    shapes = {"tensor": (1,), "token": (len(x), 1), 64: (len(x), hidden // 64)}
    assert scale.shape == shapes[granularity]
    check_scale(x, scale, quant)
    check_numbers(x, scale, q)

    # The same numbers from the same scales, and back: half a step of the 8-bit type away at most.
    again, same = ridgeline.quantize(x, quant, scale=scale)
    assert same is scale
    assert torch.equal(again.view(torch.uint8), q.view(torch.uint8))
    back = poisoned_call(device, ridgeline.dequantize, q, scale, dtype)
    numbers, factor = by_group(q, scale)
    exact = (numbers * factor).reshape(x.shape)
    assert_rounded(back, exact, exact.abs() * FLOAT32_UNIT)
    step = torch.full_like(numbers, 0.5) if quant == torch.int8 else half_ulp(numbers.abs(), quant)
    bound = (step * factor).reshape(x.shape) * 1.001 + half_ulp(exact.abs(), dtype)
    assert bool(((back.double() - x.double()).abs() <= bound).all())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("quant", FORMATS, ids=str)
def test_every_number(device: torch.device, quant: torch.dtype, dtype: torch.dtype) -> None:
    """All 256 numbers of a type come back as they were, and what they are is what torch says."""
    codes = torch.arange(256, dtype=torch.int16).to(torch.uint8).to(device).view(quant)
    one = torch.ones(1, device=device)
    wide = ridgeline.dequantize(codes, one, dtype)
    expected = codes.to(dtype)
    assert torch.equal(wide.isnan(), expected.isnan())
    assert torch.equal(wide.nan_to_num(0), expected.nan_to_num(0))
    back, _ = ridgeline.quantize(wide, quant, scale=one)
    numbers = codes.float()
    finite = numbers.isfinite()
    assert torch.equal(back.float()[finite], numbers[finite])
    infinite = numbers.isinf()
    most = largest_number(quant)
    assert torch.equal(back.float()[infinite], numbers[infinite].sign() * most)


@pytest.mark.parametrize("quant", FORMATS, ids=str)
def test_rounding_and_saturation(device: torch.device, quant: torch.dtype) -> None:
    """Every float16 there is, to nearest even, ties included; infinities and NaN."""
    x = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(torch.float16).to(device)
    one = torch.ones(1, device=device)
    q, _ = ridgeline.quantize(x, quant, scale=one)
    most = largest_number(quant)
    if quant == torch.int8:
        exact = x.double().nan_to_num(0, 1e9, -1e9).round().clamp(-128, 127)
        assert torch.equal(q.double(), exact)
        return
    clipped = x.float().clamp(-most, most)
    assert torch.equal(
        q.view(torch.uint8)[x.isfinite()], clipped.to(quant).view(torch.uint8)[x.isfinite()]
    )
    assert torch.equal(q.float().isnan(), x.isnan())
    assert torch.equal(q.float()[x.isinf()], x[x.isinf()].float().sign() * most)


@pytest.mark.parametrize("granularity", GRANULARITIES, ids=str)
@pytest.mark.parametrize("quant", FORMATS, ids=str)
def test_special_values(device: torch.device, quant: torch.dtype, granularity: str | int) -> None:
    """A group of zeros, NaN, infinity and numbers whose inverse overflows."""
    x = torch.ones(5, 128, device=device)
    x[0] = 0
    x[1, 3] = float("nan")
    x[2, 7] = float("-inf")
    x[3] = 1e-44
    q, scale = ridgeline.quantize(x, quant, granularity)
    check_scale(x, scale, quant)
    assert bool(scale.isfinite().all())
    check_numbers(x, scale, q)


@pytest.mark.parametrize("granularity", GRANULARITIES, ids=str)
@pytest.mark.parametrize("kind", VIEWS)
@pytest.mark.parametrize("rows", [(), (5,), (3, 4), (2, 1, 3)], ids=str)
def test_views(
    device: torch.device,
    rows: tuple[int, ...],
    kind: str,
    granularity: str | int,
    rng: torch.Generator,
) -> None:
    values = normal((*rows, 192), torch.bfloat16, device, rng)
    q, scale = ridgeline.quantize(view_of(values, kind), torch.float8_e4m3fn, granularity)
    check_scale(values, scale, q.dtype)
    check_numbers(values, scale, q)
    backing = torch.zeros(*rows, 200, dtype=torch.uint8, device=device).view(q.dtype)
    offset = 8 if kind == "strided" else 3
    view = backing.view(torch.uint8)[..., offset : offset + 192].copy_(q.view(torch.uint8))
    back = ridgeline.dequantize(view.view(q.dtype), scale, torch.float32)
    assert torch.equal(back, ridgeline.dequantize(q, scale, torch.float32))


@hypothesis.given(data=st.data())
@hypothesis.settings(max_examples=60, deadline=None)
def test_any_shape(device: torch.device, data: st.DataObject) -> None:
    group = data.draw(st.integers(1, 90), label="group")
    num_groups = data.draw(st.integers(1, 9), label="groups")
    rows = tuple(data.draw(st.lists(st.integers(0, 9), max_size=2), label="rows"))
    quant = data.draw(st.sampled_from(FORMATS), label="format")
    dtype = data.draw(st.sampled_from(DTYPES), label="dtype")
    granularity = data.draw(st.sampled_from(["tensor", "token", group]), label="granularity")
    rng = torch.Generator().manual_seed(data.draw(st.integers(0, 2**31), label="seed"))
    x = normal((*rows, group * num_groups), dtype, device, rng)
    q, scale = poisoned_call(device, ridgeline.quantize, x, quant, granularity)
    if x.numel():
        check_scale(x, scale, quant)
        check_numbers(x, scale, q)


def test_a_scale_of_a_whole_large_tensor(device: torch.device, rng: torch.Generator) -> None:
    """More vectors than the grid's threads hold; the largest number is the last one."""
    x = normal((4099, 2056), torch.bfloat16, device, rng)
    x[-1, -1] = -1000
    q, scale = poisoned_call(device, ridgeline.quantize, x, "int8", "tensor")
    check_scale(x, scale, torch.int8)
    check_numbers(x, scale, q)
    back = poisoned_call(device, ridgeline.dequantize, q, scale, torch.float32)
    assert torch.equal(back, q.float() * scale)
    assert int(q[-1, -1]) == -127
    assert int(q.abs().max()) == 127


@pytest.mark.parametrize("shape", [(0, 64), (3, 0), (0,)], ids=str)
@pytest.mark.parametrize("granularity", ["tensor", "token"])
def test_empty(device: torch.device, shape: tuple[int, ...], granularity: str) -> None:
    x = torch.ones(shape, device=device)
    q, scale = poisoned_call(device, ridgeline.quantize, x, "int8", granularity)
    assert q.shape == shape
    assert scale.shape == ((1,) if granularity == "tensor" else (*shape[:-1], 1))
    assert bool(scale.isfinite().all())
    assert ridgeline.dequantize(q, torch.ones(1, device=device)).shape == shape


def test_compile(device: torch.device, rng: torch.Generator) -> None:
    def step(x: Tensor) -> tuple[Tensor, ...]:
        q, scale = ridgeline.quantize(x * 2, torch.float8_e4m3fn, 64)
        whole, one = ridgeline.quantize(x, "int8", "tensor")
        given, _ = ridgeline.quantize(x, "int8", scale=one)
        return ridgeline.dequantize(q, scale), whole + given, one

    calls = [(normal((n, 128), torch.bfloat16, device, rng),) for n in (3, 8, 31)]
    results = without_recompilation(step, calls, dynamic=[0])
    for result, call in zip(results, calls, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(result, step(*call), strict=True))


@pytest.mark.gpu
def test_cuda_graph_and_no_synchronisation(rng: torch.Generator) -> None:
    device = torch.device("cuda", 0)
    x = normal((32, 4096), torch.bfloat16, device, rng)
    results: dict[str, Any] = {}

    def step() -> None:
        for granularity in GRANULARITIES:
            q, scale = ridgeline.quantize(x, torch.float8_e4m3fn, granularity)
            results[str(granularity)] = q, scale, ridgeline.dequantize(q, scale)

    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = captured(step)
    x.copy_(normal((32, 4096), torch.bfloat16, device, rng, scale=3.0))
    graph.replay()
    for q, scale, _ in results.values():
        check_scale(x, scale, q.dtype)
        check_numbers(x, scale, q)


@pytest.mark.gpu
def test_second_device(second_device: torch.device, rng: torch.Generator) -> None:
    x = normal((32, 4096), torch.bfloat16, second_device, rng)
    q, scale = ridgeline.quantize(x, torch.float8_e4m3fn, "tensor")
    check_numbers(x.cpu(), scale.cpu(), q.cpu())
    assert torch.cuda.current_device() == 0


def ones(*shape: int, dtype: torch.dtype = torch.float32) -> Any:
    return lambda device: torch.ones(shape, device=device).to(dtype)


WRONG_QUANTIZE = (
    Wrong("dtype", {"dtype": torch.float16}, r"'dtype'.*float8_e4m3fn.*float16"),
    Wrong("name", {"dtype": "int9"}, r"'dtype'.*int8.*'int9'"),
    Wrong("granularity", {"granularity": "row"}, r"'granularity'.*'token'.*'row'"),
    Wrong("group of 0", {"granularity": 0}, r"'granularity'.*at least 1.*0"),
    Wrong("group", {"granularity": 48}, r"'granularity'.*divisor.*64.*48"),
    Wrong("input", {"input": ones(4, 64, dtype=torch.float64)}, r"'input'.*float64"),
    Wrong("scalar", {"input": ones()}, r"'input'.*at least 1 dimension"),
    Wrong("stride", {"input": lambda d: ones(64, 4)(d).t()}, r"'input'.*stride 4"),
)
WRONG_SCALE = (
    Wrong("scale's dtype", {"scale": ones(1, dtype=torch.float16)}, r"'scale'.*float32"),
    Wrong("scale's rows", {"scale": ones(3, 1)}, r"'scale'.*\[4, 1\].*\[3, 1\]"),
    Wrong("scale's groups", {"scale": ones(4, 3)}, r"'scale'.*divides.*64.*3"),
    Wrong("scale's rank", {"scale": ones(4)}, r"'scale'.*\[4, 4\].*\[4\]"),
    Wrong("scale's stride", {"scale": lambda d: ones(4, 4)(d)[:, ::2]}, r"'scale'.*contiguous"),
)
WRONG_DEQUANTIZE = (
    Wrong("input", {"input": ones(4, 64)}, r"'input'.*float8_e4m3fn.*float32"),
    Wrong("dtype", {"dtype": torch.float64}, r"'dtype'.*float32.*float64"),
)


@pytest.mark.parametrize("wrong", WRONG_QUANTIZE, ids=lambda wrong: wrong.name)
def test_wrong_quantize(device: torch.device, wrong: Wrong) -> None:
    good = {"input": ones(4, 64)(device), "dtype": torch.int8, "granularity": "token"}
    assert_raises(wrong, ridgeline.quantize, good, device)


@pytest.mark.parametrize("wrong", WRONG_SCALE, ids=lambda wrong: wrong.name)
def test_wrong_scale(device: torch.device, wrong: Wrong) -> None:
    good = {"input": ones(4, 64)(device), "scale": ones(4, 2)(device), "dtype": torch.int8}
    assert_raises(wrong, ridgeline.quantize, good, device)
    good = {"input": ones(4, 64, dtype=torch.int8)(device), "scale": ones(4, 2)(device)}
    assert_raises(wrong, ridgeline.dequantize, good, device)


@pytest.mark.parametrize("wrong", WRONG_DEQUANTIZE, ids=lambda wrong: wrong.name)
def test_wrong_dequantize(device: torch.device, wrong: Wrong) -> None:
    good = {"input": ones(4, 64, dtype=torch.int8)(device), "scale": ones(4, 2)(device)}
    assert_raises(wrong, ridgeline.dequantize, good, device)


def test_gradients_are_refused(device: torch.device) -> None:
    x, scale = torch.ones(4, 64, device=device), torch.ones(1, device=device)
    assert_refuses_grad(ridgeline.quantize, [x])
    assert_refuses_grad(lambda x, s: ridgeline.quantize(x, scale=s), [x, scale])
    q = torch.ones(4, 64, dtype=torch.int8, device=device)
    assert_refuses_grad(lambda s: ridgeline.dequantize(q, s), [scale])
