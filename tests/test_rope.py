"""apply_rope_pos_ids, functional and in place, against complex128 rotations and Transformers."""

from __future__ import annotations

from typing import Any

import hypothesis
import pytest
import ridgeline
import torch
from elementwise import (
    DTYPES,
    FLOAT32_UNIT,
    VIEWS,
    Wrong,
    assert_raises,
    assert_refuses_grad,
    captured,
    untouched_outside,
    view_of,
    without_recompilation,
)
from hypothesis import strategies as st
from rope_oracle import Angles, assert_rotated, draw, frequencies
from support import normal, poisoned_call
from torch import Tensor

HEAD_DIMS = (2, 16, 40, 64, 80, 96, 128, 192, 256, 512)
HEADS = ((1, 1), (32, 8), (7, 1), (5, 0), (0, 3), (40, 40))
FAR = (0, 1, 1_000_000, 3_141_592, 2**31 - 1, -7)


def assert_rope(
    actual: tuple[Tensor, Tensor],
    inputs: tuple[Tensor, Tensor],
    pos_ids: Tensor,
    rotary_dim: int,
    interleave: bool = False,
    scale: float = 1.0,
    theta: float = 1e4,
) -> None:
    angles = Angles.of(pos_ids, frequencies(rotary_dim, scale, theta))
    assert_rotated(actual, inputs, angles, interleave)


@pytest.mark.parametrize("interleave", [False, True], ids=["half-split", "interleaved"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_head_dims(
    device: torch.device,
    head_dim: int,
    dtype: torch.dtype,
    interleave: bool,
    rng: torch.Generator,
) -> None:
    q, k, pos_ids = draw(13, (7, 2), head_dim, dtype, device, rng)
    before = q.clone(), k.clone()
    call = ridgeline.apply_rope_pos_ids
    result = poisoned_call(device, call, q, k, pos_ids, interleave=interleave)
    assert_rope(result, (q, k), pos_ids, head_dim, interleave)
    assert all(x.is_contiguous() and x.dtype == dtype for x in result)
    assert torch.equal(q, before[0])
    assert torch.equal(k, before[1])
    assert ridgeline.apply_rope_pos_ids_inplace(q, k, pos_ids, interleave=interleave) is None
    assert torch.equal(q, result[0])
    assert torch.equal(k, result[1])


@pytest.mark.parametrize("heads", HEADS, ids=str)
@pytest.mark.parametrize("nnz", [1, 2, 67])
def test_heads(
    device: torch.device, nnz: int, heads: tuple[int, int], rng: torch.Generator
) -> None:
    q, k, pos_ids = draw(nnz, heads, 128, torch.bfloat16, device, rng)
    result = poisoned_call(device, ridgeline.apply_rope_pos_ids, q, k, pos_ids)
    assert_rope(result, (q, k), pos_ids, 128)


@pytest.mark.parametrize("interleave", [False, True], ids=["half-split", "interleaved"])
@pytest.mark.parametrize(("head_dim", "rotary_dim"), [(128, 64), (64, 2), (80, 32), (576, 512)])
def test_partial_rotation(
    device: torch.device, head_dim: int, rotary_dim: int, interleave: bool, rng: torch.Generator
) -> None:
    q, k, pos_ids = draw(9, (4, 2), head_dim, torch.float16, device, rng)
    call = ridgeline.apply_rope_pos_ids
    result = poisoned_call(device, call, q, k, pos_ids, rotary_dim, interleave)
    assert_rope(result, (q, k), pos_ids, rotary_dim, interleave)
    ridgeline.apply_rope_pos_ids_inplace(q, k, pos_ids, rotary_dim, interleave)
    assert torch.equal(q, result[0])
    assert torch.equal(k, result[1])


@pytest.mark.parametrize("ids_dtype", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("scale", "theta"), [(1.0, 1e4), (8.0, 5e5), (1.0, 1e6), (0.25, 1e4), (1.0, 1.0)]
)
def test_far_positions(
    device: torch.device,
    scale: float,
    theta: float,
    dtype: torch.dtype,
    ids_dtype: torch.dtype,
    rng: torch.Generator,
) -> None:
    """Beyond 1,000,000 positions the angles are as exact as at 1."""
    q, k, _ = draw(len(FAR), (4, 1), 128, dtype, device, rng)
    pos_ids = torch.tensor(FAR, dtype=ids_dtype, device=device)
    result = ridgeline.apply_rope_pos_ids(q, k, pos_ids, rope_scale=scale, rope_theta=theta)
    assert_rope(result, (q, k), pos_ids, 128, False, scale, theta)


@pytest.mark.parametrize("kind", VIEWS)
@pytest.mark.parametrize("head_dim", [64, 80])
def test_views(device: torch.device, head_dim: int, kind: str, rng: torch.Generator) -> None:
    q_values, k_values, pos_ids = draw(11, (6, 2), head_dim, torch.bfloat16, device, rng)
    q, k = view_of(q_values, kind), view_of(k_values, kind)
    result = poisoned_call(device, ridgeline.apply_rope_pos_ids, q, k, pos_ids)
    assert_rope(result, (q_values, k_values), pos_ids, head_dim)
    ridgeline.apply_rope_pos_ids_inplace(q, k, pos_ids)
    assert torch.equal(q, result[0])
    assert torch.equal(k, result[1])
    assert kind == "contiguous" or (untouched_outside(q) and untouched_outside(k))


@pytest.mark.parametrize("layout", ["tokens first", "heads first"])
def test_fused_projection(device: torch.device, layout: str, rng: torch.Generator) -> None:
    """q and k as interleaving views of one buffer, rotated in place; v stays."""
    nnz, heads, kv_heads, head_dim = 9, 6, 2, 128
    shape = (nnz, heads + 2 * kv_heads, head_dim)
    if layout == "tokens first":
        qkv = normal(shape, torch.float16, device, rng)
    else:
        transposed = (shape[1], shape[0], shape[2])
        qkv = normal(transposed, torch.float16, device, rng).transpose(0, 1)
    before = qkv.clone()
    q, k, _ = qkv.split([heads, kv_heads, kv_heads], dim=1)
    q_before, k_before, v_before = before.split([heads, kv_heads, kv_heads], dim=1)
    pos_ids = torch.arange(nnz, device=device)
    ridgeline.apply_rope_pos_ids_inplace(q, k, pos_ids)
    assert_rope((q, k), (q_before, k_before), pos_ids, head_dim)
    assert torch.equal(qkv[:, heads + kv_heads :], v_before)


def test_tokens_do_not_depend_on_the_batch(device: torch.device, rng: torch.Generator) -> None:
    q, k, pos_ids = draw(37, (8, 2), 128, torch.bfloat16, device, rng)
    together = ridgeline.apply_rope_pos_ids(q, k, pos_ids)
    for i in range(len(q)):
        alone = ridgeline.apply_rope_pos_ids(q[i : i + 1], k[i : i + 1], pos_ids[i : i + 1])
        assert torch.equal(alone[0][0], together[0][i])
        assert torch.equal(alone[1][0], together[1][i])


def test_alternating_options(device: torch.device, rng: torch.Generator) -> None:
    """The host keeps the frequencies of the last call; others must not see them."""
    q, k, pos_ids = draw(5, (2, 1), 64, torch.float32, device, rng)
    for _ in range(2):
        for rotary_dim, scale, theta in (
            (64, 1.0, 1e4),
            (32, 1.0, 1e4),
            (64, 2.0, 1e4),
            (64, 1.0, 500.0),
        ):
            result = ridgeline.apply_rope_pos_ids(q, k, pos_ids, rotary_dim, False, scale, theta)
            assert_rope(result, (q, k), pos_ids, rotary_dim, False, scale, theta)


def test_special_values(device: torch.device) -> None:
    q = torch.ones(1, 1, 16, device=device, dtype=torch.float16)
    q[0, 0, 3], q[0, 0, 12] = float("nan"), float("inf")
    result, _ = ridgeline.apply_rope_pos_ids(
        q, q.clone(), torch.ones(1, dtype=torch.int32, device=device)
    )
    wrong = ~result[0, 0].isfinite()
    assert wrong.nonzero().flatten().tolist() == [3, 4, 11, 12]


@pytest.mark.parametrize("nnz", [0, 3])
def test_empty(device: torch.device, nnz: int) -> None:
    heads = 0 if nnz else 4
    q = torch.ones(nnz, heads, 64, dtype=torch.float16, device=device)
    pos_ids = torch.zeros(nnz, dtype=torch.int32, device=device)
    result = ridgeline.apply_rope_pos_ids(q, q[:, :1], pos_ids)
    assert result[0].shape == q.shape
    ridgeline.apply_rope_pos_ids_inplace(q, q.clone(), pos_ids)


def test_transformers(device: torch.device, rng: torch.Generator) -> None:
    """Near positions only: theirs computes frequencies and angles in float32."""
    llama = pytest.importorskip("transformers.models.llama.modeling_llama")
    from transformers import LlamaConfig

    head_dim, theta = 128, 5e5
    config = LlamaConfig(
        hidden_size=4 * head_dim,
        num_attention_heads=4,
        head_dim=head_dim,
        rope_parameters={"rope_type": "default", "rope_theta": theta},
        rope_theta=theta,
    )
    rotary = llama.LlamaRotaryEmbedding(config).to(device)
    q, k, pos_ids = draw(50, (4, 2), head_dim, torch.float32, device, rng, last=1000)
    cos, sin = rotary(q, pos_ids[None])
    theirs = llama.apply_rotary_pos_emb(q.transpose(0, 1)[None], k.transpose(0, 1)[None], cos, sin)
    ours = ridgeline.apply_rope_pos_ids(q, k, pos_ids, rope_theta=theta)
    angles = pos_ids.cpu().double()[:, None, None] * frequencies(head_dim, 1.0, theta)
    for mine, other, x in zip(ours, theirs, (q, k), strict=True):
        size = x.cpu().double().abs()
        size = size + size.roll(head_dim // 2, -1)
        bound = size * (angles.repeat(1, 1, 2) * 4 + 16) * FLOAT32_UNIT
        error = (mine - other[0].transpose(0, 1)).cpu().double().abs()
        assert bool((error <= bound).all())


@hypothesis.given(data=st.data())
@hypothesis.settings(max_examples=80, deadline=None)
def test_any_shape(device: torch.device, data: st.DataObject) -> None:
    dtype = data.draw(st.sampled_from(DTYPES), label="dtype")
    head_dim = data.draw(st.integers(2, 300), label="head_dim")
    rotary_dim = 2 * data.draw(st.integers(1, head_dim // 2), label="rotary_dim / 2")
    heads = data.draw(st.tuples(st.integers(0, 12), st.integers(0, 5)), label="heads")
    nnz = data.draw(st.integers(0, 40), label="nnz")
    kind = data.draw(st.sampled_from(VIEWS), label="view")
    interleave = data.draw(st.booleans(), label="interleave")
    ids_dtype = data.draw(st.sampled_from([torch.int32, torch.int64]), label="ids dtype")
    scale = data.draw(st.floats(0.1, 64), label="scale")
    theta = data.draw(st.floats(2, 1e7), label="theta")
    rng = torch.Generator().manual_seed(data.draw(st.integers(0, 2**31), label="seed"))
    q_values, k_values, pos_ids = draw(nnz, heads, head_dim, dtype, device, rng)
    q, k = view_of(q_values, kind), view_of(k_values, kind)
    options = (pos_ids.to(ids_dtype), rotary_dim, interleave, scale, theta)
    result = poisoned_call(device, ridgeline.apply_rope_pos_ids, q, k, *options)
    assert_rope(result, (q_values, k_values), pos_ids, rotary_dim, interleave, scale, theta)
    ridgeline.apply_rope_pos_ids_inplace(q, k, *options)
    assert torch.equal(q, result[0])
    assert torch.equal(k, result[1])


def test_opcheck(device: torch.device, rng: torch.Generator) -> None:
    q, k, pos_ids = draw(5, (4, 2), 64, torch.float16, device, rng)
    ops = torch.ops.ridgeline
    for kind in ("contiguous", "strided"):
        arguments = (view_of(q, kind), view_of(k, kind), pos_ids, 1e4, 32, False, 1.0)
        torch.library.opcheck(ops.apply_rope_pos_ids.default, arguments)
        torch.library.opcheck(ops.apply_rope_pos_ids_inplace.default, arguments)


def test_compile(device: torch.device, rng: torch.Generator) -> None:
    def step(q: Tensor, k: Tensor, pos_ids: Tensor) -> tuple[Tensor, Tensor]:
        q, k = ridgeline.apply_rope_pos_ids(q * 2, k, pos_ids, rope_theta=5e5)
        ridgeline.apply_rope_pos_ids_inplace(q, k, pos_ids, 32, True)
        return q + 1, k

    calls = [draw(n, (4, 2), 64, torch.bfloat16, device, rng) for n in (3, 8, 31)]
    results = without_recompilation(step, calls, dynamic=[0, 1, 2])
    for result, call in zip(results, calls, strict=True):
        expected = step(*call)
        assert torch.equal(result[0], expected[0])
        assert torch.equal(result[1], expected[1])


def test_inductor(device: torch.device, rng: torch.Generator) -> None:
    q, k, pos_ids = draw(5, (4, 2), 64, torch.float32, device, rng)

    def step(q: Tensor, k: Tensor) -> Tensor:
        q, k = ridgeline.apply_rope_pos_ids(q.relu(), k, pos_ids)
        return ridgeline.silu_and_mul(q[:, :2] + k)

    torch._dynamo.reset()
    torch.testing.assert_close(torch.compile(step, fullgraph=True)(q, k), step(q, k))


@pytest.mark.gpu
def test_cuda_graph(rng: torch.Generator) -> None:
    device = torch.device("cuda", 0)
    q, k, pos_ids = draw(8, (32, 8), 128, torch.bfloat16, device, rng)
    graph = captured(lambda: ridgeline.apply_rope_pos_ids_inplace(q, k, pos_ids))
    new_q, new_k, new_ids = draw(8, (32, 8), 128, torch.bfloat16, device, rng)
    q.copy_(new_q)
    k.copy_(new_k)
    pos_ids.copy_(new_ids)
    graph.replay()
    assert_rope((q, k), (new_q, new_k), new_ids, 128)


@pytest.mark.gpu
def test_second_device(second_device: torch.device, rng: torch.Generator) -> None:
    q, k, pos_ids = draw(8, (32, 8), 128, torch.bfloat16, second_device, rng)
    assert_rope(ridgeline.apply_rope_pos_ids(q, k, pos_ids), (q, k), pos_ids, 128)
    assert torch.cuda.current_device() == 0


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.large
def test_offsets_above_two_to_the_31(rng: torch.Generator) -> None:
    device = torch.device("cuda", 0)
    q_values, k, pos_ids = draw(3, (4, 1), 128, torch.bfloat16, device, rng)
    q = torch.empty_strided((3, 4, 128), (2**30 + 8, 128, 1), dtype=torch.bfloat16, device=device)
    q.copy_(q_values)
    assert_rope(ridgeline.apply_rope_pos_ids(q, k, pos_ids), (q_values, k), pos_ids, 128)


def ones(*shape: int, dtype: torch.dtype = torch.float16) -> Any:
    return lambda device: torch.ones(shape, dtype=dtype, device=device)


def good(device: torch.device) -> dict[str, Any]:
    return {
        "q": ones(3, 4, 64)(device),
        "k": ones(3, 2, 64)(device),
        "pos_ids": ones(3, dtype=torch.int32)(device),
        "rotary_dim": 64,
        "interleave": False,
        "rope_scale": 1.0,
        "rope_theta": 1e4,
    }


WRONG = (
    Wrong("q's dtype", {"q": ones(3, 4, 64, dtype=torch.float64)}, r"'q'.*float16.*float64"),
    Wrong("mixed dtypes", {"k": ones(3, 2, 64, dtype=torch.bfloat16)}, r"'k'.*float16.*bfloat16"),
    Wrong("q's rank", {"q": ones(3, 64)}, r"'q'.*3 dimensions"),
    Wrong("q a scalar", {"q": ones()}, r"'q'.*3 dimensions"),
    Wrong("k's rank", {"k": ones(3, 1, 2, 64)}, r"'k'.*3 dimensions"),
    Wrong("k's tokens", {"k": ones(2, 2, 64)}, r"'k'.*\[3, 2, 64\].*\[2, 2, 64\]"),
    Wrong("k's head_dim", {"k": ones(3, 2, 32)}, r"'k'.*\[3, 2, 64\].*\[3, 2, 32\]"),
    Wrong("q's stride", {"q": lambda d: ones(3, 64, 4)(d).mT}, r"'q'.*stride 4.*contiguous"),
    Wrong("k's stride", {"k": lambda d: ones(3, 64, 2)(d).mT}, r"'k'.*stride 2.*contiguous"),
    Wrong("float ids", {"pos_ids": ones(3)}, r"'pos_ids'.*int32.*int64.*float16"),
    Wrong("int16 ids", {"pos_ids": ones(3, dtype=torch.int16)}, r"'pos_ids'.*int32.*int16"),
    Wrong("ids' rank", {"pos_ids": ones(3, 1, dtype=torch.int32)}, r"'pos_ids'.*1 dimension"),
    Wrong("ids' length", {"pos_ids": ones(4, dtype=torch.int32)}, r"'pos_ids'.*\[3\].*\[4\]"),
    Wrong(
        "ids' stride",
        {"pos_ids": lambda d: ones(6, dtype=torch.int32)(d)[::2]},
        r"'pos_ids'.*stride 2",
    ),
    Wrong("odd rotary_dim", {"rotary_dim": 31}, r"'rotary_dim'.*even.*31"),
    Wrong("rotary_dim of 0", {"rotary_dim": 0}, r"'rotary_dim'.*even.*0"),
    Wrong("rotary_dim over head_dim", {"rotary_dim": 66}, r"'rotary_dim'.*\(64\).*66"),
    Wrong("rope_scale of 0", {"rope_scale": 0.0}, r"'rope_scale'.*> 0"),
    Wrong("rope_theta below 0", {"rope_theta": -1e4}, r"'rope_theta'.*> 0"),
    Wrong("rope_theta nan", {"rope_theta": float("nan")}, r"'rope_theta'.*finite"),
)


@pytest.mark.parametrize("op", ["apply_rope_pos_ids", "apply_rope_pos_ids_inplace"])
@pytest.mark.parametrize("layer", [ridgeline, torch.ops.ridgeline], ids=["function", "op"])
@pytest.mark.parametrize("wrong", WRONG, ids=lambda wrong: wrong.name)
def test_wrong(device: torch.device, wrong: Wrong, layer: Any, op: str) -> None:
    assert_raises(wrong, getattr(layer, op), good(device), device)


def test_wrong_without_rotary_dim(device: torch.device) -> None:
    """The default rotary_dim comes from q, whatever q is."""
    for q in (torch.ones((), device=device), torch.ones(3, 4, 7, device=device)):
        k = torch.ones(3, 1, 7, device=device)
        with pytest.raises((ValueError, RuntimeError), match=r"argument '(q|rotary_dim)'"):
            ridgeline.apply_rope_pos_ids(q, k, torch.zeros(3, dtype=torch.int32, device=device))


@pytest.mark.parametrize("layer", [ridgeline, torch.ops.ridgeline], ids=["function", "op"])
def test_overlap(device: torch.device, layer: Any) -> None:
    arguments = good(device)
    arguments["k"] = arguments["q"]
    with pytest.raises((ValueError, RuntimeError), match=r"'k'.*overlaps 'q'"):
        layer.apply_rope_pos_ids_inplace(**arguments)
    arguments["k"] = ones(3, 1, 64)(device).expand(3, 2, 64)
    with pytest.raises((ValueError, RuntimeError), match=r"'k'.*distinct"):
        layer.apply_rope_pos_ids_inplace(**arguments)
    layer.apply_rope_pos_ids(**arguments)


@pytest.mark.gpu
@pytest.mark.parametrize("op", ["apply_rope_pos_ids", "apply_rope_pos_ids_inplace"])
@pytest.mark.parametrize("layer", [ridgeline, torch.ops.ridgeline], ids=["function", "op"])
def test_mixed_devices(layer: Any, op: str) -> None:
    device = torch.device("cuda", 0)
    mixed = (
        Wrong("q", {"q": ones(3, 4, 64)("cpu")}, r"'q'.*CUDA.*cpu"),
        Wrong("k", {"k": ones(3, 2, 64)("cpu")}, r"'k'.*cuda:0.*cpu"),
        Wrong("ids", {"pos_ids": ones(3, dtype=torch.int32)("cpu")}, r"'pos_ids'.*cuda:0.*cpu"),
    )
    for wrong in mixed:
        assert_raises(wrong, getattr(layer, op), good(device), device)


def test_gradients_are_refused(device: torch.device) -> None:
    ops = torch.ops.ridgeline
    options = good(device)
    tensors = [options.pop(name) for name in ("q", "k", "pos_ids")]
    assert_refuses_grad(ridgeline.apply_rope_pos_ids, tensors)
    assert_refuses_grad(ridgeline.apply_rope_pos_ids_inplace, tensors)
    assert_refuses_grad(lambda *t: ops.apply_rope_pos_ids(*t, **options), tensors)
    assert_refuses_grad(lambda *t: ops.apply_rope_pos_ids_inplace(*t, **options), tensors)
