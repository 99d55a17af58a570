"""The serving example: every token, the pool's pages, pauses, order, graphs."""

from __future__ import annotations

import doctest
import json
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import served as example
import torch
from ridgeline.demo import cli
from ridgeline.demo.generate import Sampler, generate
from ridgeline.demo.llama import Llama
from ridgeline.demo.model_folder import ModelFolder
from served import EXAMPLES, REQUESTS, STORY, PagePool, Request, run

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def folder() -> ModelFolder:
    return ModelFolder.find(str(EXAMPLES / "demo_model"))


@pytest.fixture(scope="module")
def model(folder: ModelFolder) -> Llama:
    return Llama.load(folder, torch.device("cpu"), torch.float32)


@pytest.fixture(scope="module")
def alone(model: Llama) -> dict[str, list[int]]:
    return {r.name: list(generate(model, r.prompt, r.max_tokens, Sampler())) for r in REQUESTS}


def test_served_tokens_are_those_of_each_request_alone(
    model: Llama, alone: dict[str, list[int]]
) -> None:
    served = run(model, REQUESTS)
    assert served.tokens == alone
    assert served.totals.num_mixed_steps > 0
    assert all(sequence.num_pauses == 0 for sequence in served.scheduler.sequences)
    assert served.clock.slept_until == [500.0]


def sampled(requests: list[Request]) -> list[Request]:
    """The same requests, drawn: with every setting, and one of them greedy among the others."""
    samplers = [
        Sampler(0.8, seed=7),
        Sampler(1.0, top_k=20, seed=-3),
        Sampler(0.9, top_p=0.9, seed=1 << 40),
        Sampler(),
        Sampler(1.2, min_p=0.1, seed=5),
        Sampler(0.7, top_k=50, top_p=0.95, min_p=0.02, seed=6),
        Sampler(0.8, seed=7),
    ]
    return [replace(r, sampler=s) for r, s in zip(requests, samplers, strict=True)]


@pytest.mark.parametrize("num_pages", [64, 19])
def test_draws_are_those_of_each_request_alone(
    model: Llama, alone: dict[str, list[int]], num_pages: int
) -> None:
    """Whatever else is in the batch, and however often a request is paused."""
    requests = sampled(REQUESTS)
    served = run(model, requests, num_pages=num_pages)
    for request in requests:
        drawn = list(generate(model, request.prompt, request.max_tokens, request.sampler))
        assert served.tokens[request.name] == drawn, request
    assert served.tokens["d"] == alone["d"]
    assert all(served.tokens[name] != alone[name] for name in "abef")
    # "g" has the prompt and the seed of "a".
    assert served.tokens["g"] == served.tokens["a"][:5]
    assert (sum(s.num_pauses for s in served.scheduler.sequences) > 0) == (num_pages == 19)
    assert run(model, requests, page_size=5, max_requests=2).tokens == served.tokens
    requests = [replace(r, sampler=replace(r.sampler, seed=9)) for r in requests]
    others = run(model, requests, num_pages=num_pages).tokens
    assert others["d"] == alone["d"]
    assert all(others[name] != served.tokens[name] for name in "abef")


@pytest.mark.parametrize("num_pages", [22, 19])
def test_a_full_pool_pauses_requests_and_loses_none(
    model: Llama, alone: dict[str, list[int]], num_pages: int
) -> None:
    """19 pages of 8 are what the longest request needs by itself."""
    longest = max(request.num_cached for request in REQUESTS)
    assert -(-longest // 8) == 19
    served = run(model, REQUESTS, num_pages=num_pages)
    assert served.tokens == alone
    assert sum(sequence.num_pauses for sequence in served.scheduler.sequences) > 0
    assert served.totals.most_used <= num_pages


@pytest.mark.parametrize(
    ("page_size", "max_requests", "max_batch_tokens"), [(1, 3, 4), (5, 1, 2), (16, 7, 512)]
)
def test_tokens_depend_on_no_setting(
    model: Llama,
    alone: dict[str, list[int]],
    page_size: int,
    max_requests: int,
    max_batch_tokens: int,
) -> None:
    num_pages = -(-200 // page_size)
    limits = {"max_requests": max_requests, "max_batch_tokens": max_batch_tokens}
    served = run(model, REQUESTS, num_pages=num_pages, page_size=page_size, **limits)
    assert served.tokens == alone


@pytest.mark.parametrize("page_size", [8, 16])
def test_prefixes_are_shared(model: Llama, alone: dict[str, list[int]], page_size: int) -> None:
    """While "a" decodes, "d" and "e" come with the same 69 bytes; "g" comes after its end."""
    requests = [replace(r, max_tokens=80) if r.name == "a" else r for r in REQUESTS]
    served = run(model, requests, page_size=page_size)
    full = len(STORY) // page_size
    for name in "de":
        assert served.sequence(name).num_reused == full * page_size
        assert served.tokens[name] == alone[name]
    # The last token is always computed, so a prompt of whole pages shares all but one.
    prompt = len(STORY) + 3
    assert served.sequence("g").num_reused == (prompt - 1) // page_size * page_size
    assert served.tokens["g"] == served.tokens["a"][:5]
    assert served.totals.most_shared == full
    for name in "abcf":
        assert served.sequence(name).num_reused == 0
    written = sum(request.max_tokens for request in requests)
    computed = sum(len(r.prompt) for r in requests) + written - len(requests)
    reused = sum(sequence.num_reused for sequence in served.scheduler.sequences)
    assert served.totals.num_computed == computed - reused


def test_first_come_first_served(model: Llama) -> None:
    """No request begins before one that came earlier, nor before it came."""
    served = run(model, REQUESTS, num_pages=19, max_requests=2)
    begins = [sequence.times[0] for sequence in served.scheduler.sequences]
    order = [sequence.request.name for progress in served.progress for sequence in progress.grown]
    firsts = list(dict.fromkeys(order))
    assert begins == sorted(begins)
    assert firsts == [request.name for request in REQUESTS]
    for sequence in served.scheduler.sequences:
        assert sequence.times[0] > sequence.request.arrival
        assert sequence.times == sorted(sequence.times)
        assert len(sequence.times) == sequence.request.max_tokens


def test_decodes_go_on_beside_a_long_prompt(model: Llama) -> None:
    requests = [Request("short", 0.0, b"Anne", 60), Request("long", 3.0, b"a long one " * 50, 2)]
    served = run(model, requests, num_pages=128, max_batch_tokens=32)
    steps = [{sequence.request.name for sequence in p.grown} for p in served.progress]
    assert served.totals.num_mixed_steps >= 550 // 31
    assert all("short" in names for names in steps[:60])


def test_pool_keeps_its_books() -> None:
    pool = PagePool(4, 2)
    pages = [pool.take() for _ in range(3)]
    first = pool.publish(example.pool.ROOT, (1, 2), pages[0])
    second = pool.publish(first, (3, 4), pages[1])
    assert pool.find([1, 2, 3, 4, 5]) == (pages[:2], second)
    assert pool.find([1, 2, 3, 4]) == (pages[:1], first)
    assert pool.find([3, 4, 5]) == ([], example.pool.ROOT)
    # Known already: the page that was there first stays.
    assert pool.publish(example.pool.ROOT, (1, 2), pages[2]) == first
    assert pool.find([1, 2, 9]) == ([pages[0]], first)
    pool.hold(pages[:2])
    assert pool.num_shared == 2
    pool.release(pages)
    assert (pool.num_free, pool.num_used, pool.num_shared) == (2, 2, 0)
    pool.release(pages[:2])
    assert pool.num_free == 4
    # A free page keeps its prefix until it is taken: those without one go first, then the ends.
    assert pool.find([1, 2, 3, 4, 5]) == (pages[:2], second)
    assert pool.num_unheld(pages[:2]) == 2
    assert [pool.take(), pool.take()] == [3, pages[2]]
    assert pool.take() == pages[1]
    assert pool.find([1, 2, 3, 4, 5]) == ([pages[0]], first)
    pool.hold([pages[0]])
    assert pool.num_free == 0


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["auto", "float32"])
@pytest.mark.parametrize("num_pages", [64, 19])
@pytest.mark.parametrize("is_sampled", [False, True])
def test_graphs_change_no_token(
    folder: ModelFolder, dtype: str, num_pages: int, is_sampled: bool
) -> None:
    """The same decisions with and without graphs, so the same bits; every token checked."""
    gpu = torch.device("cuda", 0)
    model = Llama.load(folder, gpu, cli.choose_dtype(dtype, gpu))
    requests = sampled(REQUESTS) if is_sampled else REQUESTS
    recorded = run(model, requests, num_pages=num_pages, use_graphs=True)
    eager = run(model, requests, num_pages=num_pages, use_graphs=False)
    assert recorded.runner.num_replays > 50
    assert eager.runner.num_replays == 0
    assert recorded.tokens == eager.tokens
    num_pauses = sum(sequence.num_pauses for sequence in recorded.scheduler.sequences)
    assert (num_pauses > 0) == (num_pages == 19)
    verdicts = example.check.check_all(folder, model, recorded.scheduler.sequences)
    assert [name for name, verdict in verdicts.items() if not verdict.ok] == [], verdicts


def write(path: Path, requests: list[Request]) -> Path:
    lines = [
        {"id": r.name, "arrival": r.arrival / 1000, "prompt": r.prompt.decode(),
         "max_tokens": r.max_tokens, **vars(r.sampler)}
        for r in requests
    ]  # fmt: skip
    path.write_text("\n\n".join(map(json.dumps, lines)) + "\n")
    return path


def test_runs_to_the_end(
    device: torch.device, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, out = tmp_path / "requests.jsonl", tmp_path / "results.jsonl"
    write(path, [*REQUESTS[:3:-1], *sampled(REQUESTS)[3::-1]])
    options = ["--device", device.type, "--pages", "19", "--page-size", "8", "--out", str(out)]
    assert example.script.main(["--requests", str(path), "--check", "--plain", *options]) == 0
    report = capsys.readouterr().out
    assert "7 requests, 207 tokens in" in report
    for name in ("time to first token", "time per output token", "prefix sharing", "pauses"):
        assert f"\n{name}" in report
    for name in ("complete", "alone", "transformers"):
        assert f"\n{name:<13}ok: " in report
    assert report.endswith("\nserve passed\n")
    results = [json.loads(line) for line in out.read_text().splitlines()]
    arrivals = {request.name: request.arrival for request in REQUESTS}
    assert [arrivals[result["id"]] for result in results] == sorted(arrivals.values())
    for result in results:
        assert bytes(result["tokens"]).decode(errors="replace") == result["text"]
        assert 0 < result["first_token"] <= result["done"]


def test_another_run_is_compared_with(
    device: torch.device, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, out = write(tmp_path / "requests.jsonl", sampled(REQUESTS)), tmp_path / "results.jsonl"
    common = ["--requests", str(path), "--plain", "--device", device.type, "--dtype", "float32"]
    assert example.script.main([*common, "--out", str(out)]) == 0
    assert "passed" not in capsys.readouterr().out
    comparison = ["--compare", str(out)]
    assert example.script.main([*common, "--page-size", "8", *comparison]) == 0
    report = capsys.readouterr().out
    if device.type == "cpu":
        assert "\ncompared     ok: 207 of 207 tokens equal\n\nserve passed\n" in report
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    for line in lines:
        if line["id"] == "f":
            line["tokens"][0] ^= 3
    out.write_text("\n".join(map(json.dumps, lines)))
    assert example.script.main([*common, *comparison]) == 1
    report = capsys.readouterr().out
    assert "compared     FAILED: request f, token 0: " in report
    assert report.endswith("serve FAILED: compared\n")


def test_shipped_requests_give_the_shipped_tokens(
    device: torch.device, capsys: pytest.CaptureFixture[str]
) -> None:
    """Those of a CPU, in float32; on a GPU with CUDA graphs, and attention in float16."""
    options = ["--device", device.type, "--dtype", "float32", "--plain"]
    assert example.script.main([*options, "--compare", str(EXAMPLES / "serve_tokens.jsonl")]) == 0
    report = capsys.readouterr().out
    assert "\ncompared     ok: 2184 of 2184 tokens equal\n" in report
    if device.type == "cuda":
        assert " 0 as CUDA graphs" not in report


def test_texts_part_where_rounding_decides(folder: ModelFolder, model: Llama) -> None:
    """A run in bfloat16 against one in float32, greedy and drawn."""
    requests = [replace(r, name=r.name * 2) for r in sampled(REQUESTS)] + REQUESTS
    limits = {"max_requests": 16, "max_batch_tokens": 300, "num_pages": 200}
    others = run(model, requests, **limits).tokens
    rounded = Llama.load(folder, torch.device("cpu"), torch.bfloat16)
    served = run(rounded, requests, **limits).scheduler.sequences
    verdict = example.check.check_compared(others, folder, rounded, served)
    assert verdict.ok, verdict.text
    num_tokens = sum(request.max_tokens for request in requests)
    assert f" of {num_tokens} tokens equal" in verdict.text
    # By its own rounding a run in float32 cannot explain what bfloat16 wrote.
    theirs = {sequence.request.name: sequence.written for sequence in served}
    assert theirs != others
    exact = run(model, requests, **limits).scheduler.sequences
    assert not example.check.check_compared(theirs, folder, model, exact).ok


def test_shipped_requests(folder: ModelFolder) -> None:
    requests = example.requests.read_requests(EXAMPLES / "serve_requests.jsonl")
    num_drawn = sum(request.sampler.temperature > 0 for request in requests)
    assert 4 <= num_drawn <= len(requests) // 2
    assert len(requests) >= 20
    assert all(len(r.prompt) + r.max_tokens <= folder.config.context for r in requests)
    prefixes = [request.prompt[:300] for request in requests if len(request.prompt) > 300]
    assert max(prefixes.count(prefix) for prefix in prefixes) >= 5


def test_a_wrong_token_fails_the_check(folder: ModelFolder, model: Llama) -> None:
    served = run(model, REQUESTS[1:3])
    sequence = served.sequence("b")
    sequence.tokens[-1] ^= 1
    verdicts = example.check.check_all(folder, model, served.scheduler.sequences)
    assert verdicts["complete"].ok
    for name in ("alone", "transformers"):
        assert not verdicts[name].ok
        assert verdicts[name].text.startswith("request b: token 59 is")
    sequence.tokens.pop()
    text = example.check.check_complete(served.scheduler.sequences).text
    assert text == "request b has 59 of 60 tokens"


def test_16_bit_tokens_equal_up_to_ties(folder: ModelFolder) -> None:
    model = Llama.load(folder, torch.device("cpu"), torch.bfloat16)
    served = run(model, REQUESTS, num_pages=19)
    verdicts = example.check.check_all(folder, model, served.scheduler.sequences)
    assert all(verdict.ok for verdict in verdicts.values()), verdicts
    served.sequence("b").tokens[30] = 0
    verdicts = example.check.check_all(folder, model, served.scheduler.sequences)
    assert not verdicts["alone"].ok
    assert not verdicts["transformers"].ok


class Terminal:
    """Takes text as a terminal does."""

    encoding = "utf-8"

    def __init__(self) -> None:
        self.text = ""

    def write(self, text: str) -> int:
        self.text += text
        return len(text)

    def flush(self) -> None:
        pass

    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(
    "kind", [example.display.PlainLines, example.display.LiveTable], ids=lambda kind: kind.__name__
)
def test_displays_stream_every_text(model: Llama, kind: Any) -> None:
    if kind is example.display.LiveTable:
        pytest.importorskip("rich")
    requests = [Request("one", 0.0, b"Anne", 100), Request("[two]", 1.0, b"The whale", 30)]
    runner = example.Runner(model, 32, 8, 2, 40, use_graphs=False)
    scheduler = example.Scheduler(requests, PagePool(32, 8), 2, 40)
    terminal = Terminal()
    display = kind(scheduler, terminal)
    for progress in example.serve(scheduler, runner, example.Totals(), example.Steps()):
        display.show(progress)
    display.close()
    if kind is example.display.LiveTable:
        assert "2 of 2 done, 0 running, 0 waiting" in terminal.text
        for sequence in scheduler.sequences:
            text = bytes(sequence.written[:40]).decode()
            assert f"{sequence.request.name}  {text}" in terminal.text
        return
    assert "2 of 2 done" in terminal.text or "1 of 2 done" in terminal.text
    for sequence in scheduler.sequences:
        name = sequence.request.name
        parts = [line[18:] for line in terminal.text.split("\n") if line[11:16].strip() == name]
        text = bytes(sequence.written).decode(errors="replace").replace("\n", " ")
        assert "".join(parts) == text + " [done]"


@pytest.mark.parametrize("module", [example.pool, example.summary], ids=lambda m: m.__name__)
def test_docstrings(module: ModuleType) -> None:
    result = doctest.testmod(module)
    assert result.failed == 0 < result.attempted


def test_percentiles() -> None:
    assert example.summary.percentiles([5.0, 1.0, 2.0]) == pytest.approx((2.0, 4.7))
    assert example.summary.percentiles([0.25]) == (0.25, 0.25)
