"""`ridgeline.attention` at its limits: 512 requests of 0 to 65,536 keys, a pool of 40 GB, NaN."""

from __future__ import annotations

import random
from typing import Any

import oracle
import pytest
import ridgeline
import torch
from batch_problem import Batch, Inputs
from support import poisoned_call
from torch import Tensor

HEADS, DIM, PAGE = (4, 2), 64, 16
EXTREMES, NUM_CHECKED = 9, 60
LONGEST = 65_536
POOL_BYTES = 40 << 30


def wide_lengths(draw: random.Random, decodes: bool) -> list[tuple[int, int]]:
    """512 requests, their keys spread over all orders of magnitude, the extremes among them."""
    kv_lens = [0, 1, 15, 16, 17, LONGEST - 1, LONGEST, LONGEST, 40_001]
    kv_lens += [int(2 ** draw.uniform(0, 13)) for _ in range(512 - EXTREMES)]
    draw.shuffle(kv_lens)
    if decodes:
        return [(1, kv_len) for kv_len in kv_lens]
    qo_lens = [draw.choice((0, 1, 1, 1, 1, 2, 5, 17, 40)) for _ in kv_lens]
    qo_lens[kv_lens.index(LONGEST)] = 70
    qo_lens[kv_lens.index(40_001)] = 200
    return list(zip(qo_lens, kv_lens, strict=True))


class Wide:
    """A batch whose values are drawn on the GPU; slots that no request has are NaN."""

    def __init__(self, lengths: list[tuple[int, int]], rng: torch.Generator) -> None:
        device = torch.device("cuda", 0)
        draw = torch.Generator(device).manual_seed(int(torch.randint(2**31, (), generator=rng)))
        self.lengths = lengths
        counts = torch.tensor([-(-kv // PAGE) for _, kv in lengths])
        kv_lens = torch.tensor([kv for _, kv in lengths])
        qo_lens = torch.tensor([qo for qo, _ in lengths])
        total = int(counts.sum())
        # Every page once, in random order, and pages that nothing references between them.
        pages = torch.randperm(total + 64, generator=rng)[:total].to(device)
        shape = (total + 64, PAGE, HEADS[1], DIM)
        keys = torch.arange(total * PAGE).view(total, PAGE)
        first = torch.repeat_interleave((counts.cumsum(0) - counts) * PAGE, counts)
        length = torch.repeat_interleave(kv_lens, counts)
        exists = (keys - first[:, None] < length[:, None]).to(device)
        self.pools = []
        for _ in range(2):
            pool = torch.full(shape, torch.nan, dtype=torch.float16, device=device)
            values = torch.randn(
                (total, *shape[1:]), generator=draw, dtype=torch.float16, device=device
            )
            pool[pages] = values.masked_fill_(~exists[:, :, None, None], torch.nan)
            self.pools.append(pool)
        tokens = (int(qo_lens.sum()), HEADS[0], DIM)
        self.q = torch.randn(tokens, generator=draw, dtype=torch.float16, device=device)
        garbage = torch.tensor([-1, 2**31 - 1, total + 64], device=device)
        self.index = {
            "qo_indptr": torch.cat([torch.zeros(1), qo_lens.cumsum(0)]).int().to(device),
            "kv_indptr": torch.cat([torch.zeros(1), counts.cumsum(0)]).int().to(device),
            "kv_indices": torch.cat([pages, garbage]).int(),
            "kv_last_page_len": ((kv_lens - 1) % PAGE + 1).where(kv_lens > 0, 0).int().to(device),
        }

    def call(self, **options: Any) -> tuple[Tensor, Tensor]:
        out, lse = ridgeline.attention(
            self.q, (self.pools[0], self.pools[1]), **self.index, return_lse=True, **options
        )
        return out, lse

    def reference(self, request: int) -> tuple[slice, oracle.Reference]:
        """Its rows, and what they must be, causal."""
        begin, end = self.index["qo_indptr"][request : request + 2].tolist()
        first, last = self.index["kv_indptr"][request : request + 2].tolist()
        pages = self.index["kv_indices"][first:last].long()
        k, v = (pool[pages].flatten(0, 1)[: self.lengths[request][1]] for pool in self.pools)
        return slice(begin, end), oracle.attention(self.q[begin:end], k, v, causal=True)


@pytest.mark.gpu
@pytest.mark.parametrize("decodes", [True, False], ids=["decode", "mixed"])
def test_512_requests_of_up_to_65536_keys(decodes: bool, rng: torch.Generator, seed: int) -> None:
    """The extremes and some others against float64, all of them with two ways to cut the work."""
    draw = random.Random(seed)
    lengths = wide_lengths(draw, decodes)
    wide = Wide(lengths, rng)
    options: dict[str, Any] = {"causal": True, "max_q_len": 1 if decodes else 200}
    results = []
    for invariant in (False, True):
        results.append(
            poisoned_call(wide.q.device, wide.call, batch_invariant=invariant, **options)
        )
        again = poisoned_call(wide.q.device, wide.call, batch_invariant=invariant, **options)
        assert torch.equal(again[0], results[-1][0]), "out: not repeatable bitwise"
    by_length = sorted(range(len(lengths)), key=lambda request: lengths[request][1])
    checked = [*by_length[:5], *by_length[-5:], *draw.sample(by_length[5:-5], NUM_CHECKED)]
    longest = sorted(range(len(lengths)), key=lambda request: lengths[request][0])[-3:]
    for request in (*checked, *longest):
        rows, reference = wide.reference(request)
        for out, lse in results:
            oracle.check(reference, out[rows], lse[rows])
    # Values reach 5 or so, and each result is right to two roundings of float16.
    difference = (results[0][0].float() - results[1][0].float()).abs().amax(dim=(1, 2))
    assert difference.max() < 2**-6, f"row {difference.argmax()}: {difference.max()}"


@pytest.mark.gpu
@pytest.mark.large
@pytest.mark.parametrize("stacked", [False, True], ids=["pair", "stacked"])
def test_pool_of_40_gb(stacked: bool, rng: torch.Generator) -> None:
    """Pages all over a pool of 2.1e10 elements; only those that are used are ever written."""
    device = torch.device("cuda", 0)
    free = torch.cuda.mem_get_info(device)[0]
    if free < POOL_BYTES + (2 << 30):
        pytest.skip(f"needs {POOL_BYTES / 2**30 + 2:.0f} GiB, {free / 2**30:.0f} GiB are free")
    batch = Batch(
        lengths=((1, 300), (20, 90), (0, 40), (1, 1)), heads=(4, 2), head_dims=(64, 64),
        causal=True, stacked=stacked,
    )  # fmt: skip
    inputs = batch.inputs(device, rng)
    expected = inputs.call()
    parts = [inputs.cache] if stacked else list(inputs.cache)
    used = len(parts[0])
    num_pages = POOL_BYTES // sum(part[0].numel() * part.element_size() for part in parts)
    places = torch.arange(used, device=device) * (num_pages - 1) // (used - 1)
    pools = []
    for part in parts:
        pool = torch.empty((num_pages, *part.shape[1:]), dtype=part.dtype, device=device)
        pool[places] = part
        pools.append(pool)
    table = inputs.index["kv_indices"].long().clamp(0, used - 1)
    inputs.index["kv_indices"] = places[table].int()
    inputs.cache = pools[0] if stacked else tuple(pools)
    out, lse = inputs.call()
    assert torch.equal(out, expected[0])
    assert torch.equal(lse, expected[1])


def poisoned_request(inputs: Inputs, request: int) -> None:
    """Make one request's keys and values NaN."""
    begin, end = inputs.index["kv_indptr"][request : request + 2].tolist()
    for pool in inputs.cache:
        pool[inputs.index["kv_indices"][begin:end].long()] = torch.nan


@pytest.mark.parametrize("request_of_nan", [0, 2])
def test_nan_stays_with_its_request(
    request_of_nan: int, device: torch.device, rng: torch.Generator
) -> None:
    lengths = ((1, 300), (9, 700), (3, 40), (1, 64))
    batch = Batch(lengths=lengths, heads=(8, 2), causal=True)
    inputs = batch.inputs(device, rng)
    expected = inputs.call()
    poisoned_request(inputs, request_of_nan)
    out, lse = poisoned_call(device, inputs.call)
    begin = sum(qo for qo, _ in lengths[:request_of_nan])
    own = torch.zeros(len(out), dtype=torch.bool, device=device)
    own[begin : begin + lengths[request_of_nan][0]] = True
    assert out[own].isnan().all()
    assert torch.equal(out[~own], expected[0][~own])
    assert torch.equal(lse[~own], expected[1][~own])
