"""Work lists on the GPU: shared out by cost or made by tile, and results of both kinds."""

from __future__ import annotations

import pytest
import torch
from batch_problem import Batch, check, compile_kernels

BY_TILE, NUM_RECORDS, NUM_CUT_TILES = 1, 2, 3  # words of a list's header

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
