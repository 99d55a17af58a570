"""The first call of a kernel that nothing has compiled yet, with no compiler on PATH."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile

import torch

from .session import Session
from .table import Row

TITLE = "First call: empty cache, no pack, empty PATH; then a second process with RIDGELINE_JIT=0"
PREDICTION = (
    "under 1.5 s for kernels up to head_dim 128, under 3 s for the others; under 0.1 s from the "
    "disk cache, which a process that may not compile can only use if the first one filled it"
)

SCRIPT = """
import time, torch, ridgeline
def randn(*shape):
    return torch.randn(*shape, device="cuda").to(torch.bfloat16)
def attend(qo_len, kv_len, qk, vo):
    q, k, v = randn(qo_len, 8, qk), randn(kv_len, 2, qk), randn(kv_len, 2, vo)
    return lambda: ridgeline.single_prefill_with_kv_cache(q, k, v, causal=True)
x, weight = randn(4, 4096), randn(4096)
calls = {{
    "rmsnorm": lambda: ridgeline.rmsnorm(x, weight),
    "decode": attend(1, 300, 128, 128),
    "prefill": attend(2048, 2048, 128, 128),
    "prefill 192/128": attend(2048, 2048, 192, 128),
    "prefill 256": attend(2048, 2048, 256, 256),
}}
call = calls["{case}"]
torch.cuda.synchronize()
start = time.perf_counter()
call()
torch.cuda.synchronize()
print(time.perf_counter() - start)
"""

CASES = {
    "rmsnorm": 1.5,
    "decode": 1.5,
    "prefill": 1.5,
    "prefill 192/128": 3.0,
    "prefill 256": 3.0,
}


# Llama 3's attention and dtype.
WARMUP = """
import os, time, torch, ridgeline
os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:2])
os.environ["MAX_JOBS"] = "2"
torch.cuda.init()
config = {"num_qo_heads": 32, "num_kv_heads": 8, "head_dim": 128, "intermediate_size": 14336}
start = time.perf_counter()
ridgeline.warmup(config, progress=False)
print(time.perf_counter() - start)
"""
WARMUP_LIMIT = 5.0


def seconds(script: str, env: dict[str, str]) -> float:
    """What a script prints in a process of its own."""
    command = [sys.executable, "-c", script]
    result = subprocess.run(
        command, env={**os.environ, **env}, capture_output=True, text=True, check=False
    )
    if result.returncode:
        raise RuntimeError(result.stderr.strip().splitlines()[-1])
    return float(result.stdout)


def run(session: Session) -> list[Row]:
    if session.dry_run:
        return [Row(op="first call", case="needs a GPU", us=0.0)]
    torch.cuda.synchronize()
    rows = []
    for case, limit in CASES.items():
        with tempfile.TemporaryDirectory() as cache:
            env = {"RIDGELINE_CACHE_DIR": cache, "RIDGELINE_PACK_DIR": "", "PATH": ""}
            script = SCRIPT.format(case=case)
            first = seconds(script, env)
            second = seconds(script, {**env, "RIDGELINE_JIT": "0"})
        rows.append(Row(op="compiled", case=case, us=first * 1e6, predicted_us=limit * 1e6))
        rows.append(Row(op="from the cache", case=case, us=second * 1e6, predicted_us=1e5))
    with tempfile.TemporaryDirectory() as cache:
        env = {"RIDGELINE_CACHE_DIR": cache, "RIDGELINE_PACK_DIR": "", "PATH": ""}
        us = seconds(WARMUP, env) * 1e6
    rows.append(Row(op="warmup", case="Llama 3, two cores", us=us, goal_us=WARMUP_LIMIT * 1e6))
    return rows
