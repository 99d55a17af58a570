"""Decode over a paged cache: `BatchDecodeWithPagedKVCacheWrapper` and its CUDA-graph form."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import _check
from ._attention_cpu import one_of, refuse_given
from ._batch_ops import Cache
from ._paged_wrapper import PagedWrapper
from ._wrapper import Options, Shape
from ._wrapper_options import invariant

__all__ = [
    "BatchDecodeWithPagedKVCacheWrapper",
    "CUDAGraphBatchDecodeWithPagedKVCacheWrapper",
    "fast_decode_plan",
]


class BatchDecodeWithPagedKVCacheWrapper(PagedWrapper):
    """Decode attention of a batch over a paged KV cache.

    `plan` once a step, `run` once a layer. Neither waits for the GPU.

    Parameters
    ----------
    float_workspace_buffer : Tensor, optional
        Accepted for compatibility; only its device counts.
    kv_layout : {"NHD", "HND"}
        Layout of the cache.
    use_cuda_graph : bool
        `plan` copies into the three buffers, so that a captured graph sees new contents. A plan
        may have fewer requests than the buffers; the others are empty.
    use_tensor_cores : bool
        Accepted for compatibility; the same tensor-core kernel runs for both values.
    paged_kv_indptr_buffer, paged_kv_indices_buffer, paged_kv_last_page_len_buffer : Tensor
        Int32, ``[batch_size + 1]``, as many as there may be pages, ``[batch_size]``; with
        `use_cuda_graph` only.
    backend : {"auto", "fa2"}
        "fa2" names the portable kernels, which "auto" chooses too; "fa3" is not there yet.
    jit_args : None
        Not there yet.
    device : torch.device, optional
        Where the index tensors go. None: the device of the workspace, of the buffers, of a tensor
        given to `plan`, the current GPU, or the CPU where there is none.

    Examples
    --------
    >>> import torch, ridgeline
    >>> wrapper = ridgeline.BatchDecodeWithPagedKVCacheWrapper(device="cpu")
    >>> table = [[0, 1, 3], [7, 2, 5], [9, 4]]                      # indptr, indices, last lengths
    >>> table = [torch.tensor(t, dtype=torch.int32) for t in table]
    >>> wrapper.plan(*table, 8, 2, 64, 16, q_data_type="float32")
    >>> wrapper.run(torch.randn(2, 8, 64), torch.randn(10, 2, 16, 2, 64)).shape
    torch.Size([2, 8, 64])
    """

    def __init__(
        self,
        float_workspace_buffer: Tensor | None = None,
        kv_layout: str = "NHD",
        use_cuda_graph: bool = False,
        use_tensor_cores: bool = False,
        paged_kv_indptr_buffer: Tensor | None = None,
        paged_kv_indices_buffer: Tensor | None = None,
        paged_kv_last_page_len_buffer: Tensor | None = None,
        backend: str = "auto",
        jit_args: object = None,
        *,
        device: torch.device | str | None = None,
    ) -> None:
        buffers = {
            "kv_indptr": ("paged_kv_indptr_buffer", paged_kv_indptr_buffer),
            "kv_indices": ("paged_kv_indices_buffer", paged_kv_indices_buffer),
            "kv_lens": ("paged_kv_last_page_len_buffer", paged_kv_last_page_len_buffer),
        }
        super().__init__(
            float_workspace_buffer, kv_layout, use_cuda_graph, buffers, backend, device
        )
        one_of(self._name, "use_tensor_cores", use_tensor_cores, (False, True))
        refuse_given(self._name, jit_args=jit_args)
        self._starts: dict[int, Tensor] = {}

    def plan(
        self,
        indptr: Tensor,
        indices: Tensor,
        last_page_len: Tensor,
        num_qo_heads: int,
        num_kv_heads: int,
        head_dim: int,
        page_size: int,
        *,
        pos_encoding_mode: str = "NONE",
        window_left: int = -1,
        logits_soft_cap: float | None = None,
        q_data_type: torch.dtype | str = "float16",
        kv_data_type: torch.dtype | str | None = None,
        o_data_type: torch.dtype | str | None = None,
        data_type: torch.dtype | str | None = None,
        sm_scale: float | None = None,
        rope_scale: float | None = None,
        rope_theta: float | None = None,
        non_blocking: bool = True,
        fixed_split_size: int | None = None,
        disable_split_kv: bool = False,
        q_len_per_req: int = 1,
        head_dim_vo: int | None = None,
        batch_invariant: bool = False,
        validate: bool = False,
    ) -> None:
        """Store a step's page table and options, and launch its schedule.

        Parameters
        ----------
        indptr, indices, last_page_len : Tensor
            Page table, int32: ``[batch_size + 1]``, ``[indptr[-1]]`` or longer, ``[batch_size]``.
            On the device they are kept as they are (eager runs need another plan when their
            contents change); from the host they are copied.
        num_qo_heads, num_kv_heads, head_dim, page_size : int
            Of the runs.
        pos_encoding_mode, window_left, logits_soft_cap, sm_scale, rope_scale, rope_theta :
            As in `ridgeline.attention`.
        q_data_type, kv_data_type, o_data_type : torch.dtype or str
            Dtype of ``q``; the others are the same so far.
        data_type : torch.dtype or str, optional
            Older name of `q_data_type`; it wins.
        non_blocking : bool
            False: copies from the host wait for the GPU.
        fixed_split_size, disable_split_kv :
            Either one asks for `batch_invariant`, the promise behind both; the size of a piece is
            the kernel's choice.
        q_len_per_req : int
            Queries of each request, causal among themselves.
        head_dim_vo : int, optional
            Head dim of the values, where it is not that of the keys.
        batch_invariant : bool
            A request's bits depend on nothing else in the batch.
        validate : bool
            The next run checks the contents of the index tensors, which waits for the GPU.
        """
        where = self._where("plan")
        if q_len_per_req < 1:
            _check.fail(where, "q_len_per_req", "at least 1", q_len_per_req, "Leave it out.")
        same = invariant(where, batch_invariant, fixed_split_size, disable_split_kv)
        options = self._options_of(
            where, causal=q_len_per_req > 1, window_left=window_left,
            logits_soft_cap=logits_soft_cap, sm_scale=sm_scale, rope_scale=rope_scale,
            pos_encoding_mode=pos_encoding_mode, rope_theta=rope_theta, batch_invariant=same,
        )  # fmt: skip
        lens = self._buffers.get("kv_lens", last_page_len)
        batch_size = lens.shape[0]
        index = {
            "kv_indptr": ("indptr", indptr),
            "kv_indices": ("indices", indices),
            "kv_lens": ("last_page_len", last_page_len),
        }
        if q_len_per_req > 1:
            self._device_for(index)
            index["qo_indptr"] = ("q_len_per_req", self._every(q_len_per_req, batch_size))
        self._plan(
            index,
            Shape(num_qo_heads, num_kv_heads, head_dim, head_dim_vo or head_dim, page_size),
            options,
            (q_data_type if data_type is None else data_type, kv_data_type, o_data_type),
            num_tokens=batch_size * q_len_per_req,
            max_q_len=q_len_per_req,
            non_blocking=non_blocking,
            validate=validate,
        )
        self._q_len_per_req = q_len_per_req

    begin_forward = plan

    def forward(
        self,
        q: Tensor,
        paged_kv_cache: Cache,
        pos_encoding_mode: str = "NONE",
        q_scale: float | Tensor | None = None,
        k_scale: float | Tensor | None = None,
        v_scale: float | Tensor | None = None,
        window_left: int = -1,
        logits_soft_cap: float | None = None,
        sm_scale: float | None = None,
        rope_scale: float | None = None,
        rope_theta: float | None = None,
    ) -> Tensor:
        """Older form of `run`: its options count for this call, instead of the plan's."""
        options = self._forward_options(
            pos_encoding_mode, window_left, logits_soft_cap, sm_scale, rope_scale, rope_theta
        )
        result: Tensor = self._forward(
            q, paged_kv_cache, options, False, q_scale=q_scale, k_scale=k_scale, v_scale=v_scale
        )
        return result

    def forward_return_lse(
        self,
        q: Tensor,
        paged_kv_cache: Cache,
        pos_encoding_mode: str = "NONE",
        q_scale: float | Tensor | None = None,
        k_scale: float | Tensor | None = None,
        v_scale: float | Tensor | None = None,
        window_left: int = -1,
        logits_soft_cap: float | None = None,
        sm_scale: float | None = None,
        rope_scale: float | None = None,
        rope_theta: float | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Older form of `run_return_lse`: its options count instead of the plan's."""
        options = self._forward_options(
            pos_encoding_mode, window_left, logits_soft_cap, sm_scale, rope_scale, rope_theta
        )
        result: tuple[Tensor, Tensor] = self._forward(
            q, paged_kv_cache, options, True, q_scale=q_scale, k_scale=k_scale, v_scale=v_scale
        )
        return result

    def _forward_options(
        self,
        pos_encoding_mode: str,
        window_left: int,
        logits_soft_cap: float | None,
        sm_scale: float | None,
        rope_scale: float | None,
        rope_theta: float | None,
    ) -> Options:
        self._planned()
        options = self._options_of(
            self._where("forward"), window_left=window_left,
            logits_soft_cap=logits_soft_cap, sm_scale=sm_scale, rope_scale=rope_scale,
            pos_encoding_mode=pos_encoding_mode, rope_theta=rope_theta,
        )  # fmt: skip
        return options._replace(flags=self._options.flags)

    def _every(self, q_len: int, batch_size: int) -> Tensor:
        """``qo_indptr`` of requests of one length; with buffers the same tensor every time."""
        starts = self._starts.get(q_len)
        if starts is None or starts.shape[0] != batch_size + 1:
            last = batch_size * q_len
            starts = torch.arange(0, last + 1, q_len, dtype=torch.int32, device=self._device)
            self._starts[q_len] = starts
        return starts


class CUDAGraphBatchDecodeWithPagedKVCacheWrapper(BatchDecodeWithPagedKVCacheWrapper):
    """`BatchDecodeWithPagedKVCacheWrapper` over given buffers, for CUDA graphs.

    Parameters
    ----------
    workspace_buffer : Tensor, optional
        Accepted for compatibility.
    indptr_buffer, indices_buffer, last_page_len_buffer : Tensor
        Int32, ``[batch_size + 1]``, as many as there may be pages, ``[batch_size]``.
    kv_layout : {"NHD", "HND"}
        Layout of the cache.
    use_tensor_cores : bool
        Accepted for compatibility.

    Examples
    --------
    >>> import torch, ridgeline
    >>> buffers = [torch.zeros(n, dtype=torch.int32) for n in (5, 40, 4)]
    >>> wrapper = ridgeline.CUDAGraphBatchDecodeWithPagedKVCacheWrapper(None, *buffers)
    >>> table = [torch.tensor(t, dtype=torch.int32) for t in ([0, 2], [3, 1], [5])]
    >>> wrapper.plan(*table, 8, 2, 64, 16, q_data_type="float32")      # one request of four
    >>> wrapper.run(torch.randn(4, 8, 64), torch.randn(10, 2, 16, 2, 64))[1:].any()
    tensor(False)
    """

    def __init__(
        self,
        workspace_buffer: Tensor | None,
        indptr_buffer: Tensor,
        indices_buffer: Tensor,
        last_page_len_buffer: Tensor,
        kv_layout: str = "NHD",
        use_tensor_cores: bool = False,
    ) -> None:
        super().__init__(
            workspace_buffer, kv_layout, True, use_tensor_cores, indptr_buffer, indices_buffer,
            last_page_len_buffer,
        )  # fmt: skip


def fast_decode_plan(
    wrapper: BatchDecodeWithPagedKVCacheWrapper, *args: Any, **options: Any
) -> None:
    """``wrapper.plan(...)``, which is fast; the arguments are its own.

    Parameters
    ----------
    wrapper : BatchDecodeWithPagedKVCacheWrapper
        The wrapper to plan.
    *args, **options :
        As in `BatchDecodeWithPagedKVCacheWrapper.plan`.

    Examples
    --------
    >>> import torch, ridgeline
    >>> wrapper = ridgeline.BatchDecodeWithPagedKVCacheWrapper(device="cpu")
    >>> table = [torch.tensor(t, dtype=torch.int32) for t in ([0, 1], [3], [9])]
    >>> ridgeline.fast_decode_plan(wrapper, *table, 8, 2, 64, 16)
    """
    wrapper.plan(*args, **options)
