"""What the wrappers over a paged cache share: `run` and its older verbs."""

from __future__ import annotations

from typing import Any, Literal, overload

from torch import Tensor

from . import _check
from ._attention_cpu import one_of
from ._batch_ops import Cache, Result, pair
from ._wrapper import Options, Wrapper
from ._wrapper_options import refuse_run_options


class PagedWrapper(Wrapper):
    """Base of the wrappers whose `run` takes queries and a paged cache."""

    _q_len_per_req: int | None = None

    @overload
    def run(
        self,
        q: Tensor,
        paged_kv_cache: Cache,
        *args: object,
        q_scale: float | Tensor | None = ...,
        k_scale: float | Tensor | None = ...,
        v_scale: float | Tensor | None = ...,
        out: Tensor | None = ...,
        lse: Tensor | None = ...,
        return_lse: Literal[False] = ...,
        enable_pdl: bool | None = ...,
        window_left: int | None = ...,
        sinks: Tensor | None = ...,
        q_len_per_req: int | None = ...,
        schedule: Tensor | None = ...,
        lse_base: str = ...,
        lse_layout: str = ...,
    ) -> Tensor: ...

    @overload
    def run(
        self,
        q: Tensor,
        paged_kv_cache: Cache,
        *args: object,
        return_lse: Literal[True],
        q_scale: float | Tensor | None = ...,
        k_scale: float | Tensor | None = ...,
        v_scale: float | Tensor | None = ...,
        out: Tensor | None = ...,
        lse: Tensor | None = ...,
        enable_pdl: bool | None = ...,
        window_left: int | None = ...,
        sinks: Tensor | None = ...,
        q_len_per_req: int | None = ...,
        schedule: Tensor | None = ...,
        lse_base: str = ...,
        lse_layout: str = ...,
    ) -> tuple[Tensor, Tensor]: ...

    def run(
        self,
        q: Tensor,
        paged_kv_cache: Cache,
        *args: object,
        q_scale: float | Tensor | None = None,
        k_scale: float | Tensor | None = None,
        v_scale: float | Tensor | None = None,
        out: Tensor | None = None,
        lse: Tensor | None = None,
        return_lse: bool = False,
        enable_pdl: bool | None = None,
        window_left: int | None = None,
        sinks: Tensor | None = None,
        q_len_per_req: int | None = None,
        schedule: Tensor | None = None,
        lse_base: str = "ln",
        lse_layout: str = "NH",
    ) -> Result:
        """Attention of the planned batch over a layer's paged cache.

        Parameters
        ----------
        q : Tensor
            Queries of all requests, ``[num_tokens, num_qo_heads, head_dim_qk]``; in decode one row
            a request (or `q_len_per_req` of plan). Rows past ``qo_indptr[-1]`` belong to none.
        paged_kv_cache : tuple of Tensor, or Tensor
            ``[num_pages, page_size, num_kv_heads, head_dim]`` (NHD) or ``[num_pages, num_kv_heads,
            page_size, head_dim]`` (HND) for keys and for values, or both in one tensor with a
            dimension of 2 after the pages.
        *args, q_scale, k_scale, v_scale, sinks : None
            Not there yet.
        out, lse : Tensor, optional
            Where results go; `lse` is filled with `return_lse` or without.
        return_lse : bool
            Also return the log-sum-exp of the logits.
        enable_pdl : bool, optional
            Accepted for compatibility: launches overlap where the GPU can do that.
        window_left : int, optional
            This layer's window, where it is not the plan's.
        q_len_per_req : int, optional
            That of plan, for callers that pass it here as well.
        schedule : Tensor, optional
            A work list of this plan (`schedule`), of this mask and number of queries. None: eager
            runs of a plan share one, and so do the runs of a CUDA-graph capture; under
            ``torch.compile`` each run makes its own.
        lse_base : {"ln", "log2"}
            Logarithm of the LSE.
        lse_layout : {"NH", "HN"}
            ``[num_tokens, num_qo_heads]`` or ``[num_qo_heads, num_tokens]``.

        Returns
        -------
        out : Tensor
            ``[num_tokens, num_qo_heads, head_dim_vo]``. Rows without a visible key, and rows of no
            request, are 0.
        lse : Tensor
            Float32, with `return_lse` only; -inf where no key is visible.
        """
        if (
            args
            or (q_scale is not None or k_scale is not None or v_scale is not None)
            or (sinks is not None or enable_pdl is not None or q_len_per_req is not None)
        ):
            self._refuse(args, q_scale, k_scale, v_scale, sinks, enable_pdl, q_len_per_req)
        if type(paged_kv_cache) is tuple and len(paged_kv_cache) == 2:
            k, v = paged_kv_cache
        else:
            k, v = pair(self._where("run"), paged_kv_cache)
        return self._run(
            q, k, v, window_left, out, lse, return_lse, schedule, lse_base, lse_layout
        )  # fmt: skip

    def run_return_lse(
        self, q: Tensor, paged_kv_cache: Cache, *args: object, **options: Any
    ) -> tuple[Tensor, Tensor]:
        """`run` with ``return_lse=True``; the other arguments are its own."""
        result: tuple[Tensor, Tensor]
        result = self.run(q, paged_kv_cache, *args, **{**options, "return_lse": True})
        return result

    def _forward(
        self,
        q: Tensor,
        paged_kv_cache: Cache,
        options: Options,
        return_lse: bool,
        schedule: Tensor | None = None,
        **scales: float | Tensor | None,
    ) -> Any:
        """A run with options of its own, as the older verbs have it."""
        refuse_run_options(self._where("forward"), (), **scales)
        k, v = pair(self._where("run"), paged_kv_cache)
        return self._run_with(q, k, v, options, None, None, return_lse, schedule, "ln", "NH")

    def _refuse(
        self,
        args: tuple[object, ...],
        q_scale: object,
        k_scale: object,
        v_scale: object,
        sinks: object,
        enable_pdl: bool | None,
        q_len_per_req: int | None,
    ) -> None:
        """Raise for arguments that are not there yet, or not those of the plan."""
        where = self._where("run")
        refuse_run_options(
            where, args, q_scale=q_scale, k_scale=k_scale, v_scale=v_scale, sinks=sinks
        )
        one_of(where, "enable_pdl", enable_pdl, (None, False, True))
        if q_len_per_req is not None and q_len_per_req != self._q_len_per_req:
            expected = f"{self._q_len_per_req}, as in plan"
            way_out = "Pass it to the plan of a decode wrapper."
            _check.fail(where, "q_len_per_req", expected, q_len_per_req, way_out)
