"""Packs: what goes in, that they are reproducible, and that every defect is found."""

from __future__ import annotations

import json
import re
import shutil
import struct
from dataclasses import replace
from pathlib import Path

import pytest
import ridgeline
from kernel_fixtures import KERNEL, StandIn, core_row, made_entry, write_kernels
from ridgeline import compiler
from ridgeline.aot import __main__ as command
from ridgeline.aot import archs, build, manifest, plan, verify
from ridgeline.compiler import entry, pack

ARCHS = ["sm_75", "sm_90a"]
OTHER = "probe/scale.cuh:scale<float, 4>"


@pytest.fixture(scope="module")
def kernels_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_kernels(tmp_path_factory.mktemp("kernels"))


@pytest.fixture
def library(kernels_dir: Path, tmp_path: Path) -> StandIn:
    rows = (core_row(), core_row(OTHER, dynamic_smem=1024))
    return StandIn(kernels_dir, tmp_path / "cache", core_table=rows)


def run_build(library: StandIn, out: Path, names: list[str] = ARCHS) -> build.Built:
    return build.build(library, names, out, say=lambda _: None)  # type: ignore[arg-type]


def run_verify(library: StandIn, out: Path, arch: str = "sm_75") -> list[str]:
    return verify.verify(library, out, arch)  # type: ignore[arg-type]


# The list of architectures


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (archs.DEFAULT_LIST, ["sm_75", "sm_80", "sm_86", "sm_89", "sm_90a"]),
        ("7.5;8.0", ["sm_75", "sm_80"]),
        ("8.0 7.5  8.0", ["sm_75", "sm_80"]),
        ("9.0", ["sm_90a"]),
        ("8.6, 9.0a", ["sm_86", "sm_90a"]),
    ],
)
def test_torch_list(text: str, expected: list[str]) -> None:
    said: list[str] = []
    assert archs.parse_torch_list(text, said.append) == expected
    assert not said


def test_torch_list_says_what_it_leaves_out() -> None:
    said: list[str] = []
    assert archs.parse_torch_list("8.0+PTX 12.0", said.append) == ["sm_80"]
    assert "8.0+PTX: packs hold machine code only" in said[0]
    assert "12.0: left out" in said[1]


@pytest.mark.parametrize("text", ["Hopper", "8", "sm_80", "12.0", ";"])
def test_torch_list_that_names_nothing_is_refused(text: str) -> None:
    with pytest.raises(archs.ArchError, match=re.escape(archs.DEFAULT_LIST)):
        archs.parse_torch_list(text, lambda _: None)


def test_arch_option() -> None:
    assert archs.parse_names(["75,sm_80", "9.0a"]) == ["sm_75", "sm_80", "sm_90a"]
    with pytest.raises(archs.ArchError, match="got '100'"):
        archs.parse_names(["100"])


# What belongs into a pack


def test_rows_are_chosen_by_sm_and_core() -> None:
    table = [
        core_row("a:always"),
        core_row("a:turing", max_sm=79),
        core_row("a:ampere", min_sm=80),
        core_row("a:rare", core=False),
    ]
    assert list(plan.core_kernels(table, "sm_75")) == ["a:always", "a:turing"]
    assert list(plan.core_kernels(table, "sm_90a")) == ["a:always", "a:ampere"]


def test_a_kernel_of_several_rows_needs_the_most_of_them() -> None:
    table = [core_row(dynamic_smem=10, block=32), core_row(dynamic_smem=5, block=64)]
    assert plan.core_kernels(table, "sm_80") == {KERNEL: plan.Need(dynamic_smem=10, block=64)}


SOUND = entry.unpack(made_entry(arch="sm_75"))


@pytest.mark.parametrize(
    ("found", "need", "expected"),
    [
        (SOUND, plan.Need(0, 128), ""),
        (SOUND, plan.Need((64 << 10) - 128, 128), ""),
        (SOUND, plan.Need((64 << 10) - 127, 128), "the limit is 65536"),
        (replace(SOUND, arch="sm_90a"), plan.Need(200 << 10, 128), ""),
        (replace(SOUND, arch="sm_86"), plan.Need(100 << 10, 128), "the limit is 101376"),
        (replace(SOUND, spill_stores=4), plan.Need(0, 128), "spills registers (4 bytes stored"),
        (replace(SOUND, spill_loads=8), plan.Need(0, 128), "spills registers"),
        (replace(SOUND, registers=65), plan.Need(0, 1024), "takes 73728 registers"),
        (replace(SOUND, kind="ptx", registers=-1), plan.Need(0, 128), "report is missing"),
    ],
)
def test_limits(found: entry.Entry, need: plan.Need, expected: str) -> None:
    reasons = plan.problems(found, need)
    assert bool(reasons) == bool(expected)
    assert expected in "".join(reasons)


# Build


def test_build_writes_packs_and_manifests(library: StandIn, tmp_path: Path) -> None:
    out = tmp_path / "packs"
    built = run_build(library, out)
    assert (built.num_kernels, built.num_compiled) == (4, 4)
    assert sorted(path.name for path in out.iterdir()) == [
        "sm_75.json",
        "sm_75.rlpack",
        "sm_90a.json",
        "sm_90a.rlpack",
    ]
    described = json.loads((out / "sm_75.json").read_text())
    assert [kernel["name"] for kernel in described["kernels"]] == [KERNEL, OTHER]
    first, second = described["kernels"]
    assert first["registers"] > 0
    assert first["static_smem"] == 128
    assert (first["dynamic_smem"], second["dynamic_smem"]) == (0, 1024)
    assert first["spill_stores"] == first["spill_loads"] == 0
    assert described["compiler"].startswith("nvrtc ")
    for arch in ARCHS:
        assert run_verify(library, out, arch) == []


def test_build_is_reproducible_and_incremental(
    library: StandIn, kernels_dir: Path, tmp_path: Path
) -> None:
    """The same bytes: from the cache, and compiled elsewhere, in another order."""
    run_build(library, tmp_path / "a")
    assert run_build(library, tmp_path / "b").num_compiled == 0
    elsewhere = tmp_path / "kernels"
    shutil.copytree(kernels_dir, elsewhere)
    other = StandIn(elsewhere, None, core_table=library.core_table[::-1])
    assert run_build(other, tmp_path / "c", ARCHS[::-1]).num_compiled == 4
    for path in (tmp_path / "a").iterdir():
        for folder in ("b", "c"):
            assert (tmp_path / folder / path.name).read_bytes() == path.read_bytes()


def test_changed_source_is_compiled_anew(library: StandIn, tmp_path: Path) -> None:
    library.kernels = write_kernels(tmp_path / "kernels")
    run_build(library, tmp_path / "packs", ["sm_75"])
    header = library.kernels / "common" / "factor.cuh"
    header.write_text(header.read_text().replace("2.0f", "5.0f"))
    (wrong, *_) = run_verify(library, tmp_path / "packs")
    assert "was built from other sources" in wrong
    assert run_build(library, tmp_path / "packs", ["sm_75"]).num_compiled == 2
    assert run_verify(library, tmp_path / "packs") == []


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        (core_row(dynamic_smem=64 << 10), "the limit is 65536"),
        (core_row("probe/broken.cuh:broken<float>"), "probe/broken.cuh:6: "),
        (core_row(block=8192), "registers, the limit is"),
    ],
    ids=["shared memory", "compile error", "registers"],
)
def test_failed_build_writes_nothing(
    library: StandIn, tmp_path: Path, row: object, expected: str
) -> None:
    library.core_table = (*library.core_table, row)  # type: ignore[assignment]
    with pytest.raises(build.BuildError) as caught:
        run_build(library, tmp_path / "packs", ["sm_75"])
    assert expected in str(caught.value)
    assert not (tmp_path / "packs").exists()


# Verify


@pytest.fixture
def packs(library: StandIn, tmp_path: Path) -> Path:
    """Return a folder with a sound pack of entries that no compiler made."""
    entries = [
        made_entry(name, "sm_75", library.entry_key(name, "sm_75")) for name in (KERNEL, OTHER)
    ]
    return write_pack(library, tmp_path / "packs", entries)


def write_pack(library: StandIn, folder: Path, entries: list[bytes]) -> Path:
    folder.mkdir(exist_ok=True)
    packed = pack.write(entries)
    needs = dict.fromkeys((entry.unpack(data).name for data in entries), plan.Need(0, 128))
    needs |= plan.core_kernels(library.core_table, "sm_75")
    described = manifest.describe("sm_75", library.compile_options(), packed, needs)
    manifest.pack_file(folder, "sm_75").write_bytes(packed)
    manifest.manifest_file(folder, "sm_75").write_bytes(manifest.to_bytes(described))
    return folder


def test_sound_pack_is_verified(library: StandIn, packs: Path) -> None:
    assert run_verify(library, packs) == []


@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        (lambda data: data[:10], "too few"),
        (lambda data: b"RLPACK00" + data[8:], "the magic is"),
        (lambda data: data[:8] + struct.pack("<I", 1 << 31) + data[12:], "index does not match"),
        (lambda data: data[:50] + b"z" + data[51:], "index does not match"),
        (lambda data: data[:-1] + bytes([data[-1] ^ 1]), "sha256 does not match"),
        (lambda data: data[:-1], "the entry has"),
    ],
    ids=["prefix", "magic", "index size", "index", "entry", "truncated"],
)
def test_damaged_pack_is_found(  # type: ignore[no-untyped-def]
    library: StandIn, packs: Path, damage, expected: str
) -> None:
    path = manifest.pack_file(packs, "sm_75")
    path.write_bytes(damage(path.read_bytes()))
    (wrong,) = run_verify(library, packs)
    assert str(path) in wrong
    assert expected in wrong


def test_missing_and_foreign_kernels_are_found(library: StandIn, packs: Path) -> None:
    library.core_table = (core_row(), core_row("probe/new.cuh:late<1>"))
    wrong = run_verify(library, packs)
    assert [f"kernel '{OTHER}' is not in the core table" in line for line in wrong] == [True, False]
    assert "kernel 'probe/new.cuh:late<1>' is missing" in wrong[1]


def test_spills_in_a_pack_are_found(library: StandIn, packs: Path) -> None:
    bad = replace(
        entry.unpack(made_entry(KERNEL, "sm_75", library.entry_key(KERNEL, "sm_75"))),
        spill_loads=16,
    )
    good = made_entry(OTHER, "sm_75", library.entry_key(OTHER, "sm_75"))
    write_pack(library, packs, [bad.pack(), good])
    (wrong,) = run_verify(library, packs)
    assert "spills registers" in wrong


def test_manifest_of_another_pack_is_found(library: StandIn, packs: Path) -> None:
    path = manifest.manifest_file(packs, "sm_75")
    path.write_text(path.read_text().replace('"registers": 32', '"registers": 31'))
    (wrong,) = run_verify(library, packs)
    assert "does not describe the pack beside it" in wrong
    path.unlink()
    assert "cannot be read" in run_verify(library, packs)[0]


def test_entries_lie_where_the_index_says(packs: Path) -> None:
    data = manifest.pack_file(packs, "sm_75").read_bytes()
    slots = pack.read_index(data)
    assert [slot.key for slot in slots] == sorted(slot.key for slot in slots)
    assert slots[-1].offset + slots[-1].size == len(data)


# The command, and the packs of the package


def test_command_reports_a_folder_without_packs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command.main(["verify", str(tmp_path)]) == 1
    assert "has no packs" in capsys.readouterr().err
    assert command.main(["list", str(tmp_path)]) == 1


def test_command_refuses_an_unknown_architecture(capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["build", "--arch", "sm_70"]) == 1
    assert "expected some of sm_75" in capsys.readouterr().err


def test_command_lists_a_pack(
    library: StandIn, packs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command.main(["list", str(packs)]) == 0
    printed = capsys.readouterr().out
    assert KERNEL in printed
    assert "2 kernels" in printed


@pytest.mark.parametrize("arch", archs.SMEM_LIMITS)
def test_packs_of_the_package_are_complete_and_sound(arch: str) -> None:
    folder = Path(ridgeline.__file__).parent / "packs"
    if not manifest.pack_file(folder, arch).is_file():
        pytest.skip("this installation was built without packs")
    assert verify.verify(compiler.library(), folder, arch) == []


@pytest.mark.parametrize("arch", archs.SMEM_LIMITS)
def test_core_kernels_of_every_sm_are_at_most_150_for_attention(arch: str) -> None:
    names = plan.core_kernels(compiler.library().core_table, arch)
    assert names
    assert sum(name.startswith("attention/") for name in names) <= 150
