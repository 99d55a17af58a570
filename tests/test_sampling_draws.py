"""Sampling: what many draws look like, chains of draft tokens, and wrong calls."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import ridgeline
import torch
from elementwise import Wrong, assert_raises, assert_refuses_grad
from sampling_oracle import Filter, chi_square, distribution, support
from support import normal
from torch import Tensor

VOCAB = 300
CASES = (
    (True, Filter()),
    (False, Filter()),
    (True, Filter(top_k=20, top_p=0.9)),
    (False, Filter(top_k=20, top_p=0.9, joint=True)),
    (True, Filter(top_p=0.7, temperature=1.5)),
    (False, Filter(top_p=0.7)),
    (True, Filter(min_p=0.02, temperature=0.8)),
    (False, Filter(top_k=100)),
)


def draws_of(x: Tensor, from_logits: bool, how: Filter, seed: Tensor) -> Tensor:
    """A token of the one row for each seed."""
    rows = torch.zeros(seed.numel(), dtype=torch.int32, device=x.device)
    arguments = (None, from_logits, how.joint, rows, None, how.temperature, None, how.top_k)
    tokens, valid, _ = torch.ops.ridgeline.sample(
        x, seed, *arguments, None, how.top_p, None, how.min_p
    )
    assert valid.all()
    return tokens


def counts_of(x: Tensor, from_logits: bool, how: Filter, num_draws: int, seed: int) -> Tensor:
    counts = torch.zeros(x.shape[1], dtype=torch.long, device=x.device)
    step = 1 << 18 if x.is_cuda else 1 << 14
    for first in range(0, num_draws, step):
        last = min(first + step, num_draws)
        keys = torch.arange(first, last, device=x.device) + seed
        counts += torch.bincount(draws_of(x, from_logits, how, keys), minlength=x.shape[1])
    return counts.cpu()


def clear_row(how: Filter, from_logits: bool, rng: torch.Generator) -> Tensor:
    """A row none of whose tokens is at top-p's very end, so that its support is one set."""
    while True:
        x = torch.randn(1, VOCAB, generator=rng) * 1.5
        x = x if from_logits else torch.softmax(x, 1)
        sure, possible = support(x, from_logits, how)
        if torch.equal(sure, possible):
            return x


def exact_draw(x: Tensor, from_logits: bool, how: Filter) -> Tensor:
    """The distribution of a draw, float64."""
    kept = distribution(x, from_logits, how.temperature) * support(x, from_logits, how)[0]
    return (kept / kept.sum())[0]


@pytest.mark.parametrize(("from_logits", "how"), CASES, ids=str)
def test_draws_follow_the_exact_distribution(
    from_logits: bool, how: Filter, device: torch.device, rng: torch.Generator, seed: int
) -> None:
    x = clear_row(how, from_logits, rng).to(device)
    num_draws = 300_000 if device.type == "cuda" else 20_000
    counts = counts_of(x, from_logits, how, num_draws, seed)
    exact = exact_draw(x, from_logits, how)
    assert counts[exact == 0].sum() == 0, "a token outside the exact set"
    statistic, bound = chi_square(counts, exact)
    assert statistic < bound


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.parametrize(
    ("from_logits", "how"),
    [
        (True, Filter(top_k=20, top_p=0.9, min_p=0.01)),  # few candidates
        (False, Filter(top_p=0.8)),  # a histogram
        (True, Filter()),
    ],
    ids=str,
)
def test_ten_million_draws_stay_in_the_support(
    from_logits: bool, how: Filter, rng: torch.Generator, seed: int
) -> None:
    device = torch.device("cuda", 0)
    x = clear_row(how, from_logits, rng).to(device)
    counts = counts_of(x, from_logits, how, 10_000_000, seed)
    exact = exact_draw(x, from_logits, how)
    assert counts[exact == 0].sum() == 0, "a token outside the exact set"
    statistic, bound = chi_square(counts, exact)
    assert statistic < bound


@pytest.mark.parametrize("vocab", [32_000, 128_256])
def test_many_draws_of_a_real_vocabulary(
    vocab: int, device: torch.device, rng: torch.Generator, seed: int
) -> None:
    x = normal((1, vocab), torch.float32, device, rng, scale=2.0)
    num_draws = 20_000 if device.type == "cuda" else 30
    for how in (Filter(top_k=50, top_p=0.9), Filter(top_p=0.2), Filter(top_k=2000, min_p=0.05)):
        _, possible = support(x, True, how)
        counts = counts_of(x, True, how, num_draws, seed)
        assert counts[~possible[0]].sum() == 0, how


def broken_samplers(x: Tensor, rng: torch.Generator) -> dict[str, Callable[[int], Tensor]]:
    """Samplers with mistakes that a test of draws has to see."""
    exact = torch.softmax(x[0].double(), 0)
    uneven = exact * (1 + 0.1 * torch.sign(torch.randn(exact.shape, generator=rng)))
    shifted = exact.roll(1)

    def of(probs: Tensor) -> Callable[[int], Tensor]:
        return lambda n: torch.multinomial(probs, n, replacement=True, generator=rng)

    def few_bits(n: int) -> Tensor:
        """A uniform number of 8 bits: tails are never drawn."""
        uniform = torch.randint(256, (n,), generator=rng) / 256
        return torch.searchsorted(exact.cumsum(0), uniform.double(), right=True)

    return {"uneven": of(uneven), "shifted": of(shifted), "few bits": few_bits}


@pytest.mark.parametrize("name", ["uneven", "shifted", "few bits"])
def test_the_test_of_draws_catches_a_broken_sampler(name: str, rng: torch.Generator) -> None:
    x = torch.randn(1, VOCAB, generator=rng) * 1.5
    exact = exact_draw(x, True, Filter())
    tokens = broken_samplers(x, rng)[name](100_000)
    statistic, bound = chi_square(torch.bincount(tokens, minlength=VOCAB), exact)
    assert statistic > bound
    fair = torch.multinomial(exact, 100_000, replacement=True, generator=rng)
    statistic, bound = chi_square(torch.bincount(fair, minlength=VOCAB), exact)
    assert statistic < bound


@pytest.mark.parametrize("closeness", [0.0, 0.7, 1.0])
def test_chain_gives_the_target_distribution(
    closeness: float, device: torch.device, rng: torch.Generator
) -> None:
    batch = 200_000 if device.type == "cuda" else 30_000
    num_draft, vocab = 3, 24
    target = torch.softmax(torch.randn(num_draft + 1, vocab, generator=rng) * 1.5, 1)
    draft = torch.softmax(torch.randn(num_draft, vocab, generator=rng) * 1.5, 1)
    draft = closeness * target[:num_draft] + (1 - closeness) * draft
    drafted = torch.stack(
        [torch.multinomial(row, batch, replacement=True, generator=rng) for row in draft], dim=1
    )
    tokens, accepted, emitted = ridgeline.chain_speculative_sampling(
        draft.to(device).expand(batch, -1, -1),
        drafted.to(device),
        target.to(device).expand(batch, -1, -1),
        seed=torch.arange(batch, device=device),
    )
    place = torch.arange(num_draft + 1, device=device)
    assert torch.equal(tokens < 0, place > emitted[:, None])
    copied = place[:num_draft] < emitted[:, None]
    assert torch.equal(tokens[:, :num_draft][copied], drafted.to(device).int()[copied])
    assert (accepted >= emitted).all()
    for i in range(num_draft + 1):
        drawn = tokens[:, i][tokens[:, i] >= 0].cpu()
        exact = target[i].double() / target[i].double().sum()
        statistic, bound = chi_square(torch.bincount(drawn, minlength=vocab), exact)
        assert statistic < bound, f"position {i}"
    if closeness == 1.0:
        assert emitted.eq(num_draft).all()


def test_chain_counts_and_odd_inputs(device: torch.device) -> None:
    sure = torch.eye(4, device=device)
    draft = sure[torch.tensor([[0, 1, 2]], device=device)]
    target = sure[torch.tensor([[0, 3, 2, 1]], device=device)]
    ids = torch.tensor([[0, 1, 2]], device=device, dtype=torch.int32)
    tokens, accepted, emitted = ridgeline.chain_speculative_sampling(draft, ids, target, seed=1)
    assert tokens.tolist() == [[0, 3, -1, -1]]
    assert (accepted.item(), emitted.item()) == (2, 1)
    totals = [torch.full((1,), 5, device=device, dtype=torch.int32) for _ in range(2)]
    ridgeline.chain_speculative_sampling(draft, ids, target, *totals, seed=1)
    assert [t.item() for t in totals] == [7, 6]
    alone = ridgeline.chain_speculative_sampling(draft[:, :0], ids[:, :0], target[:, :1], seed=1)
    assert alone[0].tolist() == [[0]]
    strange = torch.full((1, 3, 4), math.nan, device=device), ids * 1000 - 7
    tokens = ridgeline.chain_speculative_sampling(*strange, target * math.nan, seed=1)[0]
    assert int(tokens.max()) < 4


def ones(*shape: int, dtype: torch.dtype = torch.float32) -> Any:
    return lambda device: torch.ones(shape, dtype=dtype, device=device)


def good_sample(device: torch.device) -> dict[str, Any]:
    return {"logits": torch.ones(4, 64, device=device), "seed": 3}


F64, I32 = torch.float64, torch.int32
WRONG_SAMPLE = (
    Wrong("dtype", {"logits": ones(4, 64, dtype=F64)}, r"'logits'.*float32.*float64"),
    Wrong("rank", {"logits": ones(64)}, r"'logits'.*2 dimensions"),
    Wrong("stride", {"logits": lambda d: ones(64, 4)(d).t()}, r"'logits'.*stride 4.*contiguous"),
    Wrong("vocabulary", {"logits": ones(4, 0)}, r"'logits'.*vocabulary of 1"),
    Wrong("seed's shape", {"seed": ones(3, dtype=torch.int64)}, r"'seed'.*\[4\].*\[3\]"),
    Wrong("seed's dtype", {"seed": ones(4, dtype=I32)}, r"'seed'.*int64.*int32"),
    Wrong("seed's rank", {"seed": ones(4, 1, dtype=torch.int64)}, r"'seed'.*1 dimension"),
    Wrong("offset's dtype", {"offset": ones(4)}, r"'offset'.*int64.*float32"),
    Wrong("offset alone", {"seed": None, "offset": 3}, r"'seed'.*'offset' is given"),
    Wrong("top_k's dtype", {"top_k": ones(4)}, r"'top_k'.*int32.*float32"),
    Wrong("top_p's shape", {"top_p": ones(5)}, r"'top_p'.*\[4\].*\[5\]"),
    Wrong("top_p's dtype", {"top_p": ones(4, dtype=F64)}, r"'top_p'.*float32.*float64"),
    Wrong("negative top_p", {"top_p": -0.5}, r"'top_p'.*>= 0.*-0.5"),
    Wrong("nan min_p", {"min_p": math.nan}, r"'min_p'.*finite"),
    Wrong("temperature", {"temperature": -1.0}, r"'temperature'.*>= 0"),
    Wrong("indices' dtype", {"indices": ones(4)}, r"'indices'.*int32.*float32"),
    Wrong("indices' rank", {"indices": ones(4, 1, dtype=I32)}, r"'indices'.*1 dimension"),
    Wrong("order", {"filter_apply_order": "top_p_first"}, r"'filter_apply_order'.*joint"),
)
WRONG_TOP_K = (
    Wrong("k of 0", {"k": 0}, r"'k'.*1 to 64.*got 0"),
    Wrong("k over the size", {"k": 65}, r"'k'.*1 to 64.*got 65"),
    Wrong("dtype", {"input": ones(4, 64, dtype=F64)}, r"'input'.*float64"),
    Wrong("tie_break", {"tie_break": 2}, r"'tie_break'"),
)
WRONG_CHAIN = (
    Wrong("ids", {"draft_token_ids": ones(2, 4, dtype=I32)}, r"'draft_token_ids'.*\[2, 3\]"),
    Wrong("ids' dtype", {"draft_token_ids": ones(2, 3)}, r"'draft_token_ids'.*int32.*float32"),
    Wrong("target", {"target_probs": ones(2, 3, 9)}, r"'target_probs'.*\[2, 4, 9\].*\[2, 3, 9\]"),
    Wrong("draft", {"draft_probs": ones(2, 3, 9, dtype=F64)}, r"'draft_probs'.*float64"),
    Wrong("seed", {"seed": ones(5, dtype=torch.int64)}, r"'seed'.*\[2\].*\[5\]"),
)


def by_name(wrong: Wrong) -> str:
    return wrong.name


@pytest.mark.parametrize("wrong", WRONG_SAMPLE, ids=by_name)
def test_wrong_sample(device: torch.device, wrong: Wrong) -> None:
    assert_raises(wrong, ridgeline.sample_from_logits, good_sample(device), device)


@pytest.mark.parametrize("wrong", WRONG_TOP_K, ids=by_name)
def test_wrong_top_k(device: torch.device, wrong: Wrong) -> None:
    good = {"input": torch.ones(4, 64, device=device), "k": 3}
    if wrong.name == "tie_break":
        with pytest.raises(NotImplementedError, match=wrong.message):
            ridgeline.top_k(**good, **wrong.changes)
        return
    assert_raises(wrong, ridgeline.top_k, good, device)


@pytest.mark.gpu
def test_the_op_sorts_few() -> None:
    x = torch.ones(2, 500, device="cuda")
    with pytest.raises(RuntimeError, match=r"'k'.*at most 256.*'sorted'.*300"):
        torch.ops.ridgeline.top_k(x, 300, True)
    assert torch.equal(ridgeline.top_k(x, 300, sorted=True)[1][1].cpu(), torch.arange(300))


@pytest.mark.parametrize("wrong", WRONG_CHAIN, ids=by_name)
def test_wrong_chain(device: torch.device, wrong: Wrong) -> None:
    good = {
        "draft_probs": torch.ones(2, 3, 9, device=device),
        "draft_token_ids": torch.ones(2, 3, device=device, dtype=torch.int64),
        "target_probs": torch.ones(2, 4, 9, device=device),
        "seed": 3,
    }
    assert_raises(wrong, ridgeline.chain_speculative_sampling, good, device)


@pytest.mark.parametrize("op", ["softmax", "top_k_mask_logits", "top_k_renorm_probs"])
def test_wrong_rows(device: torch.device, op: str) -> None:
    function: Any = getattr(ridgeline, op)
    setting: dict[str, Any] = {} if op == "softmax" else {"top_k": 3}
    name = "probs" if op.endswith("probs") else "logits"
    good = {name: torch.ones(4, 64, device=device), **setting}
    bad = (
        Wrong("rank", {name: ones(4)}, rf"'{name}'.*2 dimensions"),
        Wrong("dtype", {name: ones(4, 64, dtype=F64)}, rf"'{name}'.*float64"),
    )
    for wrong in bad:
        assert_raises(wrong, function, good, device)


@pytest.mark.gpu
def test_mixed_devices() -> None:
    device = torch.device("cuda", 0)
    on_cpu = {
        "seed": torch.ones(4, dtype=torch.int64),
        "indices": torch.zeros(4, dtype=torch.int32),
        "top_p": torch.ones(4),
        "top_k": torch.ones(4, dtype=torch.int32),
        "temperature": torch.ones(4),
    }
    for name, value in on_cpu.items():
        wrong = Wrong(name, {name: value}, rf"'{name}'.*cuda:0.*cpu")
        assert_raises(wrong, ridgeline.sample_from_logits, good_sample(device), device)


def test_gradients_are_refused(device: torch.device) -> None:
    x = torch.ones(2, 64, device=device)
    assert_refuses_grad(ridgeline.softmax, [x])
    assert_refuses_grad(ridgeline.sample_from_logits, [x])
    assert_refuses_grad(lambda x: torch.ops.ridgeline.softmax(x, None, 1.0), [x])
    assert_refuses_grad(lambda x: ridgeline.top_k(x, 3), [x])
