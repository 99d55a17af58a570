"""`ridgeline.attention` against float64: every form of cache, mixtures, graphs, bad contents."""

from __future__ import annotations

import random
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import ridgeline
import torch
from batch_problem import FORMS, Batch, Inputs, check, check_graph, compile_kernels
from support import broken_lists, call_with_garbage, poisoned_call, supports_bf16_attention
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

HALVES = (torch.float16, torch.bfloat16)
MIXED = Batch(
    lengths=((1, 300), (37, 90), (0, 50), (1, 0), (1, 1), (5, 5), (3, 17), (70, 200), (0, 0)),
    causal=True,
    name="mixed",
)
DECODE = Batch(lengths=((1, 100), (1, 1), (1, 257), (1, 0), (1, 64)), name="decode", max_q_len=1)
DIMS = [(d, d) for d in (8, 40, 64, 80, 128, 192, 256)] + [(192, 128), (64, 128)]


@pytest.fixture(scope="module", autouse=True)
def compiled_kernels() -> None:
    compile_kernels(rotating=True)


def ids(batch: object) -> str:
    return str(batch)


def shapes() -> list[Batch]:
    """Forms of cache, head dims, groups, page sizes and layouts, in decode and mixed batches."""
    batches = []
    for base in (MIXED, DECODE):
        for form in FORMS:
            for layout in ("NHD", "HND"):
                batches.append(base.with_(form=form, kv_layout=layout))
        for size in (1, 3, 5, 16, 17, 64, 256):
            batches.append(base.with_(page_size=size))
            batches.append(base.with_(page_size=size, head_dims=(128, 128), kv_layout="HND"))
        for group in (1, 3, 5, 7, 8, 16):
            batches.append(base.with_(heads=(2 * group, 2)))
            batches.append(base.with_(heads=(group, 1), head_dims=(128, 128)))
        for dims in DIMS:
            for dtype in HALVES:
                batches.append(base.with_(head_dims=dims, dtype=dtype))
        batches.append(base.with_(head_dims=(192, 128), form="ragged"))
        batches.append(base.with_(head_dims=(256, 256), form="padded", dtype=torch.bfloat16))
        batches.append(base.with_(stacked=True))
        batches.append(base.with_(stacked=True, kv_layout="HND", page_size=1))
    batches.append(DECODE.with_(decode=True))
    batches.append(DECODE.with_(decode=True, form="ragged"))
    batches.append(DECODE.with_(decode=True, form="padded", head_dims=(128, 128)))
    batches.append(MIXED.with_(lengths=(), name="none"))
    batches.append(MIXED.with_(lengths=(), padding=4, name="none"))
    batches.append(MIXED.with_(lengths=((0, 0), (0, 5)), padding=1, name="empty"))
    batches.append(MIXED.with_(padding=9))
    batches.append(MIXED.with_(padding=200, heads=(16, 2)))
    return list(dict.fromkeys(batches))


def options() -> list[Batch]:
    """Masks, soft cap, rotation and batch_invariant, also together."""
    batches = []
    for base in (MIXED, DECODE):
        for causal in (False, True):
            for window in (-1, 0, 1, 16, 63, 1000):
                batches.append(base.with_(causal=causal, window_left=window))
        for cap in (1e-6, 0.5, 4.0, 20.0):
            batches.append(base.with_(logits_soft_cap=cap))
        batches.append(base.with_(rope=(1.0, 1e4)))
        batches.append(base.with_(rope=(8.0, 5e5), head_dims=(128, 128), form="ragged"))
        batches.append(base.with_(rope=(2.0, 1e4), logits_soft_cap=20.0, window_left=50))
        for form in FORMS:
            batches.append(base.with_(invariant=True, form=form))
        batches.append(base.with_(invariant=True, head_dims=(128, 128), window_left=100))
    return list(dict.fromkeys(batches))


def large() -> list[Batch]:
    """Skewed, deep, wide and mixed batches, which are cut between CTAs."""
    gqa = {"heads": (8, 2), "head_dims": (128, 128)}
    skewed = ((1, 20_000), *((1, 100 + i) for i in range(40)))
    prefill = ((512, 512), (1000, 1000), (3, 3), (130, 700))
    draw = random.Random(3)
    many = tuple((1, draw.randint(0, 600)) for _ in range(300))
    short = tuple((1, draw.randint(65, 200)) for _ in range(300))
    serving = (*tuple((1, draw.randint(1, 900)) for _ in range(40)), (300, 300), (128, 1500))
    batches = [
        Batch(lengths=skewed, name="skewed", max_q_len=1, **gqa),
        Batch(lengths=skewed, name="skewed", page_size=1, **gqa),
        Batch(lengths=((1, 70_000),), name="deep", max_q_len=1, **gqa),
        Batch(lengths=((2, 30_000), (40, 9_000)), name="deep", causal=True, **gqa),
        Batch(lengths=prefill, name="prefill", causal=True, **gqa),
        Batch(lengths=prefill, name="prefill", form="ragged", causal=True, heads=(4, 4)),
        Batch(lengths=prefill, name="prefill", window_left=100, causal=True, head_dims=(256, 256)),
        Batch(lengths=((4, 3000), (2, 4000)), name="verify", causal=True, max_q_len=4, **gqa),
        Batch(lengths=((8, 3000), (7, 4000)), name="verify", causal=True, max_q_len=8, **gqa),
        Batch(lengths=many, name="many", max_q_len=1),
        Batch(lengths=many, name="many", decode=True, form="padded", heads=(8, 1)),
        Batch(lengths=short, name="short", max_q_len=1, **gqa),
        Batch(lengths=short, name="short", decode=True, form="ragged", **gqa),
        Batch(lengths=serving, name="serving", causal=True, **gqa),
        Batch(lengths=serving[::-1], name="serving", causal=True, page_size=1, **gqa),
    ]
    return [b.with_(dtype=t, invariant=i) for b in batches for t, i in
            ((torch.float16, False), (torch.bfloat16, True))]  # fmt: skip


@pytest.mark.parametrize("batch", shapes(), ids=ids)
def test_shapes(batch: Batch, device: torch.device, rng: torch.Generator) -> None:
    check(batch, device, rng)


@pytest.mark.parametrize("batch", options(), ids=ids)
def test_options(batch: Batch, device: torch.device, rng: torch.Generator) -> None:
    check(batch, device, rng)


@pytest.mark.gpu
@pytest.mark.parametrize("batch", large(), ids=ids)
def test_large(batch: Batch, rng: torch.Generator) -> None:
    check(batch, torch.device("cuda", 0), rng)


def test_float32_on_the_cpu(rng: torch.Generator) -> None:
    check(MIXED.with_(dtype=torch.float32), torch.device("cpu"), rng)


def test_out_and_lse_buffers(device: torch.device, rng: torch.Generator) -> None:
    inputs = MIXED.inputs(device, rng)
    out, lse = inputs.call()
    buffers = torch.empty_like(out), torch.empty_like(lse)
    result = inputs.call(out=buffers[0], lse=buffers[1], return_lse=False)
    assert result is buffers[0]
    assert torch.equal(buffers[0], out)
    assert torch.equal(buffers[1], lse)
    turned = inputs.call(lse_layout="HN", lse_base="log2")[1]
    assert torch.allclose(turned.t(), lse * 1.4426950408889634)


@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize("max_q_len", [None, 1])
def test_bad_contents_are_memory_safe(
    form: str, max_q_len: int | None, device: torch.device, rng: torch.Generator
) -> None:
    """Any contents of index tensors and work lists: results may be wrong, nothing else is."""
    inputs = MIXED.with_(form=form, max_q_len=max_q_len, padding=3).inputs(device, rng)
    good = inputs.call()
    call_with_garbage(inputs.call, *inputs.index.values())
    work = inputs.schedule()
    if device.type == "cuda":
        for broken in broken_lists(work, rng):
            inputs.call(schedule=broken)
        torch.cuda.synchronize()
    again = inputs.call()
    assert torch.equal(again[0], good[0])
    assert torch.equal(again[1], good[1])


@pytest.mark.gpu
def test_list_of_another_configuration(rng: torch.Generator) -> None:
    """Its shape tells, or else its tag: then the result is NaN, not a number."""
    inputs = MIXED.inputs(torch.device("cuda", 0), rng)
    work = inputs.schedule()
    with pytest.raises(RuntimeError, match="'schedule'"):
        inputs.call(schedule=work, causal=False)
    with pytest.raises(RuntimeError, match="'schedule'"):
        inputs.call(schedule=work, batch_invariant=True)
    out, lse = inputs.call(schedule=work, window_left=10)
    assert out.isnan().all()
    assert lse.isnan().all()


def test_validate_names_the_request(device: torch.device, rng: torch.Generator) -> None:
    inputs = MIXED.inputs(device, rng)
    inputs.call(validate=True)
    for name, place, value in (
        ("qo_indptr", 3, 0),
        ("kv_indptr", 2, 10**6),
        ("kv_last_page_len", 1, 17),
        ("kv_indices", 1, 10**6),
    ):
        before = int(inputs.index[name][place])
        inputs.index[name][place] = value
        with pytest.raises(ValueError, match=rf"'{name}'.*request \d"):
            inputs.call(validate=True)
        inputs.index[name][place] = before
    inputs.call(validate=True)


def replayed(
    batch: Batch, others: list[Batch], rng: torch.Generator, given: bool
) -> tuple[list[Tensor], list[Tensor]]:
    """Capture `batch`, then replay it with the contents of others; beside eager results."""
    device = torch.device("cuda", 0)
    all_inputs = [b.inputs(device, rng) for b in (batch, *others)]
    static = all_inputs[0]
    pages = max(part.cache[0].shape[0] for part in all_inputs)
    cache = tuple(
        torch.zeros((pages, *part.shape[1:]), dtype=part.dtype, device=device)
        for part in static.cache
    )
    longest = max(len(part.index["kv_indices"]) for part in all_inputs)
    indices = torch.full((longest,), -1, dtype=torch.int32, device=device)
    captured = Inputs(
        batch, static.q.clone(), cache, {**static.index, "kv_indices": indices}, [], []
    )
    captured.index = {name: t.clone() for name, t in captured.index.items()}

    def call() -> Any:
        work = captured.schedule() if given else None
        return captured.call(schedule=work)

    def load(inputs: Inputs) -> None:
        captured.q.zero_()
        captured.q[: len(inputs.q)] = inputs.q
        for target, source in zip(captured.cache, inputs.cache, strict=True):
            target[: len(source)] = source
        for name, tensor in inputs.index.items():
            captured.index[name][: len(tensor)] = tensor
            if "indptr" in name:
                captured.index[name][len(tensor) :] = tensor[-1]
            elif name == "kv_last_page_len":
                captured.index[name][len(tensor) :] = 0

    load(static)
    call()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = call()
    replays, eager = [], []
    for inputs in all_inputs:
        load(inputs)
        for result in results:
            result.fill_(torch.nan)
        graph.replay()
        replays += [result.clone() for result in results]
        eager += list(call())
    return replays, eager


@pytest.mark.gpu
@pytest.mark.parametrize("given", [False, True], ids=["own-list", "given-list"])
def test_graph_replays_with_new_lengths(given: bool, rng: torch.Generator) -> None:
    """Lengths, page tables and the number of live requests change in place."""
    base = Batch(lengths=((1, 900),) * 4 + ((60, 500), (7, 7)), causal=True, head_dims=(128, 128))
    others = [
        base.with_(lengths=((1, 5),) * 6),
        base.with_(lengths=((60, 1500), (0, 3), (1, 0))),
        base.with_(lengths=()),
        base.with_(lengths=((9, 900),) * 6),
    ]
    replays, eager = replayed(base, others, rng, given)
    for got, expected in zip(replays, eager, strict=True):
        assert torch.equal(got, expected)


CUT = [
    Batch(lengths=((1, 70_000),), heads=(8, 2), name="deep", max_q_len=1),
    Batch(lengths=((1, 70_000),), heads=(16, 1), name="deep", max_q_len=1),
    Batch(lengths=((1, 20_000), *((1, 90 + i) for i in range(40))), name="skewed", max_q_len=1),
    Batch(lengths=((2, 30_000), (40, 9_000), (1, 70)), name="mixed", causal=True, padding=7),
    Batch(lengths=((512, 512), (130, 3_000)), name="prefill", causal=True, form="ragged"),
]


@pytest.mark.gpu
@pytest.mark.parametrize("invariant", [False, True])
@pytest.mark.parametrize("dims", [(64, 64), (128, 128), (256, 256)], ids=str)
@pytest.mark.parametrize("batch", CUT, ids=ids)
def test_graphs_of_cut_tiles(
    batch: Batch, dims: tuple[int, int], invariant: bool, rng: torch.Generator
) -> None:
    """Parts lie in the stream's memory, or in the graph's: the same bits, replay after replay."""
    wanted = batch.with_(head_dims=dims, invariant=invariant)
    check_graph(wanted.inputs(torch.device("cuda", 0), rng))


@pytest.mark.gpu
def test_streams_and_threads_at_a_time(rng: torch.Generator) -> None:
    """Calls of several streams, and of several threads on one, share a work list."""
    inputs = CUT[2].with_(head_dims=(128, 128)).inputs(torch.device("cuda", 0), rng)
    work = inputs.schedule()
    expected = inputs.call(schedule=work)
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in range(3)]

    def calls(stream: torch.cuda.Stream) -> list[Any]:
        with torch.cuda.stream(stream):
            return [inputs.call(schedule=work) for _ in range(50)]

    with ThreadPoolExecutor(6) as pool:
        results = [call for part in pool.map(calls, streams * 2) for call in part]
    torch.cuda.synchronize()
    for out, lse in results:
        assert torch.equal(out, expected[0])
        assert torch.equal(lse, expected[1])


@pytest.mark.gpu
def test_the_memory_of_a_stream_grows(rng: torch.Generator) -> None:
    """Once, and calls that come after the largest allocate nothing but results."""
    device = torch.device("cuda", 0)
    sizes = [CUT[0].with_(head_dims=(64, 64)), CUT[4].with_(head_dims=(128, 128))]
    all_inputs = [batch.inputs(device, rng) for batch in sizes]
    with torch.cuda.stream(torch.cuda.Stream()):
        expected = [inputs.call() for inputs in all_inputs]
        for _ in range(3):
            for inputs, results in zip(all_inputs, expected, strict=True):
                work = inputs.schedule()
                torch.cuda.synchronize()
                torch.cuda.reset_peak_memory_stats()
                before = torch.cuda.memory_allocated()
                again = inputs.call(schedule=work, out=results[0].clone(), lse=results[1].clone())
                results_size = sum(2 * (r.numel() * r.element_size() + 512) for r in again)
                assert torch.cuda.max_memory_allocated() - before < results_size
                assert torch.equal(again[0], results[0])
                assert torch.equal(again[1], results[1])


@pytest.mark.gpu
def test_graph_trees_warm_up(rng: torch.Generator) -> None:
    """torch.compile's own graphs refuse memory that a warm-up leaves in their pool."""
    inputs = CUT[0].with_(head_dims=(128, 128)).inputs(torch.device("cuda", 0), rng)
    expected = inputs.call()
    torch._dynamo.reset()
    call = torch.compile(lambda: inputs.call(), mode="reduce-overhead", fullgraph=True)
    with torch.inference_mode():
        for _ in range(4):
            out, lse = call()
            assert torch.equal(out, expected[0])
            assert torch.equal(lse, expected[1])


@pytest.mark.parametrize("dims", [(64, 64), (128, 128), (256, 256)], ids=str)
@pytest.mark.parametrize("own", [(1, 3000), (1, 40), (4, 700), (5, 700), (30, 300), (200, 2500)])
def test_batch_invariance(
    own: tuple[int, int], dims: tuple[int, int], device: torch.device, rng: torch.Generator
) -> None:
    """A request's bits are the same alone, and anywhere in any batch."""
    if device.type == "cpu" and dims != (64, 64):
        pytest.skip("one size does on the CPU")
    alone = Batch(lengths=(own,), heads=(8, 2), head_dims=dims, causal=True, invariant=True)
    first = alone.inputs(device, rng)
    expected = first.call()
    for others in (((1, 50),) * 3, ((130, 200), (0, 4), (1, 9000))):
        for place in (0, len(others)):
            lengths = (*others[:place], own, *others[place:])
            inputs = alone.with_(lengths=lengths).inputs(device, rng)
            begin = sum(q for q, _ in lengths[:place])
            rows = slice(begin, begin + own[0])
            inputs.q[rows] = first.q
            table = inputs.index["kv_indices"]
            start = int(inputs.index["kv_indptr"][place])
            count = -(-own[1] // alone.page_size)
            for target, source in zip(inputs.cache, first.cache, strict=True):
                pages = first.index["kv_indices"][:count].long()
                target[table[start : start + count].long()] = source[pages]
            out, lse = inputs.call()
            assert torch.equal(out[rows], expected[0]), (others, place)
            assert torch.equal(lse[rows], expected[1]), (others, place)


@pytest.mark.gpu
def test_no_synchronisation(rng: torch.Generator) -> None:
    inputs = MIXED.inputs(torch.device("cuda", 0), rng)
    inputs.call(schedule=inputs.schedule())
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        torch.cuda._sleep(1_000_000_000)
        done = torch.cuda.Event()
        inputs.call(schedule=inputs.schedule())
        inputs.call()
        done.record()
        assert not done.query()
    finally:
        torch.cuda.set_sync_debug_mode("default")
        torch.cuda.synchronize()


def test_compiles_once_for_all_lengths(device: torch.device, rng: torch.Generator) -> None:
    backend = CompileCounterWithBackend("aot_eager")

    @torch.compile(fullgraph=True, dynamic=True, backend=backend)
    def step(
        q: Tensor, k: Tensor, v: Tensor, qo: Tensor, kv: Tensor, pages: Tensor, last: Tensor
    ) -> Tensor:
        work = ridgeline.schedule(
            qo_indptr=qo, kv_indptr=kv, kv_last_page_len=last, page_size=16, causal=True,
            num_qo_tokens=q.shape[0], num_qo_heads=4, num_kv_heads=2, head_dim_qk=64,
        )  # fmt: skip
        options: dict[str, Any] = {
            "qo_indptr": qo, "kv_indptr": kv, "kv_indices": pages, "kv_last_page_len": last,
            "causal": True, "schedule": work,
        }  # fmt: skip
        first = ridgeline.attention(q, (k, v), **options)
        return ridgeline.attention(first, (k, v), **options)

    for lengths in (((3, 40), (1, 100)), ((7, 7), (2, 90), (5, 33)), ((1, 9), (1, 50), (4, 4)) * 2):
        inputs = Batch(lengths=lengths, causal=True).inputs(device, rng)
        names = ("qo_indptr", "kv_indptr", "kv_indices", "kv_last_page_len")
        got = step(inputs.q, *inputs.cache, *(inputs.index[name] for name in names))
        first = inputs.call(return_lse=False)
        inputs.q = first
        assert torch.equal(got, inputs.call(return_lse=False))
    assert backend.frame_count <= 2


WRONG: list[tuple[str, Callable[[Inputs], dict[str, Any]], str]] = [
    ("int64-table", lambda i: {"kv_indices": i.index["kv_indices"].long()}, "kv_indices"),
    ("int64-indptr", lambda i: {"qo_indptr": i.index["qo_indptr"].long()}, "qo_indptr"),
    ("short-indptr", lambda i: {"kv_indptr": i.index["kv_indptr"][:-1]}, "kv_indptr"),
    ("short-lens", lambda i: {"kv_last_page_len": i.index["kv_last_page_len"][1:]}, "kv_lens"),
    ("no-lens", lambda _: {"kv_last_page_len": None}, "kv_last_page_len"),
    ("both-lens", lambda i: {"kv_lens": i.index["kv_last_page_len"]}, "kv_last_page_len"),
    ("layout", lambda _: {"kv_layout": "HDN"}, "kv_layout"),
    ("window", lambda _: {"window_left": -2}, "window_left"),
    ("max-q-len", lambda _: {"max_q_len": -2}, "max_q_len"),
    ("cap", lambda _: {"logits_soft_cap": -1.0}, "logits_soft_cap"),
    ("schedule", lambda i: {"schedule": i.index["kv_indptr"]}, "schedule"),
    ("out", lambda i: {"out": i.q[1:]}, "out"),
]


@pytest.mark.parametrize(("name", "change", "argument"), WRONG, ids=[w[0] for w in WRONG])
def test_wrong_arguments(
    name: str,
    change: Callable[[Inputs], dict[str, Any]],
    argument: str,
    device: torch.device,
    rng: torch.Generator,
) -> None:
    inputs = MIXED.inputs(device, rng)
    options = {**inputs.index, "causal": True, **change(inputs)}
    with pytest.raises((RuntimeError, ValueError, TypeError), match=f"'{argument}'"):
        ridgeline.attention(inputs.q, inputs.cache, **options)
    assert inputs.call()[0].isfinite().all(), name


@pytest.mark.parametrize(
    "flags",
    [
        pytest.param(flags, id=name)
        for name, flags in (
            ("unknown", 64),
            ("negative", -1),
            ("report-without-number", 16),
            ("complete-without-tag", 2 + 32),
            ("both", 16 + 32 + (7 << 32)),
            ("number-alone", 1 << 40),
            ("tag-alone", 2 + (-7 << 32)),
            ("report-beside-unknown", 16 + 64 + (7 << 32)),
        )
    ],
)
def test_flags_that_say_nothing(flags: int, device: torch.device, rng: torch.Generator) -> None:
    """Of a direct call; what the wrappers say of a list is one bit and an upper half."""
    inputs = MIXED.inputs(device, rng)
    for name in ("attention", "attention_lse", "attention_full"):
        with pytest.raises((RuntimeError, ValueError), match=f"'flags'.*got {flags}"):
            getattr(torch.ops.ridgeline, name)(*inputs.operands(flags=flags))
    assert inputs.call()[0].isfinite().all()


def test_later_arguments(device: torch.device, rng: torch.Generator) -> None:
    inputs = MIXED.inputs(device, rng)
    one = torch.ones(4, device=device)
    for name in ("custom_mask", "q_scale", "k_scale", "v_scale", "sinks"):
        with pytest.raises(NotImplementedError, match=f"'{name}'"):
            inputs.call(**{name: one})
    with pytest.raises(NotImplementedError, match="ALIBI"):
        inputs.call(pos_encoding_mode="ALIBI")


def test_gradients_are_refused(device: torch.device, rng: torch.Generator) -> None:
    inputs = MIXED.inputs(device, rng)
    inputs.q.requires_grad_()
    with pytest.raises(RuntimeError, match="inference_mode"):
        inputs.call(return_lse=False)
    with torch.no_grad():
        assert poisoned_call(device, inputs.call)[0].isfinite().all()


@pytest.mark.gpu
def test_bf16_on_turing_says_why(rng: torch.Generator) -> None:
    device = torch.device("cuda", 0)
    if supports_bf16_attention(device):
        pytest.skip("this architecture has bf16 tensor cores; run with --arch 75")
    inputs = MIXED.with_(dtype=torch.bfloat16).inputs(device, rng)
    with pytest.raises(RuntimeError, match="bfloat16"):
        inputs.call()
