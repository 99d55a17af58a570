"""The sampling ops on the CPU: plain torch ops, the integer masses and random stream of the GPU.

A weight of 1 is a mass of 2^42; sums of masses are exact, so that only exp2 itself, whose last
bits differ between machines, may move a draw or a threshold.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from . import _check
from ._ops import cpu_impl

MAX_VOCAB = 1 << 21
LOGITS_DTYPES = (torch.float32, torch.float16, torch.bfloat16)

_MASS_BITS = 42
_MASK = 0xFFFFFFFF
_LARGEST_PROB = 2.0**100
_CHUNK = 1 << 22  # elements that are worked on at a time


@cpu_impl("sample")
def _sample(
    input: Tensor,
    seed: Tensor,
    offset: Tensor | None,
    from_logits: bool,
    joint: bool,
    indices: Tensor | None,
    temperature: Tensor | None,
    temperature_val: float,
    top_k: Tensor | None,
    top_k_val: int,
    top_p: Tensor | None,
    top_p_val: float,
    min_p: Tensor | None,
    min_p_val: float,
) -> tuple[Tensor, Tensor, Tensor]:
    op, name = "sample", "logits" if from_logits else "probs"
    _check_rows(op, name, input, LOGITS_DTYPES if from_logits else (torch.float32,))
    num_rows = _check_indices(op, name, input, indices)
    filters = Filters(
        _per_row(op, "temperature", temperature, temperature_val, num_rows),
        _integers(op, "top_k", top_k, top_k_val, num_rows),
        _per_row(op, "top_p", top_p, top_p_val, num_rows),
        _per_row(op, "min_p", min_p, min_p_val, num_rows),
        joint,
    )
    keys = _keys(op, seed, offset, num_rows)
    tokens = torch.empty(num_rows, dtype=torch.int32)
    valid = torch.empty(num_rows, dtype=torch.bool)
    log_probs = torch.empty(num_rows, dtype=torch.float32)
    for part in _parts(num_rows, input.shape[1]):
        rows = Rows(_selected(input, indices, part), from_logits, filters.of(part))
        kept = rows.mass.masked_fill(~rows.kept(), 0)
        chosen = _drawn(kept, philox(keys[0, part], keys[1, part], 0))
        tokens[part] = torch.where(rows.valid, chosen, 0).int()
        valid[part] = rows.valid
        log_probs[part] = rows.log_probs(chosen)
    return tokens, valid, log_probs


@cpu_impl("softmax")
def _softmax(logits: Tensor, temperature: Tensor | None, temperature_val: float) -> Tensor:
    _check_rows("softmax", "logits", logits, LOGITS_DTYPES)
    num_rows = logits.shape[0]
    given = _per_row("softmax", "temperature", temperature, temperature_val, num_rows)
    output = torch.empty(logits.shape, dtype=torch.float32)
    for part in _parts(num_rows, logits.shape[1]):
        rate = torch.where(given[part] > 0, _rate(given[part]), 3e38)
        weight, mass, valid = _weigh_logits(logits[part].float(), rate)
        scale = 2.0**_MASS_BITS / mass.sum(1).double()
        output[part] = weight * torch.where(valid, scale, math.nan).float()[:, None]
    return output


@cpu_impl("top_p_renorm_probs")
def _top_p_renorm_probs(probs: Tensor, top_p: Tensor | None, top_p_val: float) -> Tensor:
    op = "top_p_renorm_probs"
    _check_rows(op, "probs", probs, (torch.float32,))
    num_rows = probs.shape[0]
    filters = Filters.none(num_rows, top_p=_per_row(op, "top_p", top_p, top_p_val, num_rows))
    return _renormalized(probs, filters)


@cpu_impl("top_k_renorm_probs")
def _top_k_renorm_probs(probs: Tensor, top_k: Tensor | None, top_k_val: int) -> Tensor:
    op = "top_k_renorm_probs"
    _check_rows(op, "probs", probs, (torch.float32,))
    num_rows = probs.shape[0]
    filters = Filters.none(num_rows, top_k=_integers(op, "top_k", top_k, top_k_val, num_rows))
    return _renormalized(probs, filters)


@cpu_impl("top_k_mask_logits")
def _top_k_mask_logits(logits: Tensor, top_k: Tensor | None, top_k_val: int) -> Tensor:
    op = "top_k_mask_logits"
    _check_rows(op, "logits", logits, LOGITS_DTYPES)
    k = _integers(op, "top_k", top_k, top_k_val, logits.shape[0])
    k = torch.where(k > 0, k, logits.shape[1])
    rank = _ranks(logits.float())
    return logits.masked_fill(rank >= k[:, None], -math.inf).contiguous()


@cpu_impl("top_k")
def _top_k(input: Tensor, k: int, sorted: bool) -> tuple[Tensor, Tensor]:  # noqa: A002
    _check_rows("top_k", "input", input, LOGITS_DTYPES)
    vocab = input.shape[1]
    if not 1 <= k <= vocab:
        expected = f"1 to {vocab} (the size of a row)"
        _check.fail("top_k", "k", expected, k, "Pass min(k, input.shape[1]).")
    order = torch.sort(input.float(), dim=1, descending=True, stable=True).indices
    indices = order[:, :k].contiguous() if sorted else order[:, :k].sort(1).values
    return input.gather(1, indices), indices


@cpu_impl("chain_speculative_sampling")
def _chain_speculative_sampling(
    draft_probs: Tensor,
    draft_token_ids: Tensor,
    target_probs: Tensor,
    seed: Tensor,
    offset: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    op = "chain_speculative_sampling"
    _check_chain(op, draft_probs, draft_token_ids, target_probs)
    batch, num_draft, vocab = draft_probs.shape
    seeds, offsets = _keys(op, seed, offset, batch)
    drafted = draft_token_ids.long().clamp(0, vocab - 1)
    q = draft_probs.gather(2, drafted[..., None])[..., 0].double()
    p = target_probs[:, :num_draft].gather(2, drafted[..., None])[..., 0].double()
    draws = torch.arange(1, num_draft + 1)
    words = philox(seeds[:, None], offsets[:, None], draws)
    passed = words[0] * 2.0**-32 * q < p
    emitted = passed.long().cumprod(1).sum(1)

    padded = torch.cat([draft_probs, torch.zeros(batch, 1, vocab)], dim=1)
    at = torch.arange(batch)
    target = target_probs[at, emitted]
    residual = _cleaned(target - padded[at, emitted])
    nothing_left = residual.amax(1, keepdim=True) == 0
    mass = _prob_mass(torch.where(nothing_left, _cleaned(target), residual))[1]
    last = torch.where(mass.sum(1) > 0, _drawn(mass, philox(seeds, offsets, 0)), 0)

    place = torch.arange(num_draft + 1)
    tokens = torch.cat([drafted, torch.zeros(batch, 1, dtype=torch.long)], dim=1)
    tokens = torch.where(place < emitted[:, None], tokens, -1)
    tokens[at, emitted] = last
    return tokens.int(), passed.sum(1).int(), emitted.int()


@dataclass
class Filters:
    """What is kept of each row; tensors [num_rows], float64 but `top_k`."""

    temperature: Tensor
    top_k: Tensor
    top_p: Tensor
    min_p: Tensor
    joint: bool

    @classmethod
    def none(
        cls, num_rows: int, top_k: Tensor | None = None, top_p: Tensor | None = None
    ) -> Filters:
        ones = torch.ones(num_rows, dtype=torch.float64)
        k = torch.zeros(num_rows, dtype=torch.long) if top_k is None else top_k
        return cls(ones, k, ones if top_p is None else top_p, torch.zeros_like(ones), False)

    def of(self, part: slice) -> Filters:
        return Filters(
            self.temperature[part],
            self.top_k[part],
            self.top_p[part],
            self.min_p[part],
            self.joint,
        )


class Rows:
    """Rows [num_rows, vocab] in float32 with their masses and filters."""

    def __init__(self, x: Tensor, from_logits: bool, filters: Filters) -> None:
        greedy = ~(filters.temperature > 0)
        self.from_logits, self.joint = from_logits, filters.joint
        self.temperature = torch.where(greedy, 1.0, filters.temperature)
        off = (filters.top_k <= 0) | (filters.top_k > x.shape[1])
        self.k = torch.where(greedy, 1, torch.where(off, x.shape[1], filters.top_k))
        self.top_p = torch.where(greedy | ~(filters.top_p < 1), 1.0, filters.top_p)
        self.min_p = torch.where(greedy | ~(filters.min_p > 0), 0.0, filters.min_p)
        self.x = x
        self.rate = _rate(self.temperature)
        if from_logits:
            self.weight, self.mass, self.valid = _weigh_logits(x, self.rate)
        else:
            self.weight, self.mass = _prob_mass(x)
            good = ((x >= 0) & (x <= _LARGEST_PROB)).all(1)
            self.mass = torch.where(good[:, None], self.mass, 0)
            self.valid = good & (self.mass.sum(1) > 0)

    def kept(self) -> Tensor:
        """Mask of the elements that the filters leave."""
        vocab = self.x.shape[1]
        if bool((self.k == vocab).all() & (self.top_p == 1).all() & (self.min_p == 0).all()):
            return torch.ones_like(self.mass, dtype=torch.bool)
        ordered, order = torch.sort(self.x, dim=1, descending=True, stable=True)
        running = self.mass.gather(1, order).cumsum(1)
        count = self.k.clone()
        within = running[:, -1] if self.joint else running.gather(1, self.k[:, None] - 1)[:, 0]
        wanted = (self.top_p * within.double()).ceil().clamp(min=1).long()
        by_mass = (running < wanted[:, None]).sum(1) + 1
        count = torch.where(self.top_p < 1, torch.minimum(count, by_mass), count)
        least = self._min_p_bound(ordered[:, 0].double())
        enough = (ordered.double() >= least[:, None]).sum(1).clamp(min=1)
        count = torch.where(self.min_p > 0, torch.minimum(count, enough), count)
        first = torch.arange(vocab) < count[:, None]
        return torch.zeros_like(first).scatter_(1, order, first)

    def _min_p_bound(self, largest: Tensor) -> Tensor:
        if not self.from_logits:
            return largest * self.min_p
        return torch.minimum(largest + self.temperature * self.min_p.log(), largest)

    def log_probs(self, tokens: Tensor) -> Tensor:
        weight = self.weight.gather(1, tokens[:, None])[:, 0].double().log2()
        if self.from_logits:
            chosen = self.x.gather(1, tokens[:, None])[:, 0]
            weight = ((chosen - self.x.amax(1)) * self.rate).double()
        total = self.mass.sum(1).double().log2() - _MASS_BITS
        return torch.where(self.valid, (weight - total) * math.log(2), math.nan).float()


def philox(seed: Tensor, offset: Tensor, draw: int | Tensor) -> tuple[Tensor, Tensor]:
    """Philox4x32-10 of key `seed` and counter (`offset`, `draw`): the high and the low word."""
    key = [seed & _MASK, (seed >> 32) & _MASK]
    zero = torch.zeros_like(offset)
    x = [offset & _MASK, (offset >> 32) & _MASK, zero + draw, zero]
    for _ in range(10):
        a, b = x[0] * 0xD2511F53, x[2] * 0xCD9E8D57
        x = [_high(b) ^ x[1] ^ key[0], b & _MASK, _high(a) ^ x[3] ^ key[1], a & _MASK]
        key = [(key[0] + 0x9E3779B9) & _MASK, (key[1] + 0xBB67AE85) & _MASK]
    return x[1], x[0]


def _high(product: Tensor) -> Tensor:
    """The upper half of a product of two 32-bit numbers, which int64 holds modulo 2^64."""
    return (product >> 32) & _MASK


def _scaled(words: tuple[Tensor, Tensor], total: Tensor) -> Tensor:
    """floor(random * total / 2^64) of 64 random bits and totals below 2^63."""
    high, low = words
    total_high, total_low = total >> 32, total & _MASK
    a, b, c = low * total_low, low * total_high, high * total_low
    d = high * total_high
    carry = (_high(a) + (b & _MASK) + (c & _MASK)) >> 32
    return d + _high(b) + _high(c) + carry


def _drawn(mass: Tensor, words: tuple[Tensor, Tensor]) -> Tensor:
    """Where the running mass of each row passes its random number."""
    running = mass.cumsum(1)
    target = _scaled(words, running[:, -1])
    return (running <= target[:, None]).sum(1).clamp(max=mass.shape[1] - 1)


def _rate(temperature: Tensor) -> Tensor:
    # Never 0, which would make NaN of -inf.
    return (math.log2(math.e) / temperature).clamp(min=1.2e-38, max=3e38).float()


def _mass(weight: Tensor) -> Tensor:
    return (weight.double() * 2.0**_MASS_BITS).round().long()


def _weigh_logits(x: Tensor, rate: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Weights relative to each row's largest, their masses, and which rows are valid."""
    largest = x.amax(1, keepdim=True)
    good = (x < math.inf).all(1) & (largest[:, 0] > -math.inf)
    weight = torch.exp2((x - largest) * rate[:, None])
    return weight, _mass(torch.where(good[:, None], weight, 0.0)), good


def _prob_mass(x: Tensor) -> tuple[Tensor, Tensor]:
    """Weights over the power of two above each row's largest, and their masses."""
    exponent = torch.frexp(x.amax(1, keepdim=True))[1].clamp(min=-100)
    weight = torch.ldexp(x, -exponent)
    return weight, _mass(torch.where((x >= 0) & (x <= _LARGEST_PROB), weight, 0.0))


def _cleaned(x: Tensor) -> Tensor:
    """What no weight can be made of counts as 0."""
    return torch.where((x > 0) & (x <= _LARGEST_PROB), x, 0.0)


def _ranks(x: Tensor) -> Tensor:
    order = torch.sort(x, dim=1, descending=True, stable=True).indices
    return torch.empty_like(order).scatter_(1, order, torch.arange(x.shape[1]).expand_as(order))


def _renormalized(probs: Tensor, filters: Filters) -> Tensor:
    output = torch.empty(probs.shape, dtype=torch.float32)
    for part in _parts(*probs.shape):
        rows = Rows(probs[part], False, filters.of(part))
        keep = rows.kept() & rows.valid[:, None]
        kept_mass = rows.mass.masked_fill(~keep, 0).sum(1).clamp(min=1).double()
        scale = (2.0**_MASS_BITS / kept_mass).float()[:, None]
        output[part] = torch.where(keep, rows.weight * scale, 0.0)
    return output


def _parts(num_rows: int, vocab: int) -> list[slice]:
    step = max(1, _CHUNK // vocab)
    return [slice(i, min(i + step, num_rows)) for i in range(0, num_rows, step)]


def _selected(input: Tensor, indices: Tensor | None, part: slice) -> Tensor:
    if indices is None:
        return input[part].float()
    return input[indices[part].long().clamp(0, input.shape[0] - 1)].float()


def _check_rows(op: str, name: str, input: Tensor, dtypes: tuple[torch.dtype, ...]) -> None:
    _check.dtype(op, name, input, dtypes)
    _check.rank(op, name, input, 2)
    _check.last_stride(op, name, input)
    if not 1 <= input.shape[1] <= MAX_VOCAB:
        expected = f"a vocabulary of 1 to {MAX_VOCAB}"
        _check.fail(op, name, expected, list(input.shape), "Split the vocabulary.")


def _check_indices(op: str, name: str, input: Tensor, indices: Tensor | None) -> int:
    if indices is None:
        return input.shape[0]
    _check.same_device(op, "indices", indices, name, input)
    _check.dtype(op, "indices", indices, (torch.int32, torch.int64))
    _check.rank(op, "indices", indices, 1)
    if input.shape[0] == 0 and indices.shape[0] > 0:
        expected = "at least one row, since 'indices' selects some"
        way_out = "Pass empty indices with an empty batch."
        _check.fail(op, name, expected, list(input.shape), way_out)
    return indices.shape[0]


def _check_per_row(op: str, name: str, tensor: Tensor, num_rows: int) -> None:
    if tensor.device.type != "cpu":
        _check.fail(op, name, "device cpu", tensor.device, "Move it with .to('cpu').")
    _check.rank(op, name, tensor, 1)
    if tensor.shape[0] not in (1, num_rows):
        expected = f"shape [{num_rows}] = one value a row, or [1]"
        _check.fail(op, name, expected, list(tensor.shape), "Pass a tensor of that shape.")


def _per_row(op: str, name: str, tensor: Tensor | None, value: float, num_rows: int) -> Tensor:
    if tensor is None:
        if not (math.isfinite(value) and value >= 0):
            way_out = "Leave it out to switch it off."
            _check.fail(op, name, "a finite number >= 0", value, way_out)
        return torch.full((num_rows,), value, dtype=torch.float64)
    _check_per_row(op, name, tensor, num_rows)
    _check.dtype(op, name, tensor, (torch.float32,))
    return tensor.double().expand(num_rows)


def _integers(op: str, name: str, tensor: Tensor | None, value: int, num_rows: int) -> Tensor:
    if tensor is None:
        return torch.full((num_rows,), value, dtype=torch.long)
    _check_per_row(op, name, tensor, num_rows)
    _check.dtype(op, name, tensor, (torch.int32, torch.int64))
    return tensor.long().expand(num_rows)


def _keys(op: str, seed: Tensor, offset: Tensor | None, num_rows: int) -> Tensor:
    """Seeds and offsets, [2, num_rows]."""
    keys = torch.zeros(2, num_rows, dtype=torch.long)
    for row, name, tensor in ((0, "seed", seed), (1, "offset", offset)):
        if tensor is not None:
            _check_per_row(op, name, tensor, num_rows)
            _check.dtype(op, name, tensor, (torch.int64,))
            keys[row] = tensor
    return keys


def _check_chain(op: str, draft: Tensor, tokens: Tensor, target: Tensor) -> None:
    _check.dtype(op, "draft_probs", draft, (torch.float32,))
    _check.rank(op, "draft_probs", draft, 3)
    _check.last_stride(op, "draft_probs", draft)
    batch, num_draft, vocab = draft.shape
    if not 1 <= vocab <= MAX_VOCAB:
        expected = f"a vocabulary of 1 to {MAX_VOCAB}"
        _check.fail(op, "draft_probs", expected, list(draft.shape), "Split the vocabulary.")
    _check.same_device(op, "draft_token_ids", tokens, "draft_probs", draft)
    _check.dtype(op, "draft_token_ids", tokens, (torch.int32, torch.int64))
    meaning = "[batch_size, num_speculative_tokens]"
    _check.shape(op, "draft_token_ids", tokens, (batch, num_draft), meaning)
    _check.same_device(op, "target_probs", target, "draft_probs", draft)
    _check.dtype(op, "target_probs", target, (torch.float32,))
    meaning = "[batch_size, num_speculative_tokens + 1, vocab_size]"
    _check.shape(op, "target_probs", target, (batch, num_draft + 1, vocab), meaning)
    _check.last_stride(op, "target_probs", target)
