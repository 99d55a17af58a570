"""Wrong calls of attention and merge: a message that helps, and a process that goes on working.

Each mistake is made through the Python function and through torch.ops; after each, a right call
must still succeed.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import ridgeline
import torch
from support import supports_bf16_attention
from torch import Tensor

OPS = torch.ops.ridgeline
MISTAKES = (TypeError, ValueError, RuntimeError)
Inputs = dict[str, Any]


def attention_inputs(device: torch.device) -> Inputs:
    def draw(*shape: int) -> Tensor:
        return torch.randn(shape).half().to(device)

    return {"q": draw(5, 4, 64), "k": draw(9, 2, 64), "v": draw(9, 2, 64)}


def call_function(inputs: Inputs) -> Tensor:
    return ridgeline.single_prefill_with_kv_cache(**inputs)


def call_decode(inputs: Inputs) -> Tensor:
    return ridgeline.single_decode_with_kv_cache(**{**inputs, "q": inputs["q"][0]})


def operands(inputs: Inputs) -> tuple[Any, ...]:
    window, cap = inputs.get("window_left", -1), inputs.get("logits_soft_cap", 0.0)
    layout = inputs.get("kv_layout", 0)
    return inputs["q"], inputs["k"], inputs["v"], False, 0.125, layout, window, cap


def call_op(inputs: Inputs) -> Tensor:
    result: Tensor = OPS.single_attention(*operands(inputs))
    return result


def call_full_op(inputs: Inputs) -> Tensor:
    result: tuple[Tensor, Tensor] = OPS.single_attention_full(
        *operands(inputs), 0, 1.0, 1e4, inputs.get("use_fp16_qk_reduction", False)
    )
    return result[0]


def call_full_function(inputs: Inputs) -> Tensor:
    return ridgeline.single_prefill_with_kv_cache(**inputs, return_lse=True)[0]


CALLS: dict[str, Callable[[Inputs], Tensor]] = {
    "prefill": call_function,
    "prefill-lse": call_full_function,
    "decode": call_decode,
    "op": call_op,
    "full-op": call_full_op,
}


def assert_refused(call: Callable[[], Any], arguments: str, *words: str) -> None:
    """The message has the house's form and names one of the arguments (``a|b``)."""
    with pytest.raises(MISTAKES) as caught:
        call()
    message = str(caught.value)
    head = rf"ridgeline\.\w+: argument '({arguments})': "
    body = r"(expected .+, got .+|.+ not supported yet)\. .+"
    assert re.match(head + body, message, re.DOTALL), message
    for word in words:
        assert word in message, message


@dataclass(frozen=True)
class Mistake:
    name: str
    change: Callable[[Inputs], Inputs]
    arguments: str  # that the message may name
    words: tuple[str, ...] = ()


def with_(**changes: Callable[[Tensor], Tensor]) -> Callable[[Inputs], Inputs]:
    """Replace tensors by a function of themselves."""
    return lambda inputs: {**inputs, **{n: change(inputs[n]) for n, change in changes.items()}}


def all_three(change: Callable[[Tensor], Tensor]) -> Callable[[Inputs], Inputs]:
    return with_(q=change, k=change, v=change)


def elsewhere(tensor: Tensor) -> Tensor:
    return tensor.to("cpu" if tensor.is_cuda else "meta")


def shifted(tensor: Tensor) -> Tensor:
    """The same shape, two bytes off a multiple of 16."""
    padded = torch.zeros((*tensor.shape[:-1], tensor.shape[-1] + 8), dtype=tensor.dtype)
    return padded.to(tensor.device)[..., 1 : tensor.shape[-1] + 1]


def odd_rows(tensor: Tensor) -> Tensor:
    """The same shape, with rows that are not a multiple of 16 bytes apart."""
    padded = torch.zeros((*tensor.shape[:-1], tensor.shape[-1] + 4), dtype=tensor.dtype)
    return padded.to(tensor.device)[..., : tensor.shape[-1]]


def transposed_storage(tensor: Tensor) -> Tensor:
    return tensor.transpose(-1, -2).contiguous().transpose(-1, -2)


def of_dim(head_dim: int) -> Callable[[Tensor], Tensor]:
    return lambda t: torch.zeros((*t.shape[:-1], head_dim), dtype=t.dtype, device=t.device)


def of_heads(heads: int) -> Callable[[Tensor], Tensor]:
    return lambda t: torch.zeros((t.shape[0], heads, 64), dtype=t.dtype, device=t.device)


MISTAKES_OF_TENSORS = [
    Mistake("float64", all_three(Tensor.double), "q", ("float64",)),
    Mistake("int8", all_three(Tensor.char), "q", ("int8",)),
    Mistake("k-bf16", with_(k=Tensor.bfloat16), "k", ("bfloat16", "float16")),
    Mistake("v-float32", with_(v=Tensor.float), "v", ("float32", "float16")),
    Mistake("q-bf16", with_(q=Tensor.bfloat16), "k|q", ("bfloat16",)),
    Mistake("k-elsewhere", with_(k=elsewhere), "k", ("device",)),
    Mistake("v-elsewhere", with_(v=elsewhere), "v", ("device",)),
    Mistake("q-elsewhere", with_(q=elsewhere), "k|q", ("device",)),
    Mistake("k-2d", with_(k=lambda t: t[0]), "k", ("3",)),
    Mistake("v-4d", with_(v=lambda t: t.unsqueeze(0)), "v", ("3",)),
    Mistake("q-4d", with_(q=lambda t: t.unsqueeze(0).unsqueeze(0)), "q"),
    Mistake("head-dim-60", all_three(of_dim(60)), "q", ("60", "multiple of 8")),
    Mistake("head-dim-264", all_three(of_dim(264)), "q", ("264", "256")),
    Mistake("head-dim-0", all_three(of_dim(0)), "q"),
    Mistake("v-head-dim-60", with_(v=of_dim(60)), "v", ("60",)),
    Mistake("k-head-dim", with_(k=of_dim(32)), "k", ("64", "32")),
    Mistake("k-shorter", with_(k=lambda t: t[:5]), "v|k"),
    Mistake("v-heads", with_(v=lambda t: t[:, :1]), "v|k"),
    Mistake("q-heads", with_(k=of_heads(3), v=of_heads(3)), "q", ("multiple", "3")),
    Mistake("no-kv-heads", with_(k=lambda t: t[:, :0], v=lambda t: t[:, :0]), "q|k"),
    Mistake("q-misaligned", with_(q=shifted), "q", ("16",)),
    Mistake("k-misaligned", with_(k=shifted), "k", ("16",)),
    Mistake("v-odd-rows", with_(v=odd_rows), "v", ("16",)),
    Mistake("q-last-stride", with_(q=transposed_storage), "q", ("stride",)),
    Mistake("k-last-stride", with_(k=transposed_storage), "k", ("stride",)),
    Mistake("v-last-stride", with_(v=transposed_storage), "v", ("stride",)),
    Mistake("window", lambda i: {**i, "window_left": -2}, "window_left", ("-2", "-1")),
    Mistake("cap", lambda i: {**i, "logits_soft_cap": -1.0}, "logits_soft_cap", ("-1",)),
    Mistake("cap-nan", lambda i: {**i, "logits_soft_cap": float("nan")}, "logits_soft_cap"),
]  # fmt: skip


@pytest.mark.parametrize("call", CALLS, ids=str)
@pytest.mark.parametrize("mistake", MISTAKES_OF_TENSORS, ids=lambda m: m.name)
def test_wrong_attention(mistake: Mistake, call: str, device: torch.device) -> None:
    inputs = attention_inputs(device)
    assert_refused(lambda: CALLS[call](mistake.change(inputs)), mistake.arguments, *mistake.words)
    assert CALLS[call](inputs).isfinite().all()


@pytest.mark.parametrize("name", ["q", "k", "v"])
@pytest.mark.parametrize("call", CALLS, ids=str)
def test_no_silent_missing_gradient(call: str, name: str, device: torch.device) -> None:
    inputs = attention_inputs(device)
    inputs[name].requires_grad_()
    with pytest.raises(RuntimeError, match="inference_mode"):
        CALLS[call](inputs)
    with torch.no_grad():
        assert CALLS[call](inputs).isfinite().all()
    with torch.inference_mode():
        assert CALLS[call](inputs).isfinite().all()


@pytest.mark.parametrize("call", ["prefill", "decode"])
def test_wrong_rank_of_q_for_the_function(call: str, device: torch.device) -> None:
    inputs = attention_inputs(device)
    wrong = inputs["q"][0] if call == "prefill" else inputs["q"].unsqueeze(0)
    assert_refused(lambda: CALLS[call]({**inputs, "q": wrong}), "q", "dimensions")
    assert CALLS[call](inputs).isfinite().all()


OPTIONS: list[tuple[str, Any, str]] = [
    ("kv_layout", "NDH", "prefill decode"),
    ("kv_layout", 0, "prefill decode"),
    ("kv_layout", 2, "op full-op"),
    ("pos_encoding_mode", "ROPE", "prefill decode"),
    ("backend", "fa4", "prefill"),
    ("lse_base", "log10", "prefill decode"),
    ("lse_layout", "TH", "prefill decode"),
    ("use_tensor_cores", "yes", "decode"),
    ("o_dtype", "float99", "prefill"),
    ("rope_scale", 2.0, "prefill decode"),
    ("rope_theta", 1e4, "prefill decode"),
]
LATER: list[tuple[str, Any, str]] = [
    ("custom_mask", torch.ones(5, 9, dtype=torch.bool), "prefill"),
    ("packed_custom_mask", torch.ones(6, dtype=torch.uint8), "prefill"),
    ("pos_encoding_mode", "ALIBI", "prefill decode"),
    ("scale_q", torch.ones(1), "prefill"),
    ("scale_k", torch.ones(1), "prefill"),
    ("scale_v", torch.ones(1), "prefill"),
    ("q_scale", 1.0, "decode"),
    ("k_scale", 0.5, "prefill decode"),
    ("v_scale", torch.ones(1), "prefill decode"),
    ("o_dtype", torch.bfloat16, "prefill"),
    ("backend", "fa3", "prefill"),
]


def option_cases(table: list[tuple[str, Any, str]]) -> list[Any]:
    return [
        pytest.param(name, value, call, id=f"{name}-{call}")
        for name, value, calls in table
        for call in calls.split()
    ]


@pytest.mark.parametrize(("name", "value", "call"), option_cases(OPTIONS))
def test_wrong_option(name: str, value: Any, call: str, device: torch.device) -> None:
    inputs = attention_inputs(device)
    assert_refused(lambda: CALLS[call]({**inputs, name: value}), name)
    assert CALLS[call](inputs).isfinite().all()


@pytest.mark.parametrize(("name", "value", "call"), option_cases(LATER))
def test_option_that_is_not_there_yet(
    name: str, value: Any, call: str, device: torch.device
) -> None:
    inputs = attention_inputs(device)
    value = value.to(device) if isinstance(value, Tensor) else value
    with pytest.raises(NotImplementedError, match=f"'{name}'"):
        CALLS[call]({**inputs, name: value})
    assert CALLS[call](inputs).isfinite().all()


FULL_OPTIONS = ("custom_mask", "mask_indptr", "q_scale", "k_scale", "v_scale", "sinks")


@pytest.mark.parametrize("name", [*FULL_OPTIONS, "extra_tensors", "extra_scalars"])
def test_argument_of_the_full_op_that_is_not_there_yet(name: str, device: torch.device) -> None:
    inputs = operands(attention_inputs(device))
    one = torch.ones(4, device=device)
    value: Any = {"extra_tensors": [one], "extra_scalars": [1.0]}.get(name, one)
    with pytest.raises((NotImplementedError, RuntimeError), match=f"'{name}'.* not supported yet"):
        OPS.single_attention_full(*inputs, 0, 1.0, 1e4, False, **{name: value})
    assert OPS.single_attention_full(*inputs, 0, 1.0, 1e4, False)[0].isfinite().all()


@pytest.mark.parametrize(
    ("mode", "rope_scale", "rope_theta", "name"),
    [
        (2, 1.0, 1e4, "pos_encoding_mode"),
        (3, 1.0, 1e4, "pos_encoding_mode"),
        (1, 0.0, 1e4, "rope_scale"),
        (1, 1.0, -1.0, "rope_theta"),
    ],
)
def test_wrong_rotation(
    mode: int, rope_scale: float, rope_theta: float, name: str, device: torch.device
) -> None:
    inputs = attention_inputs(device)

    def call_rotated(mode: int, scale: float, theta: float) -> Any:
        return OPS.single_attention_full(*operands(inputs), mode, scale, theta, False)

    assert_refused(lambda: call_rotated(mode, rope_scale, rope_theta), name)
    assert call_rotated(1, 1.0, 1e4)[0].isfinite().all()
    if mode == 1:
        options = {"rope_scale": rope_scale, "rope_theta": rope_theta}
        rotated = {**inputs, **options, "pos_encoding_mode": "ROPE_LLAMA"}
        assert_refused(lambda: call_function(rotated), name)


@pytest.mark.parametrize("call", ["prefill", "prefill-lse", "full-op"])
def test_fp16_reduction_is_for_fp16(call: str, device: torch.device) -> None:
    inputs = attention_inputs(device)
    wrong = {name: t.bfloat16() for name, t in inputs.items()}
    if not supports_bf16_attention(device):
        pytest.skip("bf16 attention raises on sm_75 for every option")
    wrong["use_fp16_qk_reduction"] = True
    assert_refused(lambda: CALLS[call](wrong), "use_fp16_qk_reduction", "bfloat16")
    assert CALLS[call]({**inputs, "use_fp16_qk_reduction": True}).isfinite().all()


@pytest.mark.gpu
@pytest.mark.parametrize("call", CALLS, ids=str)
def test_float32_on_a_gpu_comes_with_advice(call: str) -> None:
    inputs = attention_inputs(torch.device("cuda", 0))
    wrong = {name: t.float() for name, t in inputs.items()}
    assert_refused(lambda: CALLS[call](wrong), "q", "float32", "float16")
    assert CALLS[call](inputs).isfinite().all()


@pytest.mark.gpu
@pytest.mark.parametrize("call", CALLS, ids=str)
def test_bf16_on_turing_says_why(call: str) -> None:
    device = torch.device("cuda", 0)
    if supports_bf16_attention(device):
        pytest.skip("this architecture has bf16 tensor cores; run with --arch 75")
    inputs = attention_inputs(device)
    wrong = {name: t.bfloat16() for name, t in inputs.items()}
    assert_refused(lambda: CALLS[call](wrong), "q", "bfloat16", "float16")
    assert CALLS[call](inputs).isfinite().all()


@pytest.mark.parametrize("call", ["prefill", "op"])
def test_another_backend_is_refused_by_name(call: str, device: torch.device) -> None:
    """Sparse tensors stand for every kind of device that the ops do not know."""
    inputs = attention_inputs(device)
    with pytest.raises(NotImplementedError, match="single_attention"):
        CALLS[call]({**inputs, "q": inputs["q"].to_sparse()})
    assert CALLS[call](inputs).isfinite().all()


def merge_inputs(device: torch.device) -> Inputs:
    v_a, v_b = torch.randn(2, 5, 4, 64).half().to(device)
    s_a, s_b = torch.randn(2, 5, 4).to(device)
    return {"v_a": v_a, "s_a": s_a, "v_b": v_b, "s_b": s_b}


MERGE_MISTAKES = [
    Mistake("float64", with_(v_a=Tensor.double, v_b=Tensor.double), "v_a|v", ("float64",)),
    Mistake("mixed", with_(v_b=Tensor.float), "v_b|v_other", ("float32", "float16")),
    Mistake("s-half", with_(s_a=Tensor.half), "s_a|s", ("float32",)),
    Mistake("s-double", with_(s_b=Tensor.double), "s_b|s_other", ("float32",)),
    Mistake("v-elsewhere", with_(v_b=elsewhere), "v_b|v_other|v|v_a|s|s_a", ("device",)),
    Mistake("s-elsewhere", with_(s_b=elsewhere), "s_b|s_other", ("device",)),
    Mistake("v-2d", with_(v_a=lambda t: t[0]), "v_a|v"),
    Mistake("v-4d", with_(v_a=lambda t: t.unsqueeze(0)), "v_a|v"),
    Mistake("v-shapes", with_(v_b=lambda t: t[:3]), "v_b|v_other"),
    Mistake("s-shape", with_(s_b=lambda t: t.t()), "s_b|s_other"),
    Mistake("s-heads", with_(s_a=lambda t: t[:, :3]), "s_a|s"),
    Mistake("v-last-stride", with_(v_b=transposed_storage), "v_b|v_other", ("stride",)),
]


def in_place(merge: Callable[..., None]) -> Callable[[Inputs], Tensor]:
    def call(inputs: Inputs) -> Tensor:
        first = (inputs["v_a"].clone(memory_format=torch.preserve_format), inputs["s_a"].clone())
        merge(*first, inputs["v_b"], inputs["s_b"], *inputs.get("mask", ()))
        return first[0]

    return call


MERGES: dict[str, Callable[[Inputs], Tensor]] = {
    "function": lambda inputs: ridgeline.merge_state(*inputs.values())[0],
    "op": lambda inputs: OPS.merge_state(*inputs.values())[0],
    "in-place": in_place(ridgeline.merge_state_in_place),
    "in-place-op": in_place(OPS.merge_state_in_place),
}


@pytest.mark.parametrize("call", MERGES, ids=str)
@pytest.mark.parametrize("mistake", MERGE_MISTAKES, ids=lambda m: m.name)
def test_wrong_merge(mistake: Mistake, call: str, device: torch.device) -> None:
    inputs = merge_inputs(device)
    assert_refused(lambda: MERGES[call](mistake.change(inputs)), mistake.arguments, *mistake.words)
    assert MERGES[call](inputs).isfinite().all()


@pytest.mark.parametrize("call", ["in-place", "in-place-op"])
def test_wrong_mask(call: str, device: torch.device) -> None:
    inputs = merge_inputs(device)
    right = torch.ones(5, dtype=torch.bool, device=device)
    for wrong in (right.int(), right[:4], right.unsqueeze(0), elsewhere(right)):
        assert_refused(lambda mask=wrong: MERGES[call]({**inputs, "mask": (mask,)}), "mask")
    assert MERGES[call]({**inputs, "mask": (right,)}).isfinite().all()


@pytest.mark.parametrize(
    "merge", [ridgeline.merge_states, OPS.merge_states], ids=["function", "op"]
)
def test_wrong_merge_states(merge: Callable[..., Any], device: torch.device) -> None:
    v, s = torch.randn(5, 3, 4, 64).half().to(device), torch.randn(5, 3, 4).to(device)
    for arguments, name, word in (
        ((v.double(), s), "v", "float64"),
        ((v[0], s), "v", "dimensions"),
        ((v, s.half()), "s", "float32"),
        ((v, s[:, :2]), "s", "shape"),
        ((v, elsewhere(s)), "s", "device"),
        ((transposed_storage(v), s), "v", "stride"),
    ):
        assert_refused(lambda a=arguments: merge(*a), name, word)
        assert merge(v, s)[0].isfinite().all()


@pytest.mark.parametrize("call", MERGES, ids=str)
def test_merge_refuses_gradients(call: str, device: torch.device) -> None:
    inputs = merge_inputs(device)
    inputs["s_b"].requires_grad_()
    with pytest.raises(RuntimeError, match="inference_mode"):
        MERGES[call](inputs)
    with torch.no_grad():
        assert MERGES[call](inputs).isfinite().all()


def test_wrong_lse_base_of_merges(device: torch.device) -> None:
    a, s, b, t = merge_inputs(device).values()
    for call in (
        lambda: ridgeline.merge_state(a, s, b, t, lse_base="e"),
        lambda: ridgeline.merge_state_in_place(a, s, b, t, lse_base="e"),
        lambda: ridgeline.merge_states(a.unsqueeze(1), s.unsqueeze(1), lse_base="e"),
    ):
        assert_refused(call, "lse_base", "log2")
