"""Random problems over everything at once: shapes, layouts, views, masks, options, dtypes."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, note, settings
from hypothesis import strategies as st
from problem import Problem
from support import sm_under_test

CPU_EXAMPLES = 60
GPU_EXAMPLES = 400


@st.composite
def problems(draw: st.DrawFn) -> Problem:
    """A problem that is legal; lengths lean towards the edges of tiles."""
    decode = draw(st.booleans())
    head_dim = 8 * draw(st.integers(1, 32))
    head_dims = draw(st.sampled_from([(head_dim, head_dim), (192, 128)]))
    edges = st.sampled_from([0, 1, 15, 16, 17, 63, 64, 65, 127, 128, 129, 255, 256, 257])
    kv_len = draw(st.one_of(edges, st.integers(0, 700)))
    window = draw(st.one_of(st.just(-1), st.integers(0, 300)))
    rotated = draw(st.booleans())
    dtype = draw(st.sampled_from([torch.float16, torch.bfloat16]))
    kv_heads = draw(st.integers(1, 3))
    return Problem(
        decode=decode,
        qo_len=1 if decode else draw(st.one_of(edges, st.integers(0, 200))),
        kv_len=kv_len,
        heads=(kv_heads * draw(st.integers(1, 16 // kv_heads)), kv_heads),
        head_dims=head_dims,
        dtype=dtype,
        kv_layout=draw(st.sampled_from(["NHD", "HND"])),
        causal=not decode and draw(st.booleans()),
        window_left=window,
        logits_soft_cap=draw(st.sampled_from([None, 0.0, 5.0, 50.0])),
        sm_scale=draw(st.sampled_from([None, 0.05, 1.0, -0.2])),
        rope=draw(st.sampled_from([(1.0, 1e4), (4.0, 5e5)])) if rotated else None,
        fp16_qk=not decode and dtype == torch.float16 and draw(st.booleans()),
        strided=draw(st.booleans()),
        scale=draw(st.sampled_from([0.1, 1.0, 3.0])),
    )


def check(device: torch.device, problem: Problem, seed: int) -> None:
    note(f"problem: {problem}")
    if problem.dtype == torch.bfloat16 and 0 < sm_under_test(device) < 80:
        problem = problem.with_(dtype=torch.float16)
    problem.check(device, torch.Generator().manual_seed(seed))


LIMITS = {"deadline": None, "suppress_health_check": list(HealthCheck), "print_blob": True}


@settings(max_examples=CPU_EXAMPLES, **LIMITS)  # type: ignore[arg-type]
@given(problem=problems(), seed=st.integers(0, 2**32 - 1))
def test_any_problem(problem: Problem, seed: int, device: torch.device) -> None:
    check(device, problem, seed)


@pytest.mark.gpu
@pytest.mark.slow
@settings(max_examples=GPU_EXAMPLES, **LIMITS)  # type: ignore[arg-type]
@given(problem=problems(), seed=st.integers(0, 2**32 - 1))
def test_many_more_problems(problem: Problem, seed: int) -> None:
    check(torch.device("cuda", 0), problem, seed)
