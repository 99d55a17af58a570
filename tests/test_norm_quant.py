"""rmsnorm_quant, fused_add_rmsnorm_quant and layernorm_quant against float64 formulas."""

from __future__ import annotations

from typing import Any

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
    captured,
    largest_number,
    view_of,
    without_recompilation,
)
from support import normal, poisoned_call
from torch import Tensor

OUT_DTYPES = (torch.float8_e4m3fn, torch.int8)
OPS = ("rmsnorm_quant", "fused_add_rmsnorm_quant", "layernorm_quant")
HIDDEN = (1, 7, 64, 264, 1032, 4096, 4097, 20000, 131072)
EPS = 1e-5


def exact_of(op: str, tensors: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """The float64 norm, and what float32 may lose of it."""
    x = tensors["input"].double()
    chain = (32 + x.shape[-1] / 512) / 2 + 16
    if op == "layernorm_quant":
        gamma, beta = tensors["gamma"].double(), tensors["beta"].double()
        centred = x - x.mean(-1, keepdim=True)
        root = (centred.square().mean(-1, keepdim=True) + EPS).sqrt()
        exact = centred / root * gamma + beta
        size = (centred.abs() + x.abs().mean(-1, keepdim=True)) / root * gamma.abs() + beta.abs()
        return exact, size * (1.5 * chain * FLOAT32_UNIT)
    if op == "fused_add_rmsnorm_quant":
        x = (tensors["input"] + tensors["residual"]).double()
    exact = x / (x.square().mean(-1, keepdim=True) + EPS).sqrt() * tensors["weight"].double()
    return exact, exact.abs() * (chain * FLOAT32_UNIT)


def draw(
    op: str,
    rows: tuple[int, ...],
    hidden: int,
    dtype: torch.dtype,
    device: torch.device,
    rng: torch.Generator,
    weight_dtype: torch.dtype | None = None,
) -> dict[str, Tensor]:
    tensors = {"input": normal((*rows, hidden), dtype, device, rng)}
    if op == "fused_add_rmsnorm_quant":
        tensors["residual"] = normal((*rows, hidden), dtype, device, rng, scale=3.0)
    for name in ("gamma", "beta") if op == "layernorm_quant" else ("weight",):
        tensors[name] = normal((hidden,), weight_dtype or dtype, device, rng)
    return tensors


def poisoned_out(like: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.full(like.shape, 0x7F, dtype=torch.uint8, device=like.device).view(dtype)


def check(op: str, tensors: dict[str, Tensor], out: Tensor, scale: float | Tensor | None) -> None:
    """Call the op and judge what it wrote and returned."""
    exact, slack = exact_of(op, tensors)
    total = tensors["input"] + tensors["residual"] if "residual" in tensors else None
    before = tensors["input"].clone()
    returned = poisoned_call(
        out.device, getattr(ridgeline, op), out, **tensors, scale=scale, eps=EPS
    )
    assert torch.equal(tensors["input"], before)
    if total is not None:
        assert torch.equal(tensors["residual"], total)
    if scale is None:
        assert returned.dtype == torch.float32
        assert returned.shape == (*out.shape[:-1], 1)
        most = exact.abs().amax(-1, keepdim=True)
        wanted = (most / largest_number(out.dtype)).clamp(min=torch.finfo(torch.float32).tiny)
        bound = slack.amax(-1, keepdim=True) / largest_number(out.dtype) + wanted * 2.0**-22
        assert bool(((returned.double() - wanted).abs() <= bound).all())
        divisor = returned.double()
    else:
        assert returned is None
        divisor = torch.as_tensor(scale, dtype=torch.float32, device=out.device).double()
    quotient = exact / divisor
    assert_quantized(out, quotient, slack / divisor + quotient.abs() * (3 * FLOAT32_UNIT))


@pytest.mark.parametrize("weight_dtype", [None, torch.float32], ids=["weight", "weight_f32"])
@pytest.mark.parametrize("out_dtype", OUT_DTYPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("hidden", HIDDEN)
def test_every_hidden_size(
    device: torch.device,
    hidden: int,
    dtype: torch.dtype,
    out_dtype: torch.dtype,
    weight_dtype: torch.dtype | None,
    rng: torch.Generator,
) -> None:
    rows = (3 if hidden > 1024 else 17,)
    scale = torch.tensor([0.013], device=device)
    for op in OPS:
        for given in (0.027, scale, None):
            tensors = draw(op, rows, hidden, dtype, device, rng, weight_dtype)
            check(op, tensors, poisoned_out(tensors["input"], out_dtype), given)


@pytest.mark.parametrize("kind", VIEWS)
@pytest.mark.parametrize("rows", [(), (5,), (3, 4), (2, 1, 3)], ids=str)
@pytest.mark.parametrize("hidden", [64, 120, 4104])
def test_views(
    device: torch.device, hidden: int, rows: tuple[int, ...], kind: str, rng: torch.Generator
) -> None:
    for op in OPS:
        tensors = draw(op, rows, hidden, torch.bfloat16, device, rng)
        tensors = {n: view_of(t, kind) if t.dim() > 1 else t for n, t in tensors.items()}
        check(op, tensors, poisoned_out(tensors["input"], torch.int8), None)
        margin = {"contiguous": 0, "strided": 16, "unaligned": 1, "odd stride": 3}[kind]
        backing = torch.full((*rows, hidden + 2 * margin), 99, dtype=torch.int8, device=device)
        out = backing[..., margin : margin + hidden]
        check(op, tensors, out, 0.02)
        if margin:
            assert bool((backing[..., :margin] == 99).all())
            assert bool((backing[..., -margin:] == 99).all())


@pytest.mark.parametrize("out_dtype", OUT_DTYPES, ids=str)
@pytest.mark.parametrize("hidden", [40, 264, 4096, 20000])
def test_special_values(device: torch.device, hidden: int, out_dtype: torch.dtype) -> None:
    """NaN, rows of zeros, weights of infinity: no NaN elsewhere, and scales stay finite."""
    x = torch.ones(4, hidden, device=device)
    x[0, 5] = float("nan")
    x[2] = 0
    weight = torch.ones(hidden, device=device)
    weight[3] = float("inf")
    out = poisoned_out(x, out_dtype)
    scale = ridgeline.rmsnorm_quant(out, x, weight, eps=EPS)
    assert scale is not None
    assert bool(scale.isfinite().all())
    assert bool((scale > 0).all())
    numbers = out.double()
    nan = torch.zeros_like(numbers, dtype=torch.bool)
    nan[0] = True
    nan[2, 3] = True  # 0 * inf
    if out_dtype == torch.int8:
        assert not numbers[nan].any()
    else:
        assert torch.equal(numbers.isnan(), nan)
    assert bool((numbers[1::2, 3] == largest_number(out_dtype)).all())  # infinity saturates
    rest = numbers[2].clone()
    rest[3] = 0
    assert not rest.any()
    ridgeline.rmsnorm_quant(out, x[1:2].expand(4, hidden) * -3, weight, 1e-3, EPS)
    least = -128 if out_dtype == torch.int8 else -448
    assert bool((out.double() == least).all())


@pytest.mark.parametrize("hidden", [7, 128, 4096, 20000])
def test_rows_do_not_depend_on_the_batch(
    device: torch.device, hidden: int, rng: torch.Generator
) -> None:
    if device.type == "cpu":
        return
    tensors = draw("rmsnorm_quant", (37,), hidden, torch.bfloat16, device, rng)
    x, weight = tensors["input"], tensors["weight"]
    out = poisoned_out(x, torch.int8)
    scale = ridgeline.rmsnorm_quant(out, x, weight)
    assert scale is not None
    for i in (0, 17, 36):
        alone = poisoned_out(x[i], torch.int8)
        assert torch.equal(scale[i], ridgeline.rmsnorm_quant(alone, x[i], weight))
        assert torch.equal(out[i], alone)


@pytest.mark.parametrize("shape", [(0, 64), (3, 0), (2, 0, 128), (0,)], ids=str)
def test_empty(device: torch.device, shape: tuple[int, ...]) -> None:
    x = torch.ones(shape, dtype=torch.float16, device=device)
    weight = torch.ones(shape[-1], dtype=torch.float16, device=device)
    out = torch.empty(shape, dtype=torch.int8, device=device)
    ridgeline.rmsnorm_quant(out, x, weight, 0.1)
    scale = poisoned_call(device, ridgeline.rmsnorm_quant, out, x, weight)
    assert scale is not None
    assert scale.shape == (*shape[:-1], 1)
    assert bool(scale.isfinite().all())


def test_compile(device: torch.device, rng: torch.Generator) -> None:
    def step(x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
        out = torch.empty_like(x, dtype=torch.int8)
        scale = ridgeline.fused_add_rmsnorm_quant(out, x * 2, residual, weight)
        other = torch.empty_like(out)
        ridgeline.rmsnorm_quant(other, residual, weight, 0.03)
        return out.float() * scale, other, residual + 1

    calls = []
    for n in (3, 8, 31):
        tensors = draw("fused_add_rmsnorm_quant", (n,), 128, torch.bfloat16, device, rng)
        calls.append((tensors["input"], tensors["residual"], tensors["weight"]))
    expected = [step(x, residual.clone(), weight) for x, residual, weight in calls]
    results = without_recompilation(step, calls, dynamic=[0, 1])
    for result, wanted in zip(results, expected, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(result, wanted, strict=True))


@pytest.mark.gpu
def test_cuda_graph(rng: torch.Generator) -> None:
    device = torch.device("cuda", 0)
    tensors = draw("layernorm_quant", (8,), 4096, torch.bfloat16, device, rng)
    out = poisoned_out(tensors["input"], torch.float8_e4m3fn)
    scale = torch.tensor([0.01], device=device)
    graph = captured(lambda: ridgeline.layernorm_quant(out, **tensors, scale=scale, eps=EPS))
    tensors["input"].copy_(normal((8, 4096), torch.bfloat16, device, rng))
    scale.fill_(0.02)
    graph.replay()
    exact, slack = exact_of("layernorm_quant", tensors)
    divisor = scale.double()
    bound = (slack + exact.abs() * (3 * FLOAT32_UNIT)) / divisor
    assert_quantized(out, exact / divisor, bound)


@pytest.mark.gpu
def test_second_device(second_device: torch.device, rng: torch.Generator) -> None:
    tensors = draw("rmsnorm_quant", (8,), 4096, torch.bfloat16, second_device, rng)
    out = poisoned_out(tensors["input"], torch.int8)
    scale = ridgeline.rmsnorm_quant(out, **tensors, eps=EPS)
    assert scale is not None
    exact, slack = exact_of("rmsnorm_quant", {n: t.cpu() for n, t in tensors.items()})
    quotient = exact / scale.cpu().double()
    bound = slack / scale.cpu().double() + quotient.abs() * (3 * FLOAT32_UNIT)
    assert_quantized(out.cpu(), quotient, bound)


def ones(*shape: int, dtype: torch.dtype = torch.float16) -> Any:
    return lambda device: torch.ones(shape, device=device).to(dtype)


WRONG = (
    Wrong("out's dtype", {"out": ones(4, 64)}, r"'out'.*float8_e4m3fn or torch.int8.*float16"),
    Wrong("out's shape", {"out": ones(4, 63, dtype=torch.int8)}, r"'out'.*\[4, 64\].*\[4, 63\]"),
    Wrong(
        "out's stride",
        {"out": lambda d: ones(64, 4, dtype=torch.int8)(d).t()},
        r"'out'.*stride 4",
    ),
    Wrong(
        "expanded out",
        {"out": lambda d: ones(1, 64, dtype=torch.int8)(d).expand(4, 64)},
        r"'out'.*distinct",
    ),
    Wrong("zero scale", {"scale": 0.0}, r"'scale'.*> 0.*got 0"),
    Wrong("negative scale", {"scale": -1.0}, r"'scale'.*> 0"),
    Wrong("infinite scale", {"scale": float("inf")}, r"'scale'.*> 0.*inf"),
    Wrong("two scales", {"scale": ones(2, dtype=torch.float32)}, r"'scale'.*1 element.*\[2\]"),
    Wrong("scale's dtype", {"scale": ones(1)}, r"'scale'.*float32.*float16"),
    Wrong("input", {"input": ones(4, 64, dtype=torch.float64)}, r"'input'.*float64"),
    Wrong("eps", {"eps": -1.0}, r"'eps'.*>= 0"),
)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("wrong", WRONG, ids=lambda wrong: wrong.name)
def test_wrong_arguments(device: torch.device, op: str, wrong: Wrong) -> None:
    good: dict[str, Any] = {"out": ones(4, 64, dtype=torch.int8)(device), "scale": 0.5, "eps": EPS}
    good["input"] = ones(4, 64)(device)
    for name in ("gamma", "beta") if op == "layernorm_quant" else ("weight",):
        good[name] = ones(64)(device)
    if op == "fused_add_rmsnorm_quant":
        good["residual"] = ones(4, 64)(device)
    assert_raises(wrong, getattr(ridgeline, op), good, device)


def test_wrong_token_scale(device: torch.device) -> None:
    """The op itself, which the functions call with room of the right shape."""
    op = torch.ops.ridgeline.rmsnorm_quant
    out, x = ones(4, 64, dtype=torch.int8)(device), ones(4, 64)(device)
    scale = torch.ones(4, 1, device=device)
    for wrong, message in (
        ((scale[:3], None), r"'token_scale'.*\[4, 1\].*\[3, 1\]"),
        ((scale.half(), None), r"'token_scale'.*float32"),
        ((torch.ones(4, 2, device=device)[:, :1], None), r"'token_scale'.*contiguous"),
        ((scale, scale[:1]), r"'scale'.*None beside 'token_scale'"),
    ):
        with pytest.raises((TypeError, ValueError, RuntimeError), match=message):
            op(out, x, x[0].clone(), *wrong, 1.0, EPS)


def test_overlap(device: torch.device) -> None:
    x = torch.ones(4, 64, dtype=torch.float16, device=device)
    out = x.view(torch.int8)[:, :64]
    with pytest.raises((ValueError, RuntimeError), match=r"'out'.*overlaps 'input'"):
        ridgeline.rmsnorm_quant(out, x, x[0].clone(), 1.0)


def test_gradients_are_refused(device: torch.device) -> None:
    x, w = torch.ones(4, 64, device=device), torch.ones(64, device=device)
    out = torch.empty(4, 64, dtype=torch.int8, device=device)
    assert_refuses_grad(lambda x, w: ridgeline.rmsnorm_quant(out, x, w, 1.0), [x, w])
    assert_refuses_grad(lambda x, r, w: ridgeline.fused_add_rmsnorm_quant(out, x, r, w), [x, x, w])
    assert_refuses_grad(lambda x, g, b: ridgeline.layernorm_quant(out, x, g, b), [x, w, w])
