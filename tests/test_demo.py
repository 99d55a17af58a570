"""The demo: its model against transformers, its stream, its checks, its errors."""

from __future__ import annotations

import io
import json
import math
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from ridgeline.demo import check, cli, main
from ridgeline.demo.generate import Sampler, Utf8Stream, WordWrap, generate
from ridgeline.demo.llama import Llama
from ridgeline.demo.model_folder import ModelFolder

pytestmark = pytest.mark.usefixtures("one_thread")

# num_heads, num_kv_heads, head_dim, layers, tied
SHAPES = [(2, 1, 64, 2, True), (6, 2, 40, 2, False), (5, 5, 48, 1, True), (8, 1, 96, 1, False)]


@pytest.fixture(scope="module")
def model_path(repository: Path) -> Path:
    return repository / "examples" / "demo_model"


@pytest.fixture(scope="module")
def folder(model_path: Path) -> ModelFolder:
    return ModelFolder.find(str(model_path))


def dtype_of(device: torch.device) -> torch.dtype:
    return cli.choose_dtype("auto", device)


def random_llama(path: Path, seed: int, shape: tuple[int, int, int, int, bool]) -> Any:
    """Save a Llama of random weights, made by transformers, and return it."""
    num_heads, num_kv_heads, head_dim, num_layers, tied = shape
    torch.manual_seed(seed)
    config = transformers.LlamaConfig(
        vocab_size=256,
        hidden_size=120,
        intermediate_size=160,
        num_hidden_layers=num_layers,
        num_attention_heads=num_heads,
        num_key_value_heads=num_kv_heads,
        head_dim=head_dim,
        max_position_embeddings=128,
        rms_norm_eps=1e-5,
        tie_word_embeddings=tied,
        rope_theta=5000.0,
        initializer_range=0.2,
    )
    model = transformers.LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "norm" in name:
                weight.uniform_(0.5, 1.5)
    model.save_pretrained(path)
    return model


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_logits_are_those_of_transformers(
    tmp_path: Path, seed: int, shape: tuple[int, int, int, int, bool]
) -> None:
    """Prefill, prefill on top of a cache, and decode, in float32 on the CPU.

    Both round, so what float32 loses is measured: ours may be off the float64 logits by twice what
    transformers' are, as a root mean square. A single logit can be off by ten times as much.
    """
    reference = random_llama(tmp_path, seed, shape)
    model = Llama.load(ModelFolder(tmp_path), torch.device("cpu"), torch.float32)
    tokens = torch.randint(256, (60,))
    with torch.no_grad():
        theirs = reference(tokens[None]).logits[0]
        exact = reference.double()(tokens[None]).logits[0]
    cache = model.new_cache()
    chunks = [tokens[:40], tokens[40:50], *tokens[50:].split(1)]
    logits = torch.cat([model.forward(chunk, cache) for chunk in chunks])
    assert cache.length == 60
    assert logits.dtype == torch.float32

    def error(of: torch.Tensor) -> float:
        return float((of - exact).square().mean().sqrt())

    assert error(logits) <= 2 * error(theirs)


def test_greedy_tokens_equal_those_of_transformers(folder: ModelFolder) -> None:
    model = Llama.load(folder, torch.device("cpu"), torch.float32)
    prompt = b"It was a dark night at sea; "
    ours = list(generate(model, prompt, 64, Sampler()))
    verdict = check.compare_tokens(folder, model, prompt, ours)
    assert verdict == check.Verdict(True, "64 of 64 greedy tokens equal")

    wrong = [*ours[:20], (ours[20] + 1) % 256, *ours[21:]]
    verdict = check.compare_tokens(folder, model, prompt, wrong)
    assert not verdict.ok
    assert verdict.text.startswith("token 20 is")


def test_16_bit_tokens_equal_up_to_ties(folder: ModelFolder, device: torch.device) -> None:
    dtype = torch.bfloat16 if device.type == "cpu" else dtype_of(device)
    model = Llama.load(folder, device, dtype)
    prompt = b"It was a dark night at sea; "
    ours = list(generate(model, prompt, 64, Sampler()))
    assert check.compare_tokens(folder, model, prompt, ours).ok

    wrong = [*ours[:20], 0, *ours[21:]]
    verdict = check.compare_tokens(folder, model, prompt, wrong)
    assert not verdict.ok
    assert verdict.text.startswith("token 20 is 0 here")


def test_a_tie_is_what_the_dtype_cannot_resolve() -> None:
    exact = torch.tensor([[1.0, 0.9, -3.0]])
    rounded = torch.tensor([[0.94, 0.96, -3.0]])
    assert check.judge_tied(torch.tensor([1]), exact, rounded).text == "1 of 1 greedy tokens equal"
    tied = check.judge_tied(torch.tensor([0]), exact, rounded)
    assert tied.ok
    assert tied.text == "0 of 1 greedy tokens equal, 1 tied within the dtype"
    assert not check.judge_tied(torch.tensor([2]), exact, rounded).ok
    assert not check.judge_tied(torch.tensor([1]), exact, exact).ok
    assert not check.judge_tied(torch.tensor([1]), exact, exact * math.nan).ok


def test_a_draw_is_tied_where_rounding_moves_it(rng: torch.Generator) -> None:
    """Draws from logits within the error are explained, every one, and few others."""
    error = 0.05
    exact = 3 * torch.randn(2000, 64, generator=rng)
    rounded, served = (
        exact + share * error * (2 * torch.rand(2000, 64, generator=rng) - 1) for share in (1, 0.8)
    )
    for sampler in (Sampler(), Sampler(1.0, seed=3), Sampler(0.7, top_p=0.9, seed=4)):
        ours, theirs = sampler(served, 0), sampler(rounded, 0)
        parted = (ours != theirs).nonzero()[:, 0].tolist()
        assert 5 < len(parted) < 250
        # A filter's end may move too, which the search does not follow.
        unfiltered = sampler.top_p == 1
        explained = [
            check.could_choose(sampler, at, int(ours[at]), exact[at], error) for at in parted
        ]
        assert sum(explained) >= (len(parted) if unfiltered else 0.9 * len(parted))
        strangers = [
            check.could_choose(sampler, at, (int(theirs[at]) + 1) % 64, exact[at], error)
            for at in range(40)
        ]
        assert sum(strangers) < 20
    sampler = Sampler(1.0, seed=3)
    ours = sampler(served[:100], 0)
    assert check.judge_tied(ours, exact[:100], rounded[:100], "there", sampler).ok
    wrong = Sampler(1.0, seed=5)(exact, 0)
    verdict = check.judge_tied(wrong, exact, rounded, "there", sampler)
    assert not verdict.ok
    assert verdict.text.startswith("token ")


def test_runs_to_the_end(
    model_path: Path, device: torch.device, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--model", str(model_path), "--device", device.type, "--tokens", "400"]
    assert main([*arguments, "--prompt", "Emma was sure that"]) == 0
    report = capsys.readouterr().out
    assert "\nEmma was sure that" in report
    assert "prefill" in report
    assert "decode" in report
    assert "tokens/s" in report
    stated = json.loads((model_path / "training.json").read_text())["heldout_bits_per_byte"]
    assert f"held-out     ok: {stated:.3f} bits per byte" in report
    assert "generated words occur in the corpus" in report
    assert "transformers ok: " in report
    assert report.endswith("\ndemo passed\n")


def test_a_failed_check_fails_the_demo(
    model_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = tmp_path / "model"
    shutil.copytree(model_path, copy)
    (copy / "words.txt.gz").write_bytes(b"")
    options = ["--tokens", "150", "--temperature", "0", "--device", "cpu"]
    assert main(["--model", str(copy), *options]) == 1
    report = capsys.readouterr().out
    assert "words        FAILED: 0.0%" in report
    assert report.endswith("demo FAILED: words\n")


def test_no_check_needs_no_transformers(
    model_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    arguments = ["--model", str(model_path), "--tokens", "3", "--device", "cpu"]
    assert main([*arguments, "--no-check"]) == 0
    assert "tokens/s" in capsys.readouterr().out
    assert main(arguments) == 2
    assert "pip install 'ridgeline[demo]'" in capsys.readouterr().err


def test_missing_safetensors(
    model_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "safetensors", None)
    assert main(["--model", str(model_path), "--device", "cpu", "--no-check"]) == 2
    assert "pip install 'ridgeline[demo]'" in capsys.readouterr().err


def test_seed_repeats_the_text(
    model_path: Path, device: torch.device, capsys: pytest.CaptureFixture[str]
) -> None:
    def text(*options: str) -> str:
        arguments = ["--model", str(model_path), "--tokens", "60", "--device", device.type]
        assert main([*arguments, "--no-check", *options]) == 0
        return capsys.readouterr().out.split("\nprefill")[0]

    for filters in ([], ["--top-k", "30", "--top-p", "0.9"], ["--min-p", "0.05"]):
        first = text("--seed", "7", "--temperature", "0.8", *filters)
        assert text("--seed", "7", "--temperature", "0.8", *filters) == first
        assert text("--seed", "8", "--temperature", "0.8", *filters) != first
    greedy = text("--temperature", "0", "--seed", "1")
    assert text("--temperature", "0", "--seed", "2") == greedy
    assert text("--top-k", "1", "--temperature", "0.8", "--seed", "3") == greedy


def test_a_draw_depends_on_its_own_row_only(device: torch.device, rng: torch.Generator) -> None:
    """Not on the rows beside it, nor on what was drawn before."""
    logits = (3 * torch.randn(64, 256, generator=rng)).to(device)
    sampler = Sampler(0.8, top_k=50, top_p=0.95, seed=-5)
    drawn = sampler(logits, 100)
    for place in (0, 17, 63):
        assert int(sampler(logits[place, None], 100 + place)) == int(drawn[place])
    again = sampler.at(logits.flip(0), torch.arange(163, 99, -1, device=device))
    assert torch.equal(again, drawn.flip(0))
    assert not torch.equal(Sampler(0.8, top_k=50, top_p=0.95, seed=6)(logits, 100), drawn)
    assert torch.equal(Sampler()(logits, 100).long(), logits.argmax(dim=1))


@pytest.mark.gpu
def test_float32_on_a_gpu_gives_the_tokens_of_the_cpu(folder: ModelFolder) -> None:
    """All but attention is float32, so every token here is decided by more than rounding."""
    model, on_cpu = (
        Llama.load(folder, torch.device(name), torch.float32) for name in ("cuda", "cpu")
    )
    assert (model.cache_dtype, on_cpu.cache_dtype) == (torch.float16, torch.float32)
    prompt = b"It was a dark night at sea; "
    ours = list(generate(model, prompt, 96, Sampler()))
    assert ours == list(generate(on_cpu, prompt, 96, Sampler()))
    assert check.compare_tokens(folder, model, prompt, ours).ok
    sampler = Sampler(0.7, top_k=40, seed=8)
    assert len(set(generate(model, prompt, 96, sampler))) > 5
    assert list(generate(model, prompt, 96, sampler)) == list(generate(model, prompt, 96, sampler))


def test_bits_per_byte_is_what_the_training_stated(folder: ModelFolder) -> None:
    """Computed anew with transformers' model, then with ours."""
    sample = folder.held_out_sample()
    assert sample is not None
    reference = transformers.LlamaForCausalLM.from_pretrained(folder.path, dtype=torch.float32)
    context = folder.config.context
    nats, count = 0.0, 0
    for start in range(0, len(sample) - 1, context):
        window = sample[start : start + context + 1]
        with torch.no_grad():
            logits = reference(window[None, :-1]).logits[0]
        nats += F.cross_entropy(logits.double(), window[1:], reduction="sum").item()
        count += len(window) - 1
    expected = nats / count / math.log(2)
    assert expected == pytest.approx(folder.training["sample_bits_per_byte"], abs=0.005)

    model = Llama.load(folder, torch.device("cpu"), torch.float32)
    assert check.bits_per_byte(model, sample) == pytest.approx(expected, abs=1e-4)


def test_model_fits_its_budget(folder: ModelFolder) -> None:
    assert (folder.path / "model.safetensors").stat().st_size <= 8_000_000
    assert all(weight.dtype == torch.bfloat16 for weight in folder.weights().values())
    config = folder.config
    assert config.num_heads % config.num_kv_heads == 0
    assert config.num_heads > config.num_kv_heads
    assert config.context >= 1024


class Recorder(io.StringIO):
    """Remembers every write."""

    def __init__(self) -> None:
        super().__init__()
        self.writes: list[str] = []

    def write(self, text: str) -> int:
        self.writes.append(text)
        return super().write(text)


def test_streams_whole_characters_as_they_come(monkeypatch: pytest.MonkeyPatch) -> None:
    text = "na\u00efve\u2014\U0001f433 \u00a3 ok "
    monkeypatch.setattr(cli, "generate", lambda *_: iter(text.encode()))
    out = Recorder()
    tokens = cli._stream(None, "Caf\u00e9 ".encode(), 99, Sampler(), cli.Speed(), out)  # type: ignore[arg-type]
    assert bytes(tokens) == text.encode()
    assert out.getvalue().startswith("Caf\u00e9 na\u00efve\u2014\U0001f433 \u00a3 ok")
    assert "\ufffd" not in out.getvalue()
    assert len([write for write in out.writes if write.strip()]) > 3


def test_utf8_stream_replaces_what_is_broken() -> None:
    stream = Utf8Stream()
    assert "".join(map(stream.feed, b"a\xe2\x80b")) == "a\ufffdb"
    stream = Utf8Stream()
    assert "".join(map(stream.feed, b"a\xe2\x80")) + stream.finish() == "a\ufffd"


def test_wraps_between_words() -> None:
    wrap = WordWrap(11)
    text = "the quick brown fox\n\njumped over incomprehensibilities  x"
    shown = "".join(map(wrap.feed, text)) + wrap.finish()
    assert shown == "the quick\nbrown fox\n\njumped over\nincomprehensibilities\nx"


def test_words_at_the_edges() -> None:
    assert check.generated_words("", "") == []
    assert check.generated_words("", "I don't know") == ["i", "don't"]
    assert check.generated_words("He was ", "glad. ") == ["glad"]
    assert check.generated_words("He was", " glad ") == ["glad"]
    assert check.generated_words("He wa", "s glad ") == ["was", "glad"]


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["--model", "no/such/folder"], "does not exist"),
        (["--model", __file__], "is a file, not a folder"),
        (["--model", str(Path(__file__).parent)], "has no config.json"),
        (["--prompt", ""], "--prompt is empty"),
        (["--prompt", "x" * 2000], "shorten the prompt"),
        (["--tokens", "1020"], "fewer"),
        (["--tokens", "0"], "expected at least 1"),
        (["--tokens", "many"], "invalid int value"),
        (["--temperature", "-1"], "expected 0 (greedy) or more"),
        (["--temperature", "nan"], "expected 0 (greedy) or more"),
        (["--top-k", "-1"], "--top-k -1: expected 0 (off) or more"),
        (["--top-p", "1.5"], "--top-p 1.5: expected 0 to 1 (off)"),
        (["--min-p", "-0.1"], "--min-p -0.1: expected 0 (off) to 1"),
        (["--seed", str(2**63)], "expected a whole number of 64 bits"),
        (["--device", "abacus"], "expected auto, cpu, cuda or cuda:N"),
        (["--device", "meta"], "expected auto, cpu, cuda or cuda:N"),
        (["--device", "cuda:99"], "--device cuda:99"),
        (["--dtype", "int4"], "expected auto, float32"),
        (["--colour", "red"], "unrecognized arguments"),
    ],
    ids=lambda value: " ".join(value)[-40:] if isinstance(value, list) else "",
)
def test_errors_are_one_clear_line(
    model_path: Path,
    arguments: list[str],
    problem: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    model = [] if "--model" in arguments else ["--model", str(model_path)]
    device = [] if "--device" in arguments else ["--device", "cpu"]
    assert main([*model, *device, *arguments]) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.startswith("error: ")
    assert shown.err.count("\n") == 1
    assert problem in shown.err


@pytest.mark.parametrize(
    ("file", "change", "problem"),
    [
        ("config.json", {"vocab_size": 32000}, "vocab_size is 32000"),
        ("config.json", {"model_type": "mamba"}, "model_type is 'mamba'"),
        ("config.json", {"rope_parameters": {"rope_type": "llama3"}}, "rope_type is 'llama3'"),
        ("config.json", {"num_hidden_layers": 99}, "has no tensor model.layers."),
        ("config.json", {"intermediate_size": 8}, "the two files are not of one model"),
        ("config.json", {"rms_norm_eps": None}, "config.json"),
        ("config.json", b"{", "is not JSON"),
        ("model.safetensors", b"garbage!" * 4, "cannot be read"),
        ("words.txt.gz", b"garbage!" * 4, "cannot be read"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_damaged_model_folder(
    model_path: Path,
    tmp_path: Path,
    file: str,
    change: bytes | dict[str, object],
    problem: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    copy = tmp_path / "model"
    shutil.copytree(model_path, copy)
    if isinstance(change, bytes):
        (copy / file).write_bytes(change)
    else:
        content = json.loads((copy / file).read_text()) | change
        content = {key: value for key, value in content.items() if value is not None}
        (copy / file).write_text(json.dumps(content))
    assert main(["--model", str(copy), "--device", "cpu", "--tokens", "1"]) == 2
    shown = capsys.readouterr().err
    assert shown.startswith("error: ")
    assert problem in shown
