"""Sampling: exact thresholds, the random stream, odd rows, the renormalisers, torch's features."""

from __future__ import annotations

import math
from typing import Any

import pytest
import ridgeline
import torch
from elementwise import DTYPES, VIEWS, captured, view_of, without_recompilation
from sampling_oracle import BOUNDARY, Filter, distribution, philox, support
from support import normal, poisoned_call
from torch import Tensor

VOCABULARIES = (1, 7, 1000, 32_000, 128_256, 262_144)
FILTERS = (
    Filter(),
    Filter(top_k=1),
    Filter(top_k=50),
    Filter(top_k=300),
    Filter(top_k=10**6),
    Filter(top_p=0.9),
    Filter(top_p=0.0),
    Filter(min_p=0.1),
    Filter(min_p=1.0),
    Filter(top_k=50, top_p=0.9),
    Filter(top_k=50, top_p=0.5, joint=True),
    Filter(top_k=40, top_p=0.8, min_p=0.05, temperature=0.6),
    Filter(temperature=0.0, top_p=0.5),
)


def keys(num_rows: int, device: torch.device, rng: torch.Generator) -> Tensor:
    return torch.randint(-(2**63), 2**63 - 1, (num_rows,), generator=rng).to(device)


def draw(x: Tensor, from_logits: bool, how: Filter, seed: Tensor, **options: Any) -> Any:
    """Tokens, valid and log-probabilities, by the op beneath every sampler."""
    return torch.ops.ridgeline.sample(
        x,
        seed,
        options.get("offset"),
        from_logits,
        how.joint,
        options.get("indices"),
        None,
        how.temperature,
        None,
        how.top_k,
        None,
        how.top_p,
        None,
        how.min_p,
    )


def as_probs(x: Tensor) -> Tensor:
    return torch.softmax(x.float(), dim=-1)


@pytest.mark.parametrize("from_logits", [True, False], ids=["logits", "probs"])
@pytest.mark.parametrize("vocab", VOCABULARIES)
def test_tokens_are_in_the_exact_support(
    vocab: int, from_logits: bool, device: torch.device, rng: torch.Generator
) -> None:
    num_draws = 64 if device.type == "cuda" else 8 if vocab <= 1000 else 1
    logits = normal((3, vocab), torch.float32, device, rng, scale=2.0)
    logits[1] *= 4
    x = logits if from_logits else as_probs(logits)
    rows = torch.arange(3 * num_draws, device=device) % 3
    for how in FILTERS:
        _, possible = support(x, from_logits, how)
        seed = keys(rows.numel(), device, rng)
        tokens, valid, log_probs = poisoned_call(
            device, draw, x, from_logits, how, seed, indices=rows
        )
        assert valid.all(), how
        chosen = possible[rows.cpu(), tokens.long().cpu()]
        assert chosen.all(), f"{how}: {int((~chosen).sum())} tokens outside the exact set"
        exact = distribution(x, from_logits, how.temperature).log()
        exact = exact[rows.cpu(), tokens.long().cpu()]
        torch.testing.assert_close(log_probs.cpu().double(), exact, atol=2e-5, rtol=2e-6)


@pytest.mark.parametrize("dtype", DTYPES)
def test_ties_go_to_the_lowest_index(dtype: torch.dtype, device: torch.device) -> None:
    for vocab, k in ((20, 5), (1000, 300), (40_000, 50), (40_000, 1000)):
        x = torch.zeros(64, vocab, dtype=dtype, device=device)
        seed = torch.arange(64, device=device)
        tokens = draw(x, True, Filter(top_k=k), seed)[0]
        assert int(tokens.max()) < k
        assert len(set(tokens.tolist())) > min(k, 64) // 4
        share = draw(x, True, Filter(top_p=k / vocab), seed)[0]
        assert int(share.max()) <= k
        assert draw(x, True, Filter(temperature=0.0), seed)[0].eq(0).all()
        masked = ridgeline.top_k_mask_logits(x[:2], k)
        assert masked[:, :k].eq(0).all()
        assert masked[:, k:].eq(-math.inf).all()
        values, indices = ridgeline.top_k(x[:2], k, sorted=True)
        assert values.eq(0).all()
        assert torch.equal(indices[1].cpu(), torch.arange(k))


def test_random_stream(device: torch.device, rng: torch.Generator) -> None:
    """Of 2^16 equal probabilities the token is the number's 16 highest bits."""
    seed, offset = keys(40, device, rng), keys(40, device, rng)
    seed[:3], offset[:3] = torch.tensor([0, -1, 2**40]), torch.tensor([0, -1, 5])
    x = torch.full((1, 2**16), 0.25, device=device).expand(40, -1)
    tokens = draw(x, False, Filter(), seed, offset=offset)[0]
    pairs = zip(seed.tolist(), offset.tolist(), strict=True)
    assert tokens.tolist() == [philox(s, o) >> 48 for s, o in pairs]
    filtered = draw(x, False, Filter(top_k=2**15), seed, offset=offset)[0]
    assert torch.equal(filtered, tokens >> 1)


@pytest.mark.gpu
@pytest.mark.parametrize("vocab", [100, 32_000])
def test_gpu_draws_what_the_cpu_draws(vocab: int, rng: torch.Generator) -> None:
    gpu = torch.device("cuda", 0)
    logits = normal((50, vocab), torch.float32, torch.device("cpu"), rng, scale=3.0)
    for how in FILTERS:
        seed = keys(200, torch.device("cpu"), rng)
        rows = torch.arange(200) % 50
        for from_logits, x in ((True, logits), (False, as_probs(logits))):
            ours = draw(x.to(gpu), from_logits, how, seed.to(gpu), indices=rows.to(gpu))[0]
            reference = draw(x, from_logits, how, seed, indices=rows)[0]
            # Only a random number or a threshold within rounding of an edge may differ.
            assert int((ours.cpu() != reference).sum()) <= 1, (how, from_logits)


@pytest.mark.parametrize("how", FILTERS, ids=str)
def test_a_row_is_alone(how: Filter, device: torch.device, rng: torch.Generator) -> None:
    """Permuting rows permutes tokens, and the size of the batch changes nothing."""
    x = normal((9, 9000), torch.float32, device, rng, scale=2.0)
    seed = keys(9, device, rng)
    together = draw(x, True, how, seed)
    order = torch.randperm(9, generator=rng).to(device)
    permuted = draw(x[order], True, how, seed[order])
    selected = draw(x, True, how, seed[order], indices=order.int())
    for whole, part, indexed in zip(together, permuted, selected, strict=True):
        assert torch.equal(whole[order], part)
        assert torch.equal(part, indexed)
    for row in range(9):
        alone = draw(x[row : row + 1], True, how, seed[row : row + 1])
        assert all(torch.equal(a[0], t[row]) for a, t in zip(alone, together, strict=True))


@pytest.mark.gpu
@pytest.mark.parametrize("vocab", [128_256, 50_257])
@pytest.mark.parametrize("how", [*FILTERS, Filter(top_k=1000, top_p=0.95)], ids=str)
def test_size_of_the_batch_changes_nothing(how: Filter, vocab: int, rng: torch.Generator) -> None:
    """How a row is cut over blocks depends on the batch; its token does not."""
    device = torch.device("cuda", 0)
    x = torch.randn(600, vocab, generator=torch.Generator(device).manual_seed(1), device=device)
    x[::2] *= 4
    seed = keys(600, device, rng)
    together = draw(x, True, how, seed)
    for num_rows in (1, 2, 33, 64, 300, 512):
        part = draw(x[:num_rows], True, how, seed[:num_rows])
        for a, b in zip(part, together, strict=True):
            assert torch.equal(a, b[:num_rows]), num_rows


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_of_a_large_batch(dtype: torch.dtype) -> None:
    """Nor do the bits of what is computed of a row, where one block takes several in turn."""
    device = torch.device("cuda", 0)
    x = torch.randn(1501, 40_000, device=device).to(dtype) * 3
    x[7, 11], x[8], x[9, 5:] = math.nan, -math.inf, -math.inf
    temperature = torch.linspace(0, 2, 1501, device=device)
    probs = ridgeline.softmax(x, temperature)
    masked = ridgeline.top_k_mask_logits(x, 1000)
    largest = {s: ridgeline.top_k(x, 50, sorted=s) for s in (False, True)}
    renormed = ridgeline.top_p_renorm_probs(probs, 0.9)
    for rows in (slice(0, 1), slice(5, 12), slice(700, 800), slice(1480, 1501)):
        part = ridgeline.softmax(x[rows], temperature[rows])
        assert torch.equal(part.nan_to_num(7), probs[rows].nan_to_num(7))
        part = ridgeline.top_p_renorm_probs(probs[rows], 0.9)
        assert torch.equal(part, renormed[rows])
        part = ridgeline.top_k_mask_logits(x[rows], 1000)
        assert torch.equal(part.nan_to_num(7), masked[rows].nan_to_num(7))
        for in_order, (values, indices) in largest.items():
            part_values, part_indices = ridgeline.top_k(x[rows], 50, sorted=in_order)
            assert torch.equal(part_indices, indices[rows])
            assert torch.equal(part_values.nan_to_num(7), values[rows].nan_to_num(7))


def odd_rows(vocab: int, rng: torch.Generator) -> Tensor:
    """Rows on which guesses about logits fail."""
    x = torch.randn(9, vocab, generator=rng) * 2
    x[1] = x[1].sort().values
    x[2] = x[2].sort(descending=True).values
    x[3, :: vocab // 3] += 40  # few tokens far above all
    x[4, ::2] = -math.inf
    x[5] = (x[5] * 2).round() / 2  # thousands of ties
    x[6] = x[6] * 1e-3 + 1e4
    x[7] *= 1e4
    x[8, vocab // 2 :] -= 60
    return x


@pytest.mark.parametrize("vocab", [20_000, 128_256])
def test_odd_rows(vocab: int, device: torch.device, rng: torch.Generator) -> None:
    logits = odd_rows(vocab, rng).to(device)
    repeats = 16 if device.type == "cuda" else 1
    rows = torch.arange(9 * repeats, device=device) % 9
    hows = (*FILTERS, Filter(top_k=1000, top_p=0.95), Filter(top_p=0.999, min_p=1e-3))
    for how in hows if device.type == "cuda" else hows[5::3]:
        for from_logits, x in ((True, logits), (False, as_probs(logits))):
            sure, possible = support(x, from_logits, how)
            seed = keys(rows.numel(), device, rng)
            tokens, valid, _ = draw(x, from_logits, how, seed, indices=rows)
            assert valid.all(), how
            chosen = possible[rows.cpu(), tokens.long().cpu()]
            assert chosen.all(), f"{how}: rows {rows.cpu()[~chosen].tolist()} outside the exact set"
        if how.top_p < 1 and not how.top_k and not how.min_p and how.temperature == 1:
            kept = ridgeline.top_p_renorm_probs(x, how.top_p).cpu() > 0
            assert not (kept & ~possible).any(), how
            assert not (~kept & sure & (x.cpu() > 1e-30)).any(), how


@pytest.mark.parametrize("kind", VIEWS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocab", [9000, 8193])
def test_views_and_dtypes(
    vocab: int, dtype: torch.dtype, kind: str, device: torch.device, rng: torch.Generator
) -> None:
    x = normal((5, vocab), dtype, device, rng, scale=3.0)
    seed, view = keys(5, device, rng), view_of(x, kind)
    for how in (Filter(), Filter(top_k=50, top_p=0.9), Filter(top_p=0.95)):
        exact, strided = draw(x.float(), True, how, seed), draw(view, True, how, seed)
        assert all(torch.equal(a, b) for a, b in zip(exact, strided, strict=True))
    assert torch.equal(ridgeline.softmax(view), ridgeline.softmax(x.float()))
    assert torch.equal(ridgeline.top_k_mask_logits(view, 9), ridgeline.top_k_mask_logits(x, 9))
    assert torch.equal(ridgeline.top_k(view, 9)[1], ridgeline.top_k(x.float(), 9)[1])
    if dtype == torch.float32:
        probs = as_probs(x)
        view = view_of(probs, kind)
        assert torch.equal(
            ridgeline.top_p_renorm_probs(view, 0.7), ridgeline.top_p_renorm_probs(probs, 0.7)
        )


@pytest.mark.parametrize("vocab", [7, 9000])
@pytest.mark.parametrize("how", FILTERS, ids=str)
def test_rows_of_no_distribution(vocab: int, how: Filter, device: torch.device) -> None:
    inf, nan = math.inf, math.nan
    logits = torch.ones(7, vocab, device=device)
    logits[0, 3], logits[1], logits[2, -1], logits[3] = nan, nan, inf, -inf
    logits[4, :-1] = -inf
    logits[5, 1:] = -3e38
    seed = torch.arange(7, device=device)
    tokens, valid, log_probs = draw(logits, True, how, seed)
    assert valid.tolist() == [False] * 4 + [True] * 3
    assert tokens[:4].eq(0).all()
    assert int(tokens[4]) == vocab - 1
    assert int(tokens[5]) == 0
    assert torch.equal(log_probs.isnan(), ~valid)
    probs = torch.ones(7, vocab, device=device)
    probs[0, 3], probs[1], probs[2, -1], probs[3], probs[4, 1] = nan, 0.0, inf, -0.0, -1.0
    probs[5, :-1] = 0
    tokens, valid, _ = draw(probs, False, how, seed)
    assert valid.tolist() == [False] * 5 + [True] * 2
    assert tokens[:5].eq(0).all()
    assert int(tokens[5]) == vocab - 1
    assert torch.equal(ridgeline.top_p_renorm_probs(probs, 0.9).sum(1)[:5].cpu(), torch.zeros(5))


@pytest.mark.parametrize("vocab", [7, 9000])
def test_greedy_rows(vocab: int, device: torch.device, rng: torch.Generator) -> None:
    """Temperature 0, alone or beside others, is argmax; the log-probability is at temperature 1."""
    x = normal((9, vocab), torch.float32, device, rng, scale=3.0)
    x[1] = -x[1].abs()
    x[1, [2, 5, -1]] = torch.tensor([-0.0, 0.0, -0.0], device=device)  # equal
    x[2, 3:], x[3, 1::2] = x[2, :3].max(), 50.0
    x[4], x[4, -1] = -math.inf, -3e38
    x[5, -2], x[6, 0], x[7] = math.nan, math.inf, -math.inf
    seed = keys(9, device, rng)
    lowest = (x == x.amax(1, keepdim=True)).int().argmax(1)
    lowest[5:8] = 0
    per_row = torch.zeros(9, device=device)
    per_row[8] = 0.5
    for temperature in (0.0, per_row):
        tokens, log_probs, valid = ridgeline.sample_from_logits(x, temperature, seed=seed)
        rows = slice(0, 8 if isinstance(temperature, Tensor) else 9)
        assert valid.tolist() == [True] * 5 + [False] * 3 + [True]
        assert torch.equal(tokens[rows].long(), lowest[rows])
        exact = distribution(x[[0, 1, 2, 3, 4]], True, 1.0).log()
        exact = exact.gather(1, lowest[:5, None].cpu())[:, 0]
        torch.testing.assert_close(log_probs[:5].cpu().double(), exact, atol=2e-5, rtol=2e-6)
    alone = ridgeline.sample_from_logits(x[8:], 0.5, seed=seed[8:])
    assert int(alone[0]) == int(tokens[8])
    filtered = ridgeline.sample_from_logits(x, 0.0, 40, 0.3, 0.1, seed=seed)[0]
    assert torch.equal(filtered.long(), lowest)


def test_extreme_temperatures(device: torch.device) -> None:
    """The hottest is uniform over what has weight, the coldest what the largest share."""
    x = torch.tensor([[0.0, 9.0, -math.inf, 9.0]], device=device).repeat(64, 300)
    seed = torch.arange(64, device=device)
    for temperature, kept in ((1e300, [0, 1, 3]), (1e-300, [1, 3]), (0.0, [1, 3])):
        expected = torch.zeros(4).index_fill(0, torch.tensor(kept), 1 / (300 * len(kept)))
        probs = ridgeline.softmax(x[:1], temperature)[0].cpu()
        torch.testing.assert_close(probs, expected.repeat(300))
        tokens, log_probs, valid = ridgeline.sample_from_logits(x, temperature, seed=seed)
        assert valid.all()
        assert not log_probs.isnan().any()
        assert set((tokens % 4).tolist()) == set(kept if temperature else [1])


@pytest.mark.parametrize("shift", [-100.0, -1e4])
def test_low_rows_with_gaps(shift: float, device: torch.device, rng: torch.Generator) -> None:
    """Logits far below 0 beside thousands in succession that are -inf."""
    x = (normal((64, 9000), torch.float32, device, rng) + shift).contiguous()
    x[:, 1000:2100] = -math.inf
    x[32:, 4000:7200] = -math.inf
    exact = distribution(x, True, 1.0)
    torch.testing.assert_close(ridgeline.softmax(x).cpu().double(), exact, rtol=1e-4, atol=1e-30)
    for how in (Filter(), Filter(temperature=0.0), Filter(top_k=50), Filter(top_p=0.9)):
        tokens, valid, log_probs = draw(x, True, how, keys(64, device, rng))
        assert valid.all()
        chosen = exact.gather(1, tokens[:, None].long().cpu())[:, 0]
        torch.testing.assert_close(log_probs.cpu().double(), chosen.log(), rtol=1e-4, atol=1e-4)


def test_scale_of_probabilities_does_not_matter(device: torch.device, rng: torch.Generator) -> None:
    probs = as_probs(normal((6, 3000), torch.float32, device, rng))
    seed = keys(6, device, rng)
    for how in FILTERS:
        expected = draw(probs, False, how, seed)
        for scale in (2.0**-60, 2.0**40):
            assert torch.equal(draw(probs * scale, False, how, seed)[0], expected[0])


def test_settings_per_row(device: torch.device, rng: torch.Generator) -> None:
    x = normal((5, 9000), torch.float32, device, rng, scale=2.0)
    temperature = [1.0, 0.5, 0.0, 2.0, 1.0]
    top_k, top_p, min_p = [0, 50, 5, 9000, 1000], [1.0, 0.9, 0.3, 0.5, 0.0], [0.0, 0.1, 0, 0, 0.5]
    seed = keys(5, device, rng)
    for dtype in (torch.int32, torch.int64):
        tokens, log_probs, valid = ridgeline.sample_from_logits(
            x,
            torch.tensor(temperature, device=device),
            torch.tensor(top_k, device=device, dtype=dtype),
            torch.tensor(top_p, device=device),
            torch.tensor(min_p, device=device),
            seed=seed,
        )
        assert valid.all()
        for i, case in enumerate(zip(top_k, top_p, min_p, temperature, strict=True)):
            alone = draw(x[i : i + 1], True, Filter(*case), seed[i : i + 1])
            assert int(alone[0]) == int(tokens[i]), case
            torch.testing.assert_close(alone[2][0], log_probs[i])


def test_public_samplers(device: torch.device, rng: torch.Generator) -> None:
    """Each function is the op with its filter, and seeds count as documented."""
    x = normal((6, 500), torch.float32, device, rng)
    probs, seed = as_probs(x), keys(6, device, rng)
    cases = (
        (ridgeline.sampling_from_probs(probs, seed=seed), False, Filter()),
        (ridgeline.sampling_from_logits(x, seed=seed), True, Filter()),
        (ridgeline.top_p_sampling_from_probs(probs, 0.6, seed=seed), False, Filter(top_p=0.6)),
        (ridgeline.top_k_sampling_from_probs(probs, 9, seed=seed), False, Filter(top_k=9)),
        (ridgeline.min_p_sampling_from_probs(probs, 0.2, seed=seed), False, Filter(min_p=0.2)),
    )
    for tokens, from_logits, how in cases:
        assert torch.equal(tokens, draw(probs if not from_logits else x, from_logits, how, seed)[0])
    for order in ("top_k_first", "joint"):
        how = Filter(top_k=30, top_p=0.4, joint=order == "joint")
        tokens = ridgeline.top_k_top_p_sampling_from_probs(
            probs, 30, 0.4, filter_apply_order=order, seed=seed
        )
        assert torch.equal(tokens, draw(probs, False, how, seed)[0])
        tokens, valid = ridgeline.top_k_top_p_sampling_from_logits(
            x, 30, 0.4, filter_apply_order=order, seed=seed, return_valid=True
        )
        assert torch.equal(tokens, draw(x, True, how, seed)[0])
        assert valid.all()
    equal_rows = ridgeline.sampling_from_probs(probs[:1].expand(6, -1), seed=5)
    assert equal_rows.eq(equal_rows[0]).all()
    with pytest.raises(ValueError, match="check_nan"):
        ridgeline.sampling_from_probs(probs * math.nan, check_nan=True)


def test_seeds_come_from_torch(device: torch.device) -> None:
    probs = torch.ones(32, 5000, device=device)
    torch.manual_seed(3)
    first, second = ridgeline.sampling_from_probs(probs), ridgeline.sampling_from_probs(probs)
    torch.manual_seed(3)
    assert torch.equal(ridgeline.sampling_from_probs(probs), first)
    assert not torch.equal(first, second)
    assert len(set(first.tolist())) > 16
    mine = torch.Generator(device=device).manual_seed(8)
    with_mine = ridgeline.sampling_from_probs(probs, generator=mine)
    again = ridgeline.sampling_from_probs(
        probs, generator=torch.Generator(device=device).manual_seed(8)
    )
    assert torch.equal(with_mine, again)


@pytest.mark.parametrize("temperature", [1.0, 0.3, 0.0])
@pytest.mark.parametrize("shape", [(3, 1), (3, 7), (2, 32_000), (300, 20_000), (2, 262_144)])
def test_softmax(
    shape: tuple[int, int], temperature: float, device: torch.device, rng: torch.Generator
) -> None:
    x = normal(shape, torch.float32, device, rng, scale=3.0)
    got = poisoned_call(device, ridgeline.softmax, x, temperature).cpu().double()
    wide = x.cpu().double()
    distance = wide.amax(1, keepdim=True) - wide
    if temperature == 0:
        assert torch.equal(got, (distance == 0).double())
        return
    exact = torch.softmax(wide / temperature, dim=1)
    # exp2 errs by 2^-22, its argument by 2^-23 of itself; what underflows is 0.
    bound = exact * (1 + distance / temperature) * 2.0**-21 + 2e-38
    assert ((got - exact).abs() <= bound).all()
    per_row = torch.full((shape[0],), temperature, device=device)
    assert torch.equal(ridgeline.softmax(x, per_row).cpu().double(), got)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("num_rows", "vocab"), [(901, 3008), (421, 30_000), (201, 128_256)])
def test_softmax_of_many_rows(num_rows: int, vocab: int, dtype: torch.dtype) -> None:
    """Those that a block or a cluster takes in turn have the bits of rows that are alone."""
    x = torch.randn(num_rows, vocab, device="cuda").to(dtype) * 3
    x[::7, 11], x[3::7], x[5::7, 5:] = math.nan, -math.inf, -math.inf
    temperature = torch.linspace(0, 2, num_rows, device="cuda")
    together = poisoned_call(x.device, ridgeline.softmax, x, temperature)
    assert torch.equal(together.isnan().any(1), together.isnan().all(1))
    for i in {0, 1, 2, *range(5, num_rows, 37), num_rows - 2, num_rows - 1}:
        alone = ridgeline.softmax(x[i : i + 1], temperature[i : i + 1])[0]
        assert torch.equal(alone.nan_to_num(7), together[i].nan_to_num(7)), i
        assert bool(alone.isnan().any()) == (i % 7 in (0, 3)), i
    finite = ridgeline.softmax(x[1::7])
    exact = torch.softmax(x[1::7].double(), dim=1)
    torch.testing.assert_close(finite.double(), exact, rtol=2e-5, atol=2e-38)


def test_softmax_of_odd_rows(device: torch.device) -> None:
    for num_rows in (6, 300):
        x = torch.zeros(num_rows, 20_000, device=device)
        x[0, 5], x[1, 9], x[2], x[3, 1:] = math.nan, math.inf, -math.inf, -math.inf
        got = ridgeline.softmax(x)
        assert got[:3].isnan().all()
        assert torch.equal(got[3].cpu(), torch.eye(1, 20_000)[0])
        torch.testing.assert_close(got[4], torch.full_like(got[4], 1 / 20_000))


@pytest.mark.parametrize("vocab", VOCABULARIES)
def test_renormalisers(vocab: int, device: torch.device, rng: torch.Generator) -> None:
    probs = as_probs(normal((3, vocab), torch.float32, device, rng, scale=3.0))
    exact = distribution(probs, False)
    for how in (f for f in FILTERS if not f.min_p and f.temperature == 1):
        if how.top_k and how.top_p < 1:
            continue
        if how.top_k:
            got = poisoned_call(device, ridgeline.top_k_renorm_probs, probs, how.top_k)
        else:
            got = poisoned_call(device, ridgeline.top_p_renorm_probs, probs, how.top_p)
        got = got.cpu().double()
        sure, possible = support(probs, False, how)
        assert (got[sure] > 0).all(), how
        assert (got[~possible] == 0).all(), how
        kept = exact * (got > 0)
        torch.testing.assert_close(got, kept / kept.sum(1, keepdim=True), rtol=1e-6, atol=1e-30)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocab", VOCABULARIES)
def test_top_k(vocab: int, dtype: torch.dtype, device: torch.device, rng: torch.Generator) -> None:
    x = normal((3, vocab), dtype, device, rng)
    if vocab > 7:
        x[0, 5], x[0, 6], x[1, : vocab // 2], x[2, ::3] = math.nan, math.inf, -math.inf, 0.5
    order = torch.sort(x.cpu().double(), dim=1, descending=True, stable=True).indices
    for k in sorted({1, *(min(k, vocab) for k in (40, 256, 257, 700)), vocab}):
        values, indices = poisoned_call(device, ridgeline.top_k, x, k, sorted=True)
        assert torch.equal(indices.cpu(), order[:, :k])
        expected = x.gather(1, indices)
        assert torch.equal(values.nan_to_num(1e4), expected.nan_to_num(1e4))
        assert torch.equal(ridgeline.top_k(x, k)[1], indices.sort(1).values)
        masked = poisoned_call(device, ridgeline.top_k_mask_logits, x, k)
        kept = torch.zeros_like(x, dtype=torch.bool).scatter_(1, indices, True)
        assert torch.equal(masked.nan_to_num(7), x.masked_fill(~kept, -math.inf).nan_to_num(7))
        ks = torch.full((3,), k, device=device, dtype=torch.int32)
        assert torch.equal(ridgeline.top_k_mask_logits(x, ks).nan_to_num(7), masked.nan_to_num(7))


def test_empty(device: torch.device) -> None:
    none = torch.empty(0, 100, device=device)
    assert ridgeline.sampling_from_logits(none).shape == (0,)
    assert ridgeline.softmax(none).shape == (0, 100)
    assert ridgeline.top_p_renorm_probs(none, 0.5).shape == (0, 100)
    assert ridgeline.top_k(none, 3)[0].shape == (0, 3)
    no_rows = torch.empty(0, dtype=torch.int32, device=device)
    assert ridgeline.sampling_from_logits(none, indices=no_rows).shape == (0,)
    some = torch.ones(2, 100, device=device)
    assert ridgeline.top_k_sampling_from_probs(some, 3, indices=no_rows).shape == (0,)
    chain = ridgeline.chain_speculative_sampling(
        torch.empty(0, 2, 9, device=device),
        torch.empty(0, 2, dtype=torch.int32, device=device),
        torch.empty(0, 3, 9, device=device),
    )
    assert [t.shape[0] for t in chain] == [0, 0, 0]


def test_indices_out_of_range_stay_in_memory(device: torch.device) -> None:
    probs = torch.eye(4, device=device)
    rows = torch.tensor([-5, 0, 3, 99], device=device)
    assert ridgeline.sampling_from_probs(probs, indices=rows).tolist() == [0, 0, 3, 3]


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_two_draws_of_a_compiled_graph_differ(backend: str, device: torch.device) -> None:
    def step(probs: Tensor) -> tuple[Tensor, Tensor]:
        first = ridgeline.sampling_from_probs(probs)
        return first, ridgeline.top_k_top_p_sampling_from_logits(probs, 4000, 0.9)

    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, backend=backend)
    probs = torch.ones(32, 5000, device=device)
    seen = [*compiled(probs), *compiled(probs)]
    for i, tokens in enumerate(seen):
        assert not any(torch.equal(tokens, other) for other in seen[:i])


def test_dynamic_batch(device: torch.device, rng: torch.Generator) -> None:
    def step(x: Tensor, seed: Tensor) -> Tensor:
        tokens, _, _ = ridgeline.sample_from_logits(x, 0.8, 20, 0.9, seed=seed)
        probs = ridgeline.top_p_renorm_probs(ridgeline.softmax(x), 0.9)
        return tokens + ridgeline.top_k(probs, 3)[1].sum(1)

    calls = [
        (normal((n, 300), torch.float32, device, rng), keys(n, device, rng)) for n in (3, 8, 31)
    ]
    expected = [step(*call) for call in calls]
    results = without_recompilation(step, calls, dynamic=[0, 1])
    assert all(torch.equal(a, b) for a, b in zip(results, expected, strict=True))


@pytest.mark.gpu
def test_cuda_graph_draws_anew(rng: torch.Generator) -> None:
    device = torch.device("cuda", 0)
    x = normal((16, 32_000), torch.float32, device, rng)
    seed = keys(16, device, rng)
    drawn = torch.empty(16, dtype=torch.int32, device=device)
    seeded = torch.empty_like(drawn)

    def step() -> None:
        drawn.copy_(ridgeline.sample_from_logits(x, 1.0, 1000, 0.99)[0])
        seeded.copy_(ridgeline.sample_from_logits(x, 1.0, 50, 0.9, seed=seed)[0])

    graph = captured(step)
    seen = []
    for _ in range(3):
        graph.replay()
        seen.append((drawn.clone(), seeded.clone()))
    assert not torch.equal(seen[0][0], seen[1][0])
    assert not torch.equal(seen[1][0], seen[2][0])
    assert torch.equal(seen[0][1], seen[2][1])
    x.copy_(x.flip(0))
    seed.copy_(seed.flip(0))
    graph.replay()
    assert torch.equal(seeded, seen[0][1].flip(0))


@pytest.mark.gpu
def test_second_device(second_device: torch.device, rng: torch.Generator) -> None:
    x = normal((4, 9000), torch.float32, second_device, rng)
    seed = keys(4, second_device, rng)
    here = torch.device("cuda", 0)
    for how in FILTERS:
        there = draw(x, True, how, seed)
        assert all(
            torch.equal(a.to(here), b)
            for a, b in zip(there, draw(x.to(here), True, how, seed.to(here)), strict=True)
        )
    for op in (
        ridgeline.softmax,
        lambda x: ridgeline.top_k(x, 50, sorted=True)[1],
        lambda x: ridgeline.top_k_mask_logits(x, 300),
        lambda x: ridgeline.top_p_renorm_probs(torch.softmax(x, 1), 0.9),
        lambda x: ridgeline.top_k_renorm_probs(torch.softmax(x, 1), 9),
        lambda x: ridgeline.chain_speculative_sampling(
            torch.softmax(x[:2, None], 2),
            torch.zeros(2, 1, dtype=torch.int32, device=x.device),
            torch.softmax(x.view(2, 2, -1), 2),
            seed=1,
        )[0],
    ):
        there = op(x)
        assert there.device == second_device
        assert torch.equal(there.to(here), op(x.to(here)))
    assert torch.cuda.current_device() == 0


@pytest.mark.gpu
def test_repeats_are_the_same_bits(rng: torch.Generator) -> None:
    device = torch.device("cuda", 0)
    x = normal((64, 128_256), torch.float32, device, rng)
    seed = keys(64, device, rng)
    for how in (Filter(top_k=50, top_p=0.9), Filter(top_p=0.9)):
        first = draw(x, True, how, seed)
        for _ in range(5):
            again = draw(x, True, how, seed)
            assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_boundary_is_that_of_the_oracle() -> None:
    """The oracle's two masks differ by the tokens around top-p's end alone."""
    probs = torch.tensor([[0.5, 0.25, 0.15, 0.1]])
    sure, possible = support(probs, False, Filter(top_p=0.75 - BOUNDARY / 2))
    assert sure.tolist() == [[True, True, False, False]]
    assert possible.tolist() == [[True, True, True, False]]
