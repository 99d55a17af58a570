"""Cascade attention: requests that share prefixes read them once.

Each level is batch attention with its LSE: at the root, the queries of all requests that share a
prefix are one long request over it; at the last level each request has its own keys. Levels run two
at a time, each two in one launch, and their states are then merged.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, overload

import torch
from torch import Tensor

from . import _check
from ._attention_cpu import one_of, refuse_given
from ._batch_ops import LOG2_E, Cache, Result, into
from ._older_verbs import OlderVerbs
from ._paged_wrapper import PagedWrapper
from ._segments import Segment, Segments, in_one_launch, planned
from ._wrapper import Options
from .attention import single_prefill_with_kv_cache_return_lse
from .decode_wrapper import BatchDecodeWithPagedKVCacheWrapper
from .merge import merge_state, merge_state_in_place
from .prefill_wrapper import BatchPrefillWithPagedKVCacheWrapper

__all__ = [
    "BatchDecodeWithSharedPrefixPagedKVCacheWrapper",
    "BatchPrefillWithSharedPrefixPagedKVCacheWrapper",
    "MultiLevelCascadeAttentionWrapper",
]

_BUFFERS = (
    "qo_indptr_buf_arr",
    "paged_kv_indptr_buf_arr",
    "paged_kv_indices_buf_arr",
    "paged_kv_last_page_len_buf_arr",
)


class MultiLevelCascadeAttentionWrapper(OlderVerbs):
    """Attention over levels of shared prefixes in one paged cache.

    Level 0 is the root. A level's ``qo_indptr`` groups the queries of the requests that share its
    keys; the last level has a request's own keys, and `causal` counts there alone. `plan` once a
    step, `run` once a layer. Neither waits for the GPU.

    Parameters
    ----------
    num_levels : int
        Number of levels, at least 1.
    float_workspace_buffer, kv_layout, use_cuda_graph, device :
        As in `BatchPrefillWithPagedKVCacheWrapper`.
    qo_indptr_buf_arr, paged_kv_indptr_buf_arr, paged_kv_indices_buf_arr : list of Tensor
        The buffers of each level; with `use_cuda_graph` only.
    paged_kv_last_page_len_buf_arr : list of Tensor
        Likewise.

    Examples
    --------
    Three requests share two pages, and have one page each.

    >>> import torch, ridgeline
    >>> def tensors(*rows):
    ...     return [torch.tensor(row, dtype=torch.int32) for row in rows]
    >>> wrapper = ridgeline.MultiLevelCascadeAttentionWrapper(2, device="cpu")
    >>> starts, indptr = tensors([0, 3], [0, 1, 2, 3]), tensors([0, 2], [0, 1, 2, 3])
    >>> pages, last = tensors([7, 4], [1, 5, 3]), tensors([16], [9, 1, 16])
    >>> wrapper.plan(starts, indptr, pages, last, 8, 2, 64, 16, q_data_type="float32")
    >>> wrapper.run(torch.randn(3, 8, 64), torch.randn(8, 2, 16, 2, 64)).shape
    torch.Size([3, 8, 64])
    """

    def __init__(
        self,
        num_levels: int,
        float_workspace_buffer: Tensor | None = None,
        kv_layout: str = "NHD",
        use_cuda_graph: bool = False,
        qo_indptr_buf_arr: Sequence[Tensor] | None = None,
        paged_kv_indptr_buf_arr: Sequence[Tensor] | None = None,
        paged_kv_indices_buf_arr: Sequence[Tensor] | None = None,
        paged_kv_last_page_len_buf_arr: Sequence[Tensor] | None = None,
        *,
        device: torch.device | str | None = None,
    ) -> None:
        self._name = type(self).__name__
        if num_levels < 1:
            _check.fail(self._name, "num_levels", "at least 1", num_levels, "One is flat paging.")
        given = (
            qo_indptr_buf_arr,
            paged_kv_indptr_buf_arr,
            paged_kv_indices_buf_arr,
            paged_kv_last_page_len_buf_arr,
        )
        for name, buffers in zip(_BUFFERS, given, strict=True):
            if (buffers is not None) != bool(use_cuda_graph):
                expected = "a list exactly when use_cuda_graph is True"
                got = "None" if buffers is None else "a list"
                _check.fail(self._name, name, expected, got, "Pass both or neither.")
            if buffers is not None:
                self._one_each(self._name, name, buffers, num_levels)
        self._levels = [
            BatchPrefillWithPagedKVCacheWrapper(
                float_workspace_buffer,
                kv_layout,
                use_cuda_graph,
                None if qo_indptr_buf_arr is None else qo_indptr_buf_arr[level],
                None if paged_kv_indptr_buf_arr is None else paged_kv_indptr_buf_arr[level],
                None if paged_kv_indices_buf_arr is None else paged_kv_indices_buf_arr[level],
                None
                if paged_kv_last_page_len_buf_arr is None
                else paged_kv_last_page_len_buf_arr[level],
                device=device,
            )
            for level in range(num_levels)
        ]
        # The last two levels, the two above them, and so on; a root may be left over.
        self._pairs = [
            Segments(self._levels[last - 1], self._levels[last])
            for last in range(num_levels - 1, 0, -2)
        ]
        self._runs_pairs = False
        if self._pairs:
            for level in self._levels:
                level._schedules_in_plan = False

    @property
    def is_cuda_graph_enabled(self) -> bool:
        """Whether the wrapper was made with ``use_cuda_graph=True``."""
        return self._levels[0].is_cuda_graph_enabled

    def schedule(self, num_qo_tokens: int) -> list[Tensor]:
        """Make the work lists of the plan, for the `schedule` argument of `run`.

        One a launch: of the last two levels, of the two above them, and so on.
        """
        if not self._runs_pairs:
            return [level.schedule(num_qo_tokens) for level in self._levels]
        lists = []
        for pair in self._pairs:
            a, b = pair.parts
            lists.append(pair.schedule(num_qo_tokens, num_qo_tokens, a._options, b._options))
        return lists + [level.schedule(num_qo_tokens) for level in self._unpaired()]

    def _unpaired(self) -> list[BatchPrefillWithPagedKVCacheWrapper]:
        return self._levels[: len(self._levels) % 2]

    def plan(
        self,
        qo_indptr_arr: Sequence[Tensor],
        paged_kv_indptr_arr: Sequence[Tensor],
        paged_kv_indices_arr: Sequence[Tensor],
        paged_kv_last_page_len: Sequence[Tensor],
        num_qo_heads: int,
        num_kv_heads: int,
        head_dim: int,
        page_size: int,
        causal: bool = False,
        pos_encoding_mode: str = "NONE",
        use_fp16_qk_reduction: bool = False,
        sm_scale: float | None = None,
        window_left: int = -1,
        logits_soft_cap: float | None = None,
        rope_scale: float | None = None,
        rope_theta: float | None = None,
        q_data_type: torch.dtype | str = "float16",
        kv_data_type: torch.dtype | str | None = None,
        *,
        non_blocking: bool = True,
        num_qo_tokens: int | None = None,
        max_q_len: int | None = None,
        batch_invariant: bool = False,
        validate: bool = False,
    ) -> None:
        """Store a step's levels and options; the first run launches their schedules.

        Parameters
        ----------
        qo_indptr_arr, paged_kv_indptr_arr, paged_kv_indices_arr, paged_kv_last_page_len :
            A list of int32 tensors each, one a level, root first; as in
            `BatchPrefillWithPagedKVCacheWrapper.plan`.
        num_qo_heads, num_kv_heads, head_dim, page_size : int
            Of the runs.
        causal : bool
            Of the last level; a query sees the whole of the others.
        pos_encoding_mode, window_left :
            "NONE" and -1 where there is more than one level: a level does not know how far into
            the request its keys are.
        max_q_len : int, optional
            Most queries of a request at the last level; longer ones are cut off. It chooses that
            level's kernel: pass 1 for decode.
        others :
            As in `BatchPrefillWithPagedKVCacheWrapper.plan`.
        """
        where = f"{self._name}.plan"
        arrays = {
            "qo_indptr_arr": qo_indptr_arr,
            "paged_kv_indptr_arr": paged_kv_indptr_arr,
            "paged_kv_indices_arr": paged_kv_indices_arr,
            "paged_kv_last_page_len": paged_kv_last_page_len,
        }
        for name, array in arrays.items():
            self._one_each(where, name, array, len(self._levels))
        if len(self._levels) > 1:
            way_out = "Use one level (flat paging), or rotate and mask outside."
            if pos_encoding_mode != "NONE":
                _check.not_yet(where, "pos_encoding_mode", pos_encoding_mode, way_out)
            if window_left != -1:
                _check.not_yet(where, "window_left", window_left, way_out)
        for number, (level, *index) in enumerate(zip(self._levels, *arrays.values(), strict=True)):
            is_last = number == len(self._levels) - 1
            level.plan(
                *index, num_qo_heads, num_kv_heads, head_dim, page_size,
                causal=causal and is_last, max_q_len=max_q_len if is_last else None,
                pos_encoding_mode=pos_encoding_mode, use_fp16_qk_reduction=use_fp16_qk_reduction,
                sm_scale=sm_scale, window_left=window_left, logits_soft_cap=logits_soft_cap,
                rope_scale=rope_scale, rope_theta=rope_theta, q_data_type=q_data_type,
                kv_data_type=kv_data_type, non_blocking=non_blocking, num_qo_tokens=num_qo_tokens,
                batch_invariant=batch_invariant, validate=validate,
            )  # fmt: skip
        options = self._levels[-1]._options
        self._runs_pairs = bool(self._pairs) and in_one_launch(options, options, head_dim)
        for pair in self._pairs:
            pair.clear()

    begin_forward = plan

    @overload
    def run(
        self,
        q: Tensor,
        paged_kv_cache: Cache,
        *,
        out: Tensor | None = ...,
        lse: Tensor | None = ...,
        return_lse: Literal[False] = ...,
        schedule: Sequence[Tensor] | None = ...,
        lse_base: str = ...,
        lse_layout: str = ...,
    ) -> Tensor: ...

    @overload
    def run(
        self,
        q: Tensor,
        paged_kv_cache: Cache,
        *,
        return_lse: Literal[True],
        out: Tensor | None = ...,
        lse: Tensor | None = ...,
        schedule: Sequence[Tensor] | None = ...,
        lse_base: str = ...,
        lse_layout: str = ...,
    ) -> tuple[Tensor, Tensor]: ...

    def run(
        self,
        q: Tensor,
        paged_kv_cache: Cache,
        *,
        out: Tensor | None = None,
        lse: Tensor | None = None,
        return_lse: bool = False,
        schedule: Sequence[Tensor] | None = None,
        lse_base: str = "ln",
        lse_layout: str = "NH",
    ) -> Result:
        """Attention of the planned levels over a layer's paged cache.

        Parameters
        ----------
        q : Tensor
            Queries of all requests, ``[num_tokens, num_qo_heads, head_dim]``.
        paged_kv_cache : tuple of Tensor, or Tensor
            As in `BatchPrefillWithPagedKVCacheWrapper.run`; one pool for all levels.
        out, lse, return_lse, lse_base, lse_layout :
            As there.
        schedule : list of Tensor, optional
            What `schedule` made; or a work list for each level, root first, which then run one
            after the other.

        Returns
        -------
        out : Tensor
            ``[num_tokens, num_qo_heads, head_dim]``.
        lse : Tensor
            Float32, with `return_lse` only.
        """
        where = f"{self._name}.run"
        one_of(where, "lse_base", lse_base, ("ln", "log2"))
        one_of(where, "lse_layout", lse_layout, ("NH", "HN"))
        num_levels = len(self._levels)
        num_lists = (num_levels + 1) // 2 if self._runs_pairs else num_levels
        if self._runs_pairs and (schedule is None or len(schedule) == num_lists):
            merged, logs = self._run_pairs(q, paged_kv_cache, schedule or [None] * num_lists)
            if out is not None:
                merged = into(where, "out", out, merged)
            if lse is not None and lse_layout == "NH":
                logs = into(where, "lse", lse, logs)
            return self._with_lse(merged, logs, lse, return_lse, lse_base, lse_layout)
        if schedule is None:
            lists: Sequence[Tensor | None] = [None] * num_levels
        else:
            lists = schedule
            self._one_each(where, "schedule", lists, num_levels)
        if len(self._levels) == 1 and not return_lse and lse is None:
            return self._levels[0].run(q, paged_kv_cache, out=out, schedule=lists[0])
        merged, logs = self._levels[-1].run(
            q, paged_kv_cache, out=out, lse=None if lse_layout == "HN" else lse, return_lse=True,
            schedule=lists[-1],
        )  # fmt: skip
        for level, work in zip(self._levels[:-1], lists[:-1], strict=True):
            merge_state_in_place(
                merged, logs, *level.run(q, paged_kv_cache, return_lse=True, schedule=work)
            )
        return self._with_lse(merged, logs, lse, return_lse, lse_base, lse_layout)

    forward = run

    def _run_pairs(
        self, q: Tensor, paged_kv_cache: Cache, lists: Sequence[Tensor | None]
    ) -> tuple[Tensor, Tensor]:
        """The merged state of all levels, two of them a launch."""
        states = []
        num = q.shape[0]
        for pair, work in zip(self._pairs, lists, strict=False):
            a, b = (planned(level, q, paged_kv_cache, level._options) for level in pair.parts)
            out, lse = pair.run(a, b, work)
            states += [(out[num:], lse[num:]), (out[:num], lse[:num])]
        for level in self._unpaired():
            states.append(level.run(q, paged_kv_cache, return_lse=True, schedule=lists[-1]))
        merged, logs = merge_state(*states[0], *states[1])
        for state in states[2:]:
            merge_state_in_place(merged, logs, *state)
        return merged, logs

    def _with_lse(
        self,
        merged: Tensor,
        logs: Tensor,
        lse: Tensor | None,
        return_lse: bool,
        lse_base: str,
        lse_layout: str,
    ) -> Result:
        if lse_base == "log2":
            logs = logs.mul_(LOG2_E)
        if lse_layout == "HN":
            where = f"{self._name}.run"
            logs = logs.t().contiguous() if lse is None else into(where, "lse", lse, logs.t())
        return (merged, logs) if return_lse else merged

    @staticmethod
    def _one_each(where: str, name: str, given: Sequence[Tensor | None], num_levels: int) -> None:
        if len(given) != num_levels:
            way_out = "Pass one a level, root first."
            _check.fail(where, name, f"{num_levels} tensors", len(given), way_out)


class _SharedPrefix(OlderVerbs):
    """What the two older shared-prefix wrappers share: a dense prefix beside a paged cache."""

    def __init__(self, kv_layout: str, own: PagedWrapper) -> None:
        self._name = type(self).__name__
        self._kv_layout = kv_layout
        self._own = own
        own._schedules_in_plan = False
        self._segments = Segments(None, own)

    def _attend(
        self,
        q: Tensor,
        k_shared: Tensor,
        v_shared: Tensor,
        unique_kv_cache: Cache,
        options: Options,
        use_fp16_qk_reduction: bool,
        sm_scale: float | None,
    ) -> Tensor:
        """Merge a batch's own state with that of its queries over the prefix."""
        own = self._own
        prefix = own._options_of(own._where("forward"), sm_scale=sm_scale)
        if in_one_launch(prefix, options, own._shape.head_dim_qk) and not use_fp16_qk_reduction:
            out, lse = self._segments.run(
                Segment(q, k_shared, v_shared, prefix),
                planned(own, q, unique_kv_cache, options),
                None,
            )
            num = q.shape[0]
            return merge_state(out[num:], lse[num:], out[:num], lse[:num])[0]
        merged: Tensor
        merged, lse = own._forward(q, unique_kv_cache, options, True)
        prefix_state = single_prefill_with_kv_cache_return_lse(
            q, k_shared, v_shared, kv_layout=self._kv_layout, sm_scale=sm_scale,
            use_fp16_qk_reduction=use_fp16_qk_reduction,
        )  # fmt: skip
        merge_state_in_place(merged, lse, *prefix_state)
        return merged

    def _refuse_rope(self, rope_scale: float | None, rope_theta: float | None) -> None:
        refuse_given(f"{self._name}.forward", rope_scale=rope_scale, rope_theta=rope_theta)


class BatchDecodeWithSharedPrefixPagedKVCacheWrapper(_SharedPrefix):
    """Decode of requests that share a dense prefix and have paged keys of their own.

    `MultiLevelCascadeAttentionWrapper` does the same with the prefix in the paged cache.

    Parameters
    ----------
    float_workspace_buffer : Tensor, optional
        Accepted for compatibility; only its device counts.
    kv_layout : {"NHD", "HND"}
        Layout of the prefix and of the cache.
    device : torch.device, optional
        As in `BatchDecodeWithPagedKVCacheWrapper`.

    Examples
    --------
    >>> import torch, ridgeline
    >>> wrapper = ridgeline.BatchDecodeWithSharedPrefixPagedKVCacheWrapper(device="cpu")
    >>> table = [torch.tensor(t, dtype=torch.int32) for t in ([0, 1, 3], [7, 2, 5], [9, 4])]
    >>> wrapper.begin_forward(*table, 8, 2, 64, 16, data_type="float32")
    >>> q, (k, v) = torch.randn(2, 8, 64), torch.randn(2, 50, 2, 64)
    >>> pool = torch.randn(9, 2, 16, 2, 64)
    >>> wrapper.forward(q, k, v, pool).shape
    torch.Size([2, 8, 64])
    """

    def __init__(
        self,
        float_workspace_buffer: Tensor | None = None,
        kv_layout: str = "NHD",
        *,
        device: torch.device | str | None = None,
    ) -> None:
        own = BatchDecodeWithPagedKVCacheWrapper(float_workspace_buffer, kv_layout, device=device)
        super().__init__(kv_layout, own)
        self._plan = own.plan

    def begin_forward(
        self,
        unique_kv_indptr: Tensor,
        unique_kv_indices: Tensor,
        unique_kv_last_page_len: Tensor,
        num_qo_heads: int,
        num_kv_heads: int,
        head_dim: int,
        page_size: int,
        data_type: torch.dtype | str = "float16",
    ) -> None:
        """Store a step's page table of the requests' own keys.

        The arguments are those of `BatchDecodeWithPagedKVCacheWrapper.plan`.
        """
        self._plan(
            unique_kv_indptr, unique_kv_indices, unique_kv_last_page_len, num_qo_heads,
            num_kv_heads, head_dim, page_size, q_data_type=data_type,
        )  # fmt: skip
        self._segments.clear()

    def forward(
        self,
        q: Tensor,
        k_shared: Tensor,
        v_shared: Tensor,
        unique_kv_cache: Cache,
        allow_fp16_qk_reduction: bool = False,
        sm_scale: float | None = None,
        rope_scale: float | None = None,
        rope_theta: float | None = None,
    ) -> Tensor:
        """Attention over the prefix and each request's own keys.

        Parameters
        ----------
        q : Tensor
            ``[batch_size, num_qo_heads, head_dim]``.
        k_shared, v_shared : Tensor
            ``[prefix_len, num_kv_heads, head_dim]`` or ``[num_kv_heads, prefix_len, head_dim]``.
        unique_kv_cache : tuple of Tensor, or Tensor
            As in `BatchDecodeWithPagedKVCacheWrapper.run`.
        allow_fp16_qk_reduction : bool
            Accumulate the prefix's logits in float16; for float16 inputs only.
        sm_scale : float, optional
            Factor of the logits; ``1 / sqrt(head_dim)`` when None.
        rope_scale, rope_theta : None
            Nothing is rotated here.

        Returns
        -------
        Tensor
            ``[batch_size, num_qo_heads, head_dim]``.
        """
        self._refuse_rope(rope_scale, rope_theta)
        own = self._own
        own._planned()
        options = own._options_of(own._where("forward"), sm_scale=sm_scale)
        return self._attend(
            q, k_shared, v_shared, unique_kv_cache, options, allow_fp16_qk_reduction, sm_scale
        )


class BatchPrefillWithSharedPrefixPagedKVCacheWrapper(_SharedPrefix):
    """Prefill of requests that share a dense prefix and have paged keys of their own.

    `MultiLevelCascadeAttentionWrapper` does the same with the prefix in the paged cache.

    Parameters
    ----------
    float_workspace_buffer : Tensor, optional
        Accepted for compatibility; only its device counts.
    kv_layout : {"NHD", "HND"}
        Layout of the prefix and of the cache.
    device : torch.device, optional
        As in `BatchPrefillWithPagedKVCacheWrapper`.

    Examples
    --------
    >>> import torch, ridgeline
    >>> wrapper = ridgeline.BatchPrefillWithSharedPrefixPagedKVCacheWrapper(device="cpu")
    >>> table = [[0, 4, 5], [0, 1, 3], [7, 2, 5], [9, 4]]
    >>> table = [torch.tensor(t, dtype=torch.int32) for t in table]
    >>> wrapper.begin_forward(*table, 8, 2, 64, 16, q_data_type="float32")
    >>> q, (k, v) = torch.randn(5, 8, 64), torch.randn(2, 50, 2, 64)
    >>> pool = torch.randn(9, 2, 16, 2, 64)
    >>> wrapper.forward(q, k, v, pool, causal=True).shape
    torch.Size([5, 8, 64])
    """

    def __init__(
        self,
        float_workspace_buffer: Tensor | None = None,
        kv_layout: str = "NHD",
        *,
        device: torch.device | str | None = None,
    ) -> None:
        own = BatchPrefillWithPagedKVCacheWrapper(float_workspace_buffer, kv_layout, device=device)
        super().__init__(kv_layout, own)
        self._plan = own.plan

    def begin_forward(
        self,
        qo_indptr: Tensor,
        paged_kv_indptr: Tensor,
        paged_kv_indices: Tensor,
        paged_kv_last_page_len: Tensor,
        num_qo_heads: int,
        num_kv_heads: int,
        head_dim: int,
        page_size: int,
        q_data_type: torch.dtype | str = "float16",
    ) -> None:
        """Store a step's queries and page table of the requests' own keys.

        The arguments are those of `BatchPrefillWithPagedKVCacheWrapper.plan`.
        """
        self._plan(
            qo_indptr, paged_kv_indptr, paged_kv_indices, paged_kv_last_page_len, num_qo_heads,
            num_kv_heads, head_dim, page_size, q_data_type=q_data_type,
        )  # fmt: skip
        self._segments.clear()

    def forward(
        self,
        q: Tensor,
        k_shared: Tensor,
        v_shared: Tensor,
        unique_kv_cache: Cache,
        causal: bool = False,
        allow_fp16_qk_reduction: bool = False,
        sm_scale: float | None = None,
        rope_scale: float | None = None,
        rope_theta: float | None = None,
    ) -> Tensor:
        """Attention over the prefix and each request's own keys.

        Parameters
        ----------
        q : Tensor
            ``[num_tokens, num_qo_heads, head_dim]``.
        k_shared, v_shared : Tensor
            ``[prefix_len, num_kv_heads, head_dim]`` or ``[num_kv_heads, prefix_len, head_dim]``.
        unique_kv_cache : tuple of Tensor, or Tensor
            As in `BatchPrefillWithPagedKVCacheWrapper.run`.
        causal : bool
            Of the requests' own keys; a query sees the whole prefix.
        allow_fp16_qk_reduction : bool
            Accumulate the logits in float16; for float16 inputs only.
        sm_scale : float, optional
            Factor of the logits; ``1 / sqrt(head_dim)`` when None.
        rope_scale, rope_theta : None
            Nothing is rotated here.

        Returns
        -------
        Tensor
            ``[num_tokens, num_qo_heads, head_dim]``.
        """
        self._refuse_rope(rope_scale, rope_theta)
        own = self._own
        own._planned()
        options = own._options_of(
            own._where("forward"), causal=causal, sm_scale=sm_scale,
            use_fp16_qk_reduction=allow_fp16_qk_reduction,
        )  # fmt: skip
        return self._attend(
            q, k_shared, v_shared, unique_kv_cache, options, allow_fp16_qk_reduction, sm_scale
        )
