"""What a described model asks of the ops: the step from its configuration to their questions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

Question = tuple[str, dict[str, object]]

# Query lengths from decode to long prefill: between them every query tile is chosen once.
_QO_LENS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 1024, 4096)
_KV_LENS = (128, 32768)

FIELDS = {
    "num_qo_heads": "query heads of a layer",
    "num_kv_heads": "key-value heads of a layer; default: num_qo_heads",
    "head_dim": "size of a head; or head_dim_qk and head_dim_vo where they differ",
    "head_dim_qk": "size of a query or key head",
    "head_dim_vo": "size of a value or output head; default: head_dim_qk",
    "dtype": "of queries, keys and values: float16 or bfloat16; default: bfloat16",
    "weight_dtype": "of the norms' weights; default: dtype",
    "hidden_size": "size of the residual stream; default: num_qo_heads * head_dim_qk",
    "intermediate_size": "size of the gated MLP; without it no activation is prepared",
    "rotary_dim": "rotated part of a head; default: head_dim_qk",
    "interleave": "whether RoPE pairs neighbours; default: False",
    "qk_norm": "whether query and key heads are normed before RoPE; default: False",
    "window_left": "sliding window; default: -1, none",
    "logits_soft_cap": "default: 0, none",
    "pos_encoding_mode": "applied inside the attention kernel; default: NONE",
}


def from_mapping(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a described model with every default filled in.

    Raises
    ------
    ValueError
        If a field is unknown, or one that has no default is missing.
    """
    unknown = sorted(set(config) - set(FIELDS))
    if unknown:
        known = "\n".join(f"  {name}: {meaning}" for name, meaning in FIELDS.items())
        raise ValueError(
            f"ridgeline.warmup: argument 'config': unknown field {unknown[0]!r}. Fields:\n{known}"
        )
    head_dim_qk = config.get("head_dim_qk", config.get("head_dim"))
    num_qo_heads = config.get("num_qo_heads")
    if head_dim_qk is None or num_qo_heads is None:
        missing = "num_qo_heads" if num_qo_heads is None else "head_dim"
        raise ValueError(
            f"ridgeline.warmup: argument 'config': expected at least num_qo_heads and head_dim, "
            f"got {sorted(config)}. Add {missing}."
        )
    dtype = _dtype_name(config.get("dtype", "bfloat16"))
    return {
        "num_qo_heads": int(num_qo_heads),
        "num_kv_heads": int(config.get("num_kv_heads", num_qo_heads)),
        "head_dim_qk": int(head_dim_qk),
        "head_dim_vo": int(config.get("head_dim_vo", config.get("head_dim", head_dim_qk))),
        "dtype": dtype,
        "weight_dtype": _dtype_name(config.get("weight_dtype", dtype)),
        "hidden_size": int(config.get("hidden_size", int(num_qo_heads) * int(head_dim_qk))),
        "intermediate_size": int(config.get("intermediate_size", 0)),
        "rotary_dim": int(config.get("rotary_dim", head_dim_qk)),
        "interleave": bool(config.get("interleave", False)),
        "qk_norm": bool(config.get("qk_norm", False)),
        "window_left": int(config.get("window_left", -1)),
        "logits_soft_cap": float(config.get("logits_soft_cap", 0.0)),
        "pos_encoding_mode": str(config.get("pos_encoding_mode", "NONE")),
    }


def from_transformers(config: Any) -> dict[str, Any]:
    """Return the described model of a transformers config (or of the text part of one)."""
    if hasattr(config, "get_text_config"):
        config = config.get_text_config()
    num_qo_heads = getattr(config, "num_attention_heads", None)
    hidden_size = getattr(config, "hidden_size", None)
    if num_qo_heads is None or hidden_size is None:
        raise TypeError(
            "ridgeline.warmup: argument 'config': expected a transformers config with "
            "num_attention_heads and hidden_size, a dict of head counts and dtypes, or a list of "
            f"kernel names, got {type(config).__name__}"
        )
    head_dim = getattr(config, "head_dim", None) or hidden_size // num_qo_heads
    window = getattr(config, "sliding_window", None)
    return from_mapping(
        {
            "num_qo_heads": num_qo_heads,
            "num_kv_heads": getattr(config, "num_key_value_heads", None) or num_qo_heads,
            "head_dim": head_dim,
            "hidden_size": hidden_size,
            "intermediate_size": getattr(config, "intermediate_size", None) or 0,
            "qk_norm": getattr(config, "model_type", "").startswith("qwen3"),
            "rotary_dim": int(head_dim * (getattr(config, "partial_rotary_factor", None) or 1)),
            # A window of w tokens counts the query itself; window_left counts those before it.
            "window_left": -1 if window is None else window - 1,
            "logits_soft_cap": getattr(config, "attn_logit_softcapping", None) or 0.0,
            "dtype": getattr(config, "dtype", None)
            or getattr(config, "torch_dtype", None)
            or "bfloat16",
        }
    )


def questions(model: Mapping[str, Any]) -> list[Question]:
    """Return (op, configuration) for everything a forward pass of the model calls."""
    common = {"dtype": model["dtype"]}
    hidden = {**common, "hidden_size": model["hidden_size"]}
    norm = {**hidden, "weight_dtype": model["weight_dtype"]}
    rope = {name: model[name] for name in ("dtype", "rotary_dim", "interleave")}
    rope["head_dim"] = model["head_dim_qk"]
    asked: list[Question] = [
        ("rmsnorm", norm),
        ("fused_add_rmsnorm", norm),
        ("apply_rope_pos_ids", rope),
        ("apply_rope_pos_ids_inplace", rope),
    ]
    if model["intermediate_size"]:
        asked.append(("silu_and_mul", {**common, "hidden_size": model["intermediate_size"]}))
    attention = {
        name: model[name]
        for name in (
            "dtype",
            "num_qo_heads",
            "num_kv_heads",
            "head_dim_qk",
            "head_dim_vo",
            "window_left",
            "logits_soft_cap",
            "pos_encoding_mode",
        )
    }
    for qo_len in _QO_LENS:
        for kv_len in _KV_LENS:
            lengths = {"qo_len": qo_len, "kv_len": kv_len, "causal": True}
            asked.append(("single_attention", {**attention, **lengths}))
        asked.append(("attention", {**attention, "max_q_len": qo_len}))
    return [*asked, *_serving(model, rope)]


def _serving(model: Mapping[str, Any], rope: Mapping[str, object]) -> list[Question]:
    """What a serving step calls around batch attention: the paged cache and the sampler."""
    return [
        ("get_batch_indices_positions", {}),
        ("append_paged_kv_cache", {"dtype": model["dtype"]}),
        ("rope_append_paged_kv_cache", {**rope, "qk_norm": model["qk_norm"]}),
        ("sample", {"dtype": "float32"}),
    ]


def _dtype_name(dtype: object) -> str:
    return str(dtype).removeprefix("torch.")
