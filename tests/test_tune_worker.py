"""The tuner's candidates take turns, and one that fails does not stop the others."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parent.parent
# Answers as a candidate's process does, and notes when it had its turns.
SCRIPT = """
import json, sys, time
print(json.dumps({"kernels": []}), flush=True)
for line in sys.stdin:
    told = json.loads(line)
    if "case" in told and told["case"] == FAILS:
        sys.exit("no such case")
    if "turn" in told:
        with open(LOG, "a") as log:
            print(NAME, told["turn"], file=log)
    us = [US + told.get("turn", 0)]
    print(json.dumps({"error": 0.5, "us": us} if "turn" in told else {"error": 0.5}), flush=True)
"""


@pytest.fixture
def tune_worker(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    if not (ROOT / "benchmarks").is_dir():
        pytest.skip("the tests run without the checkout's benchmarks")
    monkeypatch.syspath_prepend(str(ROOT))
    from benchmarks import tune_worker

    return tune_worker


def test_candidates_take_turns(tune_worker: ModuleType, tmp_path: Path) -> None:
    from benchmarks.tune_candidates import GROUPS, Candidate

    group = "prefill 64"
    cases = GROUPS[group].cases
    log = tmp_path / "log"

    def worker(name: str, us: int, fails: str = "") -> tuple[Candidate, object]:
        values = f"NAME, US, FAILS, LOG = {name!r}, {us}, {fails!r}, {str(log)!r}"
        command = [sys.executable, "-c", f"{values}\n{SCRIPT}"]
        return Candidate(name, group, "a test"), tune_worker.Worker(command, os.environ, tmp_path)

    workers = dict([worker("a", 10), worker("b", 20, fails=cases[1]), worker("c", 30)])
    found = {candidate.name: result for candidate, result in tune_worker.in_turns(workers).items()}

    assert found["b"] == {"error": "no such case"}
    middle = (tune_worker.TURNS - 1) / 2
    for name, us in (("a", 10), ("c", 30)):
        expected = {"error": 0.5, "us": us + middle}
        assert found[name] == {"kernels": [], "cases": dict.fromkeys(cases, expected)}
    turns = [line.split() for line in log.read_text().splitlines()]
    first = [[name, str(turn)] for turn in range(tune_worker.TURNS) for name in "abc"]
    others = [[name, str(turn)] for turn in range(tune_worker.TURNS) for name in "ac"]
    assert turns == first + others * (len(cases) - 1)
