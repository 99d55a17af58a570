"""Fakes, checks and the CPU implementation of the attention ops: plain torch ops, float32 sums.

Keys are taken in blocks with an online softmax, so that memory stays bounded at any length.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from . import _check
from ._ops import cpu_impl, fake_impl

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# Most logits held at a time (float32, so 32 MB).
_MAX_LOGITS = 1 << 23


def refuse_given(op: str, **arguments: object) -> None:
    """Raise for the arguments of later versions, unless they are None."""
    for name, value in arguments.items():
        if value is not None:
            got = "a tensor" if isinstance(value, Tensor) else repr(value)
            _check.not_yet(op, name, got, "Leave it at its default, or apply it outside the call.")


def one_of(op: str, argument: str, value: object, allowed: Sequence[object]) -> None:
    """Raise unless an option has one of the values that there are."""
    if value not in allowed:
        expected = "one of " + ", ".join(repr(one) for one in allowed)
        _check.fail(op, argument, expected, repr(value), "Pass one of these.")


def check_values(
    op: str, window_left: int, logits_soft_cap: float, rope_scale: float, rope_theta: float
) -> None:
    """Raise for numbers out of range."""
    if window_left < -1:
        _check.fail(op, "window_left", "at least -1", window_left, "-1 turns it off.")
    if not logits_soft_cap >= 0.0:
        _check.fail(
            op, "logits_soft_cap", "a positive number, or 0", logits_soft_cap, "0 turns it off."
        )
    for name, value in (("rope_scale", rope_scale), ("rope_theta", rope_theta)):
        if not value > 0.0:
            _check.fail(op, name, "a positive number", value, "Leave it out for the default.")


def _check_inputs(op: str, q: Tensor, k: Tensor, v: Tensor, kv_layout: int) -> None:
    """Check what shapes, dtypes and devices alone can tell (fakes call it as well)."""
    one_of(op, "kv_layout", kv_layout, (0, 1))
    _check.dtype(op, "q", q, _DTYPES)
    _check.rank(op, "q", q, 2, 3)
    for name, tensor in (("k", k), ("v", v)):
        _check.same_device(op, name, tensor, "q", q)
        _check.same_dtype(op, name, tensor, "q", q)
        _check.rank(op, name, tensor, 3)
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        head_dim = tensor.shape[-1]
        if head_dim % 8 or not 8 <= head_dim <= 256:
            expected, got = "a head_dim that is a multiple of 8, at most 256", head_dim
            way_out = "Pad q, k and v with zeros to the next multiple of 8."
            _check.fail(op, name, expected, got, way_out)
        _check.last_stride(op, name, tensor)
    if k.shape[-1] != q.shape[-1]:
        expected = f"head_dim {q.shape[-1]}, as in 'q'"
        _check.fail(op, "k", expected, k.shape[-1], "Pass the keys that belong to these queries.")
    if k.shape[:2] != v.shape[:2]:
        expected = f"the first two dimensions of 'k', {list(k.shape[:2])}"
        _check.fail(op, "v", expected, list(v.shape[:2]), "Pass one value for each key.")
    num_qo_heads, num_kv_heads = q.shape[-2], k.shape[0 if kv_layout else 1]
    if num_qo_heads < 1 or num_kv_heads < 1 or num_qo_heads % num_kv_heads:
        expected = f"a number of heads that is a multiple of the {num_kv_heads} of 'k'"
        way_out = (
            "Check kv_layout: NHD is [kv_len, heads, head_dim], HND [heads, kv_len, head_dim]."
        )
        _check.fail(op, "q", expected, num_qo_heads, way_out)


def _check_alignment(op: str, **tensors: Tensor) -> None:
    """Hold the CPU to what the CUDA kernels need, so that code moves between them unchanged."""
    for name, tensor in tensors.items():
        strides = [
            stride
            for size, stride in zip(tensor.shape[:-1], tensor.stride()[:-1], strict=True)
            if size > 1
        ]
        bytes_off = [stride * tensor.element_size() for stride in strides]
        if tensor.data_ptr() % 16 or any(size % 16 for size in bytes_off):
            got = f"address % 16 = {tensor.data_ptr() % 16}, strides of {bytes_off} bytes"
            way_out = f"Copy it first: {name}.clone(memory_format=torch.contiguous_format)."
            _check.fail(op, name, "address and strides in multiples of 16 bytes", got, way_out)


@fake_impl("single_attention")
def _single_attention_fake(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    causal: bool = False,
    sm_scale: float | None = None,
    kv_layout: int = 0,
    *_options: object,
    **_named: object,
) -> Tensor:
    del causal, sm_scale
    _check_inputs("single_attention", q, k, v, kv_layout)
    return q.new_empty((*q.shape[:-1], v.shape[-1]))


@fake_impl("single_attention_plain")
def _single_attention_plain_fake(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return _single_attention_fake(q, k, v)


@cpu_impl("single_attention_plain")
def _single_attention_plain_cpu(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return _single_attention_cpu(q, k, v, True)


@fake_impl("single_attention_full")
def _single_attention_full_fake(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    causal: bool,
    sm_scale: float | None,
    kv_layout: int,
    *_options: object,
    **_named: object,
) -> tuple[Tensor, Tensor]:
    del causal, sm_scale
    _check_inputs("single_attention_full", q, k, v, kv_layout)
    out = q.new_empty((*q.shape[:-1], v.shape[-1]))
    return out, q.new_empty(q.shape[:-1], dtype=torch.float32)


@cpu_impl("single_attention")
def _single_attention_cpu(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    causal: bool = False,
    sm_scale: float | None = None,
    kv_layout: int = 0,
    window_left: int = -1,
    logits_soft_cap: float = 0.0,
) -> Tensor:
    op = "single_attention"
    _check_inputs(op, q, k, v, kv_layout)
    _check_alignment(op, q=q, k=k, v=v)
    check_values(op, window_left, logits_soft_cap, 1.0, 1.0)
    return _attend(q, k, v, kv_layout, causal, window_left, logits_soft_cap, sm_scale)[0]


@cpu_impl("single_attention_full")
def _single_attention_full_cpu(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    causal: bool,
    sm_scale: float | None,
    kv_layout: int,
    window_left: int,
    logits_soft_cap: float,
    pos_encoding_mode: int,
    rope_scale: float,
    rope_theta: float,
    use_fp16_qk_reduction: bool,
    custom_mask: Tensor | None = None,
    mask_indptr: Tensor | None = None,
    q_scale: Tensor | None = None,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
    sinks: Tensor | None = None,
    extra_tensors: list[Tensor] | None = None,
    extra_scalars: list[float] | None = None,
) -> tuple[Tensor, Tensor]:
    op = "single_attention_full"
    _check_inputs(op, q, k, v, kv_layout)
    _check_alignment(op, q=q, k=k, v=v)
    check_values(op, window_left, logits_soft_cap, rope_scale, rope_theta)
    refuse_given(
        op, custom_mask=custom_mask, mask_indptr=mask_indptr, q_scale=q_scale, k_scale=k_scale,
        v_scale=v_scale, sinks=sinks, extra_tensors=extra_tensors, extra_scalars=extra_scalars,
    )  # fmt: skip
    if pos_encoding_mode == 2:
        _check.not_yet(op, "pos_encoding_mode", "2 (ALIBI)", "Pass 0 (NONE) or 1 (ROPE_LLAMA).")
    one_of(op, "pos_encoding_mode", pos_encoding_mode, (0, 1))
    if use_fp16_qk_reduction and q.dtype != torch.float16:
        got = f"True with {str(q.dtype).removeprefix('torch.')}"
        way_out = "Leave it out, or convert q, k and v to float16."
        _check.fail(op, "use_fp16_qk_reduction", "False unless q is float16", got, way_out)
    rope = (rope_scale, rope_theta) if pos_encoding_mode == 1 else None
    return _attend(q, k, v, kv_layout, causal, window_left, logits_soft_cap, sm_scale, rope)


def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    kv_layout: int,
    causal: bool,
    window_left: int,
    logits_soft_cap: float,
    sm_scale: float | None,
    rope: tuple[float, float] | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention in float32 for tensors that were checked; returns out and natural-log LSE."""
    if kv_layout == 0:
        k, v = k.transpose(0, 1), v.transpose(0, 1)
    num_kv_heads, kv_len, head_dim_vo = v.shape
    if sm_scale is None:
        sm_scale = q.shape[-1] ** -0.5
    sees_all = rope is None and window_left < 0 and q.numel() == q.shape[-2] * q.shape[-1]
    if sees_all and 0 < kv_len * q.shape[-2] <= _MAX_LOGITS:
        return _attend_one(q, k, v, logits_soft_cap, sm_scale)
    queries = q if q.dim() == 3 else q.unsqueeze(0)
    qo_len, num_qo_heads, head_dim_qk = queries.shape
    group = num_qo_heads // num_kv_heads
    out = q.new_empty((*q.shape[:-1], head_dim_vo))
    lse = q.new_empty(q.shape[:-1], dtype=torch.float32)
    # [num_kv_heads, qo_len, group, ...]: the heads that share a key lie beside each other.
    queries = queries.view(qo_len, num_kv_heads, group, head_dim_qk).transpose(0, 1)
    out_rows = out.view(qo_len, num_kv_heads, group, head_dim_vo).transpose(0, 1)
    lse_rows = lse.view(qo_len, num_kv_heads, group).transpose(0, 1)

    # The mask hides every key from the first rows of a causal problem with more queries than keys.
    offset = kv_len - qo_len
    first = qo_len if kv_len == 0 else min(max(-offset, 0), qo_len) if causal else 0
    out_rows[:, :first] = 0.0
    lse_rows[:, :first] = -math.inf
    kv_block = max(1, min(kv_len, _MAX_LOGITS // max(1, num_qo_heads)))
    qo_block = max(1, _MAX_LOGITS // (num_qo_heads * kv_block))
    for start in range(first, qo_len, qo_block):
        stop = min(start + qo_block, qo_len)
        rows = queries[:, start:stop].float()
        if rope is not None:
            rows = _rotate(rows, torch.arange(start + offset, stop + offset).unsqueeze(1), *rope)
        visible = _visible_keys(start + offset, stop + offset, kv_len, causal, window_left)
        out_block, lse_block = _attend_rows(
            rows * sm_scale, k, v, start + offset, visible, kv_block, causal, window_left,
            logits_soft_cap, rope,
        )  # fmt: skip
        out_rows[:, start:stop] = out_block
        lse_rows[:, start:stop] = lse_block
    return out, lse


def _attend_one(
    q: Tensor, k: Tensor, v: Tensor, logits_soft_cap: float, sm_scale: float
) -> tuple[Tensor, Tensor]:
    """One query that sees every key, which is each step of decode: as few torch calls as it takes.

    k and v are ``[num_kv_heads, kv_len, head_dim]``.
    """
    num_kv_heads, _, head_dim_vo = v.shape
    rows = q.reshape(num_kv_heads, -1, q.shape[-1]).float() * sm_scale
    logits = torch.bmm(rows, k.float().transpose(1, 2))
    if logits_soft_cap > 0.0:
        logits = logits.div_(logits_soft_cap).tanh_().mul_(logits_soft_cap)
    top = logits.amax(-1, keepdim=True)
    weights = logits.sub_(top).exp_()
    total = weights.sum(-1, keepdim=True)
    out = torch.bmm(weights, v.float()).div_(total)
    shape = q.shape[:-1]
    return out.to(q.dtype).view(*shape, head_dim_vo), total.log_().add_(top).view(shape)


def _visible_keys(
    first_row: int, end_row: int, kv_len: int, causal: bool, window_left: int
) -> tuple[int, int]:
    """Range of keys that rows standing at positions ``[first_row, end_row)`` may see."""
    begin = max(0, first_row - window_left) if window_left >= 0 else 0
    return begin, min(kv_len, end_row) if causal else kv_len


def _attend_rows(
    rows: Tensor,
    k: Tensor,
    v: Tensor,
    position: int,
    visible: tuple[int, int],
    kv_block: int,
    causal: bool,
    window_left: int,
    logits_soft_cap: float,
    rope: tuple[float, float] | None,
) -> tuple[Tensor, Tensor]:
    """Online softmax of scaled rows ``[heads, rows, group, head_dim]`` over blocks of keys.

    Every row sees at least one key of ``visible``; the first row stands at ``position``.
    """
    num_kv_heads, num_rows, group, _ = rows.shape
    flat = rows.reshape(num_kv_heads, num_rows * group, -1)
    # Of the keys so far: largest logit, sum of e^(logit - top), and the same sum of their values.
    top = flat.new_full((num_kv_heads, num_rows * group, 1), -math.inf)
    total, out = torch.zeros_like(top), flat.new_zeros(())
    for begin in range(visible[0], visible[1], kv_block):
        end = min(begin + kv_block, visible[1])
        keys = k[:, begin:end].float()
        if rope is not None:
            keys = _rotate(keys, torch.arange(begin, end), *rope)
        logits = torch.bmm(flat, keys.transpose(1, 2))
        if logits_soft_cap > 0.0:
            logits = logits.div_(logits_soft_cap).tanh_().mul_(logits_soft_cap)
        if (causal and end > position + 1) or (
            window_left >= 0 and begin < position + num_rows - 1 - window_left
        ):
            hidden = _hidden(position, num_rows, begin, end, causal, window_left)
            logits.view(num_kv_heads, num_rows, group, -1).masked_fill_(
                hidden.unsqueeze(1), -math.inf
            )
        new_top = torch.maximum(top, logits.amax(-1, keepdim=True))
        # Why: a row that has seen no key yet has the top -inf, and -inf - -inf is NaN.
        shift = new_top.clamp_min(torch.finfo(torch.float32).min)
        weights = logits.sub_(shift).exp_()
        decay = (top - shift).exp()
        total = total * decay + weights.sum(-1, keepdim=True)
        out = out * decay + torch.bmm(weights, v[:, begin:end].float())
        top = new_top
    shape = (num_kv_heads, num_rows, group)
    return (out / total).view(*shape, -1), (top + total.log()).view(shape)


def _hidden(
    position: int, num_rows: int, begin: int, end: int, causal: bool, window_left: int
) -> Tensor:
    """Mask ``[num_rows, end - begin]``, True where the key is hidden from the row."""
    ahead = torch.arange(begin, end) - torch.arange(position, position + num_rows).unsqueeze(1)
    hidden = ahead > 0 if causal else torch.zeros_like(ahead, dtype=torch.bool)
    return hidden | (ahead < -window_left) if window_left >= 0 else hidden


def _rotate(x: Tensor, positions: Tensor, rope_scale: float, rope_theta: float) -> Tensor:
    """Rotate element d with element d + head_dim / 2; angles in float64, the rest in float32."""
    half = x.shape[-1] // 2
    frequencies = rope_theta ** (torch.arange(half, dtype=torch.float64) / -half) / rope_scale
    angles = positions.double().unsqueeze(-1) * frequencies
    cos, sin = angles.cos().float(), angles.sin().float()
    first, second = x[..., :half], x[..., half:]
    return torch.cat((first * cos - second * sin, second * cos + first * sin), -1)
