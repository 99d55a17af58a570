"""`ridgeline.warmup`: from a described model to compiled kernels."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ridgeline
import torch
from ridgeline import _model, compiler
from support import run_python

RMSNORM = "norm/rmsnorm.cuh:rmsnorm<__half, __half, 8>"
SMALL = {"num_qo_heads": 8, "num_kv_heads": 2, "head_dim": 64, "dtype": "float16"}


def asked_for(model: dict[str, Any], op: str) -> dict[str, object]:
    """Return the first question about `op`."""
    return next(config for name, config in _model.questions(model) if name == op)


def test_mapping_gets_its_defaults() -> None:
    model = _model.from_mapping({"num_qo_heads": 32, "head_dim": 128})
    assert model["num_kv_heads"] == 32
    assert model["head_dim_vo"] == 128
    assert model["hidden_size"] == 4096
    assert model["dtype"] == model["weight_dtype"] == "bfloat16"


def test_mapping_of_two_head_sizes() -> None:
    model = _model.from_mapping({"num_qo_heads": 16, "head_dim_qk": 192, "head_dim_vo": 128})
    config = asked_for(model, "single_attention")
    assert (config["head_dim_qk"], config["head_dim_vo"]) == (192, 128)


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"num_qo_heads": 32, "head_dims": 128}, "unknown field 'head_dims'"),
        ({"num_qo_heads": 32}, "Add head_dim"),
        ({"head_dim": 128}, "Add num_qo_heads"),
    ],
)
def test_mapping_with_a_mistake(config: dict[str, int], expected: str) -> None:
    with pytest.raises(ValueError, match=expected):
        ridgeline.warmup(config, arch="sm_80")


@pytest.mark.parametrize(
    ("head_dim", "model_type", "kernel"),
    [
        (128, "llama", "rope_append_plain<{0}, {0}, HalfSplit, 0>"),
        (128, "qwen3", "rope_append_plain<{0}, {0}, HalfSplit, 1>"),
        (64, "llama", "rope_append_paged_kv_cache<{0}, {0}, 8, HalfSplit>"),
    ],
)
def test_rope_append_of_a_model(head_dim: int, model_type: str, kernel: str) -> None:
    """Heads of 128 have a kernel of their own, with the norm that the model has."""
    model = _model.from_transformers(
        SimpleNamespace(
            hidden_size=512, num_attention_heads=4, head_dim=head_dim, model_type=model_type
        )
    )
    config = asked_for(model, "rope_append_paged_kv_cache")
    answer = compiler.library().explain("rope_append_paged_kv_cache", 90, config)
    (name,) = answer["kernels"]
    assert name.split(":")[1] == kernel.format("__nv_bfloat16")


def test_transformers_config() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        hidden_size=256,
        intermediate_size=688,
        num_attention_heads=8,
        num_key_value_heads=2,
        dtype="float16",
    )
    model = _model.from_transformers(config)
    expected = {"num_qo_heads": 8, "num_kv_heads": 2, "head_dim_qk": 32, "dtype": "float16"}
    assert {name: model[name] for name in expected} == expected
    assert asked_for(model, "silu_and_mul")["hidden_size"] == 688
    assert asked_for(model, "attention")["num_kv_heads"] == 2


def test_config_of_windows_and_partial_rope() -> None:
    model = _model.from_transformers(
        SimpleNamespace(
            hidden_size=512,
            num_attention_heads=4,
            sliding_window=1024,
            partial_rotary_factor=0.5,
            attn_logit_softcapping=50.0,
            torch_dtype=torch.bfloat16,
        )
    )
    assert model["window_left"] == 1023
    assert model["rotary_dim"] == 64
    assert model["logits_soft_cap"] == 50.0
    assert model["dtype"] == "bfloat16"


def test_object_that_describes_no_model() -> None:
    with pytest.raises(TypeError, match=r"expected a transformers config .* got int"):
        ridgeline.warmup(3, arch="sm_80")


def test_architecture_that_is_none() -> None:
    with pytest.raises(ValueError, match="argument 'arch': expected a name such as 'sm_90a'"):
        ridgeline.warmup([RMSNORM], arch="hopper")


def test_device_and_architecture_exclude_each_other() -> None:
    with pytest.raises(ValueError, match="got both"):
        ridgeline.warmup([RMSNORM], device="cuda", arch="sm_80")


def test_cpu_device() -> None:
    with pytest.raises(ValueError, match="The CPU needs no kernels"):
        ridgeline.warmup([RMSNORM], device="cpu")


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_without_a_gpu_the_way_out_is_named() -> None:
    with pytest.raises(RuntimeError, match="arch="):
        ridgeline.warmup(SMALL)


@pytest.mark.parametrize("arch", ["sm_75", "sm_80", "sm_90a"])
def test_core_model_needs_core_kernels_only(arch: str) -> None:
    """What the dispatcher chooses for a core configuration is in that SM's pack."""
    library = compiler.library()
    core = {row.kernel for row in library.core_table if row.core and row.serves(arch)}
    sm = compiler.native.arch_number(arch)
    dtypes = ["float16"] if arch == "sm_75" else ["float16", "bfloat16"]
    sizes = [(64, 64), (128, 128), (256, 256), (192, 128)]
    for dtype in dtypes:
        for qk, vo in sizes:
            model = _model.from_mapping(
                {
                    "num_qo_heads": 8,
                    "num_kv_heads": 2,
                    "head_dim_qk": qk,
                    "head_dim_vo": vo,
                    "intermediate_size": 1024,
                    "dtype": dtype,
                }
            )
            for op, config in _model.questions(model):
                answer = library.explain(op, sm, config)
                assert answer["ok"], (op, config, answer["reasons"])
                assert set(answer["kernels"]) <= core, (op, config)


@pytest.mark.parametrize(
    ("arch", "change", "is_for_caps"),
    [
        ("sm_90a", {}, True),
        ("sm_90a", {"logits_soft_cap": 0.0}, False),
        ("sm_90a", {"logits_soft_cap": 60.0}, False),
        ("sm_90a", {"dtype": "float16"}, False),
        ("sm_90a", {"head_dim": 256}, False),
        ("sm_80", {}, False),
    ],
)
def test_prefill_of_a_model_with_a_soft_cap(
    arch: str, change: dict[str, object], is_for_caps: bool
) -> None:
    model = _model.from_mapping(
        {"num_qo_heads": 8, "num_kv_heads": 2, "head_dim": 128, "logits_soft_cap": 50.0, **change}
    )
    library, sm = compiler.library(), compiler.native.arch_number(arch)
    asked = [
        library.explain(op, sm, config)["kernels"][1]
        for op, config in _model.questions(model)
        if op == "attention"
    ]
    assert any("SoftCapVariant" in name for name in asked) == is_for_caps
    assert not any("SoftCapVariant" in name for name in asked if "Heights<16>" in name)


def test_bf16_attention_on_turing_is_refused_with_the_reason() -> None:
    with pytest.raises(RuntimeError, match="no kernel of single_attention serves this model"):
        ridgeline.warmup({**SMALL, "dtype": "bfloat16"}, arch="sm_75")


WARMUP = f"""
import json, ridgeline
report = ridgeline.warmup([{RMSNORM!r}], arch="sm_80", progress=False)
print(json.dumps([report.num_packed, report.num_cached, report.num_compiled]))
"""


def test_second_warmup_finds_everything_in_the_cache(tmp_path: Path) -> None:
    env = {"RIDGELINE_CACHE_DIR": str(tmp_path), "RIDGELINE_PACK_DIR": ""}
    first, second = run_python(WARMUP, env), run_python(WARMUP, env)
    assert first.returncode == 0, first.stderr
    assert json.loads(first.stdout) == [0, 0, 1]
    assert json.loads(second.stdout) == [0, 1, 0]


SERVING_STEPS = """
import os, torch, ridgeline
head_dim, qk_norm = int(os.environ["HEAD_DIM"]), os.environ["QK_NORM"] == "True"
ridgeline.warmup({"num_qo_heads": 8, "num_kv_heads": 2, "head_dim": head_dim, "dtype": "float16",
                  "qk_norm": qk_norm}, progress=False)
os.environ["RIDGELINE_JIT"] = "0"
cache = torch.zeros(64, 2, 16, 2, head_dim, dtype=torch.float16, device="cuda")
weight = torch.ones(head_dim, dtype=torch.float16, device="cuda")
norms = {"q_weight": weight, "k_weight": weight} if qk_norm else {}
indices = torch.arange(64, dtype=torch.int32, device="cuda")
for lengths, new in [([5, 300], [1, 1]), ([20, 300], [7, 9]), ([40, 900], [1, 700])]:
    ints = lambda values: torch.tensor(values, dtype=torch.int32, device="cuda")
    pages = [-(-length // 16) for length in lengths]
    kv_indptr, qo_indptr = ints([0, pages[0], sum(pages)]), ints([0, new[0], sum(new)])
    last = ints([(length - 1) % 16 + 1 for length in lengths])
    table = {"kv_indices": indices, "kv_indptr": kv_indptr}
    q, k, v = (torch.randn(sum(new), heads, head_dim, device="cuda").half() for heads in (8, 2, 2))
    requests, positions = ridgeline.get_batch_indices_positions(
        qo_indptr, ints(lengths), sum(new))
    ridgeline.append_paged_kv_cache(k, v, requests, positions, cache, **table,
                                    kv_last_page_len=last)
    q = ridgeline.rope_append_paged_kv_cache(q, k, v, requests, positions, cache, **table, **norms)
    out = ridgeline.attention(q, cache, qo_indptr=qo_indptr, **table, kv_last_page_len=last,
                              causal=True, max_q_len=max(new))
    assert out.abs().sum() > 0 and out.isfinite().all()
logits = torch.randn(2, 1000, device="cuda")
ridgeline.sample_from_logits(logits, temperature=0.8, top_k=50, top_p=0.9)
torch.cuda.synchronize()
print("served")
"""


@pytest.mark.gpu
@pytest.mark.parametrize(("head_dim", "qk_norm"), [(64, True), (128, False), (128, True)])
def test_serving_steps_after_a_warmup_compile_nothing(
    head_dim: int, qk_norm: bool, tmp_path: Path
) -> None:
    env = {"RIDGELINE_CACHE_DIR": str(tmp_path), "RIDGELINE_PACK_DIR": ""}
    env |= {"HEAD_DIM": str(head_dim), "QK_NORM": str(qk_norm)}
    result = run_python(SERVING_STEPS, env)
    assert (result.returncode, result.stdout) == (0, "served\n"), result.stderr


def test_forbidden_jit_is_refused(tmp_path: Path) -> None:
    env = {
        "RIDGELINE_CACHE_DIR": str(tmp_path),
        "RIDGELINE_PACK_DIR": "",
        "RIDGELINE_JIT": "0",
    }
    result = run_python(WARMUP, env)
    assert result.returncode == 1
    assert "RIDGELINE_JIT=0 forbids" in result.stderr
    assert RMSNORM in result.stderr


def test_kernel_that_does_not_exist() -> None:
    with pytest.raises(RuntimeError, match=r"norm/none\.cuh"):
        ridgeline.warmup(["norm/none.cuh:none<1>"], arch="sm_80", progress=False)
