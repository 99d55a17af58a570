"""Prefill and append over a paged or ragged cache: the batch prefill wrappers."""

from __future__ import annotations

from typing import Any, Literal, overload

import torch
from torch import Tensor

from ._attention_cpu import one_of, refuse_given
from ._batch_attention_cpu import BATCH_INVARIANT
from ._batch_ops import Cache, Result
from ._paged_wrapper import PagedWrapper
from ._wrapper import Options, Shape, Wrapper
from ._wrapper_options import invariant, last_of, refuse_run_options

__all__ = ["BatchPrefillWithPagedKVCacheWrapper", "BatchPrefillWithRaggedKVCacheWrapper"]


class BatchPrefillWithPagedKVCacheWrapper(PagedWrapper):
    """Attention of a batch's new tokens over a paged KV cache: prefill, append, any mixture.

    `plan` once a step, `run` once a layer. Neither waits for the GPU.

    Parameters
    ----------
    float_workspace_buffer : Tensor, optional
        Accepted for compatibility; only its device counts.
    kv_layout : {"NHD", "HND"}
        Layout of the cache.
    use_cuda_graph : bool
        `plan` copies into the four buffers, so that a captured graph sees new contents. A plan
        may have fewer requests than the buffers; the others are empty.
    qo_indptr_buf, paged_kv_indptr_buf, paged_kv_indices_buf, paged_kv_last_page_len_buf : Tensor
        Int32, ``[batch_size + 1]`` twice, as many as there may be pages, ``[batch_size]``; with
        `use_cuda_graph` only.
    custom_mask_buf, mask_indptr_buf, jit_args, jit_kwargs : None
        Not there yet.
    backend : {"auto", "fa2"}
        "fa2" names the portable kernels, which "auto" chooses too; "fa3" is not there yet.
    device : torch.device, optional
        Where the index tensors go. None: the device of the workspace, of the buffers, of a tensor
        given to `plan`, the current GPU, or the CPU where there is none.

    Examples
    --------
    >>> import torch, ridgeline
    >>> wrapper = ridgeline.BatchPrefillWithPagedKVCacheWrapper(device="cpu")
    >>> table = [[0, 4, 5], [0, 1, 3], [7, 2, 5], [9, 4]]
    >>> table = [torch.tensor(t, dtype=torch.int32) for t in table]
    >>> wrapper.plan(*table, 8, 2, 64, 16, causal=True, q_data_type="float32")
    >>> q, pool = torch.randn(5, 8, 64), torch.randn(10, 2, 16, 2, 64)
    >>> out, lse = wrapper.run(q, pool, return_lse=True)
    >>> out.shape, lse.shape
    (torch.Size([5, 8, 64]), torch.Size([5, 8]))
    """

    def __init__(
        self,
        float_workspace_buffer: Tensor | None = None,
        kv_layout: str = "NHD",
        use_cuda_graph: bool = False,
        qo_indptr_buf: Tensor | None = None,
        paged_kv_indptr_buf: Tensor | None = None,
        paged_kv_indices_buf: Tensor | None = None,
        paged_kv_last_page_len_buf: Tensor | None = None,
        custom_mask_buf: Tensor | None = None,
        mask_indptr_buf: Tensor | None = None,
        backend: str = "auto",
        jit_args: object = None,
        jit_kwargs: object = None,
        *,
        device: torch.device | str | None = None,
    ) -> None:
        buffers = {
            "qo_indptr": ("qo_indptr_buf", qo_indptr_buf),
            "kv_indptr": ("paged_kv_indptr_buf", paged_kv_indptr_buf),
            "kv_indices": ("paged_kv_indices_buf", paged_kv_indices_buf),
            "kv_lens": ("paged_kv_last_page_len_buf", paged_kv_last_page_len_buf),
        }
        super().__init__(
            float_workspace_buffer, kv_layout, use_cuda_graph, buffers, backend, device
        )
        refuse_given(
            self._name, custom_mask_buf=custom_mask_buf, mask_indptr_buf=mask_indptr_buf,
            jit_args=jit_args, jit_kwargs=jit_kwargs,
        )  # fmt: skip

    def plan(
        self,
        qo_indptr: Tensor,
        paged_kv_indptr: Tensor,
        paged_kv_indices: Tensor,
        paged_kv_last_page_len: Tensor,
        num_qo_heads: int,
        num_kv_heads: int,
        head_dim_qk: int,
        page_size: int,
        head_dim_vo: int | None = None,
        custom_mask: Tensor | None = None,
        packed_custom_mask: Tensor | None = None,
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
        o_data_type: torch.dtype | str | None = None,
        non_blocking: bool = True,
        fixed_split_size: int | None = None,
        disable_split_kv: bool = False,
        *,
        num_qo_tokens: int | None = None,
        max_q_len: int | None = None,
        batch_invariant: bool = False,
        validate: bool = False,
    ) -> None:
        """Store a step's queries, page table and options, and launch its schedule.

        Parameters
        ----------
        qo_indptr, paged_kv_indptr, paged_kv_indices, paged_kv_last_page_len : Tensor
            Int32: ``[batch_size + 1]``, ``[batch_size + 1]``, ``[paged_kv_indptr[-1]]`` or longer,
            ``[batch_size]``. On the device they are kept as they are (eager runs need another plan
            when their contents change); from the host they are copied.
        num_qo_heads, num_kv_heads, head_dim_qk, page_size, head_dim_vo : int
            Of the runs; `head_dim_vo` is `head_dim_qk` when None.
        custom_mask, packed_custom_mask : None
            Not there yet.
        causal, pos_encoding_mode, sm_scale, window_left, logits_soft_cap, rope_scale, rope_theta :
            As in `ridgeline.attention`.
        use_fp16_qk_reduction : bool
            Accumulate the logits in float16; for float16 inputs only.
        q_data_type, kv_data_type, o_data_type : torch.dtype or str
            Dtype of ``q``; the others are the same so far.
        non_blocking : bool
            False: copies from the host wait for the GPU.
        fixed_split_size, disable_split_kv :
            Either one asks for `batch_invariant`, the promise behind both; the size of a piece is
            the kernel's choice.
        num_qo_tokens : int, optional
            Rows of ``q``. Without it, and with `qo_indptr` on a GPU, the first run launches the
            schedule, since reading the number here would wait for the GPU.
        max_q_len : int, optional
            Most queries of a request; longer ones are cut off. It chooses the kernel.
        batch_invariant : bool
            A request's bits depend on nothing else in the batch.
        validate : bool
            The next run checks the contents of the index tensors, which waits for the GPU.
        """
        where = self._where("plan")
        refuse_given(where, custom_mask=custom_mask, packed_custom_mask=packed_custom_mask)
        options = self._options_of(
            where, causal=causal, window_left=window_left, sm_scale=sm_scale,
            logits_soft_cap=logits_soft_cap, pos_encoding_mode=pos_encoding_mode,
            rope_scale=rope_scale, rope_theta=rope_theta,
            use_fp16_qk_reduction=use_fp16_qk_reduction,
            batch_invariant=invariant(where, batch_invariant, fixed_split_size, disable_split_kv),
        )  # fmt: skip
        self._plan(
            {
                "qo_indptr": ("qo_indptr", qo_indptr),
                "kv_indptr": ("paged_kv_indptr", paged_kv_indptr),
                "kv_indices": ("paged_kv_indices", paged_kv_indices),
                "kv_lens": ("paged_kv_last_page_len", paged_kv_last_page_len),
            },
            Shape(num_qo_heads, num_kv_heads, head_dim_qk, head_dim_vo or head_dim_qk, page_size),
            options,
            (q_data_type, kv_data_type, o_data_type),
            num_tokens=last_of(qo_indptr, num_qo_tokens),
            max_q_len=max_q_len,
            non_blocking=non_blocking,
            validate=validate,
        )

    begin_forward = plan

    def forward(
        self,
        q: Tensor,
        paged_kv_cache: Cache,
        causal: bool = False,
        pos_encoding_mode: str = "NONE",
        use_fp16_qk_reduction: bool = False,
        k_scale: float | Tensor | None = None,
        v_scale: float | Tensor | None = None,
        window_left: int = -1,
        logits_soft_cap: float | None = None,
        sm_scale: float | None = None,
        rope_scale: float | None = None,
        rope_theta: float | None = None,
    ) -> Tensor:
        """Older form of `run`: its options count for this call, instead of the plan's."""
        options = _forward_options(
            self, causal, pos_encoding_mode, use_fp16_qk_reduction, window_left, logits_soft_cap,
            sm_scale, rope_scale, rope_theta,
        )  # fmt: skip
        result: Tensor = self._forward(
            q, paged_kv_cache, options, False, k_scale=k_scale, v_scale=v_scale
        )
        return result

    def forward_return_lse(
        self,
        q: Tensor,
        paged_kv_cache: Cache,
        causal: bool = False,
        pos_encoding_mode: str = "NONE",
        use_fp16_qk_reduction: bool = False,
        k_scale: float | Tensor | None = None,
        v_scale: float | Tensor | None = None,
        window_left: int = -1,
        logits_soft_cap: float | None = None,
        sm_scale: float | None = None,
        rope_scale: float | None = None,
        rope_theta: float | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Older form of `run_return_lse`: its options count instead of the plan's."""
        options = _forward_options(
            self, causal, pos_encoding_mode, use_fp16_qk_reduction, window_left, logits_soft_cap,
            sm_scale, rope_scale, rope_theta,
        )  # fmt: skip
        result: tuple[Tensor, Tensor] = self._forward(
            q, paged_kv_cache, options, True, k_scale=k_scale, v_scale=v_scale
        )
        return result


class BatchPrefillWithRaggedKVCacheWrapper(Wrapper):
    """Attention of a batch's new tokens over ragged keys and values.

    `plan` once a step, `run` once a layer. Neither waits for the GPU.

    Parameters
    ----------
    float_workspace_buffer, kv_layout, use_cuda_graph, backend, device :
        As in `BatchPrefillWithPagedKVCacheWrapper`.
    qo_indptr_buf, kv_indptr_buf : Tensor
        Int32, ``[batch_size + 1]``; with `use_cuda_graph` only.
    custom_mask_buf, mask_indptr_buf, jit_args, jit_kwargs : None
        Not there yet.

    Examples
    --------
    >>> import torch, ridgeline
    >>> wrapper = ridgeline.BatchPrefillWithRaggedKVCacheWrapper(device="cpu")
    >>> table = [torch.tensor(t, dtype=torch.int32) for t in ([0, 4, 5], [0, 9, 30])]
    >>> wrapper.plan(*table, 8, 2, 64, causal=True, q_data_type="float32")
    >>> k, v = torch.randn(2, 30, 2, 64)
    >>> wrapper.run(torch.randn(5, 8, 64), k, v).shape
    torch.Size([5, 8, 64])
    """

    def __init__(
        self,
        float_workspace_buffer: Tensor | None = None,
        kv_layout: str = "NHD",
        use_cuda_graph: bool = False,
        qo_indptr_buf: Tensor | None = None,
        kv_indptr_buf: Tensor | None = None,
        custom_mask_buf: Tensor | None = None,
        mask_indptr_buf: Tensor | None = None,
        backend: str = "auto",
        jit_args: object = None,
        jit_kwargs: object = None,
        *,
        device: torch.device | str | None = None,
    ) -> None:
        buffers = {
            "qo_indptr": ("qo_indptr_buf", qo_indptr_buf),
            "kv_indptr": ("kv_indptr_buf", kv_indptr_buf),
        }
        super().__init__(
            float_workspace_buffer, kv_layout, use_cuda_graph, buffers, backend, device
        )
        refuse_given(
            self._name, custom_mask_buf=custom_mask_buf, mask_indptr_buf=mask_indptr_buf,
            jit_args=jit_args, jit_kwargs=jit_kwargs,
        )  # fmt: skip

    def plan(
        self,
        qo_indptr: Tensor,
        kv_indptr: Tensor,
        num_qo_heads: int,
        num_kv_heads: int,
        head_dim_qk: int,
        head_dim_vo: int | None = None,
        custom_mask: Tensor | None = None,
        packed_custom_mask: Tensor | None = None,
        causal: bool = False,
        pos_encoding_mode: str = "NONE",
        use_fp16_qk_reduction: bool = False,
        window_left: int = -1,
        logits_soft_cap: float | None = None,
        sm_scale: float | None = None,
        rope_scale: float | None = None,
        rope_theta: float | None = None,
        q_data_type: torch.dtype | str = "float16",
        kv_data_type: torch.dtype | str | None = None,
        o_data_type: torch.dtype | str | None = None,
        non_blocking: bool = True,
        fixed_split_size: int | None = None,
        disable_split_kv: bool = False,
        *,
        num_qo_tokens: int | None = None,
        max_q_len: int | None = None,
        batch_invariant: bool = False,
        validate: bool = False,
    ) -> None:
        """Store a step's lengths and options, and launch its schedule.

        Parameters
        ----------
        qo_indptr, kv_indptr : Tensor
            Int32, ``[batch_size + 1]``: where each request's queries, and its keys, begin.
        num_qo_heads, num_kv_heads, head_dim_qk, head_dim_vo : int
            Of the runs; `head_dim_vo` is `head_dim_qk` when None.
        others :
            As in `BatchPrefillWithPagedKVCacheWrapper.plan`.
        """
        where = self._where("plan")
        refuse_given(where, custom_mask=custom_mask, packed_custom_mask=packed_custom_mask)
        options = self._options_of(
            where, causal=causal, window_left=window_left, sm_scale=sm_scale,
            logits_soft_cap=logits_soft_cap, pos_encoding_mode=pos_encoding_mode,
            rope_scale=rope_scale, rope_theta=rope_theta,
            use_fp16_qk_reduction=use_fp16_qk_reduction,
            batch_invariant=invariant(where, batch_invariant, fixed_split_size, disable_split_kv),
        )  # fmt: skip
        self._plan(
            {"qo_indptr": ("qo_indptr", qo_indptr), "kv_indptr": ("kv_indptr", kv_indptr)},
            Shape(num_qo_heads, num_kv_heads, head_dim_qk, head_dim_vo or head_dim_qk, 1),
            options,
            (q_data_type, kv_data_type, o_data_type),
            num_tokens=last_of(qo_indptr, num_qo_tokens),
            max_q_len=max_q_len,
            non_blocking=non_blocking,
            validate=validate,
        )

    begin_forward = plan

    @overload
    def run(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *args: object,
        q_scale: float | Tensor | None = ...,
        k_scale: float | Tensor | None = ...,
        v_scale: float | Tensor | None = ...,
        out: Tensor | None = ...,
        lse: Tensor | None = ...,
        return_lse: Literal[False] = ...,
        enable_pdl: bool | None = ...,
        schedule: Tensor | None = ...,
        lse_base: str = ...,
        lse_layout: str = ...,
    ) -> Tensor: ...

    @overload
    def run(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *args: object,
        return_lse: Literal[True],
        q_scale: float | Tensor | None = ...,
        k_scale: float | Tensor | None = ...,
        v_scale: float | Tensor | None = ...,
        out: Tensor | None = ...,
        lse: Tensor | None = ...,
        enable_pdl: bool | None = ...,
        schedule: Tensor | None = ...,
        lse_base: str = ...,
        lse_layout: str = ...,
    ) -> tuple[Tensor, Tensor]: ...

    def run(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *args: object,
        q_scale: float | Tensor | None = None,
        k_scale: float | Tensor | None = None,
        v_scale: float | Tensor | None = None,
        out: Tensor | None = None,
        lse: Tensor | None = None,
        return_lse: bool = False,
        enable_pdl: bool | None = None,
        schedule: Tensor | None = None,
        lse_base: str = "ln",
        lse_layout: str = "NH",
    ) -> Result:
        """Attention of the planned batch over a layer's keys and values.

        Parameters
        ----------
        q : Tensor
            Queries of all requests, ``[num_tokens, num_qo_heads, head_dim_qk]``.
        k, v : Tensor
            ``[nnz, num_kv_heads, head_dim]`` (NHD) or ``[num_kv_heads, nnz, head_dim]`` (HND).
        others :
            As in `BatchPrefillWithPagedKVCacheWrapper.run`.

        Returns
        -------
        out : Tensor
            ``[num_tokens, num_qo_heads, head_dim_vo]``.
        lse : Tensor
            Float32, with `return_lse` only.
        """
        if args or not (q_scale is None and k_scale is None and v_scale is None):
            where = self._where("run")
            refuse_run_options(where, args, q_scale=q_scale, k_scale=k_scale, v_scale=v_scale)
        if enable_pdl is not None:
            one_of(self._where("run"), "enable_pdl", enable_pdl, (False, True))
        return self._run(q, k, v, None, out, lse, return_lse, schedule, lse_base, lse_layout)

    def run_return_lse(
        self, q: Tensor, k: Tensor, v: Tensor, *args: object, **options: Any
    ) -> tuple[Tensor, Tensor]:
        """`run` with ``return_lse=True``; the other arguments are its own."""
        result: tuple[Tensor, Tensor]
        result = self.run(q, k, v, *args, **{**options, "return_lse": True})
        return result

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        causal: bool = False,
        pos_encoding_mode: str = "NONE",
        use_fp16_qk_reduction: bool = False,
        window_left: int = -1,
        logits_soft_cap: float | None = None,
        sm_scale: float | None = None,
        rope_scale: float | None = None,
        rope_theta: float | None = None,
    ) -> Tensor:
        """Older form of `run`: its options count for this call, instead of the plan's."""
        options = _forward_options(
            self, causal, pos_encoding_mode, use_fp16_qk_reduction, window_left, logits_soft_cap,
            sm_scale, rope_scale, rope_theta,
        )  # fmt: skip
        result: Any = self._run_with(q, k, v, options, None, None, False, None, "ln", "NH")
        out: Tensor = result
        return out

    def forward_return_lse(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        causal: bool = False,
        pos_encoding_mode: str = "NONE",
        use_fp16_qk_reduction: bool = False,
        window_left: int = -1,
        logits_soft_cap: float | None = None,
        sm_scale: float | None = None,
        rope_scale: float | None = None,
        rope_theta: float | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Older form of `run_return_lse`: its options count instead of the plan's."""
        options = _forward_options(
            self, causal, pos_encoding_mode, use_fp16_qk_reduction, window_left, logits_soft_cap,
            sm_scale, rope_scale, rope_theta,
        )  # fmt: skip
        result: Any = self._run_with(q, k, v, options, None, None, True, None, "ln", "NH")
        both: tuple[Tensor, Tensor] = result
        return both


def _forward_options(
    wrapper: Wrapper,
    causal: bool,
    pos_encoding_mode: str,
    use_fp16_qk_reduction: bool,
    window_left: int,
    logits_soft_cap: float | None,
    sm_scale: float | None,
    rope_scale: float | None,
    rope_theta: float | None,
) -> Options:
    """Options of the older verbs; what only `plan` takes stays as planned."""
    wrapper._planned()
    return wrapper._options_of(
        wrapper._where("forward"), causal=causal,
        window_left=window_left, logits_soft_cap=logits_soft_cap, sm_scale=sm_scale,
        rope_scale=rope_scale, rope_theta=rope_theta, pos_encoding_mode=pos_encoding_mode,
        use_fp16_qk_reduction=use_fp16_qk_reduction,
        batch_invariant=bool(wrapper._options.flags & BATCH_INVARIANT),
    )  # fmt: skip
