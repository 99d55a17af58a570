"""Two batches in one launch, as the wrappers run them: `attention_pair` and its work lists.

Segment a has any cache and mostly the longer queries (a prefill, a shared prefix), segment b a plan
over a paged cache.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from . import _batch_pair_cpu as _batch_pair_cpu  # registers the fakes
from . import _check
from ._batch_attention_cpu import BATCH_INVARIANT, HND
from ._batch_ops import Cache, pair
from ._ops import find_op, is_compiling, refuse_grad
from ._work_lists import WorkLists
from ._wrapper import Index, Options, Wrapper

_PAIR = find_op("attention_pair")
_SCHEDULE = find_op("attention_pair_schedule")

_NO_INDEX: Index = (None, None, None, None)
_PLAIN = (0, 1.0, 1e4, False)  # options of logits but for the soft cap


class Segment(NamedTuple):
    """Tensors and options of a segment."""

    q: Tensor
    k: Tensor
    v: Tensor
    options: Options


def in_one_launch(a: Options, b: Options, head_dim: int) -> bool:
    """Whether one launch serves both: nothing rotates, and logits have one scale and cap."""
    for options in (a, b):
        if options.flags & BATCH_INVARIANT:
            return False
        if options.logits is not None and options.logits[1:] != _PLAIN:
            return False
    caps = [0.0 if options.logits is None else options.logits[0] for options in (a, b)]
    if caps[0] != caps[1] or a.sm_scale == b.sm_scale:
        return caps[0] == caps[1]
    default = head_dim**-0.5
    return (default if a.sm_scale is None else a.sm_scale) == (
        default if b.sm_scale is None else b.sm_scale
    )


def planned(part: Wrapper, q: Tensor, paged_kv_cache: Cache, options: Options) -> Segment:
    """The segment of a planned wrapper, checked as its own run would check it."""
    part._planned()
    k, v = pair(part._where("run"), paged_kv_cache)
    if q.dtype != part._q_dtype or part._unvalidated:
        part._check_run(q, k, options)
    return Segment(q, k, v, options)


class Segments:
    """Launches of the plan `b` beside the plan `a`, or (None) beside one request of dense keys."""

    def __init__(self, a: Wrapper | None, b: Wrapper) -> None:
        self._a, self._b = a, b
        self._lists = WorkLists()

    @property
    def parts(self) -> tuple[Wrapper, Wrapper]:
        """Both plans, where both are plans."""
        assert self._a is not None
        return self._a, self._b

    def clear(self) -> None:
        """Forget all work lists: there is another plan."""
        self._lists.clear()

    def schedule(
        self,
        num_tokens_a: int,
        num_tokens_b: int,
        options_a: Options,
        options_b: Options,
        single_kv_len: int = 0,
    ) -> Tensor:
        """Make a work list; `single_kv_len` are the keys of the one request."""
        self._b._planned()
        return self._make_list(
            *_key(num_tokens_a, num_tokens_b, options_a, options_b, single_kv_len)
        )

    def run(self, a: Segment, b: Segment, schedule: Tensor | None) -> tuple[Tensor, Tensor]:
        """Results and LSE of both, one behind the other."""
        refuse_grad(self._b._where("run"), a.q, a.k, a.v, b.q, b.k, b.v)
        index_a = _NO_INDEX if self._a is None else self._a._index
        index_b = self._b._index
        assert index_a is not None
        assert index_b is not None
        try:
            if schedule is None and not is_compiling():
                schedule = self._list_for(a, b)
            cap = 0.0 if a.options.logits is None else a.options.logits[0]
            result: tuple[Tensor, Tensor] = _PAIR(
                a.q, a.k, a.v, *_of_op(index_a), b.q, b.k, b.v, *_of_op(index_b), schedule,
                a.options.flags, b.options.flags, -1 if self._a is None else self._a._max_q_len,
                self._b._max_q_len, a.options.window_left, b.options.window_left,
                b.options.sm_scale if a.options.sm_scale is None else a.options.sm_scale, cap,
            )  # fmt: skip
        except (RuntimeError, ValueError, TypeError):
            if self._a is not None:
                self._a._explain(a.q, a.k, a.v)
            self._b._explain(b.q, b.k, b.v)
            raise
        return result

    def _list_for(self, a: Segment, b: Segment) -> Tensor:
        keys = 0
        if self._a is None:
            _check.rank(self._b._where("run"), "k", a.k, 3)
            keys = a.k.shape[1 if a.options.flags & HND else 0]
        key = _key(len(a.q), len(b.q), a.options, b.options, keys)
        gpu = self._b._device if self._b._on_gpu else None
        return self._lists.find(key, self._make_list, gpu, self._keep_index)

    def _keep_index(self) -> None:
        for part in (self._a, self._b):
            if part is not None:
                part._keep_index()

    def _make_list(
        self,
        num_tokens_a: int,
        num_tokens_b: int,
        flags_a: int,
        flags_b: int,
        window_left_a: int,
        window_left_b: int,
        single_kv_len: int,
    ) -> Tensor:
        a, b = self._a, self._b
        index_a = _NO_INDEX if a is None else a._index
        assert index_a is not None
        assert b._index is not None
        shape = b._shape
        work: Tensor = _SCHEDULE(
            index_a[0], index_a[1], index_a[3], b._index[0], b._index[1], b._index[3], flags_a,
            flags_b, 1 if a is None else a._shape.page_size, shape.page_size, num_tokens_a,
            num_tokens_b, shape.num_qo_heads, shape.num_kv_heads, shape.head_dim_qk,
            shape.head_dim_vo, -1 if a is None else a._max_q_len, b._max_q_len, window_left_a,
            window_left_b, single_kv_len,
        )  # fmt: skip
        return work


def _key(
    num_tokens_a: int, num_tokens_b: int, a: Options, b: Options, single_kv_len: int
) -> tuple[int, int, int, int, int, int, int]:
    """What a list depends on beside the plans."""
    flags = (a.flags & ~HND, b.flags & ~HND)
    return (num_tokens_a, num_tokens_b, *flags, a.window_left, b.window_left, single_kv_len)


def _of_op(index: Index) -> Index:
    """Index tensors in the order of `attention_pair`."""
    qo_indptr, kv_indptr, kv_indices, kv_lens = index
    return kv_indices, qo_indptr, kv_indptr, kv_lens
