"""Every op on a few small, awkward shapes, for compute-sanitizer: ci/test_gpu.py runs it.

Sizes are odd on purpose: rows that end inside a tile, key lengths that end inside a block, views
with gaps. Without torch's caching allocator each tensor is an allocation of its own, so that an
access past its end is seen. Results are only checked for being finite: the tests check values.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence

import ridgeline
import torch

DEVICE = torch.device("cuda")
HEADS = ((4, 4), (6, 2), (8, 1))


def dtypes() -> tuple[torch.dtype, ...]:
    turing = os.environ.get("RIDGELINE_ARCH") == "75"
    return (torch.float16,) if turing else (torch.float16, torch.bfloat16)


def random(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(*shape, device="cpu").to(dtype).to(DEVICE)


def with_gaps(x: torch.Tensor) -> torch.Tensor:
    """The same values, every row followed by a gap of 16 bytes of NaN."""
    wide = torch.full((*x.shape[:-1], x.shape[-1] + 8), float("nan"), dtype=x.dtype)
    wide = wide.to(DEVICE)
    view = wide[..., : x.shape[-1]]
    view.copy_(x)
    return view


def elementwise(dtype: torch.dtype) -> Iterator[torch.Tensor]:
    for rows, hidden in ((1, 128), (3, 4096), (5, 1000), (2, 8200)):
        x, weight = random(rows, hidden, dtype=dtype), random(hidden, dtype=dtype)
        yield ridgeline.rmsnorm(x, weight)
        yield ridgeline.rmsnorm(with_gaps(x), weight)
        residual = random(rows, hidden, dtype=dtype)
        ridgeline.fused_add_rmsnorm(x, residual, weight)
        yield x
        yield residual
        yield ridgeline.gemma_rmsnorm(x, weight)
        yield ridgeline.layernorm(with_gaps(x), weight, weight)
        out = torch.empty(rows, hidden, dtype=torch.int8, device=DEVICE)
        for scale in (0.1, None):
            ridgeline.fused_add_rmsnorm_quant(out, x, residual, weight, scale)
            yield out
        for granularity in ("tensor", "token", 8):
            q, scales = ridgeline.quantize(with_gaps(x), torch.float8_e4m3fn, granularity)
            yield ridgeline.dequantize(q, scales, dtype)
        gate = random(rows, 2 * hidden, dtype=dtype)
        yield ridgeline.silu_and_mul(gate)
        yield ridgeline.gelu_and_mul(gate)
        yield ridgeline.gelu_tanh_and_mul(gate, scale=0.1).float()
    for head_dim in (64, 80, 128):
        q, k = random(7, 6, head_dim, dtype=dtype), random(7, 2, head_dim, dtype=dtype)
        positions = torch.arange(7, dtype=torch.int32, device=DEVICE)
        yield from ridgeline.apply_rope_pos_ids(q, k, positions)
        indptr, offsets = positions[[0, 3, 6]], positions[:2]
        yield from ridgeline.apply_rope(q, k, indptr, offsets)
        table = random(7, head_dim, dtype=torch.float32)
        yield from ridgeline.apply_rope_with_cos_sin_cache(positions, q, k, head_dim, table)
        pool = random(2, 2, 4, 2, head_dim, dtype=dtype)
        weight = random(head_dim, dtype=dtype)
        yield ridgeline.rope_append_paged_kv_cache(
            q, k, k, positions * 0, positions, pool, positions[:2], positions[[0, 2]],
            q_weight=weight, k_weight=weight,
        )  # fmt: skip
        yield pool


def attention(dtype: torch.dtype) -> Iterator[torch.Tensor]:
    shapes = ((1, 1), (1, 333), (17, 65), (70, 130), (129, 129))
    for head_dim in (64, 80, 128, 256):
        for (qo_len, kv_len), (num_qo_heads, num_kv_heads) in zip(shapes, HEADS * 2, strict=False):
            q = random(qo_len, num_qo_heads, head_dim, dtype=dtype)
            k = with_gaps(random(kv_len, num_kv_heads, head_dim, dtype=dtype))
            v = with_gaps(random(kv_len, num_kv_heads, head_dim, dtype=dtype))
            for options in ({}, {"causal": True, "window_left": 20, "logits_soft_cap": 30.0}):
                if head_dim == 256 and options:
                    continue
                yield ridgeline.single_prefill_with_kv_cache(q, k, v, **options)
            yield ridgeline.single_decode_with_kv_cache(q[0], k, v)
    q, k = random(9, 4, 192, dtype=dtype), random(40, 4, 192, dtype=dtype)
    yield ridgeline.single_prefill_with_kv_cache(q, k, random(40, 4, 128, dtype=dtype), causal=True)
    q, k = random(33, 4, 128, dtype=dtype), random(50, 2, 128, dtype=dtype)
    v = random(50, 2, 128, dtype=dtype)
    yield ridgeline.single_prefill_with_kv_cache(q, k, v, pos_encoding_mode="ROPE_LLAMA")
    q, k = random(8, 128, dtype=dtype), random(9001, 2, 128, dtype=dtype)
    yield ridgeline.single_decode_with_kv_cache(q, k, random(9001, 2, 128, dtype=dtype))


def merging(dtype: torch.dtype) -> Iterator[torch.Tensor]:
    for seq_len, num_heads, head_dim in ((1, 1, 40), (5, 3, 128), (33, 8, 256)):
        v_a, v_b = (random(seq_len, num_heads, head_dim, dtype=dtype) for _ in range(2))
        s_a, s_b = (random(seq_len, num_heads, dtype=torch.float32) for _ in range(2))
        yield from ridgeline.merge_state(v_a, s_a, v_b, s_b)
        ridgeline.merge_state_in_place(v_a, s_a, v_b, s_b)
        yield v_a
        states = random(seq_len, 5, num_heads, head_dim, dtype=dtype)
        yield from ridgeline.merge_states(
            states, random(seq_len, 5, num_heads, dtype=torch.float32)
        )


def ints(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32, device=DEVICE)


def page_table(lengths: Sequence[int], page_size: int) -> tuple[torch.Tensor, ...]:
    """Of requests with keys of so many tokens: kv_indptr, kv_indices, kv_last_page_len."""
    counts = [-(-length // page_size) for length in lengths]
    kv_indptr = ints(0, *(sum(counts[: i + 1]) for i in range(len(counts))))
    pages = torch.randperm(sum(counts)).to(torch.int32).to(DEVICE)
    last = ints(*((length - 1) % page_size + 1 if length else 0 for length in lengths))
    return kv_indptr, pages, last


def batches(dtype: torch.dtype) -> Iterator[torch.Tensor]:
    """Requests of 1, 3 and 40 queries over 7, 130 and 333 keys; then indices that are garbage."""
    qo_indptr, lengths = ints(0, 1, 4, 44), (7, 130, 333)
    garbage = torch.randint(-(2**31), 2**31 - 1, (500,)).to(torch.int32).to(DEVICE)
    for head_dim in (64, 80, 256):
        q = random(44, 6, head_dim, dtype=dtype)
        for page_size in (1, 5):
            kv_indptr, pages, last = page_table(lengths, page_size)
            pool = random(len(pages), 2, page_size, 2, head_dim, dtype=dtype)
            for indptr, indices, last_page_len in (
                (kv_indptr, pages, last),
                (kv_indptr, garbage[: len(pages)], last),
                (garbage[:4], garbage[: len(pages)], garbage[4:7]),
            ):
                for invariant in (False, True):
                    yield ridgeline.attention(
                        q, pool, qo_indptr=qo_indptr, kv_indptr=indptr, kv_indices=indices,
                        kv_last_page_len=last_page_len, causal=True, batch_invariant=invariant,
                    )  # fmt: skip
                pod = ridgeline.PODWithPagedKVCacheWrapper(device=DEVICE)
                pod.plan(indptr, indices, last_page_len, 6, 2, head_dim, page_size,
                         q_data_type=dtype)  # fmt: skip
                yield from pod.run(q, *random(2, 61, 2, head_dim, dtype=dtype), q[:3], pool)
        k, v = (with_gaps(random(470, 2, head_dim, dtype=dtype)) for _ in range(2))
        for indptr in (ints(0, 7, 137, 470), garbage[:4]):
            yield ridgeline.attention(q, (k, v), qo_indptr=qo_indptr, kv_indptr=indptr)
        k, v = (random(3, 41, 2, head_dim, dtype=dtype) for _ in range(2))
        for kv_lens in (ints(7, 0, 41), garbage[:3]):
            yield ridgeline.attention(q[:3], (k, v), kv_lens=kv_lens)


def decodes(dtype: torch.dtype) -> Iterator[torch.Tensor]:
    """About as many requests and KV heads as SMs, with tables as they should be and garbage."""
    sms = torch.cuda.get_device_properties(DEVICE).multi_processor_count
    lengths = [61 * i % 400 for i in range(sms * 9 // 10 // 4)]
    kv_indptr, pages, last = page_table(lengths, 5)
    garbage = torch.randint(-(2**31), 2**31 - 1, (len(pages),)).to(torch.int32).to(DEVICE)
    for head_dim in (80, 128):
        q = random(len(lengths), 12, head_dim, dtype=dtype)
        pool = random(len(pages), 2, 5, 4, head_dim, dtype=dtype)
        for indices in (pages, garbage):
            yield ridgeline.attention(
                q, pool, kv_indptr=kv_indptr, kv_indices=indices, kv_last_page_len=last
            )
        k, v = (with_gaps(random(len(lengths), 61, 4, head_dim, dtype=dtype)) for _ in range(2))
        for kv_lens in (ints(*(length % 62 for length in lengths)), garbage[: len(lengths)]):
            yield ridgeline.attention(q, (k, v), kv_lens=kv_lens)


def paging(dtype: torch.dtype) -> Iterator[torch.Tensor]:
    garbage = torch.randint(-(2**31), 2**31 - 1, (70,)).to(torch.int32).to(DEVICE)
    kv_indptr, last = ints(0, 2, 2, 5), ints(3, 0, 1)
    lengths = ridgeline.get_seq_lens(kv_indptr, last, 5)
    yield lengths
    places = ridgeline.get_batch_indices_positions(ints(0, 4, 4, 11), lengths, 13)
    yield from places
    yield from ridgeline.get_batch_indices_positions(garbage[:4], garbage[4:7], 13)
    for head_dim in (64, 80, 33):
        pool = random(6, 2, 5, 3, head_dim, dtype=dtype)
        new = with_gaps(random(13, 3, head_dim, dtype=dtype))
        for indices, positions in (
            places,
            (garbage[:13], garbage[13:26]),
            (garbage[:13] * 0, garbage[:13]),
        ):
            for pages in (ints(4, 0, 5, 1, 3), garbage[:5]):
                ridgeline.append_paged_kv_cache(
                    new, new, indices, positions, pool, pages, kv_indptr, last
                )
                yield pool
        target = random(4, 2, 5, 3, head_dim, dtype=dtype)
        for source_pages in (ints(5, 0, 2), garbage[:3]):
            ridgeline.copy_pages(pool, target, source_pages, ints(0, 3, 1))
            yield target


def sampling(dtype: torch.dtype) -> Iterator[torch.Tensor]:
    for num_rows, vocab_size in ((1, 1), (3, 7), (2, 1001), (5, 33001)):
        logits = with_gaps(random(num_rows, vocab_size, dtype=dtype))
        for filters in ({}, {"top_k": 5, "top_p": 0.9}, {"top_p": 0.5}, {"min_p": 0.1}):
            yield from ridgeline.sample_from_logits(logits, 0.8, **filters, seed=3)
        probs = ridgeline.softmax(logits)
        yield probs
        yield ridgeline.top_p_renorm_probs(probs, 0.7)
        yield ridgeline.top_k_renorm_probs(probs, 3)
        yield ridgeline.top_k_mask_logits(logits, 3).exp()
        yield from ridgeline.top_k(logits, min(9, vocab_size))
        target = probs.expand(3, num_rows, vocab_size).transpose(0, 1).contiguous()
        drafted = torch.zeros(num_rows, 2, dtype=torch.int32, device=DEVICE)
        yield from ridgeline.chain_speculative_sampling(target[:, :2], drafted, target, seed=3)


def bits(dtype: torch.dtype) -> Iterator[torch.Tensor]:
    del dtype
    for size in (1, 77, 5000):
        x = random(size, dtype=torch.float32) > 0
        yield ridgeline.packbits(x)
        yield from ridgeline.segment_packbits(x, ints(0, size // 3, size // 3, size))


def main() -> None:
    torch.manual_seed(0)
    results = 0
    for dtype in dtypes():
        for family in (elementwise, attention, merging, batches, decodes, paging, sampling, bits):
            for result in family(dtype):
                finite = bool(result.cpu().isfinite().all())
                assert finite, f"{family.__name__}, {dtype}: a value that is not finite"
                results += 1
    torch.cuda.synchronize()
    print(f"{results} results, all finite")


if __name__ == "__main__":
    main()
