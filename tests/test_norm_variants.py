"""gemma_rmsnorm, gemma_fused_add_rmsnorm and layernorm against float64 and Transformers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import ridgeline
import torch
from elementwise import (
    DTYPES,
    FLOAT32_UNIT,
    VIEWS,
    Wrong,
    assert_raises,
    assert_refuses_grad,
    assert_rounded,
    captured,
    half_ulp,
    untouched_outside,
    view_of,
    without_recompilation,
)
from support import normal, poison, poisoned_call
from torch import Tensor

HIDDEN = (1, 7, 64, 100, 264, 1032, 4096, 4097, 20000, 131072)
EPS = 1e-5


def exact_gemma(x: Tensor, weight: Tensor, eps: float = EPS) -> Tensor:
    x = x.double()
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * (1 + weight.double())


def exact_layernorm(x: Tensor, gamma: Tensor, beta: Tensor, eps: float = EPS) -> Tensor:
    x = x.double()
    x = x - x.mean(-1, keepdim=True)
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * gamma.double() + beta.double()


def roundings(hidden: int) -> float:
    """Of float32, in a sum over a row (chains of 32 + hidden / 512 additions) and what follows."""
    return (32 + hidden / 512) / 2 + 14


def assert_gemma(actual: Tensor, x: Tensor, weight: Tensor) -> None:
    exact = exact_gemma(x, weight)
    # Of a weight near -1 the sum 1 + weight is exact but for one rounding of its own.
    assert_rounded(actual, exact, exact.abs() * (FLOAT32_UNIT * roundings(x.shape[-1])))


def layernorm_slack(x: Tensor, gamma: Tensor, beta: Tensor, eps: float = EPS) -> Tensor:
    """The mean's own error, and the subtraction's, count in units of the row's magnitudes."""
    wide = x.double()
    mean = wide.mean(-1, keepdim=True)
    root = ((wide - mean).square().mean(-1, keepdim=True) + eps).sqrt()
    of_mean = wide.abs().mean(-1, keepdim=True) * roundings(x.shape[-1]) / root
    of_values = (wide - mean).abs() / root * (roundings(x.shape[-1]) + of_mean * FLOAT32_UNIT)
    size = (of_mean + of_values) * gamma.double().abs() + beta.double().abs()
    return size * FLOAT32_UNIT * 1.5


def assert_layernorm(actual: Tensor, x: Tensor, gamma: Tensor, beta: Tensor) -> None:
    assert_rounded(actual, exact_layernorm(x, gamma, beta), layernorm_slack(x, gamma, beta))


def draw(
    rows: tuple[int, ...],
    hidden: int,
    dtype: torch.dtype,
    device: torch.device,
    rng: torch.Generator,
    weight_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """input, residual, weight (or gamma), beta."""
    vectors = [normal((hidden,), weight_dtype or dtype, device, rng) for _ in range(2)]
    x = normal((*rows, hidden), dtype, device, rng)
    return x, normal((*rows, hidden), dtype, device, rng, scale=3.0), vectors[0], vectors[1]


@pytest.mark.parametrize("weight_dtype", [None, torch.float32], ids=["weight", "weight_f32"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("hidden", HIDDEN)
def test_every_hidden_size(
    device: torch.device,
    hidden: int,
    dtype: torch.dtype,
    weight_dtype: torch.dtype | None,
    rng: torch.Generator,
) -> None:
    rows = (3 if hidden > 4096 else 37,)
    x, residual, weight, beta = draw(rows, hidden, dtype, device, rng, weight_dtype)
    out = poisoned_call(device, ridgeline.gemma_rmsnorm, x, weight, EPS)
    assert out.dtype == dtype
    assert_gemma(out, x, weight)
    normed = poisoned_call(device, ridgeline.layernorm, x, weight, beta, EPS)
    assert normed.dtype == dtype
    assert_layernorm(normed, x, weight, beta)
    total = x + residual
    ridgeline.gemma_fused_add_rmsnorm(x, residual, weight, EPS)
    assert torch.equal(residual, total)
    assert_gemma(x, residual, weight)


@pytest.mark.parametrize("kind", VIEWS)
@pytest.mark.parametrize("rows", [(), (3, 4)], ids=str)
@pytest.mark.parametrize("hidden", [64, 120, 4096])
def test_views(
    device: torch.device, hidden: int, rows: tuple[int, ...], kind: str, rng: torch.Generator
) -> None:
    values, more, weight, beta = draw(rows, hidden, torch.bfloat16, device, rng)
    x, residual = view_of(values, kind), view_of(more, kind)
    assert_layernorm(ridgeline.layernorm(x, weight, beta, EPS), values, weight, beta)
    for out_kind in VIEWS:
        out = view_of(values, out_kind)
        poison(out)
        assert ridgeline.gemma_rmsnorm(x, weight, EPS, out) is out
        assert_gemma(out, values, weight)
        assert out_kind == "contiguous" or untouched_outside(out)
    ridgeline.gemma_fused_add_rmsnorm(x, residual, weight, EPS)
    assert torch.equal(residual, values + more)
    assert_gemma(x, residual, weight)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("hidden", [100, 4096, 20000])
def test_layernorm_with_a_large_mean(
    device: torch.device, hidden: int, dtype: torch.dtype, rng: torch.Generator
) -> None:
    """A mean of 300 standard deviations: the variance must not be a difference of large sums."""
    x = normal((9, hidden), torch.float32, device, rng).add(300).to(dtype)
    gamma, beta = (normal((hidden,), dtype, device, rng) for _ in range(2))
    assert_layernorm(ridgeline.layernorm(x, gamma, beta, EPS), x, gamma, beta)


def test_special_values(device: torch.device) -> None:
    x = torch.ones(4, 264, device=device)
    x[0, 5] = float("nan")
    x[1, 7] = float("inf")
    x[2] = 0
    ones, zeros = torch.ones(264, device=device), torch.zeros(264, device=device)
    assert_gemma(ridgeline.gemma_rmsnorm(x, zeros, EPS), x, zeros)
    got, exact = ridgeline.layernorm(x, ones, zeros, EPS), exact_layernorm(x, ones, zeros)
    assert torch.equal(got.isnan(), exact.isnan())
    assert not got[2].any()  # a row of zeros


def test_gemma_equals_rmsnorm_of_weights_that_are_one_more(
    device: torch.device, rng: torch.Generator
) -> None:
    x, _, weight, _ = draw((9,), 1032, torch.bfloat16, device, rng)
    ours = ridgeline.gemma_rmsnorm(x, weight, EPS)
    assert torch.equal(ours, ridgeline.rmsnorm(x, 1 + weight.float(), EPS))


@pytest.mark.parametrize("hidden", [7, 128, 4096, 20000])
def test_rows_do_not_depend_on_the_batch(
    device: torch.device, hidden: int, rng: torch.Generator
) -> None:
    x, _, gamma, beta = draw((37,), hidden, torch.bfloat16, device, rng)
    together = ridgeline.layernorm(x, gamma, beta)
    assert torch.equal(together, ridgeline.layernorm(x, gamma, beta))
    if device.type == "cuda":
        alone = torch.stack([ridgeline.layernorm(row, gamma, beta) for row in x])
        assert torch.equal(together, alone)


@pytest.mark.parametrize("shape", [(0, 64), (3, 0), (2, 0, 128), (0,)], ids=str)
def test_empty(device: torch.device, shape: tuple[int, ...]) -> None:
    x = torch.ones(shape, dtype=torch.float16, device=device)
    weight = torch.ones(shape[-1], dtype=torch.float16, device=device)
    assert ridgeline.gemma_rmsnorm(x, weight).shape == shape
    assert ridgeline.layernorm(x, weight, weight).shape == shape
    ridgeline.gemma_fused_add_rmsnorm(x, x.clone(), weight)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_transformers(device: torch.device, dtype: torch.dtype, rng: torch.Generator) -> None:
    gemma = pytest.importorskip("transformers.models.gemma.modeling_gemma")
    x, _, weight, beta = draw((11,), 2048, dtype, device, rng)
    module = gemma.GemmaRMSNorm(2048, eps=EPS).to(device=device, dtype=dtype)
    layer = torch.nn.LayerNorm(2048, EPS, device=device, dtype=dtype)
    with torch.no_grad():
        module.weight.copy_(weight)
        layer.weight.copy_(weight)
        layer.bias.copy_(beta)
        theirs, theirs_layer = module(x), layer(x)
    exact = exact_gemma(x, weight)
    slack = exact.abs() * (FLOAT32_UNIT * roundings(2048))
    bound = 2 * half_ulp(exact.abs() + slack, dtype) + 2 * slack
    ours = ridgeline.gemma_rmsnorm(x, weight, EPS)
    assert bool(((ours.double() - theirs.double()).abs() <= bound).all())
    exact = exact_layernorm(x, weight, beta)
    slack = layernorm_slack(x, weight, beta)
    bound = 2 * half_ulp(exact.abs() + slack, dtype) + 2 * slack
    ours = ridgeline.layernorm(x, weight, beta, EPS)
    assert bool(((ours.double() - theirs_layer.double()).abs() <= bound).all())


def test_compile(device: torch.device, rng: torch.Generator) -> None:
    def step(x: Tensor, residual: Tensor, weight: Tensor, beta: Tensor) -> Tensor:
        y = ridgeline.gemma_rmsnorm(ridgeline.layernorm(x * 2, weight, beta), weight)
        ridgeline.gemma_fused_add_rmsnorm(y, residual, weight, EPS)
        return y + 1

    calls = [draw((n,), 128, torch.bfloat16, device, rng) for n in (3, 8, 31)]
    expected = [step(x, residual.clone(), w, b) for x, residual, w, b in calls]
    results = without_recompilation(step, calls, dynamic=[0, 1])
    assert all(torch.equal(a, b) for a, b in zip(results, expected, strict=True))


@pytest.mark.gpu
def test_cuda_graph(rng: torch.Generator) -> None:
    device = torch.device("cuda", 0)
    x, _, weight, beta = draw((8,), 4096, torch.bfloat16, device, rng)
    results: dict[str, Tensor] = {}

    def step() -> None:
        results["gemma"] = ridgeline.gemma_rmsnorm(x, weight, EPS)
        results["layernorm"] = ridgeline.layernorm(x, weight, beta, EPS)

    graph = captured(step)
    x.copy_(draw((8,), 4096, torch.bfloat16, device, rng)[0])
    poison(*results.values())
    graph.replay()
    assert_gemma(results["gemma"], x, weight)
    assert_layernorm(results["layernorm"], x, weight, beta)


@pytest.mark.gpu
def test_second_device(second_device: torch.device, rng: torch.Generator) -> None:
    x, _, weight, beta = draw((8,), 4096, torch.bfloat16, second_device, rng)
    assert_gemma(ridgeline.gemma_rmsnorm(x, weight, EPS).cpu(), x.cpu(), weight.cpu())
    out = ridgeline.layernorm(x, weight, beta, EPS)
    assert_layernorm(out.cpu(), x.cpu(), weight.cpu(), beta.cpu())
    assert torch.cuda.current_device() == 0


def ones(*shape: int, dtype: torch.dtype = torch.float16) -> Any:
    return lambda device: torch.ones(shape, dtype=dtype, device=device)


WRONG = (
    Wrong("dtype", {"input": ones(4, 64, dtype=torch.float64)}, r"'input'.*float16.*float64"),
    Wrong("scalar", {"input": ones()}, r"'input'.*at least 1 dimension"),
    Wrong("last stride", {"input": lambda d: ones(64, 4)(d).t()}, r"'input'.*stride 4.*contiguous"),
    Wrong("nan eps", {"eps": float("nan")}, r"'eps'.*finite"),
)
WRONG_WEIGHT = (
    Wrong("mixed dtypes", {"weight": ones(64, dtype=torch.bfloat16)}, r"'weight'.*bfloat16"),
    Wrong("weight's shape", {"weight": ones(63)}, r"'weight'.*\[64\].*\[63\]"),
)
WRONG_RESIDUAL = (
    Wrong("residual's shape", {"residual": ones(3, 64)}, r"'residual'.*\[4, 64\].*\[3, 64\]"),
)
WRONG_BETA = (
    Wrong("gamma's shape", {"gamma": ones(63)}, r"'gamma'.*\[64\].*\[63\]"),
    Wrong("beta's shape", {"beta": ones(63)}, r"'beta'.*\[64\].*\[63\]"),
    Wrong("beta's dtype", {"beta": ones(64, dtype=torch.float32)}, r"'beta'.*that of 'gamma'"),
)


def cases() -> list[Any]:
    found = []
    for op, extra, wrongs in (
        ("gemma_rmsnorm", ("weight",), (*WRONG, *WRONG_WEIGHT)),
        (
            "gemma_fused_add_rmsnorm",
            ("residual", "weight"),
            (*WRONG, *WRONG_WEIGHT, *WRONG_RESIDUAL),
        ),
        ("layernorm", ("gamma", "beta"), (*WRONG, *WRONG_BETA)),
    ):
        for wrong in wrongs:
            found.append(pytest.param(op, extra, wrong, id=f"{op}-{wrong.name}"))
    return found


@pytest.mark.parametrize("layer", [ridgeline, torch.ops.ridgeline], ids=["function", "op"])
@pytest.mark.parametrize(("op", "extra", "wrong"), cases())
def test_wrong_arguments(
    device: torch.device, op: str, extra: tuple[str, ...], wrong: Wrong, layer: Any
) -> None:
    good: dict[str, Any] = {"input": ones(4, 64)(device), "eps": EPS}
    for name in extra:
        good[name] = ones(4, 64)(device) if name == "residual" else ones(64)(device)
    assert_raises(wrong, getattr(layer, op), good, device)


def test_gradients_are_refused(device: torch.device) -> None:
    x, w = torch.ones(4, 64, device=device), torch.ones(64, device=device)
    calls: list[tuple[Callable[..., Any], list[Tensor]]] = [
        (ridgeline.gemma_rmsnorm, [x, w]),
        (ridgeline.gemma_fused_add_rmsnorm, [x, x, w]),
        (ridgeline.layernorm, [x, w, w]),
    ]
    for call, tensors in calls:
        assert_refuses_grad(call, tensors)
