"""Train the demo's byte-level Llama for a given number of minutes.

    python examples/train_demo.py --minutes 4 --out examples/demo_model

Whenever held-out text is predicted better than before, the model is written, so that an
interrupted run leaves a usable one. `--resume` goes on from the weights of such a model.
"""

import argparse
import datetime
import json
import math
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from corpus import PACKAGES, CorpusError
from network import Network, Shape
from text_data import Data, as_bytes, bits_per_byte, with_noise
from torch import Tensor

MAX_WEIGHT_BYTES = 8_000_000
SHAPE_OPTIONS = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "context",
)


class Average:
    """An exponential moving average of the weights: what is evaluated and saved."""

    def __init__(self, network: Network, decay: float = 0.999) -> None:
        self.decay = decay
        self.steps = 0
        self.source: list[Tensor] = list(network.parameters())
        self.network = Network(network.shape).to(self.source[0].device).eval()
        self.weights = [p.detach().clone() for p in self.source]

    @torch.no_grad()
    def update(self) -> None:
        """Take one step of the average; early steps forget faster."""
        self.steps += 1
        decay = min(self.decay, (1 + self.steps) / (10 + self.steps))
        torch._foreach_lerp_(self.weights, self.source, 1 - decay)

    @torch.no_grad()
    def rounded(self) -> Network:
        """Return the averaged network with its weights rounded to bf16, as they are stored."""
        for target, weight in zip(self.network.parameters(), self.weights, strict=True):
            target.copy_(weight.bfloat16())
        return self.network


class Trainer:
    """One run of the training: time-boxed, the learning rate a function of the time used."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.begin = time.monotonic()
        self.arguments = arguments
        self.out: Path = arguments.out
        self.device = torch.device(arguments.device)
        self.on_gpu = self.device.type == "cuda"
        torch.manual_seed(arguments.seed)
        torch.set_float32_matmul_precision("high")
        self.data = Data.load(arguments.corpus, self.device)
        shape = Shape(**{name: getattr(arguments, name) for name in SHAPE_OPTIONS})
        self.network = Network(shape, arguments.dropout)
        self.num_parameters = sum(p.numel() for p in self.network.parameters())
        if 2 * self.num_parameters + 10_000 > MAX_WEIGHT_BYTES:
            raise SystemExit(f"error: {self.num_parameters:,} parameters do not fit in 8 MB")
        if arguments.resume:
            load(self.network, arguments.resume)
        self.network.to(self.device).train()
        self.average = Average(self.network)
        self.optimizer = self._make_optimizer()
        self.best = self._evaluate() if arguments.resume else math.inf
        self.step = 0
        print(f"{self.num_parameters:,} parameters, {len(self.data.train):,} bytes to train on")

    def _make_optimizer(self) -> torch.optim.Optimizer:
        """Return AdamW; norms and the embedding are not decayed."""
        named = list(self.network.named_parameters())
        decayed = [p for name, p in named if p.dim() == 2 and "embed" not in name]
        others = [p for name, p in named if p.dim() != 2 or "embed" in name]
        groups = [
            {"params": decayed, "weight_decay": self.arguments.weight_decay},
            {"params": others, "weight_decay": 0.0},
        ]
        return torch.optim.AdamW(groups, betas=(0.9, 0.98), fused=self.on_gpu)

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.arguments.bf16)

    def _compiled(self) -> Callable[[Tensor], Tensor]:
        """Return the network compiled, or as it is where this machine cannot compile."""
        if not self.arguments.compile:
            return self.network
        tokens, _ = self.data.crops(self.arguments.batch, self.network.shape.context)
        try:
            fast = torch.compile(self.network)
            with self._autocast():
                logits = fast(tokens)
            torch.autograd.backward(logits.float().mean())
            return fast
        except Exception as error:
            print(f"torch.compile failed ({type(error).__name__}); training without it")
            return self.network

    def _evaluate(self) -> float:
        # On a CPU the choice between evaluations is made on a part of the held-out text.
        windows = None if self.on_gpu else 24
        return bits_per_byte(self.average.rounded(), self.data.held_out, windows)

    def _train_step(self, forward: Callable[[Tensor], Tensor], progress: float) -> Tensor:
        for group in self.optimizer.param_groups:
            group["lr"] = self.arguments.rate * rate_factor(progress)
        tokens, targets = self.data.crops(self.arguments.batch, self.network.shape.context)
        self.optimizer.zero_grad(set_to_none=True)
        with self._autocast():
            logits = forward(with_noise(tokens, self.arguments.noise))
        loss = F.cross_entropy(logits.float().flatten(0, 1), targets.flatten())
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(self.network.parameters(), 1.0)
        self.optimizer.step()
        self.average.update()
        self.step += 1
        return loss.detach()

    def run(self) -> float:
        """Train until the time is used up; return the best bits per byte on held-out text."""
        forward = self._compiled()
        start = time.monotonic()
        budget = max(1.0, self.begin + 60 * self.arguments.minutes - start)
        next_evaluation = start + self.arguments.evaluate_every
        progress = 0.0
        while progress < 1.0:
            loss = self._train_step(forward, progress)
            if self.step % self.arguments.log_every == 0:
                self._log(f"train    {loss.item() / math.log(2):.4f} bits/byte")
            progress = (time.monotonic() - start) / budget
            if time.monotonic() >= next_evaluation or progress >= 1.0:
                self._keep_if_best(self._evaluate())
                next_evaluation = time.monotonic() + self.arguments.evaluate_every
        return self._finish()

    def _log(self, text: str) -> None:
        print(f"{time.monotonic() - self.begin:6.0f} s  step {self.step:6d}  {text}", flush=True)

    def _keep_if_best(self, bits: float) -> None:
        better = bits < self.best
        self._log(f"held-out {bits:.4f} bits/byte{'  saved' if better else ''}")
        if better:
            self.best = bits
            save(self.average.network, self.data, self.out)
            write_json(self.out / "training.json", self._record(bits))

    def _finish(self) -> float:
        """State the bits per byte of the saved model on all of the held-out text."""
        record_path = self.out / "training.json"
        if not record_path.exists():
            raise SystemExit("error: nothing was saved: no evaluation beat the resumed model")
        load(self.average.network, self.out)
        bits = bits_per_byte(self.average.network, self.data.held_out)
        record = json.loads(record_path.read_text(encoding="utf-8"))
        write_json(record_path, record | {"heldout_bits_per_byte": round(bits, 4)})
        return bits

    def _record(self, bits: float) -> dict[str, object]:
        """Return what `training.json` says."""
        sample = as_bytes(self.data.sample, self.device)
        options = ("batch", "rate", "dropout", "noise", "weight_decay", "seed", "minutes")
        return {
            "heldout_bits_per_byte": round(bits, 4),
            "sample_bits_per_byte": round(bits_per_byte(self.average.network, sample), 4),
            "parameters": self.num_parameters,
            "steps": self.step,
            "tokens": self.step * self.arguments.batch * self.network.shape.context,
            "seconds": round(time.monotonic() - self.begin),
            "device": torch.cuda.get_device_name(self.device) if self.on_gpu else "CPU",
            "torch": torch.__version__,
            "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
            "corpus": {
                "debian_packages": list(PACKAGES),
                "sha256": self.data.sha256,
                "train_bytes": len(self.data.train),
                "heldout_bytes": len(self.data.held_out),
            },
            "settings": {name: getattr(self.arguments, name) for name in options},
        }


def rate_factor(progress: float, warmup: float = 0.02, floor: float = 0.01) -> float:
    """Return the learning rate's factor: a linear start, then a cosine.

    >>> [round(rate_factor(p), 3) for p in (0.01, 0.02, 0.5, 1.0)]
    [0.5, 0.999, 0.505, 0.01]
    """
    if progress < warmup:
        return max(progress, 1e-4) / warmup
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))


def save(network: Network, data: Data, out: Path) -> None:
    """Write weights, config, the corpus's words and a sample of the held-out text."""
    from safetensors.torch import save_file

    out.mkdir(parents=True, exist_ok=True)
    weights = {k: v.to("cpu", torch.bfloat16).contiguous() for k, v in network.state_dict().items()}
    save_file(weights, out / "model.safetensors", metadata={"format": "pt"})
    write_json(out / "config.json", network.shape.config())
    (out / "heldout_sample.txt").write_text(data.sample, encoding="utf-8")
    (out / "words.txt.gz").write_bytes(data.words)


def load(network: Network, folder: Path) -> None:
    """Load the weights that `save` wrote."""
    from safetensors.torch import load_file

    weights = load_file(folder / "model.safetensors")
    network.load_state_dict({name: weight.float() for name, weight in weights.items()})


def write_json(path: Path, content: dict[str, object]) -> None:
    """Write `content` for people to read."""
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    on_gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description="Train the demo's byte-level Llama.")
    add = parser.add_argument
    add("--corpus", type=Path, help="text to train on (default: fetch the Debian packages)")
    add("--out", type=Path, default=Path("examples/demo_model"))
    add("--resume", type=Path, help="a model folder to go on from")
    add("--minutes", type=float, default=4.0, help="time for everything, compiling included")
    add("--device", default="cuda" if on_gpu else "cpu")
    add("--batch", type=int, default=64 if on_gpu else 8, help="windows a step")
    add("--rate", type=float, default=2e-3)
    add("--dropout", type=float, default=0.15)
    add("--noise", type=float, default=0.01, help="share of input bytes replaced by random ones")
    add("--weight-decay", type=float, default=0.1)
    add("--seed", type=int, default=0)
    add("--evaluate-every", type=float, default=10.0 if on_gpu else 60.0, metavar="SECONDS")
    add("--log-every", type=int, default=200 if on_gpu else 20, metavar="STEPS")
    add("--bf16", action=argparse.BooleanOptionalAction, default=on_gpu)
    add("--compile", action=argparse.BooleanOptionalAction, default=on_gpu)
    for name in SHAPE_OPTIONS:
        add(f"--{name.replace('_', '-')}", type=int, default=getattr(Shape, name))
    return parser.parse_args(argv)


def main() -> int:
    """Train, and say where the model is."""
    arguments = parse()
    try:
        bits = Trainer(arguments).run()
    except CorpusError as error:
        print(f"error: {error}")
        return 2
    print(f"{arguments.out}: {bits:.4f} bits per byte on held-out text")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
