"""Host time of one call of every public function, in the default grad mode, without waiting."""

from __future__ import annotations

import ridgeline
import torch

from .session import Session
from .table import Row
from .timer import Call, host_us

TITLE = "Host time of a call, tiny bf16 tensors"
PREDICTION = (
    "under 8 us for every function; torch.mul is there for scale. A wrapper's run 8 us at batch 1 "
    "and 256 alike, with LSE 9.5, its plan 20 us (3 tables checked, one launch)"
)
# Microseconds, where it is not 8.
PREDICTED = {"decode wrapper run_return_lse": 9.5, "decode wrapper plan": 20.0}


def calls(session: Session) -> dict[str, Call]:
    x, weight = session.randn(4, 256), session.randn(256)
    out, residual = torch.empty_like(x), session.randn(4, 256)
    gate = session.randn(4, 512)
    q, k, v = session.randn(4, 8, 64), session.randn(4, 2, 64), session.randn(4, 2, 64)
    one = session.randn(8, 64)
    positions = torch.arange(4, dtype=torch.int32, device=session.device)
    s = session.randn(4, 8, dtype=torch.float32)
    states, s_states = session.randn(4, 3, 8, 64), session.randn(4, 3, 8, dtype=torch.float32)
    in_place, s_in_place = q.clone(), s.clone()
    pool, pages = session.randn(1, 2, 16, 2, 64), torch.zeros(1, device=session.device).int()
    q_out, head_weight = torch.empty_like(q), session.randn(64)
    places = (positions * 0, positions, pool, pages, positions[:2])
    return {
        "torch.mul": lambda: torch.mul(x, x),
        "rmsnorm": lambda: ridgeline.rmsnorm(x, weight),
        "rmsnorm out=": lambda: ridgeline.rmsnorm(x, weight, out=out),
        "fused_add_rmsnorm": lambda: ridgeline.fused_add_rmsnorm(x, residual, weight),
        "silu_and_mul": lambda: ridgeline.silu_and_mul(gate),
        "apply_rope_pos_ids": lambda: ridgeline.apply_rope_pos_ids(q, k, positions),
        "apply_rope_pos_ids_inplace": lambda: ridgeline.apply_rope_pos_ids_inplace(q, k, positions),
        "rope_append_paged_kv_cache": lambda: ridgeline.rope_append_paged_kv_cache(
            q, k, v, *places, q_out=q_out
        ),
        "rope_append_paged_kv_cache, norm": lambda: ridgeline.rope_append_paged_kv_cache(
            q, k, v, *places, q_weight=head_weight, k_weight=head_weight
        ),
        "single_decode_with_kv_cache": lambda: ridgeline.single_decode_with_kv_cache(one, k, v),
        "single_prefill_with_kv_cache": lambda: ridgeline.single_prefill_with_kv_cache(
            q, k, v, causal=True
        ),
        "merge_state": lambda: ridgeline.merge_state(q, s, q, s),
        "merge_state_in_place": lambda: ridgeline.merge_state_in_place(in_place, s_in_place, q, s),
        "merge_states": lambda: ridgeline.merge_states(states, s_states),
    }


def wrapper_calls(session: Session, batch_size: int) -> dict[str, Call]:
    """Plan and run of the decode and prefill wrappers, one page a request."""
    counts = torch.arange(batch_size + 1, dtype=torch.int32, device=session.device)
    last = torch.ones(batch_size, dtype=torch.int32, device=session.device)
    table = (counts, counts[:-1], last)
    sizes, dtype = (8, 2, 64, 16), torch.bfloat16
    q, pool = session.randn(batch_size, 8, 64), session.randn(batch_size, 2, 16, 2, 64)
    cache = (pool[:, 0], pool[:, 1])
    decode = ridgeline.BatchDecodeWithPagedKVCacheWrapper()
    decode.plan(*table, *sizes, q_data_type=dtype)
    prefill = ridgeline.BatchPrefillWithPagedKVCacheWrapper()
    prefill.plan(counts, *table, *sizes, causal=True, q_data_type=dtype)
    planned = ridgeline.BatchDecodeWithPagedKVCacheWrapper()
    return {
        "decode wrapper run": lambda: decode.run(q, cache),
        "decode wrapper run, 5-D cache": lambda: decode.run(q, pool),
        "decode wrapper run_return_lse": lambda: decode.run(q, cache, return_lse=True),
        "prefill wrapper run": lambda: prefill.run(q, cache),
        "decode wrapper plan": lambda: planned.plan(*table, *sizes, q_data_type=dtype),
    }


def run(session: Session) -> list[Row]:
    count, rounds = (5, 1) if session.dry_run else (2000, 3 if session.quick else 5)
    rows = []
    for name, call in calls(session).items():
        us = host_us(call, calls=count, rounds=rounds)
        predicted = None if name.startswith("torch.") else 8.0
        rows.append(Row(op=name, case="", us=us, predicted_us=predicted))
    for batch_size in (1, 256):
        for name, call in wrapper_calls(session, batch_size).items():
            us = host_us(call, calls=count, rounds=rounds)
            predicted = PREDICTED.get(name, 8.0)
            rows.append(Row(op=name, case=f"batch {batch_size}", us=us, predicted_us=predicted))
    return rows
