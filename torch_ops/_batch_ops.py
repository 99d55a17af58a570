"""How `attention` and the wrappers call the batch attention ops, and bring results into form."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from . import _check
from ._ops import find_eager_op, find_op, refuse_grad

NARROW = find_op("attention")
NARROW_EAGER = find_eager_op("attention")
PLAIN = find_op("attention_plain")
PLAIN_EAGER = find_eager_op("attention_plain")
SCHEDULE = find_op("attention_schedule")
LSE = find_op("attention_lse")
LSE_EAGER = find_eager_op("attention_lse")
PLAIN_LSE_EAGER = find_eager_op("attention_plain_lse")
_FULL = find_op("attention_full")
_OUT = find_op("attention_out")

POS_ENCODING_MODES = {"NONE": 0, "ROPE_LLAMA": 1}

Cache = Tensor | tuple[Tensor, Tensor]
Result = Tensor | tuple[Tensor, Tensor]
# q, k, v.
Operands = tuple[Tensor, Tensor, Tensor]
# The ops' next arguments, without the last that have their defaults: kv_indices, schedule,
# qo_indptr, flags, max_q_len, window_left, sm_scale, kv_indptr, kv_lens.
Problem = tuple[Tensor | int | float | None, ...]
# Soft cap, pos_encoding_mode, rope_scale, rope_theta, use_fp16_qk_reduction.
LogitOptions = tuple[float, int, float, float, bool]

_DEFAULTS: Problem = (None, None, None, 0, -1, -1, None, None, None)
_NO_LOGIT_OPTIONS: LogitOptions = (0.0, 0, 1.0, 1e4, False)
# So many of a problem's arguments have a place in the plain ops.
PLAIN_LENGTH = 4
LOG2_E = math.log2(math.e)


def pair(op: str, kv_cache: Cache) -> tuple[Tensor, Tensor]:
    """Keys and values as the ops take them: a stacked cache is both."""
    if isinstance(kv_cache, Tensor):
        if kv_cache.dim() != 5 or kv_cache.shape[1] != 2:
            expected = "a (k, v) tuple, or one tensor [num_pages, 2, ...] of 5 dimensions"
            way_out = "Pass the keys and the values as a tuple."
            _check.fail(op, "kv_cache", expected, f"shape {list(kv_cache.shape)}", way_out)
        return kv_cache, kv_cache
    if not isinstance(kv_cache, (tuple, list)) or len(kv_cache) != 2:
        expected = "a (k, v) tuple, or one tensor [num_pages, 2, ...] of 5 dimensions"
        _check.fail(op, "kv_cache", expected, type(kv_cache).__name__, "Pass one of these.")
    return kv_cache[0], kv_cache[1]


def trimmed(*problem: Tensor | int | float | None) -> Problem:
    """The arguments without the last that have their defaults: each costs 0.1 to 0.3 us."""
    count = len(problem)
    while count > 1 and not isinstance(problem[count - 1], Tensor):
        if problem[count - 1] != _DEFAULTS[count - 1]:
            break
        count -= 1
    return problem[:count]


def attend(
    where: str,
    operands: Operands,
    problem: Problem,
    options: LogitOptions | None,
    out: Tensor | None,
    lse: Tensor | None,
    return_lse: bool,
    lse_base: str,
    lse_layout: str,
) -> Result:
    """Call the op that serves, with results where the caller wants them.

    The kernel writes `out`, and `lse` in the layout NH, itself.
    """
    wants_lse = return_lse or lse is not None
    rest: tuple[object, ...] = problem
    plain = options is None or options == _NO_LOGIT_OPTIONS
    if not plain:
        assert options is not None
        rest = (*problem, *_DEFAULTS[len(problem) :], *options)
    result: Tensor
    logs: Tensor | None
    if out is None and lse is None:
        if plain and not wants_lse:
            result = NARROW(*operands, *problem)
            return result
        result, logs = (LSE if plain else _FULL)(*operands, *rest)
    else:
        q, _, v = operands
        _check.rank(where, "q", q, 3)
        result = q.new_empty((*q.shape[:2], v.shape[-1])) if out is None else out
        if wants_lse and (lse is None or lse_layout == "HN"):
            logs = q.new_empty(q.shape[:2], dtype=torch.float32)
        else:
            logs = lse
        refuse_grad(where, out, lse)
        _OUT(result, logs, *operands, *rest)
    if not wants_lse:
        return result
    assert logs is not None
    if lse_base == "log2":
        logs = logs.mul_(LOG2_E)
    if lse_layout == "HN":
        logs = logs.t().contiguous() if lse is None else into(where, "lse", lse, logs.t())
    return (result, logs) if return_lse else result


def into(where: str, name: str, target: Tensor, result: Tensor) -> Tensor:
    """Copy a result into the caller's buffer."""
    _check.shape(where, name, target, result.shape, "that of the result")
    _check.same_device(where, name, target, "q", result)
    _check.dtype(where, name, target, (result.dtype,))
    return target.copy_(result)
