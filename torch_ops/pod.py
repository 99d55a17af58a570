"""Prefill beside decode: `PODWithPagedKVCacheWrapper` and `BatchPODWithPagedKVCacheWrapper`.

Both run their two parts in one launch, from one work list, where the parts' logits have one scale
and soft cap and nothing rotates; with other options they run one part after the other.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ._attention_cpu import one_of
from ._batch_attention_cpu import HND
from ._batch_ops import Cache, Result
from ._older_verbs import OlderVerbs
from ._paged_wrapper import PagedWrapper
from ._segments import Segment, Segments, in_one_launch, planned
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

    _segments: Segments

    def _adopt(self, *parts: PagedWrapper) -> None:
        self._parts = parts
        self._name = type(self).__name__
        for part in parts:
            part._name = self._name
            # Why not: the prefill, and the masks that a schedule counts, come with `run`.
            part._schedules_in_plan = False

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


def _parted(
    both: tuple[Tensor, Tensor], num_prefill: int, return_lse_p: bool, return_lse_d: bool
) -> tuple[Result, Result]:
    """Results of the prefill and of the decode, from those of both."""
    out, lse = both
    prefill: Result = out[:num_prefill]
    decode: Result = out[num_prefill:]
    if return_lse_p:
        prefill = (out[:num_prefill], lse[:num_prefill])
    if return_lse_d:
        decode = (out[num_prefill:], lse[num_prefill:])
    return prefill, decode


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
        self._segments = Segments(None, self._decode)
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
        """Store the decodes' page table and options; the first run launches the schedule.

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
        self._segments.clear()

    begin_forward = plan

    def schedule(
        self,
        qo_len_p: int,
        kv_len_p: int,
        *,
        causal_p: bool = False,
        window_left_p: int = -1,
        window_left_d: int | None = None,
    ) -> Tensor:
        """Make the work list of a prefill and the planned decodes, for the `schedule` of `run`.

        Eager runs share one by themselves. A compiled graph makes it once with this and passes it
        to every layer.

        Parameters
        ----------
        qo_len_p, kv_len_p : int
            Rows of ``q_p``, and keys of the prefill.
        causal_p, window_left_p, window_left_d :
            As in `run`.

        Returns
        -------
        Tensor
            Int32; of the decodes alone where the plan's options need a launch for each part.
        """
        self._decode._planned()
        options = _changed(self._decode, self._options, False, window_left=window_left_d)
        prefill = self._prefill_options(causal=causal_p, window_left=window_left_p)
        lens = self._decode._index
        assert lens is not None
        assert lens[3] is not None
        num_decodes = lens[3].shape[0]
        if not in_one_launch(prefill, options, self._decode._shape.head_dim_qk):
            return self._decode.schedule(num_decodes, window_left=window_left_d)
        return self._segments.schedule(qo_len_p, num_decodes, prefill, options, kv_len_p)

    def _prefill_options(self, **given: Any) -> Options:
        cap = self._options["logits_soft_cap"]
        return self._decode._options_of(self._decode._where("run"), logits_soft_cap=cap, **given)

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
            ``[num_kv_heads, kv_len, head_dim]`` (HND); heads, head_dim and dtype are the plan's.
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
            What `schedule` made for these lengths and masks. None: eager runs of a plan share one,
            and so do the runs of a CUDA-graph capture.

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
        where = f"{self._name}.run"
        one_of(where, "causal_d", causal_d, (False, True))
        one_of(where, "kv_layout_p", kv_layout_p, ("NHD", "HND"))
        self._decode._planned()
        options = _changed(
            self._decode, self._options, False, pos_encoding_mode=pos_encoding_mode_d,
            sm_scale=sm_scale_d, window_left=window_left_d, rope_scale=rope_scale_d,
            rope_theta=rope_theta_d, use_fp16_qk_reduction=use_fp16_qk_reduction or None,
        )  # fmt: skip
        options_p = self._prefill_options(
            causal=causal_p, pos_encoding_mode=pos_encoding_mode_p, sm_scale=sm_scale_p,
            window_left=window_left_p, rope_scale=rope_scale_p, rope_theta=rope_theta_p,
            use_fp16_qk_reduction=use_fp16_qk_reduction,
        )  # fmt: skip
        if in_one_launch(options_p, options, self._decode._shape.head_dim_qk):
            flags = (options_p.flags & ~HND) | (HND if kv_layout_p == "HND" else 0)
            both = self._segments.run(
                Segment(q_p, k_p, v_p, options_p._replace(flags=flags)),
                planned(self._decode, q_d, paged_kv_cache_d, options),
                schedule,
            )
            return _parted(both, q_p.shape[0], return_lse_p, return_lse_d)
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
        self._segments = Segments(self._prefill, self._decode)
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
        """Store both batches' page tables and options; the first run launches the schedule.

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
        self._segments.clear()

    begin_forward = plan

    def schedule(
        self,
        num_qo_tokens_p: int,
        num_qo_tokens_d: int,
        *,
        causal_p: bool = False,
        causal_d: bool = False,
        window_left_p: int | None = None,
        window_left_d: int | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Make the work list of the planned prefills and decodes, for the `schedule` of `run`.

        Parameters
        ----------
        num_qo_tokens_p, num_qo_tokens_d : int
            Rows of ``q_p`` and ``q_d``.
        causal_p, causal_d, window_left_p, window_left_d :
            As in `run`.

        Returns
        -------
        Tensor or tuple of Tensor
            Int32; one for each part where the plan's options need a launch for each.
        """
        parts = (self._prefill, self._decode)
        counts = (num_qo_tokens_p, num_qo_tokens_d)
        a, b = (
            _changed(part, self._options, causal, window_left=window)
            for part, causal, window in zip(
                parts, (causal_p, causal_d), (window_left_p, window_left_d), strict=True
            )
        )
        self._decode._planned()
        if in_one_launch(a, b, self._decode._shape.head_dim_qk):
            return self._segments.schedule(*counts, a, b)
        list_p, list_d = (
            part._make_list(count, options.flags, options.window_left)
            for part, count, options in zip(parts, counts, (a, b), strict=True)
        )
        return list_p, list_d

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
        schedule: Tensor | tuple[Tensor, Tensor] | None = None,
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
        schedule : Tensor or tuple of Tensor, optional
            What `schedule` made for these lengths and masks; or a list of the prefills and one of
            the decodes, which then run one after the other.
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
        self._decode._planned()
        both = in_one_launch(options_p, options_d, self._decode._shape.head_dim_qk)
        if both and (schedule is None or isinstance(schedule, Tensor)):
            results = self._segments.run(
                planned(self._prefill, q_p, paged_kv_cache_p, options_p),
                planned(self._decode, q_d, paged_kv_cache_d, options_d),
                schedule,
            )
            return _parted(results, q_p.shape[0], return_lse_p, return_lse_d)
        list_p, list_d = (None, None) if schedule is None else schedule
        return (
            self._prefill._forward(q_p, paged_kv_cache_p, options_p, return_lse_p, list_p),
            self._decode._forward(q_d, paged_kv_cache_d, options_d, return_lse_d, list_d),
        )

    forward = run
