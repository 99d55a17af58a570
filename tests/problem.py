"""One attention problem: its inputs, the call of the public function, the reference, the check."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import oracle
import pytest
import ridgeline
import torch
from support import normal, poisoned_call, strided, supports_bf16_attention
from torch import Tensor


@dataclass(frozen=True)
class Problem:
    """Shapes and options of one call; ``str()`` of it is the test's id."""

    qo_len: int = 1
    kv_len: int = 128
    heads: tuple[int, int] = (4, 2)  # query, kv
    head_dims: tuple[int, int] = (64, 64)  # qk, vo
    dtype: torch.dtype = torch.float16
    kv_layout: str = "NHD"
    causal: bool = False
    window_left: int = -1
    logits_soft_cap: float | None = None
    sm_scale: float | None = None
    rope: tuple[float, float] | None = None
    fp16_qk: bool = False
    decode: bool = False  # single_decode_with_kv_cache
    strided: bool = False
    scale: float = 1.0  # standard deviation of q and k
    note: str = field(default="", compare=False)

    def __str__(self) -> str:
        heads = "x".join(map(str, self.heads))
        dims = "x".join(map(str, dict.fromkeys(self.head_dims)))
        parts = [
            "decode" if self.decode else f"q{self.qo_len}",
            f"kv{self.kv_len}",
            f"h{heads}",
            f"d{dims}",
            str(self.dtype).removeprefix("torch."),
            self.kv_layout,
        ]
        parts += ["causal"] if self.causal else []
        parts += [f"window{self.window_left}"] if self.window_left >= 0 else []
        parts += [f"cap{self.logits_soft_cap:g}"] if self.logits_soft_cap is not None else []
        parts += [f"scale{self.sm_scale:g}"] if self.sm_scale is not None else []
        parts += [f"rope{self.rope[0]:g}x{self.rope[1]:g}"] if self.rope else []
        parts += ["fp16qk"] if self.fp16_qk else []
        parts += ["strided"] if self.strided else []
        parts += [f"std{self.scale:g}"] if self.scale != 1.0 else []
        return "-".join(parts)

    def with_(self, **changes: Any) -> Problem:
        return replace(self, **changes)

    def inputs(self, device: torch.device, rng: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        """q, k, v of normal deviates."""
        q_shape = (self.heads[0], self.head_dims[0])
        if not self.decode:
            q_shape = (self.qo_len, *q_shape)  # type: ignore[assignment]
        lead = (self.kv_len, self.heads[1])
        if self.kv_layout == "HND":
            lead = (self.heads[1], self.kv_len)
        q = normal(q_shape, self.dtype, device, rng, self.scale)
        k = normal((*lead, self.head_dims[0]), self.dtype, device, rng, self.scale)
        v = normal((*lead, self.head_dims[1]), self.dtype, device, rng)
        if self.strided:
            q, k, v = strided(q, 0), strided(k, 1), strided(strided(v, 0, 3), 1)
        return q, k, v

    def call(self, q: Tensor, k: Tensor, v: Tensor, return_lse: bool = True) -> Any:
        """Call the public function."""
        options: dict[str, Any] = {
            "kv_layout": self.kv_layout,
            "window_left": self.window_left,
            "logits_soft_cap": self.logits_soft_cap,
            "sm_scale": self.sm_scale,
            "return_lse": return_lse,
        }
        if self.rope is not None:
            options |= {"pos_encoding_mode": "ROPE_LLAMA"}
            options |= {"rope_scale": self.rope[0], "rope_theta": self.rope[1]}
        if self.decode:
            return ridgeline.single_decode_with_kv_cache(q, k, v, **options)
        options |= {"causal": self.causal, "use_fp16_qk_reduction": self.fp16_qk}
        return ridgeline.single_prefill_with_kv_cache(q, k, v, **options)

    def reference(self, q: Tensor, k: Tensor, v: Tensor) -> oracle.Reference:
        """Solve in float64."""
        return oracle.attention(
            q, k, v, kv_layout=self.kv_layout, causal=self.causal, window_left=self.window_left,
            logits_soft_cap=self.logits_soft_cap, sm_scale=self.sm_scale, rope=self.rope,
            fp16_qk=self.fp16_qk,
        )  # fmt: skip

    def check(self, device: torch.device, rng: torch.Generator) -> None:
        """Call with and without LSE on poisoned memory, twice, and compare with the reference."""
        q, k, v = self.inputs(device, rng)
        if self.dtype == torch.bfloat16 and not supports_bf16_attention(device):
            with pytest.raises(RuntimeError, match="bfloat16"):
                self.call(q, k, v)
            return
        reference = self.reference(q, k, v)
        out, lse = poisoned_call(device, self.call, q, k, v)
        assert out.dtype == self.dtype
        assert out.device == device
        assert out.is_contiguous()
        assert lse.is_contiguous()
        oracle.check(reference, out, lse)
        narrow = poisoned_call(device, self.call, q, k, v, return_lse=False)
        oracle.check(reference, narrow)
        again = poisoned_call(device, self.call, q, k, v)
        assert torch.equal(again[0], out), "out: not repeatable bitwise"
        assert torch.equal(again[1], lse), "lse: not repeatable bitwise"
