"""Prefill beside decode: `PODWithPagedKVCacheWrapper` and `BatchPODWithPagedKVCacheWrapper`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ._attention_cpu import one_of
from ._batch_ops import Cache, Result
from ._older_verbs import OlderVerbs
from ._paged_wrapper import PagedWrapper
from ._wrapper import Options
from ._wrapper_options import refuse_run_options
from .attention import single_prefill_with_kv_cache
from .decode_wrapper import BatchDecodeWithPagedKVCacheWrapper
from .prefill_wrapper import BatchPrefillWithPagedKVCacheWrapper

__all__ = ["BatchPODWithPagedKVCacheWrapper", "PODWithPagedKVCacheWrapper"]


class _Pod(OlderVerbs):
    """What both share: the older helpers, and a part's run with options that a call changes."""

    _parts: tuple[PagedWrapper, ...]
    _name: str

    def _adopt(self, *parts: PagedWrapper) -> None:
        self._parts = parts
        self._name = type(self).__name__
        for part in parts:
            part._name = self._name

    @property
    def is_cuda_graph_enabled(self) -> bool:
        """Whether the wrapper was made with ``use_cuda_graph=True``."""
        return self._parts[0].is_cuda_graph_enabled

    def _refuse(
        self, args: tuple[object, ...], kv_layouts: dict[str, str | None], enable_pdl: bool | None,
        **later: object,
    ) -> None:  # fmt: skip
        where = f"{self._name}.run"
        refuse_run_options(where, args, **later)
        one_of(where, "enable_pdl", enable_pdl, (None, False, True))
        own = self._parts[0]._kv_layout
        for name, kv_layout in kv_layouts.items():
            one_of(where, name, kv_layout, (None, own))


def _changed(part: PagedWrapper, plan: dict[str, Any], causal: bool, **given: Any) -> Options:
    """A part's planned options, where a run changes none; else those with the changes."""
    if not causal and all(value is None for value in given.values()):
        return part._options
    part._planned()
    changes = {name: value for name, value in given.items() if value is not None}
    return part._options_of(part._where("run"), causal=causal, **{**plan, **changes})


class PODWithPagedKVCacheWrapper(_Pod):
    """One request's prefill over dense keys beside a batch's decode over a paged cache.

    Parameters
    ----------
    float_workspace_buffer, kv_layout, use_cuda_graph, jit_args, device :
        As in `BatchDecodeWithPagedKVCacheWrapper`.
    paged_kv_indptr_buffer, paged_kv_indices_buffer, paged_kv_last_page_len_buffer : Tensor
        As there; with `use_cuda_graph` only.

    Examples
    --------
    >>> import torch, ridgeline
    >>> wrapper = ridgeline.PODWithPagedKVCacheWrapper(device="cpu")
    >>> table = [torch.tensor(t, dtype=torch.int32) for t in ([0, 1, 3], [7, 2, 5], [9, 4])]
    >>> wrapper.plan(*table, 8, 2, 64, 16, q_data_type="float32")
    >>> q_p, (k_p, v_p) = torch.randn(30, 8, 64), torch.randn(2, 40, 2, 64)
    >>> q_d, pool = torch.randn(2, 8, 64), torch.randn(10, 2, 16, 2, 64)
    >>> out_p, out_d = wrapper.run(q_p, k_p, v_p, q_d, pool, causal_p=True)
    >>> out_p.shape, out_d.shape
    (torch.Size([30, 8, 64]), torch.Size([2, 8, 64]))
    """

    def __init__(
        self,
        float_workspace_buffer: Tensor | None = None,
        kv_layout: str = "NHD",
        use_cuda_graph: bool = False,
        paged_kv_indptr_buffer: Tensor | None = None,
        paged_kv_indices_buffer: Tensor | None = None,
        paged_kv_last_page_len_buffer: Tensor | None = None,
        jit_args: object = None,
        *,
        device: torch.device | str | None = None,
    ) -> None:
        self._decode = BatchDecodeWithPagedKVCacheWrapper(
            float_workspace_buffer, kv_layout, use_cuda_graph, False, paged_kv_indptr_buffer,
            paged_kv_indices_buffer, paged_kv_last_page_len_buffer, jit_args=jit_args,
            device=device,
        )  # fmt: skip
        self._adopt(self._decode)
        self._options: dict[str, Any] = {}

    def plan(
        self,
        indptr: Tensor,
        indices: Tensor,
        last_page_len: Tensor,
        num_qo_heads: int,
        num_kv_heads: int,
        head_dim: int,
        page_size: int,
        pos_encoding_mode: str = "NONE",
        window_left: int = -1,
        logits_soft_cap: float | None = None,
        q_data_type: torch.dtype | str = "float16",
        kv_data_type: torch.dtype | str | None = None,
        data_type: torch.dtype | str | None = None,
        sm_scale: float | None = None,
        rope_scale: float | None = None,
        rope_theta: float | None = None,
        non_blocking: bool = True,
        *,
        validate: bool = False,
    ) -> None:
        """Store the decodes' page table and options, and launch their schedule.

        The arguments are those of `BatchDecodeWithPagedKVCacheWrapper.plan`. `logits_soft_cap` is
        the prefill's as well; the prefill's other options come with `run`.
        """
        options: dict[str, Any] = {
            "pos_encoding_mode": pos_encoding_mode,
            "window_left": window_left,
            "logits_soft_cap": logits_soft_cap,
            "sm_scale": sm_scale,
            "rope_scale": rope_scale,
            "rope_theta": rope_theta,
        }
        self._decode.plan(
            indptr, indices, last_page_len, num_qo_heads, num_kv_heads, head_dim, page_size,
            **options, q_data_type=q_data_type, kv_data_type=kv_data_type, data_type=data_type,
            non_blocking=non_blocking, validate=validate,
        )  # fmt: skip
        self._options = options

    begin_forward = plan

    def run(
        self,
        q_p: Tensor,
        k_p: Tensor,
        v_p: Tensor,
        q_d: Tensor,
        paged_kv_cache_d: Cache,
        custom_mask_p: Tensor | None = None,
        packed_custom_mask_p: Tensor | None = None,
        causal_p: bool = False,
        kv_layout_p: str = "NHD",
        pos_encoding_mode_p: str = "NONE",
        sm_scale_p: float | None = None,
        window_left_p: int = -1,
        rope_scale_p: float | None = None,
        rope_theta_p: float | None = None,
        return_lse_p: bool = False,
        custom_mask_d: Tensor | None = None,
        packed_custom_mask_d: Tensor | None = None,
        causal_d: bool = False,
        kv_layout_d: str | None = None,
        pos_encoding_mode_d: str | None = None,
        sm_scale_d: float | None = None,
        window_left_d: int | None = None,
        rope_scale_d: float | None = None,
        rope_theta_d: float | None = None,
        q_scale: float | Tensor | None = None,
        k_scale: float | Tensor | None = None,
        v_scale: float | Tensor | None = None,
        return_lse_d: bool = False,
        use_fp16_qk_reduction: bool = False,
        enable_pdl: bool | None = None,
        *args: object,
        schedule: Tensor | None = None,
    ) -> tuple[Result, Result]:
        """Attention of the prefill and of the planned decodes.

        Parameters
        ----------
        q_p : Tensor
            The prefill's queries, ``[qo_len, num_qo_heads, head_dim]``.
        k_p, v_p : Tensor
            Its keys and values, ``[kv_len, num_kv_heads, head_dim]`` (`kv_layout_p` NHD) or
            ``[num_kv_heads, kv_len, head_dim]`` (HND).
        q_d : Tensor
            The decodes' queries, ``[batch_size, num_qo_heads, head_dim]``.
        paged_kv_cache_d : tuple of Tensor, or Tensor
            Their cache, as in `BatchDecodeWithPagedKVCacheWrapper.run`.
        causal_p, pos_encoding_mode_p, sm_scale_p, window_left_p, rope_scale_p, rope_theta_p :
            The prefill's options, as in `single_prefill_with_kv_cache`.
        causal_d : bool
            Changes nothing: one query sees every key of its request either way.
        kv_layout_d : str, optional
            The wrapper's own layout.
        pos_encoding_mode_d, sm_scale_d, window_left_d, rope_scale_d, rope_theta_d : optional
            The decodes' options, where they are not the plan's.
        custom_mask_p, packed_custom_mask_p, custom_mask_d, packed_custom_mask_d : None
            Not there yet; nor are `q_scale`, `k_scale`, `v_scale`.
        use_fp16_qk_reduction : bool
            Accumulate the logits of both in float16; for float16 inputs only.
        enable_pdl : bool, optional
            Accepted for compatibility: launches overlap where the GPU can do that.
        return_lse_p, return_lse_d : bool
            Whether a result is ``(out, lse)`` instead of ``out``.
        schedule : Tensor, optional
            A work list of the decodes, as in `BatchDecodeWithPagedKVCacheWrapper.run`.

        Returns
        -------
        prefill : Tensor or tuple of Tensor
            ``[qo_len, num_qo_heads, head_dim]``; with `return_lse_p` also its LSE.
        decode : Tensor or tuple of Tensor
            ``[batch_size, num_qo_heads, head_dim]``; with `return_lse_d` also its LSE.
        """
        self._refuse(
            args, {"kv_layout_d": kv_layout_d}, enable_pdl, custom_mask_p=custom_mask_p,
            packed_custom_mask_p=packed_custom_mask_p, custom_mask_d=custom_mask_d,
            packed_custom_mask_d=packed_custom_mask_d, q_scale=q_scale, k_scale=k_scale,
            v_scale=v_scale,
        )  # fmt: skip
        one_of(f"{self._name}.run", "causal_d", causal_d, (False, True))
        self._decode._planned()
        options = _changed(
            self._decode, self._options, False, pos_encoding_mode=pos_encoding_mode_d,
            sm_scale=sm_scale_d, window_left=window_left_d, rope_scale=rope_scale_d,
            rope_theta=rope_theta_d, use_fp16_qk_reduction=use_fp16_qk_reduction or None,
        )  # fmt: skip
        prefill: Any = single_prefill_with_kv_cache(
            q_p, k_p, v_p, causal=causal_p, kv_layout=kv_layout_p,
            pos_encoding_mode=pos_encoding_mode_p, use_fp16_qk_reduction=use_fp16_qk_reduction,
            sm_scale=sm_scale_p, window_left=window_left_p, rope_scale=rope_scale_p,
            logits_soft_cap=self._options["logits_soft_cap"], rope_theta=rope_theta_p,
            return_lse=return_lse_p,
        )  # type: ignore[call-overload] # fmt: skip
        decode = self._decode._forward(q_d, paged_kv_cache_d, options, return_lse_d, schedule)
        return prefill, decode

    forward = run


class BatchPODWithPagedKVCacheWrapper(_Pod):
    """A batch's prefills beside another batch's decodes, each over a paged cache.

    Parameters
    ----------
    float_workspace_buffer, kv_layout, device :
        As in `BatchPrefillWithPagedKVCacheWrapper`.

    Examples
    --------
    >>> import torch, ridgeline
    >>> wrapper = ridgeline.BatchPODWithPagedKVCacheWrapper(device="cpu")
    >>> table = [[0, 20], [0, 2], [8, 1], [10], [0, 1, 2], [0, 1, 3], [7, 2, 5], [9, 4]]
    >>> table = [torch.tensor(t, dtype=torch.int32) for t in table]
    >>> wrapper.plan(*table, 8, 2, 64, 16, q_data_type="float32")
    >>> q_p, q_d = torch.randn(20, 8, 64), torch.randn(2, 8, 64)
    >>> pool = torch.randn(10, 2, 16, 2, 64)
    >>> out_p, out_d = wrapper.run(q_p, pool, q_d, pool, causal_p=True)
    >>> out_p.shape, out_d.shape
    (torch.Size([20, 8, 64]), torch.Size([2, 8, 64]))
    """

    def __init__(
        self,
        float_workspace_buffer: Tensor | None = None,
        kv_layout: str = "NHD",
        *,
        device: torch.device | str | None = None,
    ) -> None:
        self._prefill, self._decode = (
            BatchPrefillWithPagedKVCacheWrapper(float_workspace_buffer, kv_layout, device=device)
            for _ in range(2)
        )
        self._adopt(self._prefill, self._decode)
        for part in self._parts:
            # Why not: the masks that a schedule counts come with `run`.
            part._schedules_in_plan = False
        self._options: dict[str, Any] = {}

    def plan(
        self,
        qo_indptr_p: Tensor,
        kv_indptr_p: Tensor,
        kv_indices_p: Tensor,
        last_page_len_p: Tensor,
        qo_indptr_d: Tensor,
        kv_indptr_d: Tensor,
        kv_indices_d: Tensor,
        last_page_len_d: Tensor,
        num_qo_heads: int,
        num_kv_heads: int,
        head_dim: int,
        page_size: int,
        pos_encoding_mode: str = "NONE",
        window_left: int = -1,
        logits_soft_cap: float | None = None,
        q_data_type: torch.dtype | str = "float16",
        kv_data_type: torch.dtype | str | None = None,
        data_type: torch.dtype | str | None = None,
        sm_scale: float | None = None,
        rope_scale: float | None = None,
        rope_theta: float | None = None,
        non_blocking: bool = True,
        *,
        max_q_len_d: int | None = None,
        validate: bool = False,
    ) -> None:
        """Store both batches' page tables and options; the first run launches their schedules.

        Parameters
        ----------
        qo_indptr_p, kv_indptr_p, kv_indices_p, last_page_len_p : Tensor
            Of the prefills, as in `BatchPrefillWithPagedKVCacheWrapper.plan`.
        qo_indptr_d, kv_indptr_d, kv_indices_d, last_page_len_d : Tensor
            Of the decodes, likewise.
        data_type : torch.dtype or str, optional
            Older name of `q_data_type`; it wins.
        max_q_len_d : int, optional
            Most queries of a decode: 1 chooses the kernel of plain decode.
        others :
            As in `BatchPrefillWithPagedKVCacheWrapper.plan`, of both.
        """
        options: dict[str, Any] = {
            "pos_encoding_mode": pos_encoding_mode,
            "window_left": window_left,
            "logits_soft_cap": logits_soft_cap,
            "sm_scale": sm_scale,
            "rope_scale": rope_scale,
            "rope_theta": rope_theta,
        }
        dtype = q_data_type if data_type is None else data_type
        tables = (
            (self._prefill, None, (qo_indptr_p, kv_indptr_p, kv_indices_p, last_page_len_p)),
            (self._decode, max_q_len_d, (qo_indptr_d, kv_indptr_d, kv_indices_d, last_page_len_d)),
        )
        for part, max_q_len, table in tables:
            part.plan(
                *table, num_qo_heads, num_kv_heads, head_dim, page_size, **options,
                q_data_type=dtype, kv_data_type=kv_data_type, non_blocking=non_blocking,
                max_q_len=max_q_len, validate=validate,
            )  # fmt: skip
        self._options = options

    begin_forward = plan

    def run(
        self,
        q_p: Tensor,
        paged_kv_cache_p: Cache,
        q_d: Tensor,
        paged_kv_cache_d: Cache,
        custom_mask_p: Tensor | None = None,
        packed_custom_mask_p: Tensor | None = None,
        causal_p: bool = False,
        kv_layout_p: str | None = None,
        pos_encoding_mode_p: str | None = None,
        sm_scale_p: float | None = None,
        window_left_p: int | None = None,
        rope_scale_p: float | None = None,
        rope_theta_p: float | None = None,
        return_lse_p: bool = False,
        custom_mask_d: Tensor | None = None,
        packed_custom_mask_d: Tensor | None = None,
        causal_d: bool = False,
        kv_layout_d: str | None = None,
        pos_encoding_mode_d: str | None = None,
        sm_scale_d: float | None = None,
        window_left_d: int | None = None,
        rope_scale_d: float | None = None,
        rope_theta_d: float | None = None,
        q_scale: float | Tensor | None = None,
        k_scale: float | Tensor | None = None,
        v_scale: float | Tensor | None = None,
        return_lse_d: bool = False,
        use_fp16_qk_reduction: bool = False,
        enable_pdl: bool | None = None,
        *args: object,
        schedule: tuple[Tensor, Tensor] | None = None,
    ) -> tuple[Result, Result]:
        """Attention of the planned prefills and decodes.

        Parameters
        ----------
        q_p, q_d : Tensor
            Queries, ``[num_tokens, num_qo_heads, head_dim]`` each.
        paged_kv_cache_p, paged_kv_cache_d : tuple of Tensor, or Tensor
            Their caches (often the same), as in `BatchPrefillWithPagedKVCacheWrapper.run`.
        causal_p, causal_d : bool
            Whether a part's mask is causal.
        kv_layout_p, kv_layout_d : str, optional
            The wrapper's own layout.
        pos_encoding_mode_p, sm_scale_p, window_left_p, rope_scale_p, rope_theta_p : optional
            Options of the prefills, where they are not the plan's; likewise those of the decodes.
        schedule : tuple of Tensor, optional
            Work lists of the prefills and of the decodes.
        others :
            As in `PODWithPagedKVCacheWrapper.run`.

        Returns
        -------
        prefill, decode : Tensor or tuple of Tensor
            ``[num_tokens, num_qo_heads, head_dim]``; with `return_lse_p` or `return_lse_d` the
            LSE beside it.
        """
        self._refuse(
            args, {"kv_layout_p": kv_layout_p, "kv_layout_d": kv_layout_d}, enable_pdl,
            custom_mask_p=custom_mask_p,
            packed_custom_mask_p=packed_custom_mask_p, custom_mask_d=custom_mask_d,
            packed_custom_mask_d=packed_custom_mask_d, q_scale=q_scale, k_scale=k_scale,
            v_scale=v_scale,
        )  # fmt: skip
        fp16 = use_fp16_qk_reduction or None
        options_p = _changed(
            self._prefill, self._options, causal_p, pos_encoding_mode=pos_encoding_mode_p,
            sm_scale=sm_scale_p, window_left=window_left_p, rope_scale=rope_scale_p,
            rope_theta=rope_theta_p, use_fp16_qk_reduction=fp16,
        )  # fmt: skip
        options_d = _changed(
            self._decode, self._options, causal_d, pos_encoding_mode=pos_encoding_mode_d,
            sm_scale=sm_scale_d, window_left=window_left_d, rope_scale=rope_scale_d,
            rope_theta=rope_theta_d, use_fp16_qk_reduction=fp16,
        )  # fmt: skip
        list_p, list_d = (None, None) if schedule is None else schedule
        return (
            self._prefill._forward(q_p, paged_kv_cache_p, options_p, return_lse_p, list_p),
            self._decode._forward(q_d, paged_kv_cache_d, options_d, return_lse_d, list_d),
        )

    forward = run
