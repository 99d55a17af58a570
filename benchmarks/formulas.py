"""The peers: the same formulas for torch.compile, and torch's own attention kernels."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from .timer import Call

# Names a file: the op library of FlashAttention-3, as the xformers wheel has it.
FLASH_ATTENTION_3 = "FLASH_ATTENTION_3"
BACKENDS = {"flash": SDPBackend.FLASH_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION}


def rmsnorm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    wide = x.float()
    scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return (wide * scale * weight.float()).to(x.dtype)


def fused_add_rmsnorm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
) -> None:
    total = x.float() + residual.float()
    scale = torch.rsqrt(total.square().mean(-1, keepdim=True) + eps)
    residual.copy_(total.to(x.dtype))
    x.copy_((total * scale * weight.float()).to(x.dtype))


def gemma_rmsnorm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    return rmsnorm(x, 1.0 + weight.float(), eps)


def layernorm(x: torch.Tensor, gamma: torch.Tensor, beta: torch.Tensor, eps: float) -> torch.Tensor:
    return F.layer_norm(x, x.shape[-1:], gamma, beta, eps)


def to_fp8(wide: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    return (wide / scale).clamp(-448, 448).to(torch.float8_e4m3fn)


def rmsnorm_per_token(
    x: torch.Tensor, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    wide = x.float()
    root = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return per_group(wide * root * weight.float(), x.shape[-1])


def per_group(x: torch.Tensor, size: int) -> tuple[torch.Tensor, torch.Tensor]:
    groups = x.float().unflatten(-1, (-1, size))
    scale = (groups.abs().amax(-1, keepdim=True) / 448).clamp(min=2.0**-126)
    return to_fp8(groups, scale).flatten(-2), scale.squeeze(-1)


def per_tensor(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    scale = (x.float().abs().amax() / 448).clamp(min=2.0**-126).reshape(1)
    return to_fp8(x.float(), scale), scale


def dequantize(q: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    return (q.float() * scale).to(torch.bfloat16)


def gated(activation: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    gate, up = x.chunk(2, dim=-1)
    return (activation(gate.float()) * up.float()).to(x.dtype)


def silu_and_mul(x: torch.Tensor) -> torch.Tensor:
    return gated(F.silu, x)


def gelu_and_mul(x: torch.Tensor) -> torch.Tensor:
    return gated(F.gelu, x)


def gelu_tanh_and_mul(x: torch.Tensor) -> torch.Tensor:
    return gated(lambda gate: F.gelu(gate, approximate="tanh"), x)


def silu_and_mul_fp8(x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    gate, up = x.chunk(2, dim=-1)
    return to_fp8(F.silu(gate.float()) * up.float(), scale)


def rope(
    q: torch.Tensor, k: torch.Tensor, positions: torch.Tensor, theta: float
) -> tuple[torch.Tensor, torch.Tensor]:
    half = q.shape[-1] // 2
    exponent = torch.arange(half, device=q.device, dtype=torch.float32) / half
    angle = positions.float()[:, None] * theta**-exponent
    cos, sin = angle.cos()[:, None, :], angle.sin()[:, None, :]

    def rotate(x: torch.Tensor) -> torch.Tensor:
        a, b = x[..., :half].float(), x[..., half:].float()
        return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1).to(x.dtype)

    return rotate(q), rotate(k)


def merge_state(
    v_a: torch.Tensor, s_a: torch.Tensor, v_b: torch.Tensor, s_b: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    s = torch.logaddexp(s_a, s_b)
    w_a, w_b = (s_a - s).exp()[..., None], (s_b - s).exp()[..., None]
    return (v_a.float() * w_a + v_b.float() * w_b).to(v_a.dtype), s


def merge_states(v: torch.Tensor, s: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    total = torch.logsumexp(s, dim=1)
    weight = (s - total[:, None]).exp()[..., None]
    return (v.float() * weight).sum(dim=1).to(v.dtype), total


def sample_by_sort(logits: torch.Tensor, top_k: int | None, top_p: float) -> None:
    """Top-k, then top-p, by sorting whole rows, as engines without a sampling kernel do."""
    ordered, order = logits.float().sort(dim=-1, descending=True)
    if top_k is not None:
        ordered[:, top_k:] = -torch.inf
    probs = torch.softmax(ordered, dim=-1)
    probs[probs.cumsum(-1) - probs >= top_p] = 0
    order.gather(1, torch.multinomial(probs, 1))


def sample_by_topk(logits: torch.Tensor, top_k: int, top_p: float) -> None:
    """The same on the k largest alone."""
    ordered, order = logits.topk(top_k, dim=-1)
    probs = torch.softmax(ordered.float(), dim=-1)
    probs[probs.cumsum(-1) - probs >= top_p] = 0
    order.gather(1, torch.multinomial(probs, 1))


def multinomial(probs: torch.Tensor) -> None:
    torch.multinomial(probs, 1)


def compiled(function: Callable[..., object], *arguments: object) -> Callable[[], Call]:
    """A peer made by torch.compile for exactly these shapes."""

    def prepare() -> Call:
        fast = torch.compile(function, dynamic=False, fullgraph=True)
        fast(*arguments)
        return lambda: fast(*arguments)

    return prepare


def sdpa(
    backend: str, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, causal: bool
) -> Callable[[], Call]:
    """torch's attention on views of the same memory: q, k, v are [length, heads, head_dim]."""
    return sdpa_batch(backend, q[None], k[None], v[None], causal=causal)


def sdpa_batch(
    backend: str, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, causal: bool
) -> Callable[[], Call]:
    """The same for [batch_size, length, heads, head_dim]."""
    q4, k4, v4 = (x.transpose(1, 2) for x in (q, k, v))
    grouped = q.shape[2] != k.shape[2]

    def prepare() -> Call:
        def call() -> torch.Tensor:
            with sdpa_kernel(BACKENDS[backend]):
                out = F.scaled_dot_product_attention(
                    q4, k4, v4, is_causal=causal, enable_gqa=grouped
                )
            return out.transpose(1, 2)

        call()
        return call

    return prepare


@cache
def flash_attention_3() -> Callable[..., Any] | None:
    """Its forward op, when the environment names the library."""
    path = os.environ.get(FLASH_ATTENTION_3)
    if not path:
        return None
    torch.ops.load_library(path)
    op: Callable[..., Any] = torch.ops.flash_attn_3.fwd
    return op
