"""Rotary embedding as a product of complex numbers in float64, and what float32 may lose in it."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from elementwise import FLOAT32_UNIT, assert_rounded
from support import normal
from torch import Tensor

# low_freq_factor, high_freq_factor, old_context_len
Llama31 = tuple[float, float, float]


def frequencies(
    rotary_dim: int, scale: float, theta: float, llama31: Llama31 | None = None
) -> Tensor:
    """Radians per position of each pair."""
    exponents = torch.arange(0, rotary_dim, 2, dtype=torch.float64) / rotary_dim
    plain = theta**-exponents
    if llama31 is None:
        return plain / scale
    low, high, length = llama31
    result = []
    for frequency in plain.tolist():
        wavelength = 2 * math.pi / frequency
        if low and wavelength > length / low:
            result.append(frequency / scale)
        elif wavelength < length / high:
            result.append(frequency)
        else:
            smooth = (length / wavelength - low) / (high - low)
            result.append((1 - smooth) * frequency / scale + smooth * frequency)
    return torch.tensor(result, dtype=torch.float64)


@dataclass(frozen=True)
class Angles:
    """[nnz, 1, num_pairs] float64, and what each may be off by beside float32's roundings."""

    cos: Tensor
    sin: Tensor
    slack: Tensor

    @staticmethod
    def of(positions: Tensor, frequency: Tensor) -> Angles:
        """The slack is the float64 rounding of a frequency times the position."""
        angles = positions.cpu().double()[:, None, None] * frequency
        return Angles(angles.cos(), angles.sin(), angles.abs() * 2.0**-50)

    @staticmethod
    def table(positions: Tensor, cache: Tensor) -> Angles:
        """The cosines and sines of [max_position, rotary_dim]."""
        rows = cache.cpu().double()[positions.cpu().long()][:, None]
        cos, sin = rows.chunk(2, dim=-1)
        return Angles(cos, sin, torch.zeros_like(cos))


def exact_rope(x: Tensor, angles: Angles, interleave: bool) -> tuple[Tensor, Tensor]:
    """The rotated heads in float64, and the loss: cosine and sine are off by 8 roundings at most,
    then two products and a sum."""
    x = x.double().cpu()
    half = angles.cos.shape[-1]
    rotary_dim = 2 * half
    rotated = x[..., :rotary_dim]
    if interleave:
        pairs = torch.complex(rotated[..., 0::2], rotated[..., 1::2])
    else:
        pairs = torch.complex(rotated[..., :half], rotated[..., half:])
    turned = pairs * torch.complex(angles.cos, angles.sin)
    loss = (pairs.real.abs() + pairs.imag.abs()) * (12 * FLOAT32_UNIT + angles.slack)
    exact, slack = x.clone(), torch.zeros_like(x)
    if interleave:
        exact[..., 0:rotary_dim:2], exact[..., 1:rotary_dim:2] = turned.real, turned.imag
        slack[..., 0:rotary_dim:2] = slack[..., 1:rotary_dim:2] = loss
    else:
        exact[..., :half], exact[..., half:rotary_dim] = turned.real, turned.imag
        slack[..., :half] = slack[..., half:rotary_dim] = loss
    return exact, slack


def assert_rotated(
    actual: tuple[Tensor, Tensor],
    inputs: tuple[Tensor, Tensor],
    angles: Angles,
    interleave: bool = False,
) -> None:
    """Both results are the rotation of the inputs, rounded once."""
    rotary_dim = 2 * angles.cos.shape[-1]
    for result, x in zip(actual, inputs, strict=True):
        exact, slack = exact_rope(x, angles, interleave)
        assert_rounded(result.cpu(), exact, slack)
        assert torch.equal(result[..., rotary_dim:], x[..., rotary_dim:])


def draw(
    nnz: int,
    heads: tuple[int, int],
    head_dim: int,
    dtype: torch.dtype,
    device: torch.device,
    rng: torch.Generator,
    last: int = 100_000,
) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, pos_ids."""
    q = normal((nnz, heads[0], head_dim), dtype, device, rng)
    k = normal((nnz, heads[1], head_dim), dtype, device, rng)
    return q, k, torch.randint(0, last, (nnz,), generator=rng).to(device)
