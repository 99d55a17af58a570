"""A Llama whose attention, norms, rotations and activations are Ridgeline's ops."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import ridgeline
import torch
import torch.nn.functional as F
from torch import Tensor

from .model_folder import TRAIN, Config, DemoError, ModelFolder


class Cache(Protocol):
    """Where the keys and values of earlier tokens are, and how new tokens attend to them."""

    def extend(self, num_tokens: int) -> None:
        """Make room for `num_tokens` more tokens: those of the next step."""
        ...

    def attend(self, layer_idx: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Rotate `q` and `k`, store `k` and `v`, return what `q` attends to; each NHD."""
        ...


class KvCache:
    """The cache of one sequence: for every layer one page, as long as the model's context.

    Parameters
    ----------
    config
        The model's sizes.
    dtype, device
        Of keys and values.
    """

    def __init__(self, config: Config, dtype: torch.dtype, device: torch.device) -> None:
        page = (2, config.context, config.num_kv_heads, config.head_dim)
        # [num_layers, 1 (page), 2 (k, v), context, num_kv_heads, head_dim]
        self.pages = torch.zeros(config.num_layers, 1, *page, dtype=dtype, device=device)
        self.length = 0
        self._rope_theta = config.rope_theta
        self._all_positions = torch.arange(config.context, dtype=torch.int32, device=device)
        self._all_requests = torch.zeros_like(self._all_positions)
        self._page_numbers = self._all_positions[:1]
        self._page_indptr = self._all_positions[:2]

    def extend(self, num_tokens: int) -> None:
        """Make room for `num_tokens` more tokens: those of the next step."""
        new = slice(self.length, self.length + num_tokens)
        self._positions, self._requests = self._all_positions[new], self._all_requests[new]
        self.length += num_tokens

    def attend(self, layer_idx: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Rotate `q` and `k`, store `k` and `v`, return what `q` attends to; each NHD."""
        pages = self.pages[layer_idx]
        q = ridgeline.rope_append_paged_kv_cache(
            q,
            k,
            v,
            self._requests,
            self._positions,
            pages,
            self._page_numbers,
            self._page_indptr,
            rope_theta=self._rope_theta,
        ).to(pages.dtype)
        keys, values = pages[0, :, : self.length]
        if len(q) == 1:
            return ridgeline.single_decode_with_kv_cache(q[0], keys, values)
        return ridgeline.single_prefill_with_kv_cache(q, keys, values, causal=True)


@dataclass(frozen=True)
class Layer:
    """Weights of one layer; `norm_after` is the norm that follows it."""

    qkv: Tensor  # [(num_heads + 2 * num_kv_heads) * head_dim, hidden_size]
    output: Tensor  # [hidden_size, num_heads * head_dim]
    norm_mlp: Tensor  # [hidden_size]
    gate_up: Tensor  # [2 * intermediate_size, hidden_size]
    down: Tensor  # [hidden_size, intermediate_size]
    norm_after: Tensor  # [hidden_size]


class Llama:
    """The model; the cache that it is called with says whose tokens it reads.

    Parameters
    ----------
    config
        Its sizes.
    weights
        Tensors under the names that Hugging Face's layout gives them.
    device, dtype
        Where and in what the model computes. Attention on a GPU is 16-bit: with float32 there, keys
        and values are stored, and queries rounded, to float16.
    """

    def __init__(
        self,
        config: Config,
        weights: dict[str, Tensor],
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        self.config = config
        self.num_parameters = sum(w.numel() for w in weights.values())

        def take(name: str, *shape: int) -> Tensor:
            if name not in weights:
                raise DemoError(f"model.safetensors has no tensor {name}; {TRAIN}")
            found = tuple(weights[name].shape)
            if found != shape:
                raise DemoError(
                    f"model.safetensors: {name} is {list(found)}, and config.json says "
                    f"{list(shape)}: the two files are not of one model; {TRAIN}"
                )
            return weights[name].to(device, dtype)

        hidden, mlp = config.hidden_size, config.intermediate_size
        q_size, kv_size = (n * config.head_dim for n in (config.num_heads, config.num_kv_heads))
        self.embedding = take("model.embed_tokens.weight", config.vocab_size, hidden)
        self.head = self.embedding
        if not config.tied:
            self.head = take("lm_head.weight", config.vocab_size, hidden)
        self.first_norm = take("model.layers.0.input_layernorm.weight", hidden)
        self.layers = []
        for layer_idx in range(config.num_layers):
            here = f"model.layers.{layer_idx}."
            attention = here + "self_attn."
            after = f"model.layers.{layer_idx + 1}.input_layernorm.weight"
            is_last = layer_idx + 1 == config.num_layers
            layer = Layer(
                qkv=torch.cat(
                    [
                        take(attention + "q_proj.weight", q_size, hidden),
                        take(attention + "k_proj.weight", kv_size, hidden),
                        take(attention + "v_proj.weight", kv_size, hidden),
                    ]
                ),
                output=take(attention + "o_proj.weight", hidden, q_size),
                norm_mlp=take(here + "post_attention_layernorm.weight", hidden),
                gate_up=torch.cat(
                    [
                        take(here + "mlp.gate_proj.weight", mlp, hidden),
                        take(here + "mlp.up_proj.weight", mlp, hidden),
                    ]
                ),
                down=take(here + "mlp.down_proj.weight", hidden, mlp),
                norm_after=take("model.norm.weight" if is_last else after, hidden),
            )
            self.layers.append(layer)

    @classmethod
    def load(cls, folder: ModelFolder, device: torch.device, dtype: torch.dtype) -> Llama:
        """Read the model that `folder` holds."""
        return cls(folder.config, folder.weights(), device, dtype)

    @property
    def device(self) -> torch.device:
        """Where the model computes."""
        return self.embedding.device

    @property
    def cache_dtype(self) -> torch.dtype:
        """The dtype of keys and values, and of attention."""
        on_gpu = self.device.type == "cuda"
        dtype = self.embedding.dtype
        return torch.float16 if on_gpu and dtype == torch.float32 else dtype

    def new_cache(self) -> KvCache:
        """Return an empty KV cache for as many tokens as the model's context holds."""
        return KvCache(self.config, self.cache_dtype, self.device)

    @torch.inference_mode()
    def forward(self, tokens: Tensor, cache: Cache) -> Tensor:
        """Run new tokens through the model: many (prefill) or one (decode).

        Parameters
        ----------
        tokens
            `[num_tokens]`, the bytes that follow those in `cache`.
        cache
            Grows by `num_tokens`.

        Returns
        -------
        Tensor
            Logits `[num_tokens, vocab_size]`.
        """
        return self.logits(self.hidden(tokens, cache))

    def hidden(self, tokens: Tensor, cache: Cache) -> Tensor:
        """Return the last layer's output `[num_tokens, hidden_size]`, normalized."""
        eps = self.config.rms_norm_eps
        cache.extend(len(tokens))
        residual = self.embedding[tokens]
        hidden = ridgeline.rmsnorm(residual, self.first_norm, eps)
        for layer_idx, layer in enumerate(self.layers):
            hidden = self._attention(layer_idx, layer, hidden, cache)
            # Adds `hidden` to `residual`, then puts the normalized sum into `hidden`.
            ridgeline.fused_add_rmsnorm(hidden, residual, layer.norm_mlp, eps)
            hidden = F.linear(ridgeline.silu_and_mul(F.linear(hidden, layer.gate_up)), layer.down)
            ridgeline.fused_add_rmsnorm(hidden, residual, layer.norm_after, eps)
        return hidden

    def logits(self, hidden: Tensor) -> Tensor:
        """Return the logits `[num_rows, vocab_size]` of rows of `hidden`."""
        return F.linear(hidden, self.head)

    def _attention(self, layer_idx: int, layer: Layer, hidden: Tensor, cache: Cache) -> Tensor:
        """Return the attention block's output `[num_tokens, hidden_size]`."""
        config = self.config
        heads = F.linear(hidden, layer.qkv).view(len(hidden), -1, config.head_dim)
        first_k, first_v = config.num_heads, config.num_heads + config.num_kv_heads
        q, k, v = heads[:, :first_k], heads[:, first_k:first_v], heads[:, first_v:]
        mixed = cache.attend(layer_idx, q, k, v).to(hidden.dtype)
        return F.linear(mixed.reshape(len(hidden), -1), layer.output)
