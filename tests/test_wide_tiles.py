"""Decodes of half as many to as many requests and KV heads as SMs: sm_90 on, heads of 128."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from batch_problem import Batch, check, check_graph, compile_kernels
from support import sm_under_test

pytestmark = pytest.mark.gpu

GPU = torch.device("cuda", 0)


@pytest.fixture(scope="module", autouse=True)
def compiled_kernels() -> None:
    compile_kernels(rotating=True)


def size_for(num_kv_heads: int, share: float) -> int:
    """Requests whose KV heads are such a share of the SMs."""
    sms = torch.cuda.get_device_properties(GPU).multi_processor_count
    return max(1, round(share * sms) // num_kv_heads)


def lengths_for(name: str, num_kv_heads: int, share: float = 0.9) -> tuple[tuple[int, int], ...]:
    size = size_for(num_kv_heads, share)
    draw = random.Random(size)
    lengths: dict[str, Callable[[int], int]] = {
        "short": lambda _: draw.randint(0, 200),
        "equal": lambda _: 129,
        "any": lambda _: draw.randint(1, 1200),
        "skewed": lambda i: 6_000 if i == 3 else draw.randint(1, 300),
    }
    return tuple((1, lengths[name](i)) for i in range(size))


BASE: dict[str, Any] = {"heads": (32, 8), "head_dims": (128, 128), "max_q_len": 1}
CASES = [
    {},
    {"page_size": 1, "kv_layout": "HND"},
    {"page_size": 5, "stacked": True},
    {"form": "paged-lens", "spare": 3},
    {"form": "padded", "decode": True, "strided": True},
    {"form": "ragged", "decode": True},
    {"heads": (8, 1), "decode": True},
    {"heads": (48, 3), "page_size": 3},
    {"heads": (33, 33), "form": "padded"},
    {"head_dims": (120, 72), "page_size": 7},
    {"head_dims": (72, 128), "form": "ragged"},
    {"window_left": 100, "causal": True},
    {"logits_soft_cap": 4.0},
    {"rope": (8.0, 5e5)},
    {"padding": 37},
    {"heads": (64, 8), "share": 0.5},
]


@pytest.fixture
def has_wide_tiles() -> None:
    if sm_under_test(GPU) < 90:
        pytest.skip("before sm_90 there are none: --arch 90a has them")


@pytest.mark.usefixtures("has_wide_tiles")
@pytest.mark.parametrize("name", ["short", "equal", "any", "skewed"])
@pytest.mark.parametrize(
    "case", CASES, ids=lambda case: "-".join(map(str, case.values())) or "plain"
)
def test_values(case: dict[str, Any], name: str, rng: torch.Generator) -> None:
    options = BASE | case
    is_half = "rope" in case or name in ("short", "skewed")
    dtype = torch.float16 if is_half else torch.bfloat16
    lengths = lengths_for(name, options["heads"][1], options.pop("share", 0.9))
    check(Batch(lengths=lengths, dtype=dtype, **options), GPU, rng)


def kernels_of(batch: Batch, rng: torch.Generator) -> list[str]:
    inputs = batch.inputs(GPU, rng)
    inputs.call()
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        inputs.call()
        torch.cuda.synchronize()
    return [event.name for event in profile.events() if "batch_attention" in event.name]


@pytest.mark.parametrize(
    ("size", "wide", "changes"),
    [
        (0.6, False, {}),
        (0.7, True, {}),
        (0.43, False, {"heads": (32, 8)}),
        (0.5, True, {"heads": (32, 8)}),
        (0.5, False, {"heads": (32, 32)}),
        (1.0, True, {}),
        (1.1, False, {}),
        (0.9, False, {"invariant": True}),
        (0.9, False, {"head_dims": (64, 64)}),
        (0.9, False, {"head_dims": (136, 128)}),
        (0.9, False, {"max_q_len": 5, "causal": True}),
    ],
    ids=[
        "few",
        "two thirds",
        "fewer",
        "half",
        "two requests",
        "all",
        "more",
        "invariant",
        "64",
        "136",
        "20 rows",
    ],
)
def test_which_batches(
    size: float, wide: bool, changes: dict[str, Any], rng: torch.Generator
) -> None:
    options = BASE | {"heads": (16, 4)} | changes
    lengths = ((1, 200),) * size_for(options["heads"][1], size)
    (kernel,) = kernels_of(Batch(lengths=lengths, **options), rng)
    assert ("WideHeight" in kernel) == (wide and sm_under_test(GPU) >= 90)


@pytest.mark.usefixtures("has_wide_tiles")
@pytest.mark.parametrize("name", ["short", "skewed"])
def test_a_graph_gives_the_same_bits(name: str, rng: torch.Generator) -> None:
    check_graph(Batch(lengths=lengths_for(name, 8), dtype=torch.float16, **BASE).inputs(GPU, rng))
