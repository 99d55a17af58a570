"""`BatchAttention`: prefill and decode in one batch, in one call, with the LSE."""

from __future__ import annotations

import torch
from torch import Tensor

from . import _check
from ._attention_cpu import refuse_given
from ._batch_attention_cpu import LENS_ARE_TOKENS
from ._batch_ops import Cache, pair
from ._wrapper import Shape, Wrapper
from ._wrapper_options import last_of

__all__ = ["BatchAttention"]


class BatchAttention(Wrapper):
    """Attention of a mixed batch (prefills beside decodes) over a paged cache, in one call.

    Parameters
    ----------
    kv_layout : {"NHD", "HND"}
        Layout of the cache.
    device : torch.device, optional
        Where the index tensors go. None: the device of a tensor given to `plan`, the current GPU,
        or the CPU where there is none.

    Examples
    --------
    >>> import torch, ridgeline
    >>> wrapper = ridgeline.BatchAttention(device="cpu")
    >>> table = [[0, 4, 5], [0, 1, 3], [7, 2, 5], [9, 20]]           # the last: tokens cached
    >>> table = [torch.tensor(t, dtype=torch.int32) for t in table]
    >>> dtypes = {"q_data_type": "float32", "kv_data_type": "float32"}
    >>> wrapper.plan(*table, 8, 2, 64, 64, 16, causal=True, **dtypes)
    >>> out, lse = wrapper.run(torch.randn(5, 8, 64), torch.randn(10, 2, 16, 2, 64))
    >>> out.shape, lse.shape
    (torch.Size([5, 8, 64]), torch.Size([5, 8]))
    """

    def __init__(self, kv_layout: str = "NHD", device: torch.device | str | None = None) -> None:
        super().__init__(None, kv_layout, False, {}, device=device)

    def plan(
        self,
        qo_indptr: Tensor,
        kv_indptr: Tensor,
        kv_indices: Tensor,
        kv_len_arr: Tensor,
        num_qo_heads: int,
        num_kv_heads: int,
        head_dim_qk: int,
        head_dim_vo: int,
        page_size: int,
        causal: bool = False,
        sm_scale: float | None = None,
        logits_soft_cap: float | None = None,
        q_data_type: torch.dtype | str = torch.bfloat16,
        kv_data_type: torch.dtype | str | None = torch.bfloat16,
        *,
        num_qo_tokens: int | None = None,
        max_q_len: int | None = None,
        batch_invariant: bool = False,
        validate: bool = False,
    ) -> None:
        """Store a step's queries, page table and options, and launch its schedule.

        Parameters
        ----------
        qo_indptr, kv_indptr, kv_indices : Tensor
            Int32: ``[batch_size + 1]``, ``[batch_size + 1]``, ``[kv_indptr[-1]]`` or longer.
        kv_len_arr : Tensor
            Int32, ``[batch_size]``: tokens of each request.
        num_qo_heads, num_kv_heads, head_dim_qk, head_dim_vo, page_size : int
            Of the runs.
        causal, sm_scale, logits_soft_cap, max_q_len, batch_invariant :
            As in `ridgeline.attention`.
        q_data_type, kv_data_type : torch.dtype or str
            One dtype so far.
        num_qo_tokens, validate :
            As in `BatchPrefillWithPagedKVCacheWrapper.plan`.
        """
        options = self._options_of(
            self._where("plan"), causal=causal, sm_scale=sm_scale,
            logits_soft_cap=logits_soft_cap, batch_invariant=batch_invariant,
            lens_flag=LENS_ARE_TOKENS,
        )  # fmt: skip
        self._plan(
            {
                "qo_indptr": ("qo_indptr", qo_indptr),
                "kv_indptr": ("kv_indptr", kv_indptr),
                "kv_indices": ("kv_indices", kv_indices),
                "kv_lens": ("kv_len_arr", kv_len_arr),
            },
            Shape(num_qo_heads, num_kv_heads, head_dim_qk, head_dim_vo, page_size),
            options,
            (q_data_type, kv_data_type, None),
            num_tokens=last_of(qo_indptr, num_qo_tokens),
            max_q_len=max_q_len,
            validate=validate,
        )

    def run(
        self,
        q: Tensor,
        kv_cache: Cache,
        out: Tensor | None = None,
        lse: Tensor | None = None,
        k_scale: float | Tensor | None = None,
        v_scale: float | Tensor | None = None,
        logits_soft_cap: float = 0.0,
        *,
        schedule: Tensor | None = None,
        lse_base: str = "ln",
        lse_layout: str = "NH",
    ) -> tuple[Tensor, Tensor]:
        """Attention of the planned batch over a layer's paged cache.

        Parameters
        ----------
        q : Tensor
            Queries of all requests, ``[num_tokens, num_qo_heads, head_dim_qk]``.
        kv_cache : tuple of Tensor, or Tensor
            As in `BatchPrefillWithPagedKVCacheWrapper.run`.
        out, lse : Tensor, optional
            Where results go.
        k_scale, v_scale : None
            Not there yet.
        logits_soft_cap : float
            This layer's soft cap; 0: the plan's.
        schedule, lse_base, lse_layout :
            As in `BatchPrefillWithPagedKVCacheWrapper.run`.

        Returns
        -------
        out : Tensor
            ``[num_tokens, num_qo_heads, head_dim_vo]``.
        lse : Tensor
            Float32.
        """
        if k_scale is not None or v_scale is not None:
            refuse_given(self._where("run"), k_scale=k_scale, v_scale=v_scale)
        k, v = pair(self._where("run"), kv_cache)
        if logits_soft_cap == 0.0:
            result = self._run(q, k, v, None, out, lse, True, schedule, lse_base, lse_layout)
        else:
            if not logits_soft_cap > 0.0:
                expected, way_out = "a positive number, or 0", "0 is the plan's."
                where = self._where("run")
                _check.fail(where, "logits_soft_cap", expected, logits_soft_cap, way_out)
            options = self._options._replace(logits=(float(logits_soft_cap), 0, 1.0, 1e4, False))
            result = self._run_with(
                q, k, v, options, out, lse, True, schedule, lse_base, lse_layout
            )  # fmt: skip
        assert isinstance(result, tuple)
        return result
