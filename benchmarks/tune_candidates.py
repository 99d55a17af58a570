"""What tune_attention.py tries: tiles and constants, by the group of cases that they are for."""

from __future__ import annotations

from dataclasses import dataclass

BATCH_CHOICE = "torch_ops/csrc/ops/batch_choice.cpp"
Tile = tuple[int, int, int, int, int, bool]  # TileConfig of kernels/attention/params.h


@dataclass(frozen=True)
class Group:
    """Cases that decide about one kernel; `kernel` is part of its name."""

    kernel: str
    head_dims: tuple[int, int]
    cases: tuple[str, ...]  # of CASES


@dataclass(frozen=True)
class Candidate:
    """A change of the tile table, or of other text, from which a library of its own is made.

    `tiles` gives (head_dim_qk, head_dim_vo, tile_q) another row. `patches` are (file, old, new);
    one whose old text is not in the file makes the candidate fail, and the report says so.
    """

    name: str
    group: str
    why: str
    tiles: tuple[tuple[tuple[int, int, int], Tile], ...] = ()
    patches: tuple[tuple[str, str, str], ...] = ()


# (qo_len, kv_len) of the requests, query and KV heads, place of the keys, causal.
CASES: dict[str, tuple[list[tuple[int, int]], tuple[int, int], str, bool]] = {
    "1 x 1024": ([(1, 1024)], (32, 8), "page 16", False),
    "1 x 16384": ([(1, 16384)], (32, 8), "page 16", False),
    "16 x 1024": ([(1, 1024)] * 16, (32, 8), "page 16", False),
    "64 x 4096": ([(1, 4096)] * 64, (32, 8), "page 16", False),
    "64 x 4096, page 1": ([(1, 4096)] * 64, (32, 8), "page 1", False),
    "64 x 4096, 32/32": ([(1, 4096)] * 64, (32, 32), "padded", False),
    "256 x 1024": ([(1, 1024)] * 256, (64, 8), "page 16", False),
    "skewed": ([(1, 65536)] + [(1, 512)] * 63, (32, 8), "page 16", False),
    "32 x 512, causal": ([(512, 512)] * 32, (32, 8), "ragged", True),
    "4 x 4096, causal": ([(4096, 4096)] * 4, (32, 8), "ragged", True),
    "4 x 4096": ([(4096, 4096)] * 4, (32, 8), "ragged", False),
    "4 x 4096, causal, page 16": ([(4096, 4096)] * 4, (32, 8), "page 16", True),
    "1 x 16384, causal": ([(16384, 16384)], (32, 32), "ragged", True),
    "mixed": ([(1024, 1024)] * 8 + [(1, 4096)] * 120, (32, 8), "page 16", True),
}
DECODES = tuple(name for name, (requests, *_) in CASES.items() if requests[0][0] == 1)
PREFILLS = tuple(name for name in CASES if name not in DECODES)
WIDE = ("32 x 512, causal", "4 x 4096, causal", "4 x 4096", "4 x 4096, causal, page 16")

GROUPS = {
    "decode 128": Group("Heights<16>", (128, 128), DECODES),
    "prefill 128": Group("Heights<16, 128>", (128, 128), PREFILLS),
    "prefill 64": Group("Heights<16, 128>", (64, 64), WIDE),
    "prefill 192": Group("Heights<16, 128>", (192, 128), WIDE),
    "prefill 256": Group("Heights<16, 64>", (256, 256), WIDE),
}


def _tile(group: str, why: str, rows: int, tile: Tile, *more: tuple[int, Tile]) -> Candidate:
    warps, _, keys, stages, ctas, in_registers = tile
    name = f"{rows} rows, {warps} warps, {keys} keys, {stages} stage{'s' * (stages > 1)}"
    name += f", {ctas} CTA{'s' * (ctas > 1)}"
    name += ", Q in registers" if in_registers else ""
    dims = GROUPS[group].head_dims
    tiles = tuple(((*dims, height), each) for height, each in ((rows, tile), *more))
    return Candidate(name, group, why, tiles)


def _constant(group: str, name: str, why: str, old: str, new: str) -> Candidate:
    return Candidate(name, group, why, patches=((BATCH_CHOICE, old, new),))


_EIGHT_WARPS = (16, (8, 8, 128, 1, 1, True))
CANDIDATES = (
    *(Candidate("as it is", group, "the table of this checkout") for group in GROUPS),
    _tile("decode 128", "more in flight, beyond sm_86", 16, (4, 4, 64, 3, 2, True)),
    _tile("decode 128", "more CTAs of a shorter pipeline", 16, (4, 4, 64, 1, 4, True)),
    _tile("decode 128", "three CTAs", 16, (4, 4, 64, 2, 3, True)),
    _tile("decode 128", "longer steps", 16, (4, 4, 128, 1, 2, True)),
    _tile("decode 128", "longer steps, three CTAs", 16, (4, 4, 128, 1, 3, True)),
    _tile("decode 128", "longer steps, Q from shared memory", 16, (4, 4, 128, 1, 2, False)),
    _tile("decode 128", "longer steps, two stages, one CTA", 16, (4, 4, 128, 2, 1, True)),
    _tile("decode 128", "longer steps, half the warps", 16, (2, 2, 64, 1, 4, True)),
    _tile("decode 128", "longer steps, two stages, half the warps", 16, (2, 2, 64, 2, 3, True)),
    _tile("decode 128", "more warps of less work", 16, (8, 8, 128, 1, 2, True)),
    _tile("decode 128", "fewer warps, more CTAs", 16, (2, 2, 32, 2, 4, True)),
    _tile("decode 128", "registers for the pipeline", 16, (4, 4, 64, 2, 2, False)),
    _constant("decode 128", "64 KiB in flight", "one CTA an SM", "(128 * 1024 + in_flight - 1)",
              "(64 * 1024 + in_flight - 1)"),
    _constant("decode 128", "192 KiB in flight", "three CTAs", "(128 * 1024 + in_flight - 1)",
              "(192 * 1024 + in_flight - 1)"),
    _constant("decode 128", "parts of 4 tiles at least", "fewer parts to merge", ": 1};", ": 4};"),
    _tile("prefill 128", "the next keys arrive earlier", 128, (4, 1, 64, 2, 2, False)),
    _tile("prefill 128", "shorter steps, two stages", 128, (4, 1, 32, 2, 2, False)),
    _tile("prefill 128", "shorter steps", 128, (4, 1, 32, 1, 2, False)),
    _tile("prefill 128", "16 rows a warp", 128, (8, 1, 64, 1, 1, True), _EIGHT_WARPS),
    _tile("prefill 128", "16 rows a warp, two CTAs", 128, (8, 1, 64, 1, 2, False),
          (16, (8, 8, 128, 1, 2, True))),
    _tile("prefill 128", "16 rows a warp, two stages", 128, (8, 1, 64, 2, 1, True), _EIGHT_WARPS),
    _constant("prefill 128", "parts of 256 keys", "balance", "512 / kv_tile", "256 / kv_tile"),
    _constant("prefill 128", "parts of 1,024 keys", "few parts", "512 / kv_tile",
              "1024 / kv_tile"),
    _tile("prefill 64", "two stages", 128, (4, 1, 64, 2, 2, False)),
    _tile("prefill 64", "three CTAs", 128, (4, 1, 64, 1, 3, False)),
    _tile("prefill 64", "two long stages", 128, (4, 1, 128, 2, 2, False)),
    _tile("prefill 64", "Q in registers", 128, (4, 1, 64, 2, 2, True)),
    _tile("prefill 192", "shorter steps", 128, (4, 1, 32, 1, 2, False)),
    _tile("prefill 192", "shorter steps, two stages", 128, (4, 1, 32, 2, 2, False)),
    _tile("prefill 256", "shorter steps", 64, (4, 1, 32, 1, 2, False)),
    _tile("prefill 256", "shorter steps, two stages", 64, (4, 1, 32, 2, 2, False)),
)  # fmt: skip
