"""Runs the model on a step's tokens, over the paged pool; on a GPU decode steps are CUDA graphs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import ridgeline
import torch
from ridgeline.demo.llama import Llama
from ridgeline.demo.model_folder import Config, DemoError
from torch import Tensor

from .scheduler import Part


class StepInputs:
    """The numbers of a step, at places on the device that never move.

    They are filled in on the host and travel in one copy. A CUDA graph that has read them once
    reads whatever is there when it is replayed.
    """

    #: Of one value a request, as `sample_from_logits` takes them: int64 first, for its alignment.
    SAMPLING = {  # noqa: RUF012
        "seed": torch.int64,
        "offset": torch.int64,
        "top_k": torch.int32,
        "temperature": torch.float32,
        "top_p": torch.float32,
        "min_p": torch.float32,
    }

    def __init__(
        self, max_requests: int, max_tokens: int, max_pages: int, device: torch.device
    ) -> None:
        sizes = {
            **{name: max_requests * dtype.itemsize // 4 for name, dtype in self.SAMPLING.items()},
            "tokens": max_tokens,
            "last_rows": max_requests,
            "qo_indptr": max_requests + 1,
            "kv_indptr": max_requests + 1,
            "kv_last_page_len": max_requests,
            "kv_indices": max_requests * max_pages,
        }
        length = sum(sizes.values())
        on_gpu = device.type == "cuda"
        self._host = torch.zeros(length, dtype=torch.int32, pin_memory=on_gpu)
        self._device = self._host.to(device) if on_gpu else self._host
        names, lengths = list(sizes), list(sizes.values())
        self._host_views, self._views = (
            {
                name: part.view(self.SAMPLING.get(name, torch.int32))
                for name, part in zip(names, numbers.split(lengths), strict=True)
            }
            for numbers in (self._host, self._device)
        )

    def fill(self, parts: Sequence[Part], page_size: int, num_requests: int) -> None:
        """Write the step down; requests from ``len(parts)`` to `num_requests` are empty padding."""
        num_padding = num_requests - len(parts)
        ends = [part.sequence.num_computed + part.num_tokens for part in parts]
        num_pages = [-(-end // page_size) for end in ends]
        qo_indptr = [0, *accumulate(part.num_tokens for part in parts)]
        kv_indptr = [0, *accumulate(num_pages)]
        tokens: list[int] = []
        indices: list[int] = []
        for part, end, count in zip(parts, ends, num_pages, strict=True):
            tokens += part.sequence.tokens[part.sequence.num_computed : end]
            indices += part.sequence.pages[:count]
        padding = [0] * num_padding
        samplers = [part.sequence.request.sampler for part in parts]
        settings = {
            name: [getattr(sampler, name) for sampler in samplers]
            for name in self.SAMPLING
            if name != "offset"
        }
        # The place of the next token in its text: however often the request is paused, whatever
        # else is in the batch, its draw is that of the request alone.
        settings["offset"] = [len(part.sequence.times) for part in parts]
        for name, values in (
            *((name, numbers + padding) for name, numbers in settings.items()),
            ("tokens", tokens + padding),
            ("last_rows", [end - 1 for end in qo_indptr[1:]] + padding),
            ("qo_indptr", qo_indptr + [qo_indptr[-1]] * num_padding),
            ("kv_indptr", kv_indptr + [kv_indptr[-1]] * num_padding),
            ("kv_last_page_len", [(end - 1) % page_size + 1 for end in ends] + padding),
            ("kv_indices", indices),
        ):
            view = self._host_views[name]
            view[: len(values)] = torch.tensor(values, dtype=view.dtype)
        if self._device is not self._host:
            self._device.copy_(self._host, non_blocking=True)

    def __getitem__(self, name: str) -> Tensor:
        view: Tensor = self._views[name]
        return view


class PagedCache:
    """The cache of a step's requests: pages of the pool, found through a page table.

    Parameters
    ----------
    config
        The model's sizes.
    pool
        ``[num_layers, num_pages, 2 (k, v), page_size, num_kv_heads, head_dim]``.
    inputs
        The step, filled in.
    num_requests, num_tokens
        Of the step, with padding.
    is_decode
        One token a request.
    """

    def __init__(
        self,
        config: Config,
        pool: Tensor,
        inputs: StepInputs,
        num_requests: int,
        num_tokens: int,
        is_decode: bool,
    ) -> None:
        self.pool, self.rope_theta = pool, config.rope_theta
        page_size = pool.shape[3]
        qo_indptr = inputs["qo_indptr"][: num_requests + 1]
        kv_indptr = inputs["kv_indptr"][: num_requests + 1]
        last_page_len = inputs["kv_last_page_len"][:num_requests]
        seq_lens = ridgeline.get_seq_lens(kv_indptr, last_page_len, page_size)
        self.batch_indices, self.positions = ridgeline.get_batch_indices_positions(
            qo_indptr, seq_lens, num_tokens
        )
        self.kv_indices, self.kv_indptr = inputs["kv_indices"], kv_indptr
        self.last_page_len = last_page_len
        self.qo_indptr = None if is_decode else qo_indptr
        # One work list, which every layer's attention takes.
        self.schedule = ridgeline.schedule(
            qo_indptr=self.qo_indptr,
            kv_indptr=kv_indptr,
            kv_last_page_len=last_page_len,
            page_size=page_size,
            num_qo_tokens=num_tokens,
            num_qo_heads=config.num_heads,
            num_kv_heads=config.num_kv_heads,
            head_dim_qk=config.head_dim,
            causal=True,
        )

    def extend(self, num_tokens: int) -> None:
        """Do nothing: the scheduler has given every request the pages of its new tokens."""

    def attend(self, layer_idx: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Rotate `q` and `k`, store `k` and `v` in their pages, return what `q` attends to."""
        pages = self.pool[layer_idx]
        q = ridgeline.rope_append_paged_kv_cache(
            q,
            k,
            v,
            self.batch_indices,
            self.positions,
            pages,
            self.kv_indices,
            self.kv_indptr,
            rope_theta=self.rope_theta,
        )
        return ridgeline.attention(
            q.to(pages.dtype),
            pages,
            qo_indptr=self.qo_indptr,
            kv_indptr=self.kv_indptr,
            kv_indices=self.kv_indices,
            kv_last_page_len=self.last_page_len,
            causal=True,
            schedule=self.schedule,
        )


class Runner:
    """Computes steps: their keys and values go to the pool, the chosen next tokens come back.

    A decode step is padded to the next of a few batch sizes. With `use_graphs`, each of these is
    recorded once, with the making of its work list, and replayed from then on.

    Parameters
    ----------
    model
        The weights; on a GPU, the current one.
    num_pages, page_size
        Of the pool.
    max_requests, max_batch_tokens
        Most requests and tokens of a step.
    use_graphs
        On a GPU only.
    """

    def __init__(
        self,
        model: Llama,
        num_pages: int,
        page_size: int,
        max_requests: int,
        max_batch_tokens: int,
        use_graphs: bool,
    ) -> None:
        config = model.config
        self.model, self.page_size = model, page_size
        self.pool = _new_pool(model, num_pages, page_size)
        max_pages = -(-config.context // page_size)
        self.inputs = StepInputs(max_requests, max_batch_tokens, max_pages, model.device)
        self.batch_sizes = [*_powers_below(max_requests), max_requests]
        self.num_replays = 0
        self._graphs: dict[int, tuple[torch.cuda.CUDAGraph, Tensor]] = {}
        self._warm_up(max_batch_tokens, use_graphs)

    @torch.inference_mode()
    def _warm_up(self, max_batch_tokens: int, use_graphs: bool) -> None:
        """Load or compile every kernel, and record the graphs, on batches of padding alone."""
        self.inputs.fill([], self.page_size, 1)
        # The number of tokens chooses the kernel.
        for num_tokens in [*_powers_below(max_batch_tokens), max_batch_tokens]:
            self._compute(1, num_tokens, is_decode=False)
        memory = torch.cuda.graph_pool_handle() if use_graphs else None
        for batch_size in reversed(self.batch_sizes):
            self.inputs.fill([], self.page_size, batch_size)
            self._compute(batch_size, batch_size, is_decode=True)
            if self.model.device.type == "cuda":
                torch.cuda.synchronize()  # the inputs have been read, and may be filled again
            if not use_graphs:
                continue
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=memory):
                chosen = self._compute(batch_size, batch_size, is_decode=True)
            self._graphs[batch_size] = graph, chosen

    @torch.inference_mode()
    def step(self, parts: Sequence[Part]) -> list[int]:
        """Compute `parts`; return the token after each, as its request wants it chosen."""
        is_decode = all(part.num_tokens == 1 for part in parts)
        num_requests = num_tokens = len(parts)
        if is_decode:
            num_requests = num_tokens = min(s for s in self.batch_sizes if s >= len(parts))
        else:
            num_tokens = sum(part.num_tokens for part in parts)
        self.inputs.fill(parts, self.page_size, num_requests)
        if is_decode and self._graphs:
            graph, chosen = self._graphs[num_requests]
            graph.replay()
            self.num_replays += 1
        else:
            chosen = self._compute(num_requests, num_tokens, is_decode)
        # Waits for the device, so the next step may fill the inputs anew.
        tokens: list[int] = chosen[: len(parts)].tolist()
        return tokens

    def _compute(self, num_requests: int, num_tokens: int, is_decode: bool) -> Tensor:
        """Return the chosen next tokens `[num_requests]`, int32; reads nothing on the host."""
        cache = PagedCache(
            self.model.config, self.pool, self.inputs, num_requests, num_tokens, is_decode
        )
        hidden = self.model.hidden(self.inputs["tokens"][:num_tokens], cache)
        if not is_decode:
            hidden = hidden[self.inputs["last_rows"][:num_requests]]
        settings: dict[str, Any] = {
            name: self.inputs[name][:num_requests] for name in StepInputs.SAMPLING
        }
        chosen, _, _ = ridgeline.sample_from_logits(self.model.logits(hidden), **settings)
        return chosen


def _new_pool(model: Llama, num_pages: int, page_size: int) -> Tensor:
    """Return ``[num_layers, num_pages, 2 (k, v), page_size, num_kv_heads, head_dim]``, zeros."""
    config = model.config
    page = (2, page_size, config.num_kv_heads, config.head_dim)
    shape = (config.num_layers, num_pages, *page)
    try:
        return torch.zeros(shape, dtype=model.cache_dtype, device=model.device)
    except RuntimeError:  # torch's own, on the CPU; its OutOfMemoryError is one too
        gigabytes = math.prod(shape) * model.cache_dtype.itemsize / 1e9
        raise DemoError(
            f"--pages {num_pages}: the pool would take {gigabytes:,.1f} GB, more than "
            f"{model.device} has free; pass fewer"
        ) from None


def _powers_below(limit: int) -> list[int]:
    return [1 << power for power in range(limit.bit_length()) if 1 << power < limit]
