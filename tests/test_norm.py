"""rmsnorm and fused_add_rmsnorm against float64 formulas and Transformers' LlamaRMSNorm."""

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

HIDDEN = (1, 7, 64, 100, 128, 256, 264, 1024, 1032, 4096, 4097, 5120, 14336, 20000, 131072)
EPS = 1e-5


def exact_rmsnorm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    x = x.double()
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight.double()


def slack(exact: Tensor) -> Tensor:
    """What float32 may lose: the sum of squares, in chains of at most 32 + hidden / 512 additions
    (and half of that after the root), the inverse root, the division and two products."""
    chain = 32 + exact.shape[-1] / 512
    return exact.abs().nan_to_num(0, 0, 0) * (FLOAT32_UNIT * (chain / 2 + 12))


def assert_rmsnorm(actual: Tensor, x: Tensor, weight: Tensor, eps: float = EPS) -> None:
    exact = exact_rmsnorm(x, weight, eps)
    assert_rounded(actual, exact, slack(exact))


def draw(
    rows: tuple[int, ...],
    hidden: int,
    dtype: torch.dtype,
    device: torch.device,
    rng: torch.Generator,
    weight_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """input, residual, weight."""
    return (
        normal((*rows, hidden), dtype, device, rng),
        normal((*rows, hidden), dtype, device, rng, scale=3.0),
        normal((hidden,), weight_dtype or dtype, device, rng),
    )


@pytest.mark.parametrize("weight_dtype", [None, torch.float32], ids=["weight", "weight_f32"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("hidden", HIDDEN)
def test_rmsnorm(
    device: torch.device,
    hidden: int,
    dtype: torch.dtype,
    weight_dtype: torch.dtype | None,
    rng: torch.Generator,
) -> None:
    x, _, weight = draw((3 if hidden > 8192 else 67,), hidden, dtype, device, rng, weight_dtype)
    out = poisoned_call(device, ridgeline.rmsnorm, x, weight, EPS)
    assert out.is_contiguous()
    assert out.dtype == dtype
    assert_rmsnorm(out, x, weight)


@pytest.mark.parametrize("weight_dtype", [None, torch.float32], ids=["weight", "weight_f32"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("hidden", HIDDEN)
def test_fused_add_rmsnorm(
    device: torch.device,
    hidden: int,
    dtype: torch.dtype,
    weight_dtype: torch.dtype | None,
    rng: torch.Generator,
) -> None:
    rows = 3 if hidden > 8192 else 67
    x, residual, weight = draw((rows,), hidden, dtype, device, rng, weight_dtype)
    total = x.double() + residual.double()
    as_torch_adds = x + residual
    assert ridgeline.fused_add_rmsnorm(x, residual, weight, EPS) is None
    assert torch.equal(residual, as_torch_adds)
    assert_rounded(residual, total, total.abs() * FLOAT32_UNIT)
    assert_rmsnorm(x, residual, weight)


@pytest.mark.parametrize("kind", VIEWS)
@pytest.mark.parametrize("rows", [(), (5,), (3, 4), (2, 1, 3)], ids=str)
@pytest.mark.parametrize("hidden", [64, 120, 4096])
def test_views(
    device: torch.device, hidden: int, rows: tuple[int, ...], kind: str, rng: torch.Generator
) -> None:
    values, residual_values, weight_values = draw(rows, hidden, torch.bfloat16, device, rng)
    x, residual = view_of(values, kind), view_of(residual_values, kind)
    weight = view_of(weight_values, "unaligned" if kind == "unaligned" else "contiguous")
    assert_rmsnorm(poisoned_call(device, ridgeline.rmsnorm, x, weight, EPS), values, weight)

    for out_kind in VIEWS:
        out = view_of(values, out_kind)
        poison(out)
        assert ridgeline.rmsnorm(x, weight, EPS, out) is out
        assert_rmsnorm(out, values, weight)
        assert out_kind == "contiguous" or untouched_outside(out)

    ridgeline.fused_add_rmsnorm(x, residual, weight, EPS)
    assert torch.equal(residual, values + residual_values)
    assert_rmsnorm(x, residual, weight)
    assert kind == "contiguous" or (untouched_outside(x) and untouched_outside(residual))


def test_fused_projection_views(device: torch.device, rng: torch.Generator) -> None:
    """Per-head norm of q inside a fused QKV buffer: 3-D, in place through `out`."""
    tokens, heads, head_dim = 9, 6, 128
    qkv = normal((tokens, heads + 4, head_dim), torch.float16, device, rng)
    before = qkv.clone()
    weight = normal((head_dim,), torch.float16, device, rng)
    q = qkv[:, :heads]
    ridgeline.rmsnorm(q, weight, EPS, out=q)
    assert_rmsnorm(q, before[:, :heads], weight)
    assert torch.equal(qkv[:, heads:], before[:, heads:])


@pytest.mark.parametrize("hidden", [7, 128, 1024, 4096, 20000])
def test_rows_do_not_depend_on_the_batch(
    device: torch.device, hidden: int, rng: torch.Generator
) -> None:
    x, _, weight = draw((37,), hidden, torch.bfloat16, device, rng)
    together = ridgeline.rmsnorm(x, weight)
    assert torch.equal(together, ridgeline.rmsnorm(x, weight))
    alone = torch.stack([ridgeline.rmsnorm(row, weight) for row in x])
    if device.type == "cuda":
        assert torch.equal(together, alone)
    else:
        assert_rmsnorm(alone, x, weight, 1e-6)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_special_values(device: torch.device, dtype: torch.dtype) -> None:
    hidden = 264
    x = torch.ones(6, hidden, dtype=dtype, device=device)
    x[0, 5] = float("nan")
    x[1, 7] = float("inf")
    x[2] = 0
    x[3] = 65504 if dtype == torch.float16 else 1e18
    x[4] = -x[3]
    weight = torch.ones(hidden, dtype=dtype, device=device)
    assert_rmsnorm(ridgeline.rmsnorm(x, weight, EPS), x, weight)
    assert_rmsnorm(ridgeline.rmsnorm(x, weight, 0.0), x, weight, 0.0)
    weight[3] = float("-inf")
    assert_rmsnorm(ridgeline.rmsnorm(x, weight, EPS), x, weight)


@pytest.mark.parametrize("shape", [(0, 64), (3, 0), (2, 0, 128), (0,)], ids=str)
def test_empty(device: torch.device, shape: tuple[int, ...]) -> None:
    x = torch.ones(shape, dtype=torch.float16, device=device)
    weight = torch.ones(shape[-1], dtype=torch.float16, device=device)
    assert ridgeline.rmsnorm(x, weight).shape == shape
    assert ridgeline.rmsnorm(x, weight, out=torch.empty_like(x)).shape == shape
    ridgeline.fused_add_rmsnorm(x, x.clone(), weight)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_transformers(device: torch.device, dtype: torch.dtype, rng: torch.Generator) -> None:
    llama = pytest.importorskip("transformers.models.llama.modeling_llama")
    x, _, weight = draw((11,), 4096, dtype, device, rng)
    module = llama.LlamaRMSNorm(4096, eps=EPS).to(device=device, dtype=dtype)
    with torch.no_grad():
        module.weight.copy_(weight)
        theirs = module(x)
    ours = ridgeline.rmsnorm(x, weight, EPS)
    # Theirs rounds the normalised input and the product, ours the product alone: three roundings.
    normalised = exact_rmsnorm(x, torch.ones_like(weight), EPS)
    exact = normalised * weight.double()
    bound = half_ulp(normalised.abs(), dtype) * weight.double().abs() + 2 * slack(exact)
    bound += 2 * half_ulp(exact.abs() + bound, dtype)
    assert bool(((ours.double() - theirs.double()).abs() <= bound).all())


@hypothesis.given(data=st.data())
@hypothesis.settings(max_examples=60, deadline=None)
def test_any_shape(device: torch.device, data: st.DataObject) -> None:
    dtype = data.draw(st.sampled_from(DTYPES), label="dtype")
    hidden = data.draw(st.integers(1, 700), label="hidden")
    rows = tuple(data.draw(st.lists(st.integers(0, 9), max_size=2), label="rows"))
    kind = data.draw(st.sampled_from(VIEWS), label="view")
    rng = torch.Generator().manual_seed(data.draw(st.integers(0, 2**31), label="seed"))
    values, residual_values, weight = draw(rows, hidden, dtype, device, rng)
    x, residual = view_of(values, kind), view_of(residual_values, kind)
    assert_rmsnorm(poisoned_call(device, ridgeline.rmsnorm, x, weight, EPS), values, weight)
    ridgeline.fused_add_rmsnorm(x, residual, weight, EPS)
    assert torch.equal(residual, values + residual_values)
    assert_rmsnorm(x, residual, weight)


@pytest.mark.parametrize("kind", ["contiguous", "strided"])
def test_opcheck(device: torch.device, kind: str, rng: torch.Generator) -> None:
    values, residual, weight = draw((3, 5), 64, torch.float16, device, rng)
    x = view_of(values, kind)
    ops = torch.ops.ridgeline
    torch.library.opcheck(ops.rmsnorm.default, (x, weight, EPS))
    torch.library.opcheck(ops.rmsnorm_out.default, (torch.empty_like(x), x, weight, EPS))
    torch.library.opcheck(ops.fused_add_rmsnorm.default, (x, residual, weight, EPS))


def test_compile(device: torch.device, rng: torch.Generator) -> None:
    def step(x: Tensor, residual: Tensor, weight: Tensor) -> Tensor:
        y = ridgeline.rmsnorm(x * 2, weight, EPS)
        ridgeline.fused_add_rmsnorm(y, residual, weight, EPS)
        return y + 1

    calls = [draw((n,), 128, torch.bfloat16, device, rng) for n in (3, 8, 31)]
    expected = []
    for x, residual, weight in calls:
        other = residual.clone()
        expected.append((step(x, other, weight), other))
    results = without_recompilation(step, calls, dynamic=[0, 1])
    for result, (y, other), (_, residual, _) in zip(results, expected, calls, strict=True):
        assert torch.equal(result, y)
        assert torch.equal(residual, other)


def test_inductor(device: torch.device, rng: torch.Generator) -> None:
    x, residual, weight = draw((5,), 128, torch.float32, device, rng)
    other = residual.clone()

    def step(x: Tensor, residual: Tensor) -> Tensor:
        y = ridgeline.rmsnorm(x, weight, EPS).relu()
        ridgeline.fused_add_rmsnorm(y, residual, weight, EPS)
        return y

    torch._dynamo.reset()
    result = torch.compile(step, fullgraph=True)(x, residual)
    torch.testing.assert_close(result, step(x, other))
    torch.testing.assert_close(residual, other)


def test_export(device: torch.device, rng: torch.Generator) -> None:
    class Block(torch.nn.Module):
        def __init__(self, weight: Tensor) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(weight, requires_grad=False)

        def forward(self, x: Tensor) -> Tensor:
            return ridgeline.rmsnorm(x, self.weight, EPS)

    x, _, weight = draw((5,), 128, torch.float16, device, rng)
    lengths = {"x": {0: torch.export.Dim("tokens")}}
    program = torch.export.export(Block(weight), (x,), dynamic_shapes=lengths)
    longer = x.repeat(3, 1)
    assert torch.equal(program.module()(longer), ridgeline.rmsnorm(longer, weight, EPS))


@pytest.mark.parametrize("op", ["rmsnorm", "fused_add_rmsnorm"])
def test_pdl(device: torch.device, op: str, rng: torch.Generator) -> None:
    x, residual, weight = draw((9,), 1024, torch.float16, device, rng)
    arguments = [x, weight] if op == "rmsnorm" else [x, residual, weight]
    if sm_under_test(device) < 90:
        with pytest.raises((ValueError, RuntimeError), match="enable_pdl"):
            getattr(ridgeline, op)(*arguments, enable_pdl=True)
        return
    expected = [t.clone() for t in arguments]
    plain = getattr(ridgeline, op)(*expected, enable_pdl=False)
    result = None
    for _ in range(3):
        attempt = [t.clone() for t in arguments]
        result = getattr(ridgeline, op)(*attempt, enable_pdl=True)
        assert all(torch.equal(a, b) for a, b in zip(attempt, expected, strict=True))
    if plain is not None:
        assert torch.equal(plain, result)


@pytest.mark.gpu
@pytest.mark.parametrize("hidden", [128, 4096])
def test_cuda_graph(hidden: int, rng: torch.Generator) -> None:
    device = torch.device("cuda", 0)
    x, residual, weight = draw((8,), hidden, torch.bfloat16, device, rng)
    out, static_x, static_residual = torch.empty_like(x), x.clone(), residual.clone()

    def step() -> None:
        ridgeline.rmsnorm(static_x, weight, EPS, out=out)
        ridgeline.fused_add_rmsnorm(static_x, static_residual, weight, EPS)

    graph = captured(step)
    new_x, new_residual, _ = draw((8,), hidden, torch.bfloat16, device, rng)
    static_x.copy_(new_x)
    static_residual.copy_(new_residual)
    poison(out)
    graph.replay()
    assert_rmsnorm(out, new_x, weight)
    assert torch.equal(static_residual, new_x + new_residual)
    assert_rmsnorm(static_x, static_residual, weight)


@pytest.mark.gpu
def test_second_device(second_device: torch.device, rng: torch.Generator) -> None:
    x, residual, weight = draw((8,), 4096, torch.bfloat16, second_device, rng)
    # Why .cpu(): the check's own torch ops must not depend on the current GPU.
    assert_rmsnorm(ridgeline.rmsnorm(x, weight, EPS).cpu(), x.cpu(), weight.cpu())
    ridgeline.fused_add_rmsnorm(x, residual, weight, EPS)
    assert_rmsnorm(x.cpu(), residual.cpu(), weight.cpu())
    assert torch.cuda.current_device() == 0


@pytest.mark.gpu
def test_side_stream(rng: torch.Generator) -> None:
    device = torch.device("cuda", 0)
    x, _, weight = draw((4096,), 4096, torch.bfloat16, device, rng)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(20_000_000)
        y = x * 3
        out = ridgeline.rmsnorm(y, weight, EPS)
    torch.cuda.synchronize()
    assert_rmsnorm(out, y, weight)


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.large
def test_offsets_above_two_to_the_31(rng: torch.Generator) -> None:
    device = torch.device("cuda", 0)
    values, _, weight = draw((3,), 4096, torch.bfloat16, device, rng)
    x = torch.empty_strided((3, 4096), (2**30 + 8, 1), dtype=torch.bfloat16, device=device)
    x.copy_(values)
    assert_rmsnorm(ridgeline.rmsnorm(x, weight, EPS), values, weight)
    ridgeline.rmsnorm(x, weight, EPS, out=x)
    assert_rmsnorm(x, values, weight)


def good_rmsnorm(device: torch.device) -> dict[str, Any]:
    x = torch.ones(4, 64, dtype=torch.float16, device=device)
    return {"input": x, "weight": x[0].clone(), "eps": EPS}


def ones(*shape: int, dtype: torch.dtype = torch.float16) -> Any:
    return lambda device: torch.ones(shape, dtype=dtype, device=device)


WRONG_INPUT = (
    Wrong("dtype", {"input": ones(4, 64, dtype=torch.float64)}, r"'input'.*float16.*float64"),
    Wrong("integers", {"input": ones(4, 64, dtype=torch.int32)}, r"'input'.*float16.*int32"),
    Wrong("scalar", {"input": ones()}, r"'input'.*at least 1 dimension"),
    Wrong("last stride", {"input": lambda d: ones(64, 4)(d).t()}, r"'input'.*stride 4.*contiguous"),
    Wrong("mixed dtypes", {"weight": ones(64, dtype=torch.bfloat16)}, r"'weight'.*bfloat16"),
    Wrong("weight's shape", {"weight": ones(63)}, r"'weight'.*\[64\].*\[63\]"),
    Wrong("weight's rank", {"weight": ones(1, 64)}, r"'weight'.*1 dimension"),
    Wrong("weight's stride", {"weight": lambda d: ones(128)(d)[::2]}, r"'weight'.*stride 2"),
    Wrong("negative eps", {"eps": -1e-6}, r"'eps'.*>= 0"),
    Wrong("nan eps", {"eps": float("nan")}, r"'eps'.*finite"),
)
WRONG_OUT = (
    Wrong("out's shape", {"out": ones(4, 32)}, r"'out'.*\[4, 64\].*\[4, 32\]"),
    Wrong("out's dtype", {"out": ones(4, 64, dtype=torch.float32)}, r"'out'.*float16.*float32"),
    Wrong("out's last stride", {"out": lambda d: ones(64, 4)(d).t()}, r"'out'.*stride 4"),
    Wrong("expanded out", {"out": lambda d: ones(1, 64)(d).expand(4, 64)}, r"'out'.*distinct"),
)
WRONG_RESIDUAL = (
    Wrong("residual's shape", {"residual": ones(3, 64)}, r"'residual'.*\[4, 64\].*\[3, 64\]"),
    Wrong("residual's dtype", {"residual": ones(4, 64, dtype=torch.float32)}, r"'residual'.*float"),
    Wrong(
        "expanded", {"residual": lambda d: ones(1, 64)(d).expand(4, 64)}, r"'residual'.*distinct"
    ),
)


def by_name(wrong: Wrong) -> str:
    return wrong.name


@pytest.mark.parametrize("layer", [ridgeline, torch.ops.ridgeline], ids=["function", "op"])
@pytest.mark.parametrize("wrong", WRONG_INPUT, ids=by_name)
def test_wrong_rmsnorm(device: torch.device, wrong: Wrong, layer: Any) -> None:
    assert_raises(wrong, layer.rmsnorm, good_rmsnorm(device), device)


@pytest.mark.parametrize("layer", ["function", "op"])
@pytest.mark.parametrize("wrong", [*WRONG_INPUT, *WRONG_OUT], ids=by_name)
def test_wrong_out(device: torch.device, wrong: Wrong, layer: str) -> None:
    call = ridgeline.rmsnorm if layer == "function" else torch.ops.ridgeline.rmsnorm_out
    good = good_rmsnorm(device)
    assert_raises(wrong, call, {**good, "out": torch.empty_like(good["input"])}, device)


@pytest.mark.parametrize("layer", [ridgeline, torch.ops.ridgeline], ids=["function", "op"])
@pytest.mark.parametrize("wrong", [*WRONG_INPUT, *WRONG_RESIDUAL], ids=by_name)
def test_wrong_fused_add(device: torch.device, wrong: Wrong, layer: Any) -> None:
    good = good_rmsnorm(device)
    good["residual"] = good["input"].clone()
    assert_raises(wrong, layer.fused_add_rmsnorm, good, device)


@pytest.mark.parametrize("layer", [ridgeline, torch.ops.ridgeline], ids=["function", "op"])
def test_overlap(device: torch.device, layer: Any) -> None:
    buffer = torch.ones(5, 64, dtype=torch.float16, device=device)
    weight = torch.ones(64, dtype=torch.float16, device=device)
    for residual in (buffer[:4], buffer[1:]):
        with pytest.raises((ValueError, RuntimeError), match=r"'residual'.*overlaps 'input'"):
            layer.fused_add_rmsnorm(buffer[:4], residual, weight, EPS)
    with pytest.raises((ValueError, RuntimeError), match=r"'out'.*overlaps 'input'"):
        ridgeline.rmsnorm(buffer[:4], weight, EPS, out=buffer[1:])


@pytest.mark.gpu
@pytest.mark.parametrize("layer", [ridgeline, torch.ops.ridgeline], ids=["function", "op"])
def test_mixed_devices(layer: Any) -> None:
    device = torch.device("cuda", 0)
    good = good_rmsnorm(device)
    on_cpu = {name: value.cpu() for name, value in good.items() if isinstance(value, Tensor)}
    mixed = (
        Wrong("weight", {"weight": on_cpu["weight"]}, r"'weight'.*cuda:0.*cpu"),
        Wrong("input", {"input": on_cpu["input"]}, r"'input'.*CUDA.*cpu"),
    )
    for wrong in mixed:
        assert_raises(wrong, layer.rmsnorm, good, device)


def test_gradients_are_refused(device: torch.device) -> None:
    x = torch.ones(4, 64, device=device)
    weight = torch.ones(64, device=device)
    ops = torch.ops.ridgeline
    assert_refuses_grad(ridgeline.rmsnorm, [x, weight])
    assert_refuses_grad(lambda x, w: ops.rmsnorm(x, w, EPS), [x, weight])
    assert_refuses_grad(lambda x, w, out: ridgeline.rmsnorm(x, w, out=out), [x, weight, x])
    assert_refuses_grad(ridgeline.fused_add_rmsnorm, [x, x, weight])
    assert_refuses_grad(lambda x, r, w: ops.fused_add_rmsnorm(x, r, w, EPS), [x, x, weight])
