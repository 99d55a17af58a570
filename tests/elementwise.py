"""What the tests of norm, activation and RoPE share: error bounds in ulps, views, error tables."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
FLOAT32_UNIT = 2.0**-24  # half an ulp of 1
ERRORS = (TypeError, ValueError, RuntimeError)


def half_ulp(magnitude: Tensor, dtype: torch.dtype) -> Tensor:
    """Half the distance between neighbouring numbers of `dtype` around float64 magnitudes."""
    info = torch.finfo(dtype)
    exponent = torch.frexp(magnitude.clamp(min=info.smallest_normal))[1] - 1
    return torch.ldexp(torch.full_like(magnitude, info.eps / 2), exponent)


def assert_rounded(actual: Tensor, exact: Tensor, slack: Tensor | float = 0.0) -> None:
    """`actual` is the float64 `exact`, off by at most `slack`, rounded once to actual's dtype."""
    assert actual.shape == exact.shape
    assert exact.dtype == torch.float64
    expected = exact.to(actual.dtype)
    assert torch.equal(actual.isnan(), expected.isnan()), "NaN in different places"
    assert torch.equal(actual.isinf(), expected.isinf()), "inf in different places"
    finite = expected.isfinite()
    slack = torch.as_tensor(slack, dtype=torch.float64, device=exact.device).expand_as(exact)
    error = (actual.double() - exact).abs()
    bound = half_ulp(exact.abs() + slack, actual.dtype) + slack
    bad = finite & ~(error <= bound)
    if bad.any():
        at = tuple(bad.nonzero()[0].tolist())
        pytest.fail(
            f"{int(bad.sum())} of {bad.numel()} elements are off; the first at {at}: got "
            f"{actual[at].item()!r}, exact {exact[at].item()!r}, error {error[at].item():.3g}, "
            f"bound {bound[at].item():.3g}"
        )
    inf = expected.isinf()
    assert torch.equal(actual[inf], expected[inf]), "inf of different signs"


def largest_number(dtype: torch.dtype) -> float:
    """Of an 8-bit type: numbers beyond it saturate."""
    return 127.0 if dtype == torch.int8 else torch.finfo(dtype).max


def assert_quantized(actual: Tensor, exact: Tensor, slack: Tensor) -> None:
    """`actual` is the float64 `exact`, off by at most `slack`, rounded and saturated to 8 bits."""
    assert actual.shape == exact.shape
    is_int = actual.dtype == torch.int8
    numbers = actual.double()
    nan = exact.isnan()
    if is_int:
        assert not numbers[nan].any(), "NaN that is not 0"
    else:
        assert torch.equal(numbers.isnan(), nan), "NaN in different places"
        assert not numbers.isinf().any(), "infinity instead of the largest number"
    most = largest_number(actual.dtype)
    wanted = exact.nan_to_num(0, 2 * most, -2 * most).clamp(-128 if is_int else -most, most)
    slack = slack.expand_as(exact).nan_to_num(0, 0, 0)
    bound = slack + (
        torch.full_like(wanted, 0.5) if is_int else half_ulp(wanted.abs(), actual.dtype)
    )
    bad = ~nan & ~((numbers - wanted).abs() <= bound)
    if bad.any():
        at = tuple(bad.nonzero()[0].tolist())
        pytest.fail(
            f"{int(bad.sum())} of {bad.numel()} numbers are off; the first at {at}: got "
            f"{numbers[at].item()!r}, exact {exact[at].item()!r}, bound {bound[at].item():.3g}"
        )


def view_of(values: Tensor, kind: str) -> Tensor:
    """`values` in another place: a view of a poisoned buffer, strided or not aligned."""
    if kind == "contiguous":
        return values.clone()
    margins = {
        "strided": (1, 16),  # aligned to 16 bytes in every dtype
        "unaligned": (0, 1),
        "odd stride": (1, 3),
    }[kind]
    backing_shape = [n + 2 * margins[0] for n in values.shape[:-1]]
    backing_shape.append(values.shape[-1] + 2 * margins[1])
    backing = torch.full(backing_shape, float("nan"), dtype=values.dtype, device=values.device)
    index = [slice(margins[0], margins[0] + n) for n in values.shape[:-1]]
    index.append(slice(margins[1], margins[1] + values.shape[-1]))
    view = backing[tuple(index)]
    view.copy_(values)
    return view


VIEWS = ("contiguous", "strided", "unaligned", "odd stride")


def untouched_outside(view: Tensor) -> bool:
    """Whether the buffer of a `view_of` still is poisoned around the view."""
    backing = view._base
    assert backing is not None
    assert torch.isfinite(view).all()
    return int(backing.isnan().sum()) == backing.numel() - view.numel()


@dataclass(frozen=True)
class Wrong:
    """A call that must raise: positional arguments as keywords, and what the message says."""

    name: str
    changes: dict[str, Any]
    message: str


def assert_raises(
    wrong: Wrong, call: Callable[..., Any], good: dict[str, Any], device: torch.device
) -> None:
    """The changed call raises the message; after it, the good call still works."""
    arguments = {**good}
    for key, value in wrong.changes.items():
        arguments[key] = value(device) if callable(value) else value
    with pytest.raises(ERRORS, match=wrong.message) as caught:
        call(**arguments)
    if device.type == "cpu":
        assert not isinstance(caught.value, (IndexError, KeyError))
    assert "argument '" in str(caught.value)
    call(**good)
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def assert_refuses_grad(call: Callable[..., Any], tensors: list[Tensor]) -> None:
    """Raises when any one floating-point tensor requires grad; fine under no_grad."""
    for i in range(len(tensors)):
        if not tensors[i].is_floating_point():
            continue
        arguments = [t.clone().requires_grad_(j == i) for j, t in enumerate(tensors)]
        with pytest.raises(RuntimeError, match=r"requires grad.*inference_mode"):
            call(*arguments)
        with torch.no_grad():
            call(*arguments)


def captured(function: Callable[[], Any]) -> torch.cuda.CUDAGraph:
    """A CUDA graph of one call, captured after a warm-up on a side stream."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        function()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        function()
    return graph


def without_recompilation(
    function: Callable[..., Any], calls: list[tuple[Any, ...]], dynamic: list[int]
) -> list[Any]:
    """Results of the compiled function; dimension 0 of the arguments in `dynamic` varies."""
    torch._dynamo.reset()
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    for call, index in itertools.product(calls, dynamic):
        torch._dynamo.mark_dynamic(call[index], 0)
    results = [compiled(*calls[0])]
    with torch._dynamo.config.patch(error_on_recompile=True):
        results += [compiled(*call) for call in calls[1:]]
    return results
