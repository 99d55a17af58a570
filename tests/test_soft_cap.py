"""Soft caps against float64, where kernels differ by them: caps, scales, logits of any size."""

from __future__ import annotations

from typing import Any

import oracle
import pytest
import torch
from batch_problem import Batch, Inputs, check
from oracle import Reference
from support import poisoned_call, supports_bf16_attention

PREFILL = Batch(
    lengths=((300, 300), (40, 1000), (130, 700), (200, 64), (1, 90), (0, 20), (70, 0), (129, 640)),
    heads=(8, 2), head_dims=(128, 128), dtype=torch.bfloat16, causal=True,
)  # fmt: skip


def batches() -> list[Batch]:
    """Caps on either side of those that SoftCapVariant is for, and what else may come with one."""
    found = [PREFILL.with_(logits_soft_cap=cap) for cap in (0.5, 8.0, 30.0, 50.0, 51.0)]
    capped = PREFILL.with_(logits_soft_cap=30.0)
    found += [capped.with_(form=form) for form in ("ragged", "padded")]
    found += [capped.with_(causal=False), capped.with_(causal=False, window_left=100)]
    found += [capped.with_(window_left=window, form="ragged") for window in (0, 63, 200)]
    found += [capped.with_(invariant=True), capped.with_(page_size=1, heads=(7, 1))]
    found += [capped.with_(lengths=((64, 3000), (200, 1500)), form="ragged", causal=False)]
    found += [capped.with_(dtype=torch.float16), capped.with_(head_dims=(64, 64))]
    return found


@pytest.mark.parametrize("batch", batches(), ids=str)
def test_caps_and_masks(batch: Batch, device: torch.device, rng: torch.Generator) -> None:
    check(batch, device, rng)


def sized(inputs: Inputs, sizes: torch.Tensor) -> Inputs:
    """Queries scaled row by row; powers of two are exact."""
    inputs.q = inputs.q * sizes.to(inputs.q)[:, None, None]
    return inputs


def reference(inputs: Inputs, **options: Any) -> Reference:
    """With options of the oracle, for a batch of one request."""
    batch = inputs.batch
    options = {"causal": batch.causal, "logits_soft_cap": batch.logits_soft_cap, **options}
    return oracle.attention(inputs.q, inputs.keys[0], inputs.values[0], **options)


@pytest.fixture(autouse=True)
def _has_bf16(device: torch.device) -> None:
    if not supports_bf16_attention(device):
        pytest.skip("no bf16 tensor cores")


@pytest.mark.parametrize("cap", [10.0, 30.0, 50.0])
@pytest.mark.parametrize("form", ["paged", "ragged"])
def test_logits_up_to_the_cap(
    cap: float, form: str, device: torch.device, rng: torch.Generator
) -> None:
    """From next to 0 to far beyond the cap, in one tile."""
    batch = PREFILL.with_(lengths=((160, 700),), logits_soft_cap=cap, form=form)
    inputs = sized(batch.inputs(device, rng), 2.0 ** (torch.arange(160) % 17 - 6))
    out, lse = poisoned_call(device, inputs.call)
    oracle.check(reference(inputs), out, lse)


@pytest.mark.parametrize("cap", [10.0, 30.0, 50.0])
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_all_logits_at_one_end(
    cap: float, sign: float, device: torch.device, rng: torch.Generator
) -> None:
    """Rows whose logits all are next to cap, or all next to -cap, and masked keys beside them."""
    batch = PREFILL.with_(lengths=((160, 300),), logits_soft_cap=cap)
    inputs = batch.inputs(device, rng)
    inputs.q = inputs.q.abs() * 512 * sign
    for k in (*inputs.keys, inputs.cache[0]):
        k.abs_()
    out, lse = poisoned_call(device, inputs.call)
    expected = reference(inputs)
    oracle.check(expected, out, lse)
    count = torch.arange(141, 301, dtype=torch.float64, device=device)
    exact = count.log()[:, None] + sign * cap
    assert (lse - exact).abs().max() < 1e-4


@pytest.mark.parametrize("sm_scale", [-0.1, 0.0, 1e-35, 3.0])
def test_scales(sm_scale: float, device: torch.device, rng: torch.Generator) -> None:
    batch = PREFILL.with_(lengths=((160, 300),), logits_soft_cap=30.0)
    inputs = batch.inputs(device, rng)
    out, lse = poisoned_call(device, inputs.call, sm_scale=sm_scale)
    oracle.check(reference(inputs, sm_scale=sm_scale), out, lse)


@pytest.mark.parametrize("form", ["paged", "ragged"])
def test_what_is_no_number(form: str, device: torch.device, rng: torch.Generator) -> None:
    """A key of NaN reaches the rows that see it, and no others."""
    batch = PREFILL.with_(lengths=((300, 300),), logits_soft_cap=30.0, form=form)
    inputs = batch.inputs(device, rng)
    place = 101
    keys = inputs.cache[0]
    if form == "paged":
        keys = keys[inputs.index["kv_indices"][place // batch.page_size]]
    keys[place % len(keys)] = torch.nan
    out, lse = poisoned_call(device, inputs.call)
    seen = torch.arange(300, device=device) >= place
    assert out[seen].isnan().all()
    assert lse[seen].isnan().all()
    expected = reference(inputs)
    oracle.check(
        Reference(*(getattr(expected, name)[~seen] for name in
                    ("out", "lse", "out_bound", "lse_bound"))),
        out[~seen], lse[~seen],
    )  # fmt: skip


@pytest.mark.parametrize("cap", [30.0, 50.0])
def test_values_of_any_size(cap: float, device: torch.device, rng: torch.Generator) -> None:
    """Sums of products with exponentials neither overflow nor vanish."""
    batch = PREFILL.with_(lengths=((160, 300),), logits_soft_cap=cap)
    inputs = sized(batch.inputs(device, rng), 2.0 ** (torch.arange(160) % 9 - 2))
    sizes = 2.0 ** (torch.arange(128) % 61 - 30)
    for v in (inputs.values[0], inputs.cache[1]):
        v.mul_(sizes.to(v))
    out, lse = poisoned_call(device, inputs.call)
    oracle.check(reference(inputs), out, lse)
