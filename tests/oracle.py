"""Float64 references, written from the formulas alone, and what arithmetic may lose against them.

Nothing here calls ridgeline. References run on the device of their inputs, in float64, over blocks
of rows and keys, so that kv_len 100,000 fits in memory.

How the bounds come about. Write x for the largest |logit| that a row can have,
sm_scale * |q| * max |k| (Cauchy-Schwarz), p for the exact probabilities, u for half a unit in the
last place of the dtype that P is rounded to, n for the number of visible keys.

1. Logits. Products of 16-bit numbers are exact in float32; each tensor-core step over 8 terms adds
   a truncation of the running sum, each float32 step after that (scale, exponent) a rounding; exp2
   errs by 2^-22. With E the sum of these, every probability is off by a factor of exp(2E) at most,
   and the output by at most expm1(2E) * sum p |v - out| <= expm1(2E) * sqrt(sum p v^2 - out^2).
2. P is rounded to the MMA's dtype: u * sum p |v|; in float16 a P below 2^-14 of the row's largest
   loses up to 2^-25 absolute: 2^-25 * sum |v| / sum exp(logit - max).
3. P @ V sums over n keys in steps of 8 with truncation: (n / 8 + 8) * 2^-23 * sum p |v|; the sum of
   P itself rounds to nearest, with errors that grow as sqrt(n).
4. The output is rounded once: u_out * |out|.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

BLOCK = 1 << 23


@dataclass(frozen=True)
class Arithmetic:
    """Unit roundoffs of one implementation."""

    operand: float  # of the dtype that P (and rotated q, k) is rounded to before a product
    output: float
    qk: float  # of one step of the sum over head_dim
    truncates: bool  # tensor cores truncate their sums; the CPU rounds to nearest
    operand_underflow: float  # absolute, for numbers of at most 1
    output_underflow: float
    angle: float  # radians, of a rotation at position 0

    @staticmethod
    def of(dtype: torch.dtype, device: torch.device, fp16_qk: bool = False) -> Arithmetic:
        unit = torch.finfo(dtype).eps / 2
        smallest = {torch.float16: 2.0**-25, torch.bfloat16: 2.0**-134, torch.float32: 2.0**-150}
        cuda = device.type == "cuda"
        return Arithmetic(
            operand=unit if cuda else 2.0**-24,
            output=unit,
            qk=2.0**-11 if fp16_qk and cuda else 2.0**-22,
            truncates=cuda,
            operand_underflow=smallest[dtype] if cuda else 0.0,
            output_underflow=smallest[dtype],
            angle=2.0**-18 if cuda else 2.0**-22,
        )


@dataclass
class Reference:
    """Exact results in float64 and how far from them a right implementation may be."""

    out: Tensor
    lse: Tensor
    out_bound: Tensor
    lse_bound: Tensor


def positions_visible(
    query: Tensor, key: Tensor, qo_len: int, kv_len: int, causal: bool, window_left: int
) -> Tensor:
    """The mask of API.md: ``[len(query), len(key)]``, True where the key is visible."""
    diagonal = query.unsqueeze(1) + (kv_len - qo_len)
    visible = torch.ones(len(query), len(key), dtype=torch.bool, device=query.device)
    if causal:
        visible &= key <= diagonal
    if window_left >= 0:
        visible &= key >= diagonal - window_left
    return visible


def rotate_half(x: Tensor, positions: Tensor, scale: float, theta: float) -> Tensor:
    """Rotary embedding of ``x [..., len(positions), head_dim]`` as complex multiplication."""
    half = x.shape[-1] // 2
    exponents = torch.arange(half, dtype=torch.float64, device=x.device) / half
    angles = torch.outer(positions.double() / scale, theta**-exponents)
    turned = torch.complex(x[..., :half], x[..., half:]) * torch.polar(
        torch.ones_like(angles), angles
    )
    return torch.cat((turned.real, turned.imag), -1)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    kv_layout: str = "NHD",
    causal: bool = False,
    window_left: int = -1,
    logits_soft_cap: float | None = None,
    sm_scale: float | None = None,
    rope: tuple[float, float] | None = None,
    fp16_qk: bool = False,
) -> Reference:
    """Attention of ``q [qo_len, heads, dim]`` (or ``[heads, dim]``); `rope` is (scale, theta)."""
    if q.dim() == 2:
        one = attention(
            q.unsqueeze(0), k, v, kv_layout=kv_layout, causal=causal, window_left=window_left,
            logits_soft_cap=logits_soft_cap, sm_scale=sm_scale, rope=rope, fp16_qk=fp16_qk,
        )  # fmt: skip
        return Reference(one.out[0], one.lse[0], one.out_bound[0], one.lse_bound[0])
    if kv_layout == "NHD":
        k, v = k.transpose(0, 1), v.transpose(0, 1)
    qo_len, num_qo_heads, head_dim = q.shape
    num_kv_heads, kv_len, _ = v.shape
    scale = head_dim**-0.5 if sm_scale is None else sm_scale
    math_of = Arithmetic.of(q.dtype, q.device, fp16_qk)
    heads = []
    for head in range(num_qo_heads):
        queries = q[:, head].double()
        keys = k[head // (num_qo_heads // num_kv_heads)].double()
        values = v[head // (num_qo_heads // num_kv_heads)].double()
        if rope is not None:
            rows = torch.arange(qo_len, device=q.device) + kv_len - qo_len
            queries = rotate_half(queries, rows, *rope)
            keys = rotate_half(keys, torch.arange(kv_len, device=q.device), *rope)
        heads.append(
            _one_head(queries, keys, values, causal, window_left, logits_soft_cap or 0.0, scale,
                      rope is not None, math_of)
        )  # fmt: skip
    return Reference(*(torch.stack(parts, 1) for parts in zip(*heads, strict=True)))


def _one_head(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    causal: bool,
    window_left: int,
    cap: float,
    scale: float,
    rotated: bool,
    arithmetic: Arithmetic,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """out, lse and their bounds for one query head."""
    (qo_len, head_dim), kv_len = q.shape, len(k)
    rows_at_once = max(1, BLOCK // max(1, kv_len))
    parts = []
    largest_key = k.norm(dim=-1).max() if kv_len else q.new_zeros(())
    for start in range(0, max(qo_len, 1), rows_at_once):
        rows = torch.arange(start, min(start + rows_at_once, qo_len), device=q.device)
        visible = positions_visible(
            rows, torch.arange(kv_len, device=q.device), qo_len, kv_len, causal, window_left
        )
        queries = q[rows]
        logits = (queries @ k.T) * scale
        if cap > 0.0:
            logits = cap * torch.tanh(logits / cap)
        logits = logits.masked_fill(~visible, -math.inf)
        seen = visible.any(1)
        top = logits.amax(1, keepdim=True) if kv_len else logits.new_zeros(len(rows), 1)
        weights = (logits - top.masked_fill(~seen.unsqueeze(1), 0.0)).exp()
        total = weights.sum(1, keepdim=True)
        p = weights / total.clamp_min(1e-300)
        out = p @ v
        lse = (top + total.log()).squeeze(1) if kv_len else total.log().squeeze(1)

        x = abs(scale) * queries.norm(dim=-1, keepdim=True) * largest_key
        count = visible.sum(1, keepdim=True)
        error = _logit_error(x, head_dim, kv_len, cap, rotated, arithmetic)
        sum_error = (4 * count.sqrt() + 8) * 2.0**-24
        product_error = (count / 8 + 8) * 2.0**-23 if arithmetic.truncates else sum_error
        magnitude = p @ v.abs()
        spread = (p @ v.square() - out.square()).clamp_min(0.0).sqrt()
        flat = visible.double() @ v.abs() / total.clamp_min(1.0)
        bound = (
            torch.expm1((2 * error).clamp_max(80.0)) * spread
            + (arithmetic.operand + product_error) * magnitude
            + arithmetic.operand_underflow * flat
            + (arithmetic.output + sum_error) * out.abs()
            + arithmetic.output_underflow
        )
        lse_bound = (error + sum_error).squeeze(1) + 2.0**-22 * (1 + lse.abs())
        parts.append((out, lse, bound, lse_bound.masked_fill(~seen, 0.0)))
    return tuple(torch.cat(part) for part in zip(*parts, strict=True))  # type: ignore[return-value]


def _logit_error(
    x: Tensor, head_dim: int, kv_len: int, cap: float, rotated: bool, arithmetic: Arithmetic
) -> Tensor:
    """How far a row's logits may be off, given the largest |logit| x."""
    error = (head_dim / 8 + 4) * arithmetic.qk * x + 2.0**-21
    if rotated:
        # Each rotated operand is rounded once; a phase of 32 bits is off by 2^-32 turns a position.
        angle = arithmetic.angle + 2 * math.pi * 2.0**-32 * kv_len
        error = error + 2 * (arithmetic.operand + angle) * x
    if cap > 0.0:
        error = error + 2.0**-20 * cap
    return error


def merge(v: Tensor, s: Tensor) -> Reference:
    """States ``v [seq_len, num_states, heads, dim]``, ``s [seq_len, num_states, heads]``, to one.

    Weights err by a few float32 roundings (2^-20 of the sum holds them all), the result is rounded
    once to v's dtype.
    """
    arithmetic = Arithmetic.of(v.dtype, v.device)
    exact_v, exact_s = v.double(), s.double()
    lse = torch.logsumexp(exact_s, 1)
    weights = (exact_s - lse.masked_fill(lse == -math.inf, 0.0).unsqueeze(1)).exp().unsqueeze(-1)
    parts = torch.where(weights == 0.0, 0.0, weights * exact_v)
    out = parts.sum(1)
    steps = 2.0**-20 * (1 + s.shape[1] / 64)
    bound = steps * parts.abs().sum(1) + arithmetic.output * out.abs() + arithmetic.output_underflow
    return Reference(out, lse, bound, steps * (1 + lse.abs().nan_to_num(posinf=0.0, neginf=0.0)))


def worst(name: str, got: Tensor, exact: Tensor, bound: Tensor) -> float:
    """Largest error as a multiple of its bound; the masks of inf and NaN are compared first."""
    assert got.shape == exact.shape, f"{name}: shape {got.shape}, expected {exact.shape}"
    for kind, test in (
        ("NaN", torch.isnan),
        ("+inf", torch.isposinf),
        ("-inf", torch.isneginf),
    ):
        differ = test(got) != test(exact.to(got.dtype) if kind == "NaN" else exact)
        assert not differ.any(), (
            f"{name}: {kind} at {differ.sum().item()} of {differ.numel()} places where the "
            f"reference differs, first at {differ.nonzero()[0].tolist()}"
        )
    finite = torch.isfinite(exact)
    if not finite.any():
        return 0.0
    error = torch.where(finite, (got.double() - exact).abs(), 0.0)
    ratio = torch.where(finite, error / bound.clamp_min(1e-300), 0.0)
    return float(ratio.max())


def check(reference: Reference, out: Tensor, lse: Tensor | None = None) -> None:
    """Assert that results lie within the bounds, and that rows without keys are exactly 0."""
    hidden = reference.lse == -math.inf
    assert (out[hidden] == 0).all(), "out: a row with no visible key is not 0"
    pairs = [("out", out, reference.out, reference.out_bound)]
    if lse is not None:
        assert lse.dtype == torch.float32, f"lse: {lse.dtype}, expected float32"
        pairs.append(("lse", lse, reference.lse, reference.lse_bound))
    for name, got, exact, bound in pairs:
        ratio = worst(name, got, exact, bound)
        if ratio <= 1.0:
            continue
        error = (got.double() - exact).abs().nan_to_num(0.0)
        relative = (error / bound.clamp_min(1e-300)).nan_to_num(0.0)
        place = torch.unravel_index(relative.argmax(), got.shape)
        raise AssertionError(
            f"{name}{[int(i) for i in place]}: got {got[place].item()}, "
            f"exact {exact[place].item()}, error {error[place].item():.3g} is {ratio:.3g} times "
            f"the bound {bound[place].item():.3g}; largest error {error.max().item():.3g}, "
            f"{(error > bound).sum().item()} of {error.numel()} elements are beyond their bound"
        )
