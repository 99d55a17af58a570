"""Work lists on the GPU: shared out by cost or made by tile, and results of both kinds."""

from __future__ import annotations

import pytest
import ridgeline
import torch
from batch_problem import Batch, check, compile_kernels
from support import sm_under_test

BY_TILE, NUM_RECORDS, NUM_CUT_TILES, NUM_RANGES = 1, 2, 3, 7  # words of a list's header

PROMPTS = Batch(lengths=((1024, 1024),) * 8, heads=(32, 8), head_dims=(64, 64), causal=True)
BESIDE_A_LONG_ONE = PROMPTS.with_(lengths=((128, 40000), *[(64, 64)] * 8))
DECODES = PROMPTS.with_(lengths=((1, 3000),) * 8, max_q_len=1)


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("batch", "by_tile"),
    [
        (PROMPTS, True),
        (BESIDE_A_LONG_ONE, False),
        (DECODES, False),
        (PROMPTS.with_(invariant=True), False),
    ],
    ids=["prompts", "a long one", "decodes", "invariant"],
)
def test_kind_of_list(batch: Batch, by_tile: bool, rng: torch.Generator) -> None:
    """Equal prompts are listed tile by tile and nothing is cut; where a tile is a large part of all
    work, or bits may not depend on the batch, the work is shared out."""
    compile_kernels()
    device = torch.device("cuda", 0)
    header = batch.inputs(device, rng).schedule()[:4].tolist()
    assert bool(header[BY_TILE]) == by_tile
    if by_tile:
        assert header[NUM_CUT_TILES] == 0
        queries = sum(qo for qo, _ in batch.lengths)
        packed = queries * batch.heads[0] // batch.heads[1]
        assert header[NUM_RECORDS] in {packed // 64, packed // 128}
    check(batch, device, rng)


LIST_HEADER, SHARES, CUT_TILES = 16, 1024 * 16, 1024 * 8  # words of a list before its records
RECORD_WORDS = 12
SHARE_WORDS, SHARE_BEGIN, SHARE_END = 16, 12, 13
REQUEST, KV_HEAD, Q_ROW_BEGIN, KV_BEGIN, KV_END = 1, 2, 3, 8, 9  # of a record


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("q_lens", "kv_lens", "heads"),
    [
        ([1] * 256, list(range(1, 257)), (32, 8)),
        ([1] * 700, [5 * i for i in range(700)], (32, 8)),
        ([1] * 600 + [700] * 30, [900] * 630, (32, 8)),
        ([1] * 40, [20_000_000] + [512] * 39, (32, 8)),
        ([1] * 40, [0, 8_000_000] * 20, (24, 3)),
        ([300, 1, 0] * 20, [3_000_000, 70, 9] * 20, (20, 5)),
    ],
    ids=["few", "many requests", "many items", "a long one", "long ones", "long prompts"],
)
def test_every_key_is_in_one_record(
    q_lens: list[int], kv_lens: list[int], heads: tuple[int, int]
) -> None:
    """Of lists whose scheduler keeps what it found in shared memory, or in the list."""
    device = torch.device("cuda", 0)
    starts = torch.tensor([0, *q_lens]).cumsum(0, dtype=torch.int32).to(device)
    work = ridgeline.schedule(
        qo_indptr=None if max(q_lens) == 1 else starts,
        kv_lens=torch.tensor(kv_lens, dtype=torch.int32, device=device),
        num_qo_tokens=sum(q_lens), num_qo_heads=heads[0], num_kv_heads=heads[1],
        head_dim_qk=128, max_q_len=max(q_lens),
    ).cpu()  # fmt: skip
    check_records(work, q_lens, kv_lens)


def check_records(work: torch.Tensor, q_lens: list[int], kv_lens: list[int]) -> None:
    """The records of each tile follow each other from the first key to the last."""
    begin = LIST_HEADER + SHARES + CUT_TILES
    num_records = int(work[NUM_RECORDS])
    records = work[begin : begin + num_records * RECORD_WORDS].view(-1, RECORD_WORDS).tolist()
    tiles: dict[tuple[int, int, int], list[tuple[int, int]]] = {}
    for record in records:
        tile = (record[REQUEST], record[KV_HEAD], record[Q_ROW_BEGIN])
        tiles.setdefault(tile, []).append((record[KV_BEGIN], record[KV_END]))
    assert {tile[0] for tile in tiles} == {i for i, length in enumerate(q_lens) if length > 0}
    for (request, *_), parts in tiles.items():
        parts.sort()
        assert [begin for begin, _ in parts] == [0, *(end for _, end in parts[:-1])]
        assert parts[-1][1] == kv_lens[request]


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("heads", "size", "finely"),
    [((8, 1), 16, True), ((16, 8), 16, False), ((8, 1), 64, False)],
    ids=["few that fit", "do not fit", "many"],
)
def test_few_prompts_whose_keys_fit_l2_are_sorted_finely(
    heads: tuple[int, int], size: int, finely: bool
) -> None:
    """Of a list by tile none sees 1.5 times as many keys as one before it; else more do."""
    device = torch.device("cuda", 0)
    if heads[1] == 8 and torch.cuda.get_device_properties(device).L2_cache_size >= 67e6:
        pytest.skip("keys and values of 67 MB fit this GPU's L2 cache")
    length = 1024
    work = ridgeline.schedule(
        qo_indptr=torch.arange(size + 1, dtype=torch.int32, device=device) * length,
        kv_lens=torch.full((size,), length, dtype=torch.int32, device=device),
        num_qo_tokens=size * length, num_qo_heads=heads[0], num_kv_heads=heads[1],
        head_dim_qk=128, causal=True, max_q_len=length,
    ).cpu()  # fmt: skip
    assert int(work[BY_TILE]) == 1
    begin = LIST_HEADER + SHARES + CUT_TILES
    records = work[begin : begin + int(work[NUM_RECORDS]) * RECORD_WORDS].view(-1, RECORD_WORDS)
    tiles = {(request, row) for request, row in records[:, [REQUEST, Q_ROW_BEGIN]].tolist()}
    rows = range(0, length * heads[0] // heads[1], 128)
    assert tiles == {(request, row) for request in range(size) for row in rows}
    assert len(records) == len(tiles)
    steps = (records[:, KV_END] + 63) // 64
    fewest_before = steps.cummin(0).values[:-1]
    assert bool((steps[1:] <= 1.5 * fewest_before + 1).all()) == finely


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("size", "kv_len", "num_records", "num_cut", "head_dim_qk"),
    [
        (64, 1024, 2, 0, 128),
        (32, 300, 1, 0, 128),
        (16, 2048, 1, 16, 192),
        (48, 1024, None, None, 128),
        (64, 1, 2, 0, 128),
    ],
)
def test_decodes_of_one_length(
    size: int, kv_len: int, num_records: int | None, num_cut: int | None, head_dim_qk: int
) -> None:
    """Where almost as many ranges as there are teams divide them evenly, all ranges are alike."""
    device = torch.device("cuda", 0)
    work = ridgeline.schedule(
        kv_lens=torch.full((size,), kv_len, dtype=torch.int32, device=device),
        num_qo_tokens=size, num_qo_heads=32, num_kv_heads=8, head_dim_qk=head_dim_qk,
        head_dim_vo=128,
    ).cpu()  # fmt: skip
    check_records(work, [1] * size, [kv_len] * size)
    # Of 33 teams 32 have work then.
    sms = torch.cuda.get_device_properties(device).multi_processor_count
    if sms == 132 and sm_under_test(device) >= 80 and num_records is not None:
        shares = work[LIST_HEADER : LIST_HEADER + 33 * SHARE_WORDS].view(-1, SHARE_WORDS)
        records = (shares[:, SHARE_END] - shares[:, SHARE_BEGIN]).tolist()
        assert records == [num_records] * 32 + [0]
        assert int(work[NUM_CUT_TILES]) == num_cut


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("kv_lens", "whole"),
    [
        ([1024] * 16, True),
        ([2048] * 10, False),
        ([256] * 5, True),
        (list(range(1, 300, 10)), True),
        ([3, 0, 190], True),
        ([1024, *[20] * 9], False),
        ([130] * 34, False),
    ],
    ids=["16", "long", "5", "unequal", "one", "one long", "more than teams"],
)
@pytest.mark.parametrize("form", ["padded", "paged"])
def test_short_decodes_stay_whole(
    kv_lens: list[int], whole: bool, form: str, rng: torch.Generator
) -> None:
    """Where a team has one at most, and the longest is little more than an equal share."""
    compile_kernels()
    device = torch.device("cuda", 0)
    batch = Batch(
        lengths=tuple((1, length) for length in kv_lens), heads=(32, 8), head_dims=(128, 128),
        form=form, max_q_len=1,
    )  # fmt: skip
    work = batch.inputs(device, rng).schedule().cpu()
    check_records(work, [1] * len(kv_lens), kv_lens)
    sms = torch.cuda.get_device_properties(device).multi_processor_count
    if sms == 132 and sm_under_test(device) >= 80:
        assert (int(work[NUM_CUT_TILES]) == 0) == whole
        assert (int(work[NUM_RANGES]) == len(kv_lens)) == whole
    check(batch, device, rng)


@pytest.mark.gpu
@pytest.mark.parametrize(("size", "team_size"), [(1, 32), (8, 32), (16, 32), (33, 8), (20, 8)])
def test_teams_of_all_heads(size: int, team_size: int) -> None:
    """Where the requests share out evenly to such teams, and hardly any CTA is left over."""
    device = torch.device("cuda", 0)
    work = ridgeline.schedule(
        kv_lens=torch.full((size,), 700, dtype=torch.int32, device=device),
        num_qo_tokens=size, num_qo_heads=32, num_kv_heads=32, head_dim_qk=128,
    ).cpu()  # fmt: skip
    check_records(work, [1] * size, [700] * size)
    begin = LIST_HEADER + SHARES + CUT_TILES
    records = work[begin : begin + int(work[NUM_RECORDS]) * RECORD_WORDS].view(-1, RECORD_WORDS)
    sms = torch.cuda.get_device_properties(device).multi_processor_count
    if sms == 132 and sm_under_test(device) >= 80:
        assert set(records[:, KV_HEAD].tolist()) == set(range(0, 32, team_size))


@pytest.mark.gpu
@pytest.mark.parametrize("queries", [128, 256, 512])
def test_tiles_over_the_same_keys_are_cut_alike(queries: int) -> None:
    """So that all of them are read against the same keys at any time."""
    device = torch.device("cuda", 0)
    work = ridgeline.schedule(
        qo_indptr=torch.tensor([0, queries], dtype=torch.int32, device=device),
        kv_lens=torch.tensor([40_000], dtype=torch.int32, device=device),
        num_qo_tokens=queries, num_qo_heads=32, num_kv_heads=8, head_dim_qk=128,
    ).cpu()  # fmt: skip
    check_records(work, [queries], [40_000])
    begin = LIST_HEADER + SHARES + CUT_TILES
    records = work[begin : begin + int(work[NUM_RECORDS]) * RECORD_WORDS].view(-1, RECORD_WORDS)
    cuts: dict[tuple[int, int], set[int]] = {}
    for record in records.tolist():
        cuts.setdefault((record[KV_HEAD], record[Q_ROW_BEGIN]), set()).add(record[KV_BEGIN])
    # Where an SM has two CTAs of tall tiles, and the GPU so many SMs, not on sm_75.
    sms = torch.cuda.get_device_properties(device).multi_processor_count
    if sms == 132 and sm_under_test(device) >= 80:
        assert len(set(map(frozenset, cuts.values()))) == 1


@pytest.mark.gpu
@pytest.mark.parametrize("form", ["ragged", "paged"])
@pytest.mark.parametrize("causal", [False, True])
def test_the_last_of_equal_tiles_are_split(form: str, causal: bool, rng: torch.Generator) -> None:
    """Those that are left when all SMs have had as many, where they are few: heads of the first
    request's tile, which has no rows for some of the small tiles."""
    compile_kernels()
    device = torch.device("cuda", 0)
    sms = torch.cuda.get_device_properties(device).multi_processor_count
    heads = 8
    size = next(n for n in range(sms, 2 * sms) if 0 < heads * n % sms < heads)
    batch = Batch(
        lengths=((27, 200), *[(32, 200)] * (size - 1)), heads=(4 * heads, heads),
        head_dims=(128, 128), form=form, causal=causal,
    )  # fmt: skip
    header = batch.inputs(device, rng).schedule()[:4].tolist()
    splits = sm_under_test(device) >= 90
    assert header[BY_TILE] == 1 + (heads * size % sms if splits else 0)
    assert header[NUM_RECORDS] == size
    check(batch, device, rng)
