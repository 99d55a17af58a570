"""silu_and_mul, gelu_and_mul and gelu_tanh_and_mul against the float64 formulas."""

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
    untouched_outside,
    view_of,
    without_recompilation,
)
from hypothesis import strategies as st
from support import normal, poison, poisoned_call, sm_under_test
from torch import Tensor

HIDDEN = (1, 7, 64, 100, 128, 264, 1032, 4096, 4097, 14336, 131072)


OPS = ("silu_and_mul", "gelu_and_mul", "gelu_tanh_and_mul")


def exact_of(op: str, x: Tensor) -> Tensor:
    gate, value = x.double().chunk(2, dim=-1)
    if op == "gelu_and_mul":
        return gate * torch.special.erfc(-(0.5**0.5) * gate) / 2 * value
    if op == "gelu_tanh_and_mul":
        return gate / (1 + torch.exp(-2 * tanh_argument(gate))) * value
    return gate / (1 + torch.exp(-gate)) * value


def tanh_argument(gate: Tensor) -> Tensor:
    return (2 / torch.pi) ** 0.5 * (gate + 0.044715 * gate**3)


def slack_of(op: str, x: Tensor) -> Tensor:
    """What float32 may lose: the exponentials (for 16-bit types the hardware's exp2) of arguments
    that are rounded themselves, a division, a polynomial, a few products; and float32's smallest
    number where the activation leaves its range."""
    gate, value = x.double().chunk(2, dim=-1)
    exact = exact_of(op, x).abs().nan_to_num(0, 0, 0)
    narrow = x.dtype != torch.float32
    finite = gate.abs().nan_to_num(0, 0, 0)
    if op == "gelu_and_mul":
        # Beyond 15 the activation is 0, or the identity.
        roundings = 24 + (3 if narrow else 2) * finite.clamp(max=15).square()
    elif op == "gelu_tanh_and_mul":
        roundings = 20 + 10 * tanh_argument(finite).clamp(max=110)
    else:
        roundings = 16 + 2 * finite if narrow else 12
    return exact * roundings * FLOAT32_UNIT + value.abs().nan_to_num(0, 0, 0) * 2.0**-148


def assert_gated(op: str, actual: Tensor, x: Tensor) -> None:
    assert_rounded(actual, exact_of(op, x), slack_of(op, x))


def assert_silu_and_mul(actual: Tensor, x: Tensor) -> None:
    assert_gated("silu_and_mul", actual, x)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("hidden", HIDDEN)
def test_every_hidden_size(
    device: torch.device, hidden: int, dtype: torch.dtype, op: str, rng: torch.Generator
) -> None:
    for scale in (1.0, 20.0):
        x = normal((3 if hidden > 4096 else 37, 2 * hidden), dtype, device, rng, scale)
        out = poisoned_call(device, getattr(ridgeline, op), x)
        assert out.is_contiguous()
        assert out.dtype == dtype
        assert_gated(op, out, x)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_every_number(device: torch.device, dtype: torch.dtype, op: str) -> None:
    """All 65,536 gates, as one row with values of 1 (and so is every exponent, inf and NaN)."""
    bits = torch.arange(2**16, dtype=torch.int32).to(torch.int16)
    gate = bits.view(dtype).to(device)
    x = torch.cat([gate, torch.ones_like(gate)])
    assert_gated(op, getattr(ridgeline, op)(x), x)


@pytest.mark.parametrize("op", OPS)
def test_float32_range(device: torch.device, op: str) -> None:
    """Gates across the whole range in which the activation is not zero or the identity."""
    gate = torch.linspace(-110, 110, 100_001, device=device)
    x = torch.cat([gate, torch.ones_like(gate)])
    assert_gated(op, getattr(ridgeline, op)(x), x)
    gate = torch.linspace(-15, 15, 100_001, device=device)
    x = torch.cat([gate, torch.ones_like(gate)])
    assert_gated(op, getattr(ridgeline, op)(x), x)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("hidden", [1, 7, 64, 1032, 4104])
def test_fp8_output(
    device: torch.device, hidden: int, dtype: torch.dtype, op: str, rng: torch.Generator
) -> None:
    for scale in (0.03, torch.tensor([2e-3], device=device), torch.tensor(7.0, device=device)):
        x = normal((17, 2 * hidden), dtype, device, rng, scale=3.0)
        x[3, 0] = float("nan")
        x[4, 0] = float("inf")
        out = poisoned_call(device, getattr(ridgeline, op), x, scale=scale)
        divisor = torch.as_tensor(scale, dtype=torch.float32, device=device).double()
        exact = exact_of(op, x) / divisor
        slack = slack_of(op, x) / divisor + exact.abs() * (3 * FLOAT32_UNIT)
        assert out.dtype == torch.float8_e4m3fn
        assert_quantized(out, exact, slack)
        backing = torch.zeros(17, hidden + 5, dtype=torch.uint8, device=device)
        view = backing.view(out.dtype)[:, 5:]
        assert getattr(ridgeline, op)(x, view, scale=scale) is view
        assert torch.equal(view.view(torch.uint8), out.view(torch.uint8))
        assert not backing[:, :5].any()


@pytest.mark.parametrize("kind", VIEWS)
@pytest.mark.parametrize("rows", [(), (5,), (3, 4), (2, 1, 3)], ids=str)
@pytest.mark.parametrize("hidden", [64, 100, 1032])
def test_views(
    device: torch.device, hidden: int, rows: tuple[int, ...], kind: str, rng: torch.Generator
) -> None:
    values = normal((*rows, 2 * hidden), torch.bfloat16, device, rng)
    x = view_of(values, kind)
    assert_silu_and_mul(poisoned_call(device, ridgeline.silu_and_mul, x), values)
    for out_kind in VIEWS:
        out = view_of(values[..., :hidden], out_kind)
        poison(out)
        assert ridgeline.silu_and_mul(x, out) is out
        assert_silu_and_mul(out, values)
        assert out_kind == "contiguous" or untouched_outside(out)


@pytest.mark.parametrize("shape", [(0, 64), (3, 0), (2, 0, 128), (0,)], ids=str)
def test_empty(device: torch.device, shape: tuple[int, ...]) -> None:
    x = torch.ones(shape, dtype=torch.float16, device=device)
    expected = (*shape[:-1], shape[-1] // 2)
    assert ridgeline.silu_and_mul(x).shape == expected
    assert ridgeline.silu_and_mul(x, out=x.new_empty(expected)).shape == expected


def test_rows_do_not_depend_on_the_batch(device: torch.device, rng: torch.Generator) -> None:
    x = normal((37, 2 * 1032), torch.bfloat16, device, rng)
    together = ridgeline.silu_and_mul(x)
    assert torch.equal(together, ridgeline.silu_and_mul(x))
    if device.type == "cuda":
        assert torch.equal(together, torch.stack([ridgeline.silu_and_mul(row) for row in x]))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_transformers_gelu(device: torch.device, dtype: torch.dtype, rng: torch.Generator) -> None:
    """GemmaMLP's activations round before the product, as LlamaMLP's does."""
    activations = pytest.importorskip("transformers.activations")
    x = normal((11, 2 * 512), dtype, device, rng, scale=0.7)
    gate, value = x.chunk(2, dim=-1)
    for op, name in (("gelu_and_mul", "gelu"), ("gelu_tanh_and_mul", "gelu_pytorch_tanh")):
        theirs = activations.ACT2FN[name](gate) * value
        activated = exact_of(op, torch.cat([gate, torch.ones_like(gate)], dim=-1))
        bound = (half_ulp(activated.abs(), dtype) + 2.0**-22) * value.double().abs()
        bound += 2 * slack_of(op, x)
        bound += 2 * half_ulp(exact_of(op, x).abs() + bound, dtype)
        error = (getattr(ridgeline, op)(x).double() - theirs.double()).abs()
        assert bool((error <= bound).all())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_transformers(device: torch.device, dtype: torch.dtype, rng: torch.Generator) -> None:
    """LlamaMLP rounds the activation before the product: two roundings to our one."""
    activations = pytest.importorskip("transformers.activations")
    x = normal((11, 2 * 512), dtype, device, rng)
    gate, value = x.chunk(2, dim=-1)
    theirs = activations.ACT2FN["silu"](gate) * value
    activated = gate.double() / (1 + torch.exp(-gate.double()))
    bound = half_ulp(activated.abs(), dtype) * value.double().abs() + 2 * slack_of(
        "silu_and_mul", x
    )
    bound += 2 * half_ulp(exact_of("silu_and_mul", x).abs() + bound, dtype)
    error = (ridgeline.silu_and_mul(x).double() - theirs.double()).abs()
    assert bool((error <= bound).all())


@hypothesis.given(data=st.data())
@hypothesis.settings(max_examples=60, deadline=None)
def test_any_shape(device: torch.device, data: st.DataObject) -> None:
    dtype = data.draw(st.sampled_from(DTYPES), label="dtype")
    hidden = data.draw(st.integers(1, 700), label="hidden")
    rows = tuple(data.draw(st.lists(st.integers(0, 9), max_size=2), label="rows"))
    kind = data.draw(st.sampled_from(VIEWS), label="view")
    scale = data.draw(st.sampled_from([0.01, 1.0, 30.0]), label="scale")
    rng = torch.Generator().manual_seed(data.draw(st.integers(0, 2**31), label="seed"))
    values = normal((*rows, 2 * hidden), dtype, device, rng, scale)
    x = view_of(values, kind)
    assert_silu_and_mul(poisoned_call(device, ridgeline.silu_and_mul, x), values)


def test_opcheck(device: torch.device, rng: torch.Generator) -> None:
    values = normal((3, 5, 128), torch.float16, device, rng)
    ops = torch.ops.ridgeline
    for x in (values, view_of(values, "strided")):
        torch.library.opcheck(ops.silu_and_mul.default, (x,))
        torch.library.opcheck(ops.silu_and_mul_out.default, (x.new_empty(3, 5, 64), x))


def test_compile(device: torch.device, rng: torch.Generator) -> None:
    def step(x: Tensor) -> Tensor:
        return ridgeline.silu_and_mul(x * 2, out=torch.zeros_like(x[:, :64])) + 1

    calls = [(normal((n, 128), torch.bfloat16, device, rng),) for n in (3, 8, 31)]
    results = without_recompilation(step, calls, dynamic=[0])
    for result, (x,) in zip(results, calls, strict=True):
        assert torch.equal(result, step(x))


def test_pdl(device: torch.device, rng: torch.Generator) -> None:
    x = normal((9, 2048), torch.float16, device, rng)
    if sm_under_test(device) < 90:
        with pytest.raises((ValueError, RuntimeError), match="enable_pdl"):
            ridgeline.silu_and_mul(x, enable_pdl=True)
        return
    expected = ridgeline.silu_and_mul(x, enable_pdl=False)
    for _ in range(3):
        assert torch.equal(ridgeline.silu_and_mul(x, enable_pdl=True), expected)


@pytest.mark.gpu
def test_cuda_graph(rng: torch.Generator) -> None:
    device = torch.device("cuda", 0)
    x = normal((8, 2 * 4096), torch.bfloat16, device, rng)
    out = x.new_empty(8, 4096)
    graph = captured(lambda: ridgeline.silu_and_mul(x, out))
    x.copy_(normal((8, 2 * 4096), torch.bfloat16, device, rng))
    poison(out)
    graph.replay()
    assert_silu_and_mul(out, x)


@pytest.mark.gpu
def test_second_device(second_device: torch.device, rng: torch.Generator) -> None:
    x = normal((8, 2 * 4096), torch.bfloat16, second_device, rng)
    # Why .cpu(): the check's own torch ops must not depend on the current GPU.
    assert_silu_and_mul(ridgeline.silu_and_mul(x).cpu(), x.cpu())
    assert torch.cuda.current_device() == 0


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.large
def test_offsets_above_two_to_the_31(rng: torch.Generator) -> None:
    device = torch.device("cuda", 0)
    values = normal((3, 256), torch.bfloat16, device, rng)
    x = torch.empty_strided((3, 256), (2**30 + 8, 1), dtype=torch.bfloat16, device=device)
    x.copy_(values)
    assert_silu_and_mul(ridgeline.silu_and_mul(x), values)


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.large
@pytest.mark.parametrize("hidden", [1, 3])
def test_more_vectors_than_31_bits(hidden: int) -> None:
    """Single-element accesses over more than 2^31 outputs: several ranges of rows."""
    device = torch.device("cuda", 0)
    rows = min(2**31 - 1, (2**31 + 2**20) // hidden)
    x = torch.zeros(rows, 2 * hidden, dtype=torch.float16, device=device)
    x[:, hidden:] = 1
    x[-3:, :hidden] = 2
    out = ridgeline.silu_and_mul(x)
    assert int(out.count_nonzero()) == 3 * hidden
    assert_silu_and_mul(out[-5:], x[-5:])


FP8 = torch.float8_e4m3fn


def ones(*shape: int, dtype: torch.dtype = torch.float16) -> Any:
    return lambda device: torch.ones(shape, device=device).to(dtype)


WRONG_INPUT = (
    Wrong("dtype", {"input": ones(4, 64, dtype=torch.float64)}, r"'input'.*float16.*float64"),
    Wrong("integers", {"input": ones(4, 64, dtype=torch.int32)}, r"'input'.*float16.*int32"),
    Wrong("scalar", {"input": ones()}, r"'input'.*even last dimension"),
    Wrong("odd", {"input": ones(4, 63)}, r"'input'.*even last dimension.*\[4, 63\]"),
    Wrong("last stride", {"input": lambda d: ones(64, 4)(d).t()}, r"'input'.*stride 4"),
)
WRONG_OUT = (
    Wrong("out's shape", {"out": ones(4, 64)}, r"'out'.*\[4, 32\].*\[4, 64\]"),
    Wrong("out's dtype", {"out": ones(4, 32, dtype=torch.float32)}, r"'out'.*float16.*float32"),
    Wrong("out's last stride", {"out": lambda d: ones(32, 4)(d).t()}, r"'out'.*stride 4"),
    Wrong("expanded out", {"out": lambda d: ones(1, 32)(d).expand(4, 32)}, r"'out'.*distinct"),
)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("layer", [ridgeline, torch.ops.ridgeline], ids=["function", "op"])
@pytest.mark.parametrize("wrong", WRONG_INPUT, ids=lambda wrong: wrong.name)
def test_wrong_input(device: torch.device, wrong: Wrong, layer: Any, op: str) -> None:
    assert_raises(wrong, getattr(layer, op), {"input": ones(4, 64)(device)}, device)


WRONG_FP8 = (
    Wrong("fp8 out's dtype", {"out": ones(4, 32)}, r"'out'.*float8_e4m3fn.*float16"),
    Wrong("fp8 out's shape", {"out": ones(4, 64, dtype=FP8)}, r"'out'.*\[4, 32\].*\[4, 64\]"),
    Wrong("no scale", {"scale": None}, r"'out'.*float16.*float8_e4m3fn"),
    Wrong("zero scale", {"scale": 0.0}, r"'scale'.*> 0"),
    Wrong("two scales", {"scale": ones(2, dtype=torch.float32)}, r"'scale'.*1 element"),
    Wrong("scale's dtype", {"scale": ones(1)}, r"'scale'.*float32.*float16"),
)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("wrong", [*WRONG_INPUT, *WRONG_FP8], ids=lambda wrong: wrong.name)
def test_wrong_fp8(device: torch.device, wrong: Wrong, op: str) -> None:
    good = {"input": ones(4, 64)(device), "out": ones(4, 32, dtype=FP8)(device), "scale": 0.5}
    assert_raises(wrong, getattr(ridgeline, op), good, device)


@pytest.mark.parametrize("layer", ["function", "op"])
@pytest.mark.parametrize("wrong", [*WRONG_INPUT, *WRONG_OUT], ids=lambda wrong: wrong.name)
def test_wrong_out(device: torch.device, wrong: Wrong, layer: str) -> None:
    ops = torch.ops.ridgeline
    call = ridgeline.silu_and_mul if layer == "function" else ops.silu_and_mul_out
    assert_raises(wrong, call, {"input": ones(4, 64)(device), "out": ones(4, 32)(device)}, device)


def test_overlap(device: torch.device) -> None:
    buffer = torch.ones(12, 64, dtype=torch.float16, device=device)
    with pytest.raises((ValueError, RuntimeError), match=r"'out'.*overlaps 'input'"):
        ridgeline.silu_and_mul(buffer[:4], out=buffer[2:4].view(4, 32))


@pytest.mark.gpu
@pytest.mark.parametrize("call", ["function", "op"])
def test_mixed_devices(call: str) -> None:
    device = torch.device("cuda", 0)
    function = (
        ridgeline.silu_and_mul if call == "function" else torch.ops.ridgeline.silu_and_mul_out
    )
    good = {"input": ones(4, 64)(device), "out": ones(4, 32)(device)}
    mixed = (
        Wrong("out", {"out": good["out"].cpu()}, r"'out'.*cuda:0.*cpu"),
        Wrong("input", {"input": good["input"].cpu()}, r"'input'.*CUDA.*cpu"),
    )
    for wrong in mixed:
        assert_raises(wrong, function, good, device)


def test_gradients_are_refused(device: torch.device) -> None:
    x = torch.ones(4, 64, device=device)
    ops = torch.ops.ridgeline
    assert_refuses_grad(ridgeline.silu_and_mul, [x])
    assert_refuses_grad(ops.silu_and_mul, [x])
    assert_refuses_grad(ridgeline.silu_and_mul, [x, x[:, :32].clone()])
    assert_refuses_grad(lambda x, out: ops.silu_and_mul_out(out, x), [x, x[:, :32].clone()])
