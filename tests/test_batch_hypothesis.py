"""Random batches over everything at once: lengths, forms of cache, strides, masks, head dims.

The run's seed decides what is drawn, so the line that reruns a failure alone draws the same. On an
architecture older than the GPU the driver assembles each kernel, in seconds, so a run draws head
dims and a dtype of one kernel.
"""

from __future__ import annotations

import os
import random

import pytest
import torch
from batch_problem import FORMS, Batch, check, compile_kernels
from hypothesis import HealthCheck, given, note, seed, settings
from hypothesis import strategies as st
from support import sm_under_test

CPU_EXAMPLES = 10
GPU_EXAMPLES = 20
PAGE_SIZES = (1, 3, 5, 16, 17, 64, 256)
HEAD_DIMS = ((8, 64), (72, 128), (192, 192), (136, 256))  # of each kernel; 192 stands for 192, 128
DTYPES = (torch.float16, torch.bfloat16)
RUN_SEED = int(os.environ["RIDGELINE_TEST_SEED"])
LIMITS = {"deadline": None, "suppress_health_check": list(HealthCheck), "print_blob": True}


@pytest.fixture(scope="module", autouse=True)
def compiled_kernels() -> None:
    compile_kernels()


def kernels_of_run() -> tuple[list[tuple[int, int]], list[torch.dtype]]:
    """Head dims and dtypes that this run draws."""
    arch = os.environ.get("RIDGELINE_ARCH", "")
    if not arch or arch.startswith("9"):
        return list(HEAD_DIMS), list(DTYPES)
    choose = random.Random(f"{RUN_SEED} {arch}")
    return [choose.choice(HEAD_DIMS)], [choose.choice(DTYPES)]


@st.composite
def batches(draw: st.DrawFn) -> Batch:
    """A legal batch; lengths lean towards the edges of tiles."""
    dims, dtypes = kernels_of_run()
    least, most = draw(st.sampled_from(dims))
    head_dim = draw(
        st.one_of(st.just(most), st.integers(least // 8, most // 8).map(lambda n: 8 * n))
    )
    decodes = draw(st.booleans())
    edges = st.sampled_from(
        [0, 1, 15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 128, 129, 255, 256, 257]
    )
    qo_len = st.just(1) if decodes else st.one_of(edges, st.integers(0, 40))
    kv_len = st.one_of(edges, st.integers(0, 400), st.just(1500))
    lengths = tuple(draw(st.lists(st.tuples(qo_len, kv_len), max_size=5)))
    kv_heads = draw(st.integers(1, 2))
    group = draw(st.one_of(st.sampled_from([1, 2, 4, 7, 8]), st.integers(1, 16 // kv_heads)))
    form = draw(st.sampled_from(FORMS))
    longest = max([1, *(qo for qo, _ in lengths)])
    paged = form.startswith("paged")
    same_dims = least != most
    stacked = paged and same_dims and draw(st.booleans())
    return Batch(
        lengths=lengths,
        heads=(kv_heads * group, kv_heads),
        head_dims=(head_dim, head_dim) if same_dims else (192, 128),
        dtype=draw(st.sampled_from(dtypes)),
        form=form,
        page_size=draw(st.sampled_from(PAGE_SIZES)),
        kv_layout=draw(st.sampled_from(["NHD", "HND"])),
        causal=draw(st.booleans()),
        window_left=draw(st.one_of(st.just(-1), edges, st.integers(0, 300))),
        logits_soft_cap=draw(st.sampled_from([None, None, 5.0, 50.0])),
        invariant=draw(st.booleans()),
        max_q_len=draw(st.sampled_from([None, longest, longest + 100])),
        decode=decodes and draw(st.booleans()),
        stacked=stacked,
        padding=0 if decodes else draw(st.sampled_from([0, 3])),
        strided=draw(st.booleans()),
        spare=draw(st.integers(0, 3)) if form == "paged-lens" else 0,
    )


def check_one(batch: Batch, device: torch.device, values_seed: int) -> None:
    note(f"batch: {batch!r}, values: {values_seed}")
    if 0 < sm_under_test(device) < 80:
        batch = batch.with_(dtype=torch.float16)
    check(batch, device, torch.Generator().manual_seed(values_seed))


@seed(RUN_SEED)
@settings(max_examples=CPU_EXAMPLES, **LIMITS)  # type: ignore[arg-type]
@given(batch=batches(), values_seed=st.integers(0, 2**32 - 1))
def test_any_batch_on_the_cpu(batch: Batch, values_seed: int) -> None:
    check_one(batch, torch.device("cpu"), values_seed)


@pytest.mark.gpu
@seed(RUN_SEED)
@settings(max_examples=GPU_EXAMPLES, **LIMITS)  # type: ignore[arg-type]
@given(batch=batches(), values_seed=st.integers(0, 2**32 - 1))
def test_any_batch(batch: Batch, values_seed: int) -> None:
    check_one(batch, torch.device("cuda", 0), values_seed)
