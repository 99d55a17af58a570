"""The counters of the tuner, read from what Nsight Compute printed on an H200, in fewer columns."""

from __future__ import annotations

import os
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parent.parent
STALLS = {
    "barrier": ("0.20", "0.34"),
    "dispatch_stall": ("0.32", "0.29"),
    "long_scoreboard": ("0.22", "0.41"),
    "math_pipe_throttle": ("0.87", "0.62"),
    "mio_throttle": ("0.06", "0.05"),
    "not_selected": ("0.35", "0.33"),
    "short_scoreboard": ("0.52", "0.57"),
    "wait": ("1.71", "1.58"),
}
SHARED_MEMORY = "l1tex__data_pipe_lsu_wavefronts_mem_shared.sum.pct_of_peak_sustained_elapsed"
# Name, unit, and the values of two launches.
COLUMNS = (
    ("ID", "", "0", "1"),
    ("gpu__time_duration.sum", "ns", "1,411,264", "213,952"),
    ("dram__throughput.avg.pct_of_peak_sustained_elapsed", "%", "17.50", "25.30"),
    (SHARED_MEMORY, "%", "53.05", "48.72"),
    ("sm__pipe_tensor_cycles_active.avg.pct_of_peak_sustained_active", "%", "62.38", "53.69"),
    *(
        (f"smsp__average_warps_issue_stalled_{name}_per_issue_active.ratio", "inst", *values)
        for name, values in STALLS.items()
    ),
    ("smsp__issue_active.avg.pct_of_peak_sustained_active", "%", "36.74", "36.76"),
)
PRINTED = "\n".join(
    [
        "==PROF== Connected to process 890 (/usr/bin/python3.12)",
        "a line of the program's",
        '==PROF== Profiling "batch_attention": 0%....50%....100% - 5 passes',
        "==PROF== Disconnected from process 890",
        *(",".join(f'"{value}"' for value in row) for row in zip(*COLUMNS, strict=True)),
    ]
)


@pytest.fixture
def counters(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    if not (ROOT / "benchmarks").is_dir():
        pytest.skip("the tests run without the checkout's benchmarks")
    monkeypatch.syspath_prepend(str(ROOT))
    from benchmarks import tune_counters

    return tune_counters


def program(folder: Path, monkeypatch: pytest.MonkeyPatch, script: str) -> None:
    """Put an ncu of ours on the PATH."""
    path = folder / "ncu"
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}/bin{os.pathsep}/usr/bin")


def test_every_launch_is_read(counters: ModuleType) -> None:
    first, second = counters.parse(PRINTED)
    assert first["tensor pipe"] == 62.38
    assert second["wait"] == 1.58
    assert set(first) == {*counters.PIPES, *counters.STALLS}


def test_description_names_the_longest_waits(counters: ModuleType) -> None:
    line = counters.describe(counters.parse(PRINTED)[0])
    assert line.startswith("tensor pipe 62%, issue slots 37%, shared memory 53%, DRAM 18%")
    assert line.endswith("wait 1.71, math_pipe_throttle 0.87, short_scoreboard 0.52")


def test_large_numbers_have_commas(counters: ModuleType) -> None:
    text = PRINTED.replace('"62.38"', '"1,062.5"')
    assert counters.parse(text)[0]["tensor pipe"] == 1062.5


def test_no_launch_is_no_row(counters: ModuleType) -> None:
    assert counters.parse("==WARNING== No kernels were profiled.\n") == []


def test_program_is_run(
    counters: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "printed").write_text(PRINTED)
    program(tmp_path, monkeypatch, f'cat {tmp_path}/printed; echo "$VALUE $@" > {tmp_path}/asked')
    assert len(counters.count(["python", "x.py"], "batch_attention", {"VALUE": "7"}, ROOT)) == 2
    asked = (tmp_path / "asked").read_text().split()
    assert asked[0] == "7"
    assert asked[-2:] == ["python", "x.py"]
    assert "regex:batch_attention" in asked


def test_failures_say_why(
    counters: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(counters.CountersError, match="no ncu on the PATH"):
        counters.count(["python"], "batch_attention", {}, ROOT)
    program(tmp_path, monkeypatch, 'echo "==ERROR== no permission for the counters"; exit 1')
    with pytest.raises(counters.CountersError, match="ended with 1: .*no permission"):
        counters.count(["python"], "batch_attention", {}, ROOT)
    program(tmp_path, monkeypatch, "exit 0")
    with pytest.raises(counters.CountersError, match="no launch"):
        counters.count(["python"], "batch_attention", {}, ROOT)
