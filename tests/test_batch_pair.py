"""`attention_pair`: two batches in one launch, against float64; graphs, bad contents, errors."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from batch_problem import FORMS, Batch
from pair_problem import OPS, Pair, compile_kernels
from support import broken_lists, call_with_garbage, sm_under_test, supports_bf16_attention
from torch import Tensor

PREFILL = Batch(
    lengths=((37, 90), (0, 50), (1, 300), (5, 5), (70, 200), (3, 0)), causal=True, name="prefill"
)
DECODE = Batch(lengths=((1, 100), (1, 1), (1, 257), (1, 0), (1, 64)), decode=True, name="decode")
SHORT = Batch(lengths=((3, 40), (0, 7), (4, 90)), causal=True, max_q_len=4, name="short")
Case = tuple[Batch, Batch]


@pytest.fixture(scope="module", autouse=True)
def compiled_kernels() -> None:
    compile_kernels()


def both(a: Batch, b: Batch, **changes: Any) -> Case:
    return a.with_(**changes), b.with_(**changes)


def cases() -> list[Case]:
    """Forms of cache, layouts, head dims, groups, masks; empty and uneven segments."""
    found = [(PREFILL.with_(form=form), DECODE) for form in FORMS]
    found += [
        (PREFILL.with_(form=form, kv_layout="HND"), DECODE.with_(form="paged-lens"))
        for form in FORMS
    ]
    for dims in ((64, 64), (128, 128), (40, 40), (192, 128), (256, 256), (64, 128)):
        found.append(both(PREFILL, DECODE, head_dims=dims))
        found.append(both(PREFILL, SHORT, head_dims=dims, form="paged-lens"))
    for group in (1, 3, 7, 16):
        found.append(both(PREFILL, DECODE, heads=(2 * group, 2), head_dims=(128, 128)))
    found.append(both(PREFILL, DECODE, head_dims=(128, 128), dtype=torch.bfloat16))
    found.append(both(PREFILL, DECODE, logits_soft_cap=20.0))
    found.append((PREFILL.with_(window_left=30), DECODE.with_(window_left=9)))
    found.append((PREFILL.with_(causal=False), SHORT.with_(window_left=16, page_size=3)))
    found.append((PREFILL.with_(page_size=1), DECODE.with_(page_size=17, kv_layout="HND")))
    found.append((DECODE, PREFILL.with_(padding=3)))
    found.append((PREFILL, PREFILL.with_(lengths=((130, 130), (2, 400)), stacked=True)))
    found.append((PREFILL.with_(padding=5), SHORT.with_(padding=2)))
    found.append((PREFILL.with_(max_q_len=70), SHORT.with_(strided=True)))
    none = PREFILL.with_(lengths=())
    found += [(none, DECODE), (PREFILL, DECODE.with_(lengths=())), (none, none)]
    found += [(none.with_(padding=4), DECODE), (PREFILL, SHORT.with_(lengths=(), padding=4))]
    found.append((PREFILL.with_(lengths=((0, 0), (0, 9))), DECODE.with_(lengths=((1, 0),) * 3)))
    return found


def singles() -> list[Case]:
    """One request with dense keys beside decodes."""
    one = PREFILL.with_(form="ragged", lengths=((90, 130),))
    found = [(one, DECODE), (one.with_(kv_layout="HND", causal=False), SHORT)]
    found += [(one.with_(lengths=((3, 0),)), DECODE), (one.with_(lengths=((200, 200),)), PREFILL)]
    found.append((one.with_(window_left=20), DECODE.with_(lengths=())))
    return [*found, both(one, DECODE, head_dims=(128, 128), heads=(8, 2))]


def large() -> list[Case]:
    """What is cut between CTAs, on both sides, and what goes by tile."""
    gqa = {"heads": (8, 2), "head_dims": (128, 128)}
    many = tuple((1, 90 + i) for i in range(200))
    prefix = Batch(lengths=((200, 9_000),), name="prefix", **gqa)
    prefills = Batch(lengths=((300, 300),) * 12, causal=True, name="prefills", **gqa)
    own = Batch(lengths=many, decode=True, name="own", **gqa)
    deep = own.with_(lengths=((1, 30_000), (1, 70)), name="deep")
    chunk = prefills.with_(lengths=((512, 4_000), (1, 9)), form="ragged", name="chunk")
    shared = prefix.with_(lengths=((256, 20_000),), name="shared")
    few = own.with_(lengths=((1, 70), (1, 9), (1, 0)), name="few")
    found = [(prefix, own), (prefills, own), (prefix, deep), (chunk, deep), (chunk, prefills)]
    return [*found, (shared, own), both(shared, few, heads=(32, 8))]


def case_id(case: Case) -> str:
    return f"{case[0]}+{case[1]}"


def check(case: Case, device: torch.device, rng: torch.Generator, single: bool = False) -> None:
    pair = Pair.of(*case, device, rng, single)
    if case[0].dtype == torch.bfloat16 and not supports_bf16_attention(device):
        with pytest.raises(RuntimeError, match="bfloat16"):
            pair.call()
        return
    pair.check()


@pytest.mark.parametrize("case", cases(), ids=case_id)
def test_pairs(case: Case, device: torch.device, rng: torch.Generator) -> None:
    check(case, device, rng)


@pytest.mark.parametrize("case", singles(), ids=case_id)
def test_one_request_beside_a_batch(case: Case, device: torch.device, rng: torch.Generator) -> None:
    check(case, device, rng, single=True)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", large(), ids=case_id)
def test_large(case: Case, dtype: torch.dtype, rng: torch.Generator) -> None:
    check(both(*case, dtype=dtype), torch.device("cuda", 0), rng)


def beside_a_prefix() -> list[Case]:
    """Requests of few keys beside eight tall tiles for each KV head, cut in even parts."""
    prefix = Batch(lengths=((256, 10_000),), heads=(32, 8), head_dims=(128, 128), name="prefix")
    lengths = tuple((1, 37 * i % 257) for i in range(60))
    own = prefix.with_(lengths=lengths, decode=True, name="own")
    found = [(prefix, own), (prefix, own.with_(window_left=50))]
    for page_size in (1, 3):
        found.append(both(prefix, own, page_size=page_size, kv_layout="HND"))
    for group in (1, 7, 16):
        queries = prefix.with_(lengths=((1024 // group, 10_000),))
        found.append(both(queries, own, heads=(8 * group, 8)))
    few = own.with_(lengths=tuple((1 + i % 4, i) for i in range(50)), decode=False, max_q_len=4)
    found.append((prefix, few.with_(causal=True, form="paged-lens")))
    found.append((prefix.with_(form="ragged"), own))
    return [*found, both(prefix, own, logits_soft_cap=20.0)]


RECORDS, RECORD_WORDS, BY_WARPS = 16 + 1024 * (16 + 8), 12, 1 << 16  # words of a list, a bit


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", beside_a_prefix(), ids=case_id)
def test_a_warp_a_request(case: Case, dtype: torch.dtype, rng: torch.Generator) -> None:
    """Short requests beside a shared prefix, which a warp each takes from sm_90 on."""
    device = torch.device("cuda", 0)
    check(both(*case, dtype=dtype), device, rng)
    work = Pair.of(*case, device, rng).schedule().cpu()
    records = work[RECORDS : RECORDS + int(work[2]) * RECORD_WORDS].view(-1, RECORD_WORDS)
    sms = torch.cuda.get_device_properties(device).multi_processor_count
    if sms == 132:
        assert bool((records[:, 0] & BY_WARPS).any()) == (sm_under_test(device) >= 90)


def test_longer_requests_are_cut_off(device: torch.device, rng: torch.Generator) -> None:
    pair = Pair.of(PREFILL, SHORT, device, rng)
    full, _ = pair.call()
    pair.a.batch, pair.b.batch = PREFILL.with_(max_q_len=5), SHORT.with_(max_q_len=3)
    out, lse = pair.call()
    begin = 0
    for most, inputs in ((5, pair.a), (3, pair.b)):
        for length, _ in inputs.batch.lengths:
            end = begin + length
            kept = min(begin + most, end)
            assert not out[kept:end].any()
            assert (lse[kept:end] == -torch.inf).all()
            begin = end
    assert len(out) == len(full)
    assert not torch.equal(out, full)


def test_bad_contents_are_memory_safe(device: torch.device, rng: torch.Generator) -> None:
    """Any contents of index tensors and work lists: results may be wrong, nothing else is."""
    wide = both(PREFILL, DECODE, head_dims=(128, 128), heads=(8, 2))
    others = (PREFILL, PREFILL.with_(form="padded"), PREFILL.with_(lengths=()))
    for a, b in (wide, *((a, DECODE) for a in others)):
        pair = Pair.of(a, b.with_(decode=False), device, rng)
        good, work = pair.call(), pair.schedule()
        call_with_garbage(pair.call, *pair.a.index.values(), *pair.b.index.values())
        if device.type == "cuda":
            for broken in broken_lists(work, rng):
                pair.call(broken)
                broken[1:] |= BY_WARPS
                pair.call(broken)
            torch.cuda.synchronize()
        for got, expected in zip(pair.call(), good, strict=True):
            assert torch.equal(got, expected)


@pytest.mark.gpu
def test_list_of_another_configuration(rng: torch.Generator) -> None:
    """Its shape tells, or else its tag: then the result is NaN, not a number."""
    pair = Pair.of(PREFILL, DECODE, torch.device("cuda", 0), rng)
    work = pair.schedule()
    with pytest.raises(RuntimeError, match="'schedule'"):
        pair.call(work[:-1])
    pair.a.batch = PREFILL.with_(causal=False)
    with pytest.raises(RuntimeError, match="'schedule'"):
        pair.call(work)
    pair.a.batch = PREFILL.with_(window_left=10)
    out, lse = pair.call(work)
    assert out.isnan().all()
    assert lse.isnan().all()


@pytest.mark.gpu
@pytest.mark.parametrize("given", [False, True], ids=["own-list", "given-list"])
def test_graph_replays_with_new_lengths(given: bool, rng: torch.Generator) -> None:
    """Lengths and page tables change in place, to fewer keys and fewer queries."""
    device = torch.device("cuda", 0)
    dims = {"head_dims": (128, 128), "heads": (8, 2)}
    prefix = Batch(lengths=((40, 3_000), (9, 100)), causal=True, **dims)
    decode = Batch(lengths=((1, 900),) * 30, decode=True, **dims)
    pair = Pair.of(prefix, decode, device, rng)

    def call() -> tuple[Tensor, Tensor]:
        result: tuple[Tensor, Tensor] = pair.call(pair.schedule() if given else None)
        return result

    call()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = call()
    for changed in range(4):
        if changed == 1:
            pair.a.index["kv_last_page_len"].fill_(3)
            pair.b.index["kv_last_page_len"].fill_(1)
        elif changed == 2:
            pair.a.index["qo_indptr"].copy_(torch.tensor([0, 2, 30]))
            pair.b.index["kv_indptr"].copy_(torch.arange(31))
        elif changed == 3:
            pair.a.index["qo_indptr"].zero_()
        for result in results:
            result.fill_(torch.nan)
        graph.replay()
        for got, expected in zip(results, call(), strict=True):
            assert torch.equal(got, expected)


@pytest.mark.gpu
def test_launches(rng: torch.Generator) -> None:
    """With a list: attention and what adds up parts; without one the schedule before them."""
    pair = Pair.of(PREFILL, DECODE, torch.device("cuda", 0), rng)
    work = pair.schedule()
    for schedule, count in ((work, 2), (None, 3)):
        pair.call(schedule)
        torch.cuda.synchronize()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            pair.call(schedule)
            torch.cuda.synchronize()
        kernels = [event.name for event in profile.events() if "ridgeline" in event.name]
        assert len(kernels) == count, kernels
        assert sum("batch_attention_pair" in name for name in kernels) == 1


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("'q'", lambda t: {**t, 7: t[7].repeat(1, 2, 1)}),
        ("'kv_indices'", lambda t: {**t, 10: None}),
        ("'kv_lens'|'kv_last_page_len'", lambda t: {**t, 13: None}),
        ("'kv_indptr'", lambda t: {**t, 5: t[5].long()}),
        ("'k'", lambda t: {**t, 1: t[1].float()}),
        ("'qo_indptr'", lambda t: {**t, 4: t[4][None]}),
        ("'flags'", lambda t: {**t, 15: 4}),
        ("'flags'", lambda t: {**t, 16: 4 + 8}),
        ("'max_q_len'", lambda t: {**t, 17: -2}),
        ("'window_left'", lambda t: {**t, 20: -2}),
        ("'logits_soft_cap'", lambda t: {**t, 22: -1.0}),
        ("'schedule'", lambda t: {**t, 14: t[4]}),
    ],
)  # fmt: skip
def test_errors(name: str, change: Any, device: torch.device, rng: torch.Generator) -> None:
    pair = Pair.of(PREFILL, SHORT, device, rng)
    arguments = dict(enumerate((*pair.operands(), None, *pair.numbers(), None, 0.0)))
    error = (RuntimeError, ValueError, TypeError)
    with torch.no_grad(), pytest.raises(error, match=name) as raised:
        OPS.attention_pair(*change(arguments).values())
    assert "attention_pair" in str(raised.value)


def test_refuses_gradients(device: torch.device, rng: torch.Generator) -> None:
    pair = Pair.of(PREFILL, DECODE, device, rng)
    pair.a.q.requires_grad_()
    with pytest.raises(RuntimeError, match="inference_mode"):
        OPS.attention_pair(*pair.operands(), None, *pair.numbers())
