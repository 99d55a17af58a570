"""What the wrappers refuse, and that the message names the argument and the way out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import ridgeline
import torch
from batch_problem import Inputs
from wrapper_problem import BUFFERS, DECODE, KINDS, MIXED, base, make, plan, planned, run

INT32 = torch.int32
ONE = torch.ones(4)


@pytest.mark.parametrize("kind", KINDS)
def test_run_before_plan(kind: str, device: torch.device, rng: torch.Generator) -> None:
    inputs = base(kind).inputs(device, rng)
    wrapper = make(kind, inputs.batch, device)
    with pytest.raises(RuntimeError, match=r"run: call plan\(\) first"):
        run(wrapper, kind, inputs)
    with pytest.raises(RuntimeError, match=r"call plan\(\) first"):
        wrapper.schedule(3)


@pytest.mark.parametrize("kind", ["decode", "prefill", "ragged"])
def test_constructor(kind: str, device: torch.device) -> None:
    batch = base(kind)
    buffers = {name: torch.zeros(9, dtype=INT32, device=device) for name in BUFFERS[kind]}
    for missing in BUFFERS[kind]:
        some = {name: buffer for name, buffer in buffers.items() if name != missing}
        with pytest.raises(ValueError, match=f"'{missing}'"):
            make(kind, batch, device, use_cuda_graph=True, **some)
        with pytest.raises(ValueError, match=f"'{missing}'"):
            make(kind, batch, device, **{missing: buffers[missing]})
        wrong = {**buffers, missing: buffers[missing].long()}
        with pytest.raises(TypeError, match=rf"'{missing}'.*int32"):
            make(kind, batch, device, use_cuda_graph=True, **wrong)
    with pytest.raises(NotImplementedError, match="'backend'"):
        make(kind, batch, device, backend="fa3")
    with pytest.raises(ValueError, match="'backend'"):
        make(kind, batch, device, backend="cudnn")
    with pytest.raises(NotImplementedError, match="'jit_args'"):
        make(kind, batch, device, jit_args=[1])
    with pytest.raises(ValueError, match="'kv_layout'"):
        make(kind, batch.with_(kv_layout="NDH"), device)
    if kind == "decode":
        with pytest.raises(ValueError, match="'use_tensor_cores'"):
            make(kind, batch, device, use_tensor_cores="yes")
    else:
        for name in ("custom_mask_buf", "mask_indptr_buf", "jit_kwargs"):
            with pytest.raises(NotImplementedError, match=f"'{name}'"):
                make(kind, batch, device, **{name: ONE})


PLAN_WRONG: list[tuple[str, dict[str, Any], str, type[Exception]]] = [
    ("window", {"window_left": -2}, "window_left", ValueError),
    ("cap", {"logits_soft_cap": -1.0}, "logits_soft_cap", ValueError),
    ("rope-scale", {"rope_scale": 2.0}, "rope_scale", ValueError),
    (
        "rope-theta",
        {"pos_encoding_mode": "ROPE_LLAMA", "rope_theta": 0.0},
        "rope_theta",
        ValueError,
    ),
    ("mode", {"pos_encoding_mode": "YARN"}, "pos_encoding_mode", ValueError),
    ("alibi", {"pos_encoding_mode": "ALIBI"}, "pos_encoding_mode", NotImplementedError),
    ("dtype", {"q_data_type": "half precision"}, "q_data_type", ValueError),
    ("q-fp8", {"q_data_type": torch.float8_e4m3fn}, "q_data_type", ValueError),
    ("kv-fp8", {"kv_data_type": torch.float8_e4m3fn}, "kv_data_type", NotImplementedError),
    ("out", {"o_data_type": "float32"}, "o_data_type", NotImplementedError),
    ("split", {"fixed_split_size": 0}, "fixed_split_size", ValueError),
]


@pytest.mark.parametrize("kind", ["decode", "prefill", "ragged"])
@pytest.mark.parametrize(
    ("name", "options", "argument", "error"), PLAN_WRONG, ids=[w[0] for w in PLAN_WRONG]
)
def test_options_of_plan(
    kind: str,
    name: str,
    options: dict[str, Any],
    argument: str,
    error: type[Exception],
    rng: torch.Generator,
) -> None:
    index = base(kind).inputs(torch.device("cpu"), rng).index
    wrapper = make(kind, base(kind), torch.device("cpu"))
    table = [index[one] for one in BUFFERS[kind].values()]
    sizes = (4, 2, 64) if kind == "ragged" else (4, 2, 64, 16)
    with pytest.raises(error, match=f"plan: argument '{argument}'"):
        wrapper.plan(*table, *sizes, **options)


@pytest.mark.parametrize("kind", ["prefill", "ragged"])
def test_masks_of_plan(kind: str, rng: torch.Generator) -> None:
    index = base(kind).inputs(torch.device("cpu"), rng).index
    table = [index[one] for one in BUFFERS[kind].values()]
    sizes = (4, 2, 64) if kind == "ragged" else (4, 2, 64, 16)
    for name in ("custom_mask", "packed_custom_mask"):
        with pytest.raises(NotImplementedError, match=f"'{name}'"):
            make(kind, base(kind), torch.device("cpu")).plan(*table, *sizes, **{name: ONE})


TABLES_WRONG: list[tuple[str, Callable[[Inputs], Any], str, str]] = [
    ("int64", lambda i: i.index["kv_indices"].long(), "kv_indices", "int32"),
    ("rank", lambda i: i.index["kv_indptr"][None], "kv_indptr", "1 dimensions"),
    ("stride", lambda i: i.index["kv_indices"].repeat(2)[::2], "kv_indices", "stride 1"),
]


@pytest.mark.parametrize(
    ("name", "change", "kind", "text"), TABLES_WRONG, ids=[w[0] for w in TABLES_WRONG]
)
def test_tables_of_plan(
    name: str, change: Callable[[Inputs], Any], kind: str, text: str, device: torch.device,
    rng: torch.Generator,
) -> None:  # fmt: skip
    inputs = MIXED.inputs(device, rng)
    inputs.index[kind] = change(inputs)
    with pytest.raises((TypeError, ValueError), match=rf"'paged_{kind}'.*{text}"):
        planned("prefill", inputs)
    assert name


def test_sizes_of_plan(device: torch.device, rng: torch.Generator) -> None:
    index = DECODE.inputs(device, rng).index
    table = (index["kv_indptr"], index["kv_indices"], index["kv_last_page_len"])
    wrapper = make("decode", DECODE, device)
    with pytest.raises(ValueError, match="'num_qo_heads'"):
        wrapper.plan(*table, 5, 2, 64, 16)
    with pytest.raises(ValueError, match="'num_qo_heads'"):
        wrapper.plan(*table, 4, 0, 64, 16)
    with pytest.raises(ValueError, match="'q_len_per_req'"):
        wrapper.plan(*table, 4, 2, 64, 16, q_len_per_req=0)
    with pytest.raises(ValueError, match="'last_page_len'"):
        wrapper.plan(*table[:2], table[2][1:], 4, 2, 64, 16)
    for tables in ((table[0][1:], *table[1:]), (table[0][:0], *table[1:])):
        with pytest.raises(ValueError, match=r"'(indptr|last_page_len)'.*batch_size"):
            wrapper.plan(*tables, 4, 2, 64, 16)
    with pytest.raises((ValueError, RuntimeError), match="'page_size'"):
        wrapper.plan(*table, 4, 2, 64, 0)
    with pytest.raises((ValueError, RuntimeError), match="'head_dim_qk'"):
        wrapper.plan(*table, 4, 2, 65, 16)
    buffers = {name: torch.zeros(3, dtype=torch.int32, device=device) for name in BUFFERS["decode"]}
    small = make("decode", DECODE, device, use_cuda_graph=True, **buffers)
    with pytest.raises(ValueError, match="'indptr'.*buffer"):
        small.plan(*table, 4, 2, 64, 16)
    prefill = MIXED.inputs(device, rng)
    with pytest.raises(ValueError, match="'max_q_len'"):
        planned("prefill", prefill, max_q_len=-2)


@pytest.mark.gpu
def test_tables_of_another_device(rng: torch.Generator) -> None:
    inputs = DECODE.inputs(torch.device("cuda", 0), rng)
    with pytest.raises(ValueError, match="'indptr'.*device"):
        plan(make("decode", DECODE, torch.device("cpu")), "decode", inputs)


RUN_WRONG: list[tuple[str, dict[str, Any], str, type[Exception]]] = [
    ("q-scale", {"q_scale": 2.0}, "q_scale", NotImplementedError),
    ("k-scale", {"k_scale": ONE}, "k_scale", NotImplementedError),
    ("v-scale", {"v_scale": 0.5}, "v_scale", NotImplementedError),
    ("sinks", {"sinks": ONE}, "sinks", NotImplementedError),
    ("pdl", {"enable_pdl": 3}, "enable_pdl", ValueError),
    ("window", {"window_left": -2}, "window_left", ValueError),
    ("q-len", {"q_len_per_req": 2}, "q_len_per_req", ValueError),
    ("base", {"lse_base": "log10"}, "lse_base", ValueError),
    ("layout", {"lse_layout": "HNN"}, "lse_layout", ValueError),
]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("name", "options", "argument", "error"), RUN_WRONG, ids=[w[0] for w in RUN_WRONG]
)
def test_options_of_run(
    kind: str,
    name: str,
    options: dict[str, Any],
    argument: str,
    error: type[Exception],
    device: torch.device,
    rng: torch.Generator,
) -> None:
    if kind in ("ragged", "batch") and name in ("sinks", "window", "q-len"):
        pytest.skip("no such argument")
    if kind == "batch" and name in ("pdl", "q-scale"):
        pytest.skip("no such argument")
    inputs = base(kind).inputs(device, rng)
    wrapper = planned(kind, inputs)
    with pytest.raises(error, match=f"run: argument '{argument}'"):
        run(wrapper, kind, inputs, **options)
    with pytest.raises(error, match=f"run: argument '{argument}'"):
        run(wrapper, kind, inputs, return_lse=True, **options)


def test_custom_variant_arguments(device: torch.device, rng: torch.Generator) -> None:
    inputs = DECODE.inputs(device, rng)
    with pytest.raises(NotImplementedError, match="'args'"):
        planned("decode", inputs).run(inputs.q, inputs.cache, ONE)


@pytest.mark.parametrize("kind", KINDS)
def test_tensors_that_are_not_the_plans(
    kind: str, device: torch.device, rng: torch.Generator
) -> None:
    inputs = base(kind).inputs(device, rng)
    wrapper = planned(kind, inputs)
    good = run(wrapper, kind, inputs, return_lse=True)
    changes: list[tuple[dict[str, Any], str]] = [
        ({"heads": (8, 2)}, "num_qo_heads"),
        ({"heads": (4, 4)}, "num_kv_heads"),
        ({"head_dims": (128, 128)}, "head_dim_qk"),
        ({"head_dims": (64, 128)}, "head_dim_vo"),
    ]
    if kind != "ragged":
        changes.append(({"page_size": 32}, "page_size"))
    for change, argument in changes:
        other = base(kind).with_(**change).inputs(device, rng)
        with pytest.raises(ValueError, match=f"run: argument '{argument}'.*plan"):
            run(wrapper, kind, other)
    other = base(kind).with_(dtype=torch.bfloat16).inputs(device, rng)
    with pytest.raises(TypeError, match=r"'q'.*bfloat16"):
        run(wrapper, kind, other)
    with pytest.raises((ValueError, RuntimeError), match="'schedule'"):
        run(wrapper, kind, inputs, schedule=wrapper.schedule(len(inputs.q))[:-1])
    buffer = inputs.q.new_empty((1, 4, 64))
    with pytest.raises((ValueError, RuntimeError), match="'out'"):
        run(wrapper, kind, inputs, out=buffer)
    with pytest.raises((ValueError, RuntimeError, TypeError), match="'lse'"):
        run(wrapper, kind, inputs, lse=buffer)
    again = run(wrapper, kind, inputs, return_lse=True)
    assert torch.equal(again[0], good[0])


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_refused(kind: str, device: torch.device, rng: torch.Generator) -> None:
    inputs = base(kind).inputs(device, rng)
    wrapper = planned(kind, inputs)
    inputs.q.requires_grad_()
    with pytest.raises(RuntimeError, match=r"run.*inference_mode"):
        run(wrapper, kind, inputs)
    with torch.inference_mode():
        run(wrapper, kind, inputs)


@pytest.mark.gpu
def test_validate_inside_a_capture(rng: torch.Generator) -> None:
    inputs = MIXED.inputs(torch.device("cuda", 0), rng)
    wrapper = planned("prefill", inputs, validate=True)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph), pytest.raises(ValueError, match="'validate'"):
        wrapper.run(inputs.q, inputs.cache)


def test_cascade(device: torch.device, rng: torch.Generator) -> None:
    wrapper_class = ridgeline.MultiLevelCascadeAttentionWrapper
    with pytest.raises(ValueError, match="'num_levels'"):
        wrapper_class(0)
    with pytest.raises(ValueError, match="'qo_indptr_buf_arr'"):
        wrapper_class(2, use_cuda_graph=True)
    index = MIXED.inputs(device, rng).index
    table = [[index[one]] * 2 for one in BUFFERS["prefill"].values()]
    wrapper = wrapper_class(2, device=device)
    with pytest.raises(ValueError, match="'paged_kv_indices_arr'.*2 tensors"):
        wrapper.plan(*table[:2], table[2][:1], table[3], 4, 2, 64, 16)
    with pytest.raises(NotImplementedError, match="'window_left'"):
        wrapper.plan(*table, 4, 2, 64, 16, window_left=5)
    with pytest.raises(NotImplementedError, match="'pos_encoding_mode'"):
        wrapper.plan(*table, 4, 2, 64, 16, pos_encoding_mode="ROPE_LLAMA")
    q = torch.zeros(3, 4, 64, device=device).half()
    with pytest.raises(RuntimeError, match=r"call plan\(\) first"):
        wrapper.run(q, torch.zeros(9, 2, 16, 2, 64, device=device).half())
    wrapper.plan(*table, 4, 2, 64, 16)
    with pytest.raises(ValueError, match="'schedule'"):
        wrapper.run(q, torch.zeros(9, 2, 16, 2, 64, device=device).half(), schedule=[])


def test_pod(device: torch.device, rng: torch.Generator) -> None:
    inputs = DECODE.inputs(device, rng)
    index = inputs.index
    wrapper = ridgeline.PODWithPagedKVCacheWrapper(device=device)
    k, v = (torch.zeros(9, 2, 64, device=device).half() for _ in range(2))
    tensors = (inputs.q, k, v, inputs.q, inputs.cache)
    with pytest.raises(RuntimeError, match=r"call plan\(\) first"):
        wrapper.run(*tensors)
    wrapper.plan(index["kv_indptr"], index["kv_indices"], index["kv_last_page_len"], 4, 2, 64, 16)
    for name in ("custom_mask_p", "packed_custom_mask_d", "q_scale", "k_scale", "v_scale"):
        with pytest.raises(NotImplementedError, match=f"PODWith.*'{name}'"):
            wrapper.run(*tensors, **{name: ONE})
    with pytest.raises(ValueError, match="'kv_layout_d'"):
        wrapper.run(*tensors, kv_layout_d="HND")
    with pytest.raises(ValueError, match="'rope_scale'"):
        wrapper.run(*tensors, rope_scale_d=2.0)
    with pytest.raises(ValueError, match="'enable_pdl'"):
        wrapper.run(*tensors, enable_pdl="yes")
    both = ridgeline.BatchPODWithPagedKVCacheWrapper(device=device)
    with pytest.raises(RuntimeError, match=r"call plan\(\) first"):
        both.run(inputs.q, inputs.cache, inputs.q, inputs.cache)
