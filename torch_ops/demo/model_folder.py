"""A model folder in Hugging Face's layout: its config, its weights, and what it says of itself."""

from __future__ import annotations

import gzip
import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

TRAIN = "train one with `python examples/train_demo.py --out DIR` and pass --model DIR"
RESTORE = "get the file again, for example with `git checkout`"


class DemoError(Exception):
    """The demo cannot run as asked; the message is one line and says what to do."""


@dataclass(frozen=True)
class Config:
    """What the demo reads of a Llama's `config.json`."""

    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    context: int
    rms_norm_eps: float
    rope_theta: float
    tied: bool

    @classmethod
    def parse(cls, raw: dict[str, Any]) -> Config:
        """Check `raw` and pick the sizes out of it.

        Raises
        ------
        DemoError
            When a key is missing, or the model is of a kind that the demo does not run.
        """
        rope = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
        for key, value, expected in (
            ("model_type", raw.get("model_type"), "llama"),
            ("hidden_act", raw.get("hidden_act", "silu"), "silu"),
            ("vocab_size", raw.get("vocab_size"), 256),
            ("rope_type", rope.get("rope_type", "default"), "default"),
            ("attention_bias", raw.get("attention_bias", False), False),
            ("mlp_bias", raw.get("mlp_bias", False), False),
        ):
            if value != expected:
                raise DemoError(
                    f"config.json: {key} is {value!r}, and the demo runs byte-level Llamas with "
                    f"{key} {expected!r} only; {TRAIN}"
                )
        try:
            num_heads = int(raw["num_attention_heads"])
            hidden_size = int(raw["hidden_size"])
            return cls(
                hidden_size=hidden_size,
                intermediate_size=int(raw["intermediate_size"]),
                num_layers=int(raw["num_hidden_layers"]),
                num_heads=num_heads,
                num_kv_heads=int(raw.get("num_key_value_heads", num_heads)),
                head_dim=int(raw.get("head_dim") or hidden_size // num_heads),
                vocab_size=int(raw["vocab_size"]),
                context=int(raw["max_position_embeddings"]),
                rms_norm_eps=float(raw["rms_norm_eps"]),
                rope_theta=float(rope.get("rope_theta", raw.get("rope_theta", 10000.0))),
                tied=bool(raw.get("tie_word_embeddings", False)),
            )
        except KeyError as error:
            raise DemoError(f"config.json has no {error}; {TRAIN}") from None


@dataclass(frozen=True)
class ModelFolder:
    """A folder that holds at least `config.json` and `model.safetensors`."""

    path: Path

    @classmethod
    def find(cls, given: str | None) -> ModelFolder:
        """Return the folder the user gave, or the one of the checkout that this runs in."""
        if given is not None:
            folder = Path(given).expanduser()
            if not folder.is_dir():
                what = "is a file, not a folder" if folder.exists() else "does not exist"
                raise DemoError(f"--model {given}: {what}; pass a model folder, or {TRAIN}")
        else:
            places = (Path.cwd(), Path(__file__).resolve().parents[2])
            folders = [place / "examples" / "demo_model" for place in places]
            found = [folder for folder in folders if folder.is_dir()]
            if not found:
                raise DemoError(
                    "no model here: run this in a checkout of Ridgeline, which has one in "
                    "examples/demo_model, or pass --model DIR"
                )
            folder = found[0]
        for name in ("config.json", "model.safetensors"):
            if not (folder / name).is_file():
                raise DemoError(f"{folder} has no {name}, so it is no model folder; {TRAIN}")
        return cls(folder)

    @cached_property
    def config(self) -> Config:
        """The sizes of the model."""
        return Config.parse(self._json("config.json"))

    @cached_property
    def training(self) -> dict[str, Any]:
        """What the training script recorded; empty when it left nothing."""
        return self._json("training.json") if (self.path / "training.json").is_file() else {}

    def weights(self) -> dict[str, Tensor]:
        """Load the tensors, on the CPU, in the dtype they are stored in."""
        try:
            from safetensors import SafetensorError
            from safetensors.torch import load_file
        except ImportError:
            raise DemoError(
                "the demo reads its weights with safetensors, which is not installed; "
                "run `pip install 'ridgeline[demo]'`"
            ) from None
        try:
            tensors: dict[str, Tensor] = load_file(self.path / "model.safetensors")
        except SafetensorError as error:
            raise DemoError(
                f"{self.path / 'model.safetensors'} cannot be read ({error}); {RESTORE}"
            ) from None
        return tensors

    def words(self) -> frozenset[str] | None:
        """Return the words of the corpus, or None when the folder has no list of them."""
        path = self.path / "words.txt.gz"
        if not path.is_file():
            return None
        try:
            return frozenset(gzip.decompress(path.read_bytes()).decode("utf-8").split())
        except (OSError, EOFError, UnicodeDecodeError) as error:
            raise DemoError(f"{path} cannot be read ({error}); {RESTORE}") from None

    def held_out_sample(self) -> Tensor | None:
        """Return the first bytes of the held-out text, int64, or None when there are none."""
        path = self.path / "heldout_sample.txt"
        if not path.is_file():
            return None
        return torch.tensor(list(path.read_bytes()))

    def _json(self, name: str) -> dict[str, Any]:
        try:
            content = json.loads((self.path / name).read_text(encoding="utf-8"))
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise DemoError(f"{self.path / name} is not JSON ({error}); {TRAIN}") from None
        if not isinstance(content, dict):
            raise DemoError(f"{self.path / name} is not a JSON object; {TRAIN}")
        return content
