"""merge_state, merge_state_in_place and merge_states against float64."""

from __future__ import annotations

import math

import oracle
import pytest
import ridgeline
import torch
from support import normal, poisoned_call, strided
from torch import Tensor

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
HEAD_DIMS = (1, 3, 8, 40, 64, 128, 192, 256, 520)


def state(
    shape: tuple[int, ...],
    dtype: torch.dtype,
    device: torch.device,
    rng: torch.Generator,
    spread: float = 4.0,
) -> tuple[Tensor, Tensor]:
    """v of normal deviates and s around 0; every fifth state has seen no key."""
    v = normal(shape, dtype, device, rng)
    s = normal(shape[:-1], torch.float32, device, rng, spread)
    unseen = (torch.rand(shape[:-1], generator=rng) < 0.2).to(device)
    return v.masked_fill_(unseen.unsqueeze(-1), 0.0), s.masked_fill_(unseen, -math.inf)


def pair_reference(v_a: Tensor, s_a: Tensor, v_b: Tensor, s_b: Tensor) -> oracle.Reference:
    return oracle.merge(torch.stack((v_a, v_b), 1), torch.stack((s_a, s_b), 1))


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_two_states(
    dtype: torch.dtype, head_dim: int, device: torch.device, rng: torch.Generator
) -> None:
    a = state((37, 5, head_dim), dtype, device, rng)
    b = state((37, 5, head_dim), dtype, device, rng)
    v, s = poisoned_call(device, ridgeline.merge_state, *a, *b)
    assert v.dtype == dtype
    oracle.check(pair_reference(*a, *b), v, s)
    again = poisoned_call(device, ridgeline.merge_state, *a, *b)
    assert torch.equal(again[0], v)
    assert torch.equal(again[1], s)


@pytest.mark.parametrize("masked", [False, True], ids=["all", "masked"])
@pytest.mark.parametrize("head_dim", [3, 64, 256])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_two_states_in_place(
    dtype: torch.dtype, head_dim: int, masked: bool, device: torch.device, rng: torch.Generator
) -> None:
    v, s = state((301, 3, head_dim), dtype, device, rng)
    other = state((301, 3, head_dim), dtype, device, rng)
    mask = (torch.rand(301, generator=rng) < 0.5).to(device) if masked else None
    before = v.clone(), s.clone()
    reference = pair_reference(v, s, *other)
    assert ridgeline.merge_state_in_place(v, s, *other, mask) is None
    merged = slice(None) if mask is None else mask
    part = oracle.Reference(
        reference.out[merged],
        reference.lse[merged],
        reference.out_bound[merged],
        reference.lse_bound[merged],
    )
    oracle.check(part, v[merged], s[merged])
    if mask is not None:
        assert torch.equal(v[~mask], before[0][~mask])
        assert torch.equal(s[~mask], before[1][~mask])


@pytest.mark.parametrize("num_states", [0, 1, 2, 4, 5, 8, 9, 100])
@pytest.mark.parametrize("head_dim", [5, 64, 264])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_many_states(
    dtype: torch.dtype, head_dim: int, num_states: int, device: torch.device, rng: torch.Generator
) -> None:
    v, s = state((19, num_states, 3, head_dim), dtype, device, rng)
    out, lse = poisoned_call(device, ridgeline.merge_states, v, s)
    assert out.shape == (19, 3, head_dim)
    oracle.check(oracle.merge(v, s), out, lse)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_views(dtype: torch.dtype, device: torch.device, rng: torch.Generator) -> None:
    """Strided states, an offset that no 16-byte access fits, and a transposed LSE."""
    a = state((20, 4, 64), dtype, device, rng)
    b = state((20, 4, 64), dtype, device, rng)
    expected = ridgeline.merge_state(*a, *b)
    shifted = torch.full((20, 4, 67), math.nan, dtype=dtype, device=device)[..., 1:65]
    shifted.copy_(b[0])
    turned = b[1].t().contiguous().t()
    for v_a, s_a in ((strided(a[0], 1), strided(a[1], 0)), a):
        for v_b, s_b in ((shifted, turned), b):
            out, lse = poisoned_call(device, ridgeline.merge_state, v_a, s_a, v_b, s_b)
            assert torch.equal(out, expected[0])
            assert torch.equal(lse, expected[1])
    v, s = strided(a[0], 0, 3), strided(a[1], 1)
    ridgeline.merge_state_in_place(v, s, shifted, turned)
    assert torch.equal(v, expected[0])
    assert torch.equal(s, expected[1])
    stacked = torch.stack((a[0], b[0]), 0).transpose(0, 1)
    out, lse = ridgeline.merge_states(stacked, torch.stack((a[1], b[1]), 0).transpose(0, 1))
    oracle.check(pair_reference(*a, *b), out, lse)


def test_states_without_keys_count_for_nothing(device: torch.device) -> None:
    """Whatever their v holds: NaN here."""
    v = torch.full((2, 3, 8), math.nan, dtype=torch.float16, device=device)
    s = torch.full((2, 3), -math.inf, device=device)
    ones = torch.ones_like(v)
    zero = torch.zeros_like(s)
    for out, lse in (
        ridgeline.merge_state(v, s, ones, zero),
        ridgeline.merge_state(ones, zero, v, s),
        ridgeline.merge_states(torch.stack((v, ones, v), 1), torch.stack((s, zero, s), 1)),
    ):
        assert torch.equal(out, ones)
        assert torch.equal(lse, zero)
    for out, lse in (
        ridgeline.merge_state(v, s, v, s),
        ridgeline.merge_states(torch.stack((v, v), 1), torch.stack((s, s), 1)),
    ):
        assert torch.equal(out, torch.zeros_like(out))
        assert torch.equal(lse, s)


@pytest.mark.parametrize("height", [-1e30, -1e4, 1e4, 1e30])
def test_extreme_lse(height: float, device: torch.device, rng: torch.Generator) -> None:
    """Equal LSE average the values, however large; a far larger one takes all."""
    v_a = normal((4, 2, 16), torch.float32, device, rng)
    v_b = normal((4, 2, 16), torch.float32, device, rng)
    s = torch.full((4, 2), height, device=device)
    out, lse = ridgeline.merge_state(v_a, s, v_b, s)
    torch.testing.assert_close(out, (v_a + v_b) / 2, rtol=2.0**-21, atol=2.0**-21)
    torch.testing.assert_close(lse, s + math.log(2.0), rtol=2.0**-22, atol=2.0**-22)
    out, lse = ridgeline.merge_states(torch.stack((v_a, v_b), 1), torch.stack((s, 2 * s), 1))
    assert torch.equal(out, v_a if height < 0 else v_b)
    assert torch.equal(lse, s if height < 0 else 2 * s)


@pytest.mark.parametrize("shape", [(0, 3, 64), (5, 0, 64)], ids=str)
def test_empty(shape: tuple[int, ...], device: torch.device, rng: torch.Generator) -> None:
    v, s = state(shape, torch.float16, device, rng)
    assert ridgeline.merge_state(v, s, v, s)[0].shape == shape
    ridgeline.merge_state_in_place(v, s, v.clone(), s.clone())
    out, lse = ridgeline.merge_states(v.unsqueeze(1), s.unsqueeze(1))
    assert (out.shape, lse.shape) == (shape, shape[:-1])


def test_lse_base(device: torch.device, rng: torch.Generator) -> None:
    a = state((9, 4, 32), torch.float32, device, rng)
    b = state((9, 4, 32), torch.float32, device, rng)
    expected_v, expected_s = ridgeline.merge_state(*a, *b)
    log2e = math.log2(math.e)
    binary = [(v, s * log2e) for v, s in (a, b)]
    mask = torch.arange(9, device=device) % 2 == 0
    v, s = ridgeline.merge_state(*binary[0], *binary[1], lse_base="log2")
    many_v, many_s = ridgeline.merge_states(
        torch.stack([v for v, _ in binary], 1),
        torch.stack([s for _, s in binary], 1),
        lse_base="log2",
    )
    in_v, in_s = binary[0][0].clone(), binary[0][1].clone()
    ridgeline.merge_state_in_place(in_v, in_s, *binary[1], mask, lse_base="log2")
    assert torch.equal(in_s[~mask], binary[0][1][~mask])
    for got_v, got_s in ((v, s), (many_v, many_s)):
        torch.testing.assert_close(got_v, expected_v, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(got_s, expected_s * log2e, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(in_v[mask], expected_v[mask], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(in_s[mask], expected_s[mask] * log2e, rtol=1e-5, atol=1e-6)


def test_attention_over_two_halves_merges_to_the_whole(
    device: torch.device, rng: torch.Generator
) -> None:
    q = normal((7, 4, 64), torch.float16, device, rng)
    k = normal((300, 2, 64), torch.float16, device, rng)
    v = normal((300, 2, 64), torch.float16, device, rng)
    halves = [
        ridgeline.single_prefill_with_kv_cache_return_lse(q, k[part], v[part])
        for part in (slice(0, 111), slice(111, 300))
    ]
    out, lse = ridgeline.merge_state(*halves[0], *halves[1])
    reference = oracle.attention(q, k, v)
    # Each half was rounded to float16 before the merge.
    reference.out_bound += 2.0**-11 * 2 * v.abs().max().double()
    oracle.check(reference, out, lse)
