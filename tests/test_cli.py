"""`python -m ridgeline doctor | kernels | warmup`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from kernel_fixtures import made_entry
from ridgeline import cli, compiler, doctor
from ridgeline.compiler import cache, pack, toolchain

RMSNORM = "norm/rmsnorm.cuh:rmsnorm<__half, __half, 8>"


def run_cli(*words: str, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "ridgeline", *words],
        env={**os.environ, **env},
        capture_output=True,
        text=True,
    )


def subjects(findings: list[doctor.Finding]) -> dict[str, doctor.Finding]:
    return {finding.subject: finding for finding in findings}


def test_doctor_looks_at_everything() -> None:
    found = subjects(doctor.diagnose())
    assert {"versions", "library", "driver", "NVRTC", "cache"} <= set(found)
    assert found["NVRTC"].state == "ok", found["NVRTC"]
    assert found["library"].state == "ok"


def test_doctor_says_what_is_wrong_with_a_pack_and_a_cache(tmp_path: Path) -> None:
    (tmp_path / "sm_80.rlpack").write_bytes(b"RLPACK01 but no pack")
    (tmp_path / "file").touch()
    result = run_cli(
        "doctor",
        RIDGELINE_PACK_DIR=str(tmp_path),
        RIDGELINE_CACHE_DIR=str(tmp_path / "file" / "cache"),
    )
    assert result.returncode == 1, result.stdout
    assert "2 wrong" in result.stdout
    assert str(tmp_path / "sm_80.rlpack") in result.stdout
    assert "-> reinstall ridgeline" in result.stdout
    assert "-> set RIDGELINE_CACHE_DIR" in result.stdout


DRIVER = {"driver_version": 12040, "error": "", "devices": []}
GPU = {"index": 0, "name": "GPU", "sm": 90, "arch": "sm_90a", "pack": "", "error": ""}


@pytest.mark.parametrize(
    ("changes", "states"),
    [
        ({"pack": "sm_90a"}, ["ok"]),
        ({}, ["note"]),
        ({"sm": 70, "arch": "sm_70"}, ["wrong"]),
        ({"error": "pack is damaged"}, ["wrong"]),
    ],
)
def test_doctor_on_gpus(changes: dict[str, object], states: list[str]) -> None:
    findings = list(doctor._gpus({**DRIVER, "devices": [{**GPU, **changes}]}))
    assert [finding.state for finding in findings] == states


def test_doctor_finds_a_driver_that_fails() -> None:
    finding = doctor._driver({**DRIVER, "error": "the driver is too old"})
    assert finding.state == "wrong"
    assert "525" in finding.way_out


def test_doctor_without_nvrtc(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing() -> None:
        raise toolchain.CompilerMissingError("no NVRTC. Install it: pip install nvrtc")

    monkeypatch.setattr(toolchain, "load", missing)
    without_gpu = doctor._nvrtc(compiler.library(), has_gpu=False)
    with_gpu = doctor._nvrtc(compiler.library(), has_gpu=True)
    assert (without_gpu.state, with_gpu.state) == ("note", "wrong")
    assert "pip install nvrtc" in with_gpu.way_out


def test_kernels_lists_packs_and_cache(tmp_path: Path) -> None:
    packs, folder = tmp_path / "packs", tmp_path / "cache"
    cache.write_atomically(packs / "sm_80.rlpack", pack.write([made_entry(RMSNORM)]))
    store = cache.Cache(folder, "nvrtc_1")
    cached = made_entry(RMSNORM.replace("8", "1"))
    store.write("sm_80", "1" * 64, cached)
    store.write("sm_80", "2" * 64, cached[:-1])
    result = run_cli("kernels", RIDGELINE_PACK_DIR=str(packs), RIDGELINE_CACHE_DIR=str(folder))
    assert result.returncode == 0, result.stderr
    assert RMSNORM in result.stdout
    assert RMSNORM.replace("8", "1") in result.stdout
    assert "(of other sources)" in result.stdout
    assert "damaged, will be compiled anew: 2222" in result.stdout


def test_kernels_without_any(tmp_path: Path) -> None:
    result = run_cli("kernels", RIDGELINE_PACK_DIR="", RIDGELINE_CACHE_DIR=str(tmp_path))
    assert result.returncode == 0
    assert "no kernels yet" in result.stdout


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["warmup"], "expected a model or --kernel"),
        (["warmup", "no/such/folder"], "is neither a config.json"),
        (["warmup", "num_qo_heads=8", "--arch", "sm_80"], "Add head_dim"),
        (["warmup", "a.json", "b.json"], "expected one config.json"),
        (["warmup", "--kernel", "norm/none.cuh:none<1>", "--arch", "sm_80"], "norm/none.cuh"),
    ],
)
def test_mistakes_get_one_line(
    words: list[str], expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(words) == 1
    printed = capsys.readouterr().err
    assert printed.startswith("error: ")
    assert expected in printed


def test_warmup_compiles_a_kernel(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["warmup", "--kernel", RMSNORM, "--arch", "sm_80"]) == 0
    assert "1 kernels for sm_80" in capsys.readouterr().out


def test_description_of_a_model(tmp_path: Path) -> None:
    assert cli._described(["num_qo_heads=8", "dtype=float16", "interleave=True"]) == {
        "num_qo_heads": 8,
        "dtype": "float16",
        "interleave": True,
    }
    (tmp_path / "config.json").write_text(json.dumps({"hidden_size": 256}))
    assert cli._described([str(tmp_path)]).hidden_size == 256
