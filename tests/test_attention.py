"""Single-request attention against float64, over shapes, layouts, masks and options."""

from __future__ import annotations

import math

import oracle
import pytest
import ridgeline
import torch
import torch.nn.functional as F
from problem import Problem
from support import normal, poisoned_call, supports_bf16_attention

HALVES = (torch.float16, torch.bfloat16)
HEAD_DIMS = [(d, d) for d in (8, 32, 40, 64, 80, 96, 128, 192, 256)] + [(192, 128), (64, 128)]
GROUPS = (1, 3, 5, 7, 8, 16)
KV_LENGTHS = (0, 1, 2, 15, 16, 17, 63, 64, 65, 127, 128, 129, 255, 257, 1000, 4099)
QO_LENGTHS = (0, 1, 2, 7, 15, 16, 17, 31, 33, 63, 64, 65, 127, 128, 129, 300)

DECODE = Problem(decode=True, heads=(4, 2), kv_len=333)
PREFILL = Problem(qo_len=33, heads=(4, 2), kv_len=150, causal=True)


def ids(problem: object) -> str:
    return str(problem)


def shapes() -> list[Problem]:
    """Every head dim, group and length, each in decode and prefill."""
    problems = []
    for dtype in HALVES:
        for dims in HEAD_DIMS:
            for base in (DECODE, PREFILL):
                problems.append(base.with_(dtype=dtype, head_dims=dims))
    for group in GROUPS:
        problems.append(DECODE.with_(heads=(2 * group, 2)))
        problems.append(PREFILL.with_(heads=(2 * group, 2), dtype=torch.bfloat16))
        problems.append(PREFILL.with_(heads=(group, 1), qo_len=5, head_dims=(128, 128)))
    for kv_len in KV_LENGTHS:
        problems.append(DECODE.with_(kv_len=kv_len, heads=(6, 2)))
        problems.append(DECODE.with_(kv_len=kv_len, dtype=torch.bfloat16, head_dims=(128, 128)))
        problems.append(PREFILL.with_(kv_len=kv_len, causal=False, qo_len=3))
    for qo_len in QO_LENGTHS:
        problems.append(PREFILL.with_(qo_len=qo_len, kv_len=qo_len))
        problems.append(PREFILL.with_(qo_len=qo_len, kv_len=qo_len + 70, dtype=torch.bfloat16))
        problems.append(PREFILL.with_(qo_len=qo_len, kv_len=200, causal=False))
    long = PREFILL.with_(heads=(2, 1))
    problems.append(long.with_(qo_len=1024, kv_len=1024))
    problems.append(long.with_(qo_len=4096, kv_len=4096))
    problems.append(long.with_(qo_len=100, kv_len=20_011, head_dims=(128, 128)))
    problems.append(long.with_(qo_len=3, kv_len=100_003, dtype=torch.bfloat16))
    problems.append(DECODE.with_(kv_len=100_003, heads=(4, 1), head_dims=(128, 128)))
    return list(dict.fromkeys(problems))


def options() -> list[Problem]:
    """Layouts, views, masks, soft cap, scale and rotation, also together."""
    small = PREFILL.with_(qo_len=40, kv_len=170)
    problems = []
    for base in (DECODE, PREFILL):
        for layout in ("NHD", "HND"):
            for views in (False, True):
                problems.append(base.with_(kv_layout=layout, strided=views))
    for qo_len, kv_len in ((40, 170), (170, 40), (65, 64), (300, 7), (5, 0)):
        for causal in (False, True):
            for window in (-1, 0, 1, 16, 63, 1000):
                problem = small.with_(qo_len=qo_len, kv_len=kv_len, causal=causal)
                problems.append(problem.with_(window_left=window))
    for window in (0, 5, 64, 100, 400):
        problems.append(DECODE.with_(window_left=window))
    for base in (DECODE, small):
        for cap in (0.0, 1e-6, 1.0, 8.0, 30.0):
            problems.append(base.with_(logits_soft_cap=cap, scale=3.0))
        for sm_scale in (0.0, 1.0, -0.25, 0.01):
            problems.append(base.with_(sm_scale=sm_scale))
        for rope in ((1.0, 1e4), (8.0, 5e5)):
            for dtype in HALVES:
                problems.append(base.with_(rope=rope, dtype=dtype))
        for dims in ((40, 40), (80, 80), (192, 128), (256, 256)):
            problems.append(base.with_(rope=(1.0, 1e4), head_dims=dims, kv_layout="HND"))
        problems.append(
            base.with_(rope=(2.0, 1e4), logits_soft_cap=20.0, window_left=50, strided=True)
        )
    problems.append(DECODE.with_(rope=(1.0, 1e4), kv_len=50_003, heads=(2, 1)))
    for qo_len in (4, 33, 130):
        problems.append(small.with_(fp16_qk=True, qo_len=qo_len))
    return list(dict.fromkeys(problems))


@pytest.mark.parametrize("problem", shapes(), ids=ids)
def test_shapes(problem: Problem, device: torch.device, rng: torch.Generator) -> None:
    problem.check(device, rng)


@pytest.mark.parametrize("problem", options(), ids=ids)
def test_options(problem: Problem, device: torch.device, rng: torch.Generator) -> None:
    problem.check(device, rng)


@pytest.mark.parametrize(
    "problem",
    [p.with_(dtype=torch.float32) for p in (DECODE, PREFILL, PREFILL.with_(rope=(1.0, 1e4)))],
    ids=ids,
)
def test_float32_on_the_cpu(problem: Problem, rng: torch.Generator) -> None:
    problem.check(torch.device("cpu"), rng)


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize(
    "problem",
    [
        Problem(qo_len=4096, kv_len=4096, heads=(32, 8), head_dims=(128, 128), causal=True),
        Problem(qo_len=2048, kv_len=9001, heads=(16, 2), head_dims=(128, 128), causal=True),
        Problem(qo_len=1000, kv_len=3000, heads=(8, 8), head_dims=(256, 256), window_left=700),
        Problem(qo_len=777, kv_len=131_072, heads=(4, 1), head_dims=(192, 128), causal=True),
        Problem(decode=True, kv_len=500_000, heads=(32, 8), head_dims=(128, 128)),
    ],
    ids=ids,
)
def test_large(problem: Problem, dtype: torch.dtype, rng: torch.Generator) -> None:
    problem.with_(dtype=dtype).check(torch.device("cuda", 0), rng)


@pytest.mark.parametrize("kv_len", [64, 65, 200, 2048, 5000])
@pytest.mark.parametrize("decode", [True, False], ids=["decode", "prefill"])
def test_each_key_is_found(
    decode: bool, kv_len: int, device: torch.device, rng: torch.Generator
) -> None:
    """A key that outweighs all others must show its own value, wherever it lies.

    Random data cannot tell whether one key of thousands was lost; this can. Query i points along
    its own axis with key place[i]; the value of a key spells its place in base 8.
    """
    heads, head_dim = 2, 64
    edges = [0, 1, 15, 16, 63, kv_len // 2, kv_len - 17, kv_len - 2, kv_len - 1]
    places = sorted({place for place in edges if 0 <= place < kv_len})[:head_dim]
    keys = normal((kv_len, heads, head_dim), torch.float16, device, rng) * 0.01
    digits = torch.arange(kv_len, device=device).unsqueeze(1) // 8 ** torch.arange(8, device=device)
    values = (digits % 8).half().unsqueeze(1).expand(-1, heads, -1).repeat(1, 1, head_dim // 8)
    queries = torch.zeros(len(places), heads, head_dim, dtype=torch.float16, device=device)
    for axis, place in enumerate(places):
        keys[place] = 0.0
        keys[place, :, axis] = 100.0
        queries[axis, :, axis] = 100.0
    if decode:
        out = torch.stack([ridgeline.single_decode_with_kv_cache(q, keys, values) for q in queries])
    else:
        out = ridgeline.single_prefill_with_kv_cache(queries, keys, values)
    assert torch.equal(out, values[places])


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("decode", [True, False], ids=["decode", "prefill"])
def test_logits_at_the_extremes(
    dtype: torch.dtype, decode: bool, device: torch.device, rng: torch.Generator
) -> None:
    """Logits far beyond the dtype's range: the softmax is a hard choice, and stays finite."""
    if not supports_bf16_attention(device) and dtype == torch.bfloat16:
        pytest.skip("bf16 attention raises on sm_75 (test_attention_errors.py)")
    heads, head_dim, kv_len = 2, 64, 150
    # Powers of two, so that the largest logits are exact: fp16 up to 2^15 * 2^15 * 64.
    largest = 2.0**15 if dtype == torch.float16 else 2.0**55
    values = normal((kv_len, heads, head_dim), dtype, device, rng)
    keys = torch.full((kv_len, heads, head_dim), -largest, dtype=dtype, device=device)
    winner = 77
    keys[winner] = largest
    queries = torch.full((3, heads, head_dim), largest, dtype=dtype, device=device)
    queries[1] = -largest
    outs, lses = [], []
    if decode:
        for query in queries:
            out, lse = poisoned_call(
                device, ridgeline.single_decode_with_kv_cache, query, keys, values, return_lse=True
            )
            outs.append(out)
            lses.append(lse)
        out, lse = torch.stack(outs), torch.stack(lses)
    else:
        out, lse = poisoned_call(
            device, ridgeline.single_prefill_with_kv_cache, queries, keys, values, return_lse=True
        )
    assert torch.equal(out[0], values[winner])
    assert torch.equal(out[2], values[winner])
    others = torch.cat((values[:winner], values[winner + 1 :])).double().mean(0)
    spread = values.double().abs().mean(0)
    unit = torch.finfo(dtype).eps
    assert ((out[1].double() - others).abs() <= unit * (others.abs() + spread)).all()
    top = largest * largest * math.sqrt(head_dim)
    expected = torch.full_like(lse, top)
    assert torch.allclose(lse, expected, rtol=2.0**-21, atol=0.0)


def test_values_at_the_extremes(device: torch.device) -> None:
    """The average of the largest float16 values is the largest float16 value, not inf."""
    largest = torch.finfo(torch.float16).max
    query = torch.zeros(2, 64, dtype=torch.float16, device=device)
    keys = torch.zeros(3000, 2, 64, dtype=torch.float16, device=device)
    values = torch.full_like(keys, largest)
    out = ridgeline.single_decode_with_kv_cache(query, keys, values)
    assert torch.equal(out, torch.full_like(out, largest))


@pytest.mark.parametrize("group", [1, 4])
@pytest.mark.parametrize("causal", [False, True])
def test_matches_torch_sdpa(
    causal: bool, group: int, device: torch.device, rng: torch.Generator
) -> None:
    """A second oracle: torch's own attention in float64, for our op and for the oracle itself."""
    problem = PREFILL.with_(qo_len=50, kv_len=90, heads=(2 * group, 2), causal=causal)
    q, k, v = problem.inputs(device, rng)
    mask = torch.ones(50, 90, dtype=torch.bool, device=device)
    if causal:
        mask = mask.tril(90 - 50)
    heads_first = (t.double().transpose(0, 1).unsqueeze(0) for t in (q, k, v))
    expected = F.scaled_dot_product_attention(*heads_first, attn_mask=mask, enable_gqa=True)
    expected = expected.squeeze(0).transpose(0, 1)
    reference = problem.reference(q, k, v)
    torch.testing.assert_close(reference.out, expected, rtol=1e-12, atol=1e-12)
    out = problem.call(q, k, v, return_lse=False)
    assert oracle.worst("out", out, expected, reference.out_bound) <= 1.0


def test_oracle_rotation_matches_transformers(rng: torch.Generator) -> None:
    """Our reading of ROPE_LLAMA is Hugging Face's: cos and sin over two halves."""
    llama = pytest.importorskip("transformers.models.llama.modeling_llama")
    x = torch.randn(1, 3, 20, 16, generator=rng, dtype=torch.float64)
    positions = torch.arange(20)
    frequencies = 1e4 ** (-torch.arange(8, dtype=torch.float64) / 8)
    angles = torch.outer(positions.double(), frequencies).repeat(1, 2).unsqueeze(0)
    expected, _ = llama.apply_rotary_pos_emb(x, x, angles.cos(), angles.sin())
    torch.testing.assert_close(oracle.rotate_half(x, positions, 1.0, 1e4), expected)


def test_lse_bases_and_layouts(device: torch.device, rng: torch.Generator) -> None:
    q, k, v = PREFILL.inputs(device, rng)
    out, natural = ridgeline.single_prefill_with_kv_cache_return_lse(q, k, v, causal=True)
    same, binary = ridgeline.single_prefill_with_kv_cache(
        q, k, v, causal=True, return_lse=True, lse_base="log2", lse_layout="HN"
    )
    assert torch.equal(out, same)
    assert binary.shape == (4, 33)
    assert binary.is_contiguous()
    torch.testing.assert_close(binary.t() * math.log(2.0), natural, rtol=1e-6, atol=1e-6)
    _, one = ridgeline.single_decode_with_kv_cache(q[0], k, v, return_lse=True)
    _, one_binary = ridgeline.single_decode_with_kv_cache(
        q[0], k, v, return_lse=True, lse_base="log2", lse_layout="HN"
    )
    assert one.shape == one_binary.shape == (4,)
    torch.testing.assert_close(one_binary * math.log(2.0), one, rtol=1e-6, atol=1e-6)


def test_decode_is_prefill_of_one(device: torch.device, rng: torch.Generator) -> None:
    q, k, v = DECODE.inputs(device, rng)
    decode = ridgeline.single_decode_with_kv_cache(q, k, v, use_tensor_cores=True)
    prefill = ridgeline.single_prefill_with_kv_cache(q.unsqueeze(0), k, v, causal=True)
    assert torch.equal(decode, prefill.squeeze(0))


def test_compatible_arguments_are_taken(device: torch.device, rng: torch.Generator) -> None:
    q, k, v = PREFILL.inputs(device, rng)
    expected = ridgeline.single_prefill_with_kv_cache(q, k, v)
    for arguments in ({"backend": "fa2"}, {"o_dtype": torch.float16}, {"o_dtype": "float16"}):
        assert torch.equal(ridgeline.single_prefill_with_kv_cache(q, k, v, **arguments), expected)


def test_inputs_are_left_alone(device: torch.device, rng: torch.Generator) -> None:
    q, k, v = PREFILL.inputs(device, rng)
    copies = [t.clone() for t in (q, k, v)]
    PREFILL.with_(rope=(1.0, 1e4)).call(q, k, v)
    assert all(torch.equal(t, copy) for t, copy in zip((q, k, v), copies, strict=True))


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.large
@pytest.mark.parametrize("kv_layout", ["NHD", "HND"])
def test_offsets_beyond_32_bits(kv_layout: str, rng: torch.Generator) -> None:
    """Keys and values in one buffer, 2^31 elements apart and further; needs 14 GB."""
    device = torch.device("cuda", 0)
    free, _ = torch.cuda.mem_get_info()
    needed = 14 << 30
    if free < needed:
        pytest.skip(f"needs {needed >> 30} GB of free GPU memory, {free >> 30} GB are there")
    heads, head_dim, kv_len = 2, 128, 300
    row = (2**31 // kv_len + 8) // 8 * 8
    backing = torch.zeros(2 * kv_len * row + 4096, dtype=torch.float16, device=device)
    if kv_layout == "NHD":
        size, stride = (kv_len, heads, head_dim), (row, head_dim, 1)
    else:
        size, stride = (heads, kv_len, head_dim), (2**31 + 64, 1024, 1)
    k = backing.as_strided(size, stride)
    v = backing.as_strided(size, stride, 512 if kv_layout == "HND" else kv_len * row)
    k.copy_(normal(size, torch.float16, device, rng))
    v.copy_(normal(size, torch.float16, device, rng))
    for problem in (
        Problem(decode=True, heads=(4, heads), head_dims=(head_dim, head_dim)),
        Problem(qo_len=70, heads=(4, heads), head_dims=(head_dim, head_dim), causal=True),
    ):
        problem = problem.with_(kv_len=kv_len, kv_layout=kv_layout)
        q = normal((70, 4, head_dim), torch.float16, device, rng)
        q = q[0] if problem.decode else q
        out, lse = problem.call(q, k, v)
        oracle.check(problem.reference(q, k, v), out, lse)
