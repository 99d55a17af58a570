"""What the serving example refuses: each with one line that says what to do."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import pytest
from ridgeline.demo import check
from ridgeline.demo.model_folder import DemoError
from served import EXAMPLES, REQUESTS, PagePool, Scheduler, script

GOOD = '{"arrival": 0, "prompt": "She", "max_tokens": 3}'


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (None, "does not exist"),
        ("", "holds no request"),
        ("\n \n", "holds no request"),
        (b"\xff\xfe\x00", "cannot be read"),
        (f"{GOOD}\n{{", "line 2 is not JSON"),
        (f"{GOOD}\n\n[1]", "line 3 is not a JSON object"),
        ('{"prompt": "She", "max_tokens": 3}', "line 1 has no 'arrival'"),
        ('{"arrival": 0, "prompt": "She"}', "line 1 has no 'max_tokens'"),
        ('{"arrival": "soon", "prompt": "She", "max_tokens": 3}', "expected a number of seconds"),
        ('{"arrival": -1, "prompt": "She", "max_tokens": 3}', "expected 0 seconds or more"),
        ('{"arrival": NaN, "prompt": "She", "max_tokens": 3}', "expected 0 seconds or more"),
        ('{"arrival": 0, "prompt": 7, "max_tokens": 3}', "prompt is 7; expected a text"),
        ('{"arrival": 0, "prompt": "", "max_tokens": 3}', "prompt is empty"),
        ('{"arrival": 0, "prompt": "She", "max_tokens": 0}', "expected at least 1"),
        ('{"arrival": 0, "prompt": "She", "max_tokens": 2.5}', "expected a whole number"),
        ('{"arrival": 0, "prompt": "She", "max_tokens": true}', "expected a whole number"),
        ('{"arrival": 0, "prompt": "She", "max_tokens": 3, "id": 4}', "id is 4; expected a text"),
        ('{"arrival": 0, "prompt": "She", "max_token": 3}', "unknown key 'max_token'"),
        (f'{GOOD[:-1]}, "temperature": -1}}', "temperature is -1; expected 0 (greedy) or more"),
        (f'{GOOD[:-1]}, "temperature": "hot"}}', "temperature is 'hot'; expected a number"),
        (f'{GOOD[:-1]}, "top_k": 2.5}}', "top_k is 2.5; expected a whole number"),
        (f'{GOOD[:-1]}, "top_p": 2}}', "top_p is 2; expected 0 to 1 (off)"),
        (f'{GOOD[:-1]}, "min_p": NaN}}', "min_p is nan; expected 0 (off) to 1"),
        (f'{GOOD[:-1]}, "seed": {2**63}}}', "expected a whole number of 64 bits"),
        ('{"arrival": 0, "prompt": "She", "max_tokens": 1022}', "more than the model's context"),
        ('{"arrival": 0, "prompt": "She", "max_tokens": 1000}', "pass --pages 63 or more"),
        (f'{GOOD[:-1]}, "id": "r02"}}\n{GOOD}', "2 requests have the id 'r02'"),
    ],
    ids=lambda value: str(value)[-50:],
)
def test_wrong_requests_are_one_clear_line(
    tmp_path: Path,
    content: str | bytes | None,
    problem: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = tmp_path / "requests.jsonl"
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    assert_one_line(["--requests", str(path), "--pages", "62"], problem, capsys)


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["--requests", str(EXAMPLES)], "is no file"),
        (["--model", "no/such/folder"], "does not exist"),
        (["--pages", "0"], "--pages 0: expected at least 1"),
        (["--pages", "3"], "pages of 16 tokens, and the pool has 3"),
        (["--pages", "10000000000"], "the pool would take"),
        (["--page-size", "-1"], "--page-size -1: expected at least 1"),
        (["--max-requests", "256"], "expected more than --max-requests 256"),
        (["--graphs", "on"], "CUDA graphs need a GPU"),
        (["--graphs", "maybe"], "expected auto, on or off"),
        (["--dtype", "int4"], "expected auto, float32"),
        (["--out", str(EXAMPLES)], "is a folder"),
        (["--out", "no/such/folder/results"], "there is no folder no/such/folder"),
        (["--compare", "no/such/file"], "expected a file that --out wrote (FileNotFoundError"),
        (["--compare", __file__], "expected a file that --out wrote (JSONDecodeError"),
        (["--compare", os.devnull], "expected 120 tokens of request r01, found 0"),
        (["--colour", "red"], "`python examples/serve.py --help` lists the options"),
    ],
    ids=lambda value: " ".join(value)[-30:] if isinstance(value, list) else "",
)
def test_wrong_options_are_one_clear_line(
    arguments: list[str], problem: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert_one_line(arguments, problem, capsys)


def assert_one_line(arguments: list[str], problem: str, capsys: Any) -> None:
    assert script.main(["--device", "cpu", *arguments]) == 2
    shown = capsys.readouterr().err
    assert shown.startswith("error: ")
    assert shown.count("\n") == 1
    assert problem in shown


def test_check_says_that_transformers_is_missing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    assert_one_line(["--check"], "or leave --check out", capsys)
    with pytest.raises(DemoError, match="or pass --no-check"):
        check.require_transformers()


def test_a_pool_too_small_for_a_request_is_refused() -> None:
    """It would wait for ever."""
    with pytest.raises(DemoError, match="request e: .* need 19 pages of 8 tokens"):
        Scheduler(REQUESTS, PagePool(18, 8), 6, 40)
