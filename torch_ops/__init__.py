"""Ridgeline: CUDA kernels for LLM serving, as torch custom ops.

Importing it touches no GPU, compiler, network or home folder.
"""

from __future__ import annotations

from .activation import silu_and_mul
from .attention import (
    single_decode_with_kv_cache,
    single_prefill_with_kv_cache,
    single_prefill_with_kv_cache_return_lse,
)
from .batch_attention import attention, schedule
from .merge import merge_state, merge_state_in_place, merge_states
from .norm import fused_add_rmsnorm, rmsnorm
from .rope import apply_rope_pos_ids, apply_rope_pos_ids_inplace
from .supports import Support, supports
from .warmup import Warmup, warmup

__version__ = "0.1.0"

__all__ = [
    "Support",
    "Warmup",
    "apply_rope_pos_ids",
    "apply_rope_pos_ids_inplace",
    "attention",
    "fused_add_rmsnorm",
    "merge_state",
    "merge_state_in_place",
    "merge_states",
    "rmsnorm",
    "schedule",
    "silu_and_mul",
    "single_decode_with_kv_cache",
    "single_prefill_with_kv_cache",
    "single_prefill_with_kv_cache_return_lse",
    "supports",
    "warmup",
]
