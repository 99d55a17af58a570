"""The ops inside torch: opcheck, torch.compile with dynamic lengths, torch.export."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import ridgeline
import torch
from batch_problem import Batch
from pair_problem import Pair
from support import normal, supports_bf16_attention
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

Arguments = tuple[tuple[Any, ...], dict[str, Any]]
OPS = torch.ops.ridgeline
FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)
OPCHECKS = (
    "test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic"
)  # fmt: skip


def half(*shape: int, device: torch.device, dtype: torch.dtype = torch.float16) -> Tensor:
    return torch.randn(shape, device=device).to(dtype)


def norm_cases(device: torch.device) -> dict[str, list[Arguments]]:
    x, weight = half(3, 5, 64, device=device), half(64, device=device)
    view = half(6, 128, device=device)[::2, :64]
    return {
        "rmsnorm": [((x, weight, 1e-6), {}), ((view, weight.float(), 1e-5), {})],
        "rmsnorm_out": [((torch.empty_like(x), x, weight, 1e-6), {})],
        "fused_add_rmsnorm": [((x, half(3, 5, 64, device=device), weight, 1e-6), {})],
        "gemma_rmsnorm": [((x, weight, 1e-6), {}), ((view, weight.float(), 1e-5), {})],
        "gemma_rmsnorm_out": [((torch.empty_like(x), x, weight, 1e-6), {})],
        "gemma_fused_add_rmsnorm": [((x, half(3, 5, 64, device=device), weight, 1e-6), {})],
        "layernorm": [((x, weight, weight, 1e-6), {}), ((view, *[weight.float()] * 2, 1e-5), {})],
    }


def norm_quant_cases(device: torch.device) -> dict[str, list[Arguments]]:
    x, weight = half(3, 5, 64, device=device), half(64, device=device)
    out = torch.zeros(3, 5, 64, dtype=torch.int8, device=device)
    one, rows = torch.ones(1, device=device), torch.ones(3, 5, 1, device=device)
    scales = ((None, None, 0.5), (None, one, 1.0), (rows, None, 1.0))
    return {
        "rmsnorm_quant": [((out, x, weight, *scale, 1e-6), {}) for scale in scales],
        "fused_add_rmsnorm_quant": [
            ((out, x, half(3, 5, 64, device=device), weight, *scale, 1e-6), {}) for scale in scales
        ],
        "layernorm_quant": [((out, x, weight, weight, *scale, 1e-6), {}) for scale in scales],
    }


def activation_cases(device: torch.device) -> dict[str, list[Arguments]]:
    x = half(3, 5, 128, device=device)
    out, fp8 = half(3, 5, 64, device=device), torch.zeros(3, 5, 64, device=device)
    cases: dict[str, list[Arguments]] = {}
    for op in ("silu_and_mul", "gelu_and_mul", "gelu_tanh_and_mul"):
        cases[op] = [((x,), {})]
        cases[f"{op}_out"] = [((out, x), {})]
        cases[f"{op}_quant"] = [
            ((fp8.to(torch.float8_e4m3fn), x, None, 0.5), {}),
            ((fp8.to(torch.float8_e4m3fn), x, torch.ones(1, device=device), 1.0), {}),
        ]
    return cases


def rope_cases(device: torch.device) -> dict[str, list[Arguments]]:
    q, k = half(7, 4, 64, device=device), half(7, 2, 64, device=device)
    positions = torch.arange(7, device=device, dtype=torch.int32)
    cases: list[Arguments] = [
        ((q, k, positions, 1e4), {}),
        ((q, k, positions.long(), 5e5, 32, True, 2.0), {}),
    ]
    requests = torch.tensor([0, 3, 3, 7], dtype=torch.int32, device=device), positions[:3]
    by_request: list[Arguments] = [((q, k, *requests, 1e4, 32, False, 1.0), {})]
    table = torch.randn(9, 32, device=device)
    by_table: list[Arguments] = [
        ((positions, q, k, 64, table), {}),
        ((positions.long(), q.flatten(1), k.flatten(1), 64, table, False), {}),
    ]
    scaling = (1.0, 4.0, 8192.0)
    named = {
        "apply_rope": by_request,
        "apply_rope_pos_ids": cases,
        "apply_llama31_rope": [((*args, *scaling), {}) for args, _ in by_request],
        "apply_llama31_rope_pos_ids": [((*cases[1][0], *scaling), {}), cases[0]],
        "apply_rope_with_cos_sin_cache": by_table,
    }
    return named | {f"{name}_inplace": arguments for name, arguments in named.items()}


def attention_cases(device: torch.device) -> dict[str, list[Arguments]]:
    q, k = half(5, 4, 64, device=device), half(9, 2, 64, device=device)
    v = half(9, 2, 40, device=device)
    hnd = [t.transpose(0, 1).contiguous() for t in (k, v)]
    narrow: list[Arguments] = [
        ((q, k, v, True, 0.125, 0, -1, 0.0), {}),
        ((q[0], *hnd, False, 0.125, 1, 3, 30.0), {}),
        ((q, k[:0], v[:0], False, 0.125, 0, -1, 0.0), {}),
    ]
    if supports_bf16_attention(device):
        bf16 = [t.bfloat16() for t in (q, k, v)]
        narrow.append(((*bf16, False, None, 0, -1, 0.0), {}))
    full: list[Arguments] = [
        ((*arguments, 0, 1.0, 1e4, False), options) for arguments, options in narrow
    ]
    full.append(((q, k, v, True, 0.125, 0, -1, 0.0, 1, 8.0, 5e5, False), {}))
    full.append(((q, k, v, True, 0.125, 0, -1, 0.0, 0, 1.0, 1e4, True), {"sinks": None}))
    plain: list[Arguments] = [((q, k, v), {}), ((q[0], k, v), {})]
    return {
        "single_attention_plain": plain,
        "single_attention": narrow,
        "single_attention_full": full,
    }


def merge_cases(device: torch.device) -> dict[str, list[Arguments]]:
    v_a, v_b = half(6, 4, 64, device=device), half(6, 4, 64, device=device)
    s_a, s_b = torch.randn(2, 6, 4, device=device)
    mask = torch.arange(6, device=device) % 2 == 0
    pair = (v_a, s_a.clone(), v_b, s_b.clone())
    states = half(6, 3, 4, 40, device=device), torch.randn(6, 3, 4, device=device)
    return {
        "merge_state": [(pair, {})],
        "merge_state_in_place": [(pair, {}), ((*pair, mask), {})],
        "merge_states": [(states, {})],
    }


def batch_cases(device: torch.device) -> dict[str, list[Arguments]]:
    rng = torch.Generator().manual_seed(0)
    ops = ("", "_plain", "_lse", "_plain_lse", "_full", "_out")
    cases: dict[str, list[Arguments]] = {f"attention{name}": [] for name in ops}
    for form in ("paged", "ragged", "padded"):
        inputs = Batch(lengths=((3, 40), (0, 5), (1, 0)), form=form).inputs(device, rng)
        narrow = inputs.operands(flags=2)
        cases["attention"].append((narrow, {}))
        cases["attention"].append(((*narrow[:9], None, *narrow[10:]), {}))
        if device.type == "cuda":  # the CPU makes no list that would tell it lengths
            plain = inputs.operands(flags=0, schedule=inputs.schedule())[:7]
            cases["attention_plain"].append((plain, {}))
            cases["attention_plain_lse"].append((plain, {}))
        cases["attention_lse"].append((narrow, {}))
        cases["attention_full"].append(((*narrow, 0.0, 1, 1.0, 1e4, False), {}))
        cases["attention_full"].append(((*narrow[:9], None, *narrow[10:]), {}))
        operands = (inputs.q, *inputs.cache)
        work = inputs.index["kv_lens" if form == "padded" else "kv_indptr"]
        if device.type == "cuda":
            work = inputs.schedule()
        prepare = (*operands, inputs.index.get("kv_indices"), work, 0, inputs.index["qo_indptr"], 0)
        cases["attention_prepare"] = [(prepare, {}), ((*prepare, -1, 7, 0.125, 30.0), {})]
        cases["attention_prepared"] = [((*operands, 0), {})]
        cases["attention_prepared_lse"] = [((*operands, 0), {})]
        out, lse = inputs.call()
        wide = out.new_zeros((len(out), 6, 64))[:, 1:5]
        cases["attention_out"].append(((wide, lse, *narrow, 0.0, 1), {}))
        cases["attention_out"].append(((out, None, *narrow), {}))
        cases["attention_schedule"] = [(inputs.schedule_operands(flags=2), {})]
    decode = Batch(lengths=((1, 40), (1, 5), (1, 0)), decode=True)
    cases["attention_pair"], cases["attention_pair_schedule"] = [], []
    for form, single in (("paged", False), ("ragged", False), ("ragged", True)):
        lengths = ((30, 50),) if single else ((3, 40), (0, 5), (20, 60))
        first = Batch(lengths=lengths, form=form, causal=True)
        pair = Pair.of(first, decode, device, rng, single)
        options = (*pair.numbers(), 0.125, 30.0)
        cases["attention_pair"].append(((*pair.operands(), None, *options), {}))
        cases["attention_pair_schedule"].append((pair.schedule_operands(), {}))
    stacked = Batch(lengths=((3, 40), (0, 5), (1, 0)), stacked=True).inputs(device, rng)
    pool = stacked.cache
    operands = stacked.operands(flags=2)
    index = operands[1 + len(pool) :]
    for name in ("attention", "attention_lse"):
        cases[name].append(((operands[0], pool, pool, *index), {}))
    return cases


def page_cases(device: torch.device) -> dict[str, list[Arguments]]:
    def numbers(*values: int) -> Tensor:
        return torch.tensor(values, dtype=torch.int32, device=device)

    key, latent = half(3, 2, 8, device=device), half(3, 16, device=device)
    pool, other = half(5, 2, 4, 2, 8, device=device), half(6, 2, 4, 2, 8, device=device)
    pair = [half(5, 2, 4, 8, device=device) for _ in range(2)]
    pages = (pool[:, 0, :, 0], pool[:, 1].flatten(2))
    tokens = (numbers(0, 1, -1), numbers(3, 0, -1))
    table = (numbers(2, 4), numbers(0, 1, 2), numbers(4, 1))
    scales = torch.ones(2, device=device)
    views = (pool[:, 0], pool[:, 1])
    q, weight = half(3, 4, 8, device=device), torch.ones(8, device=device)
    rotary = (q, key, key, *tokens, *views, *table[:2], torch.empty_like(q), 2, 1e4)
    norm, angles = (weight, weight, 1e-6), (4, 8.0, 1.0, 4.0, 8192.0)
    others = (other[:, 0], other[:, 1])
    copies = (numbers(0, 3), numbers(1, 4))
    return {
        "append_paged_kv_cache": [
            ((key, key, *tokens, *views, *table, 0), {}),
            ((key.float(), key.float(), *tokens, *pair, *table, 1, 0.5, 1.0, None, scales), {}),
        ],
        "append_paged_mla_kv_cache": [((latent[:, :8], latent, *tokens, *pages, *table), {})],
        "rope_append_paged_kv_cache": [
            (rotary, {}),
            ((*rotary, *norm), {}),
        ],
        "rope_append_paged_kv_cache_full": [
            ((*rotary, *norm, tokens[0], *angles, None, 1.0, 1.0, None, None), {}),
        ],
        "get_batch_indices_positions": [((numbers(0, 1, 3), numbers(4, 2), 5), {})],
        "get_seq_lens": [((numbers(0, 1, 3), numbers(4, 2), 5), {})],
        "copy_pages": [((*views, *others, *copies), {})],
        "copy_pages_inplace": [((*views, *copies), {})],
    }


def quantization_cases(device: torch.device) -> dict[str, list[Arguments]]:
    x = torch.rand(103, device=device) < 0.5
    indptr = torch.tensor([0, 3, 3, 103], dtype=torch.int32, device=device)
    return {
        "packbits": [((x,), {}), ((x[::2].byte(), False), {})],
        "segment_packbits": [((x, indptr), {}), ((x[::2], indptr[:1], False), {})],
        **quantize_cases(device),
    }


def quantize_cases(device: torch.device) -> dict[str, list[Arguments]]:
    x = half(3, 5, 64, device=device)
    q = torch.zeros(3, 5, 64, dtype=torch.int8, device=device)
    scales = torch.ones(3, 5, 4, device=device)
    return {
        "quantize": [((x, torch.int8, size), {}) for size in (-1, 0, 16)],
        "quantize_with_scale": [((x, scales, torch.int8), {})],
        "dequantize": [((q, scales, torch.float16), {})],
    }


def sampling_cases(device: torch.device) -> dict[str, list[Arguments]]:
    logits, seed = torch.randn(3, 40, device=device), torch.arange(3, device=device)
    probs = torch.softmax(logits, dim=-1)
    rows = torch.tensor([2, 0, 0], device=device)
    k, p = torch.tensor([2, 5, 40], device=device), torch.full((3,), 0.7, device=device)
    off = (None, 1.0, None, 0, None, 1.0, None, 0.0)
    draft, target = probs.expand(2, 3, 40), torch.softmax(torch.randn(2, 4, 40), -1).to(device)
    ids = torch.zeros(2, 3, dtype=torch.int32, device=device)
    return {
        "sample": [
            ((logits.half(), seed, None, True, False, None, *off), {}),
            ((probs, seed[:1], seed, False, True, rows, p, 1.0, k, 0, p, 1.0, p, 0.0), {}),
        ],
        "softmax": [((logits, None, 0.7), {}), ((logits.bfloat16(), p, 1.0), {})],
        "top_p_renorm_probs": [((probs, None, 0.7), {}), ((probs[:, :30], p, 1.0), {})],
        "top_k_renorm_probs": [((probs, None, 7), {}), ((probs, k, 0), {})],
        "top_k_mask_logits": [((logits.half(), None, 7), {}), ((logits, k, 0), {})],
        "top_k": [((logits, 7, True), {}), ((logits.bfloat16()[::2], 1, False), {})],
        "chain_speculative_sampling": [((draft, ids, target, seed[:2], None), {})],
    }


CASES: list[Callable[[torch.device], dict[str, list[Arguments]]]] = [
    norm_cases,
    norm_quant_cases,
    activation_cases,
    rope_cases,
    attention_cases,
    merge_cases,
    batch_cases,
    page_cases,
    quantization_cases,
    sampling_cases,
]


def registered_ops() -> list[str]:
    names = torch._C._dispatch_get_all_op_names()
    return sorted(n.removeprefix("ridgeline::") for n in names if n.startswith("ridgeline::"))


def test_every_op_has_an_opcheck_case() -> None:
    covered = {name for cases in CASES for name in cases(torch.device("cpu"))}
    assert covered == set(registered_ops())


@pytest.mark.parametrize("name", registered_ops())
def test_opcheck(name: str, device: torch.device) -> None:
    torch.manual_seed(0)
    for cases in CASES:
        for arguments, options in cases(device).get(name, []):
            tests = OPCHECKS
            if name.endswith(("_schedule", "_prepare")) and device.type == "cuda":
                # Words of a list that no record takes are never written, and no prepared call has
                # an earlier one's number, so two results may differ.
                tests = tuple(test for test in tests if test != "test_aot_dispatch_dynamic")
            if any(a.dtype in FP8 for a in arguments if isinstance(a, Tensor)):
                # It multiplies what an op mutates, which torch does not do in 8 bits.
                tests = tuple(test for test in tests if test != "test_schema")
            op = getattr(OPS, name).default
            torch.library.opcheck(op, arguments, options, test_utils=tests)


def block(x: Tensor, residual: Tensor, k: Tensor, v: Tensor, weight: Tensor, pos: Tensor) -> Tensor:
    """Every family in one function: what a layer of a model does, less its matrix products."""
    ridgeline.fused_add_rmsnorm(x, residual, weight)
    q = ridgeline.rmsnorm(x, weight).view(x.shape[0], 4, 32)
    q, rotated = ridgeline.apply_rope_pos_ids(q, k[-x.shape[0] :], pos)
    out, lse = ridgeline.single_prefill_with_kv_cache_return_lse(q, k, v, causal=True)
    plain = ridgeline.single_prefill_with_kv_cache(q, k, v, window_left=3, kv_layout="NHD")
    step = ridgeline.single_decode_with_kv_cache(q[-1], k, v)
    merged, _ = ridgeline.merge_state(out, lse, plain, lse)
    merged = merged + step + ridgeline.merge_states(merged.unsqueeze(1), lse.unsqueeze(1))[0]
    return ridgeline.silu_and_mul(merged.flatten(1)) + rotated.sum()


def block_inputs(
    qo_len: int, kv_len: int, device: torch.device, rng: torch.Generator
) -> tuple[Tensor, ...]:
    def draw(*shape: int) -> Tensor:
        return normal(shape, torch.float16, device, rng)

    positions = torch.arange(kv_len - qo_len, kv_len, device=device, dtype=torch.int32)
    kv = draw(kv_len, 2, 32), draw(kv_len, 2, 32)
    return draw(qo_len, 128), draw(qo_len, 128), *kv, draw(128), positions


LENGTHS = [(5, 21), (6, 22), (11, 40), (2, 300), (33, 33)]


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compile_with_dynamic_lengths(
    backend: str, device: torch.device, rng: torch.Generator
) -> None:
    """One graph, whole, serves every length; results are those of eager calls."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend(backend)
    compiled = torch.compile(block, fullgraph=True, dynamic=True, backend=counter)
    compiled_so_far = 0
    with torch.inference_mode():
        for qo_len, kv_len in LENGTHS:
            inputs = block_inputs(qo_len, kv_len, device, rng)
            expected = block(*(t.clone() for t in inputs))
            torch.testing.assert_close(compiled(*inputs), expected, rtol=1e-2, atol=1e-2)
            # The first call may compile twice: dynamic=True tries default floats as symbols first.
            compiled_so_far = compiled_so_far or counter.frame_count
            assert counter.frame_count == compiled_so_far, f"recompiled for {qo_len}, {kv_len}"


def test_compile_marks_lengths_dynamic_by_itself(
    device: torch.device, rng: torch.Generator
) -> None:
    """Without dynamic=True torch compiles twice, as it does for its own ops, and then no more."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(
        lambda q, k, v: ridgeline.single_decode_with_kv_cache(q, k, v, return_lse=True),
        fullgraph=True,
        backend=counter,
    )
    with torch.inference_mode():
        for kv_len in (20, 21, 22, 100, 1000):
            q = normal((4, 64), torch.float16, device, rng)
            k, v = (normal((kv_len, 2, 64), torch.float16, device, rng) for _ in range(2))
            out, lse = compiled(q, k, v)
            expected = ridgeline.single_decode_with_kv_cache(q, k, v, return_lse=True)
            assert torch.equal(out, expected[0])
            assert torch.equal(lse, expected[1])
    assert counter.frame_count == 2


def test_compile_window_as_dynamic_integer(device: torch.device, rng: torch.Generator) -> None:
    """window_left is a SymInt: a growing one does not recompile at every value."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(
        lambda q, k, v, window: ridgeline.single_decode_with_kv_cache(q, k, v, window_left=window),
        fullgraph=True,
        backend=counter,
    )
    q = normal((4, 64), torch.float16, device, rng)
    k, v = (normal((50, 2, 64), torch.float16, device, rng) for _ in range(2))
    with torch.inference_mode():
        for window in (5, 6, 7, 20, 40):
            expected = ridgeline.single_decode_with_kv_cache(q, k, v, window_left=window)
            assert torch.equal(compiled(q, k, v, window), expected)
    assert counter.frame_count == 2


class Attention(torch.nn.Module):
    """What the export tests export."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        out, lse = ridgeline.single_prefill_with_kv_cache(q, k, v, causal=True, return_lse=True)
        return out * 2, ridgeline.merge_state(out, lse, out, lse)[1]


def test_export(device: torch.device, rng: torch.Generator, tmp_path: Any) -> None:
    """Exported with dynamic lengths, saved, loaded and run at other lengths."""

    def inputs(qo_len: int, kv_len: int) -> tuple[Tensor, Tensor, Tensor]:
        q = normal((qo_len, 4, 64), torch.float16, device, rng)
        k, v = (normal((kv_len, 2, 64), torch.float16, device, rng) for _ in range(2))
        return q, k, v

    qo_len, kv_len = torch.export.Dim("qo_len"), torch.export.Dim("kv_len")
    with torch.no_grad():
        program = torch.export.export(
            Attention(),
            inputs(6, 20),
            dynamic_shapes={"q": {0: qo_len}, "k": {0: kv_len}, "v": {0: kv_len}},
        )
        called = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
        assert {
            "ridgeline.single_attention_full.default",
            "ridgeline.merge_state.default",
        } <= called
        torch.export.save(program, tmp_path / "attention.pt2")
        loaded = torch.export.load(tmp_path / "attention.pt2").module()
        for lengths in ((6, 20), (1, 1), (17, 100)):
            arguments = inputs(*lengths)
            for got, expected in zip(loaded(*arguments), Attention()(*arguments), strict=True):
                assert torch.equal(got, expected)


def test_vmap_and_grad_transforms_say_no(device: torch.device) -> None:
    """A transform that the ops do not support raises instead of returning something."""
    q = torch.randn(3, 4, 64, device=device).half()
    k = torch.randn(9, 2, 64, device=device).half()
    with pytest.raises(RuntimeError):
        torch.func.grad(lambda x: ridgeline.single_decode_with_kv_cache(x, k, k).sum())(q[0])
