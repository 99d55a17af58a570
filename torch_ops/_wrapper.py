"""What every wrapper does: keep a plan, share its work list, call the op.

`Wrapper` stores index tensors and options (`_plan`), makes work lists and shares them between the
runs of a plan or of a CUDA-graph capture (`_list_for`), and calls the narrow op wherever it serves
(`_run`). All checks that a plan can do are done there: a run is little more than the op's own call.
"""

from __future__ import annotations

from collections.abc import Mapping
from ctypes import c_float
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import _check
from ._attention_cpu import check_values, one_of
from ._batch_attention_cpu import BATCH_INVARIANT, CAUSAL, HND, validate_contents
from ._batch_ops import (
    LSE,
    LSE_EAGER,
    NARROW,
    NARROW_EAGER,
    PLAIN_EAGER,
    PLAIN_LENGTH,
    PLAIN_LSE_EAGER,
    POS_ENCODING_MODES,
    SCHEDULE,
    LogitOptions,
    Problem,
    Result,
    attend,
    trimmed,
)
from ._capture import is_capturing
from ._older_verbs import OlderVerbs
from ._ops import is_compiling, is_grad_enabled, refuse_grad
from ._prepared import (
    MOST_PREPARED,
    PREPARE,
    PREPARED,
    PREPARED_LSE,
    RUNS_BEFORE,
    PreparedCall,
)
from ._work_lists import WorkLists
from ._wrapper_options import dtypes_of, refuse_backend

# Index tensors, in the order of the ops' arguments.
_INDEX = ("qo_indptr", "kv_indptr", "kv_indices", "kv_lens")
Index = tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]


class Options(NamedTuple):
    """Options of a run, as the ops take them."""

    flags: int
    window_left: int
    sm_scale: float | None
    logits: LogitOptions | None  # None where they have their defaults


class Shape(NamedTuple):
    """Head counts, head dims and page size of a plan."""

    num_qo_heads: int
    num_kv_heads: int
    head_dim_qk: int
    head_dim_vo: int
    page_size: int


class Wrapper(OlderVerbs):
    """Base of the wrappers; the classes that callers name add their own arguments.

    Index tensors are called as the op calls them: qo_indptr, kv_indptr, kv_indices, kv_lens.
    """

    def __init__(
        self,
        float_workspace_buffer: Tensor | None,
        kv_layout: str,
        use_cuda_graph: bool,
        buffers: Mapping[str, tuple[str, Tensor | None]],
        backend: str = "auto",
        device: torch.device | str | None = None,
    ) -> None:
        self._name = type(self).__name__
        one_of(self._name, "kv_layout", kv_layout, ("NHD", "HND"))
        refuse_backend(self._name, backend)
        self._kv_layout = kv_layout
        self._use_cuda_graph = bool(use_cuda_graph)
        self._buffers: dict[str, Tensor] = {}
        for kind, (name, buffer) in buffers.items():
            if (buffer is not None) != self._use_cuda_graph:
                expected = "a tensor exactly when use_cuda_graph is True"
                got = "None" if buffer is None else "a tensor"
                _check.fail(self._name, name, expected, got, "Pass both or neither.")
            if buffer is not None:
                _check_int32(self._name, name, buffer)
                self._buffers[kind] = buffer
        given = device
        if given is None and float_workspace_buffer is not None:
            given = float_workspace_buffer.device
        if given is None and self._buffers:
            given = next(iter(self._buffers.values())).device
        self._device = None if given is None else torch.device(given)
        # Why not with buffers: the graph that reads them contains its own schedule.
        self._schedules_in_plan = not self._use_cuda_graph
        self._on_gpu = False
        self._gpu = 0  # its number, where it is on one
        self._index: Index | None = None
        self._options = Options(0, -1, None, None)
        self._problem: Problem = ()
        self._unvalidated = False
        self._lists = WorkLists()
        # By the window that a run was given: what is prepared, and how many runs came before.
        self._calls: dict[int | None, PreparedCall | None] = {}
        self._num_runs: dict[int | None, int] = {}
        self._num_prepared = 0
        self._captured_indices: list[Index] = []

    @property
    def is_cuda_graph_enabled(self) -> bool:
        """Whether the wrapper was made with ``use_cuda_graph=True``."""
        return self._use_cuda_graph

    @property
    def device(self) -> torch.device | None:
        """Where the index tensors are; None before the first plan where nothing has told."""
        return self._device

    def schedule(self, num_qo_tokens: int, *, window_left: int | None = None) -> Tensor:
        """Make the work list of the plan, for the `schedule` argument of `run`.

        Eager runs share one by themselves. A compiled graph makes it once with this (or with
        `ridgeline.schedule`) and passes it to every layer.

        Parameters
        ----------
        num_qo_tokens : int
            Rows of ``q``.
        window_left : int, optional
            The runs' window, where it is not the plan's.

        Returns
        -------
        Tensor
            Int32.
        """
        self._planned()
        options = self._options
        window = options.window_left if window_left is None else window_left
        return self._make_list(num_qo_tokens, options.flags, window)

    def _plan(
        self,
        index: Mapping[str, tuple[str, Tensor]],
        shape: Shape,
        options: Options,
        dtypes: tuple[object, object, object],
        *,
        num_tokens: int | None,
        max_q_len: int | None = None,
        non_blocking: bool = True,
        validate: bool = False,
    ) -> None:
        """Store a plan; make its work list where the number of queries is known."""
        where = self._where("plan")
        if shape.num_kv_heads < 1 or shape.num_qo_heads % shape.num_kv_heads:
            expected = f"a multiple of num_kv_heads ({shape.num_kv_heads})"
            way_out = "Pass the model's numbers of heads."
            _check.fail(where, "num_qo_heads", expected, shape.num_qo_heads, way_out)
        if max_q_len is not None and max_q_len < 0:
            _check.fail(where, "max_q_len", "at least 0", max_q_len, "Leave it out.")
        dtype = dtypes_of(where, *dtypes)
        device = self._device_for(index)
        batch_size = -1
        for kind, (name, tensor) in index.items():
            self._check_index(where, kind, name, tensor, device)
            if kind != "kv_indices" and name != "q_len_per_req":
                size = tensor.shape[0] if kind == "kv_lens" else tensor.shape[0] - 1
                if size < 0 or (size != batch_size and batch_size >= 0):
                    expected = "one batch_size for all index tensors"
                    got = f"shape {list(tensor.shape)}"
                    way_out = "indptr tensors have batch_size + 1 elements, lengths batch_size."
                    _check.fail(where, name, expected, got, way_out)
                batch_size = size
        # Every tensor is checked before the first buffer changes.
        placed: dict[str, Tensor | None] = dict.fromkeys(_INDEX)
        for kind, (_, tensor) in index.items():
            placed[kind] = self._place(kind, tensor, device, non_blocking)
        qo_indptr, kv_indptr, kv_indices, kv_lens = placed.values()
        self._index = (qo_indptr, kv_indptr, kv_indices, kv_lens)
        self._q_dtype = dtype
        self._shape = shape
        self._options = options
        # Without qo_indptr every request has one query, whatever the number.
        self._max_q_len = -1 if max_q_len is None or qo_indptr is None else max_q_len
        self._problem = self._problem_of(options)
        self._unvalidated = validate
        self._lists.clear()
        self._calls, self._num_runs = {}, {}
        self._num_prepared = 0
        if num_tokens is not None and self._schedules_in_plan:
            self._list_for((num_tokens, options.flags, options.window_left))

    def _device_for(self, index: Mapping[str, tuple[str, Tensor]]) -> torch.device:
        """Device of the plan: the one that was given, else that of a tensor on a GPU."""
        device = self._device
        if device is None:
            devices = [tensor.device for _, tensor in index.values()]
            device = next((d for d in devices if d.type != "cpu"), devices[0])
            if device.type == "cpu" and torch.cuda.is_available():
                device = torch.device("cuda", torch.cuda.current_device())
        if device.type == "cuda" and device.index is None:
            device = torch.device("cuda", torch.cuda.current_device())
        self._device = device
        self._on_gpu = device.type == "cuda"
        self._gpu = device.index or 0
        return device

    def _check_index(
        self, where: str, kind: str, name: str, tensor: Tensor, device: torch.device
    ) -> None:
        if tensor.dtype is not torch.int32 or tensor.dim() != 1 or not tensor.is_contiguous():
            _check_int32(where, name, tensor)
        if tensor.device != device and tensor.device.type != "cpu":
            expected = f"device {device}, or the CPU"
            way_out = f"Move it with .to({str(device)!r}), or make the wrapper on its device."
            _check.fail(where, name, expected, tensor.device, way_out)
        buffer = self._buffers.get(kind)
        if buffer is not None and tensor.shape[0] > buffer.shape[0]:
            expected = f"at most the {buffer.shape[0]} elements of its buffer"
            way_out = "Make the wrapper with larger buffers."
            _check.fail(where, name, expected, tensor.shape[0], way_out)

    def _place(self, kind: str, tensor: Tensor, device: torch.device, non_blocking: bool) -> Tensor:
        """An index tensor on the device: itself, a copy on its way, or the buffer that has it."""
        buffer = self._buffers.get(kind)
        if buffer is None:
            there = tensor.device == device
            return tensor if there else tensor.to(device, non_blocking=non_blocking)
        length, capacity = tensor.shape[0], buffer.shape[0]
        buffer[:length].copy_(tensor, non_blocking=non_blocking)
        if length < capacity and kind == "kv_lens":
            buffer[length:].zero_()
        elif length < capacity and kind != "kv_indices":
            # Requests that are not there are empty ones.
            buffer[length:].copy_(buffer[length - 1 : length].expand(capacity - length))
        return buffer

    def _run(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        window_left: int | None,
        out: Tensor | None,
        lse: Tensor | None,
        return_lse: bool,
        schedule: Tensor | None,
        lse_base: str,
        lse_layout: str,
    ) -> Result:
        """A run with the plan's options, and its window where none is given."""
        plain = (
            (out is None and lse is None and schedule is None)
            and (lse_base == "ln" and lse_layout == "NH")
            and not is_compiling()
        )
        if plain:
            call = self._calls.get(window_left)
            if call is None or not (call.report is None or call.report.is_awaited()):
                call = self._prepare(q, k, v, window_left)
            if call is not None:
                if is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad):
                    refuse_grad(self._where("run"), q, k, v)
                again: Any
                if return_lse:
                    again = PREPARED_LSE(q, k, v, call.number)
                    found = again[0] is not None
                else:
                    again = PREPARED(q, k, v, call.number)
                    found = again is not None
                if found:
                    result: Result = again
                    return result
                self._prepare(q, k, v, window_left)
        options = self._options if window_left is None else self._with_window(window_left)
        return self._run_with(
            q, k, v, options, out, lse, return_lse, schedule, lse_base, lse_layout
        )  # fmt: skip

    def _prepare(
        self, q: Tensor, k: Tensor, v: Tensor, window_left: int | None
    ) -> PreparedCall | None:
        """Prepare this run and others that look like it, once a plan has had a few."""
        before, runs = self._calls.get(window_left), self._num_runs.get(window_left, 0)
        if runs < RUNS_BEFORE:
            self._num_runs[window_left] = runs + 1
            return None
        if before is None and self._num_prepared == MOST_PREPARED:
            return None
        options = self._options if window_left is None else self._with_window(window_left)
        key = (q.shape[0], options.flags, options.window_left)
        work = self._lists.eager.get(key)
        if not self._on_gpu or work is None or is_capturing(self._gpu):
            return None
        self._calls[window_left] = None
        if q.dtype != self._q_dtype or self._unvalidated or self._num_prepared == MOST_PREPARED:
            return None
        self._num_prepared += 1
        report, told = self._lists.reports.get(key), 0
        if report is not None:
            told = report.flags() if report.settled is None else report.settled
            report = report if report.settled is None else None
        beside = before.number if before is not None and before.report is report else 0
        assert self._index is not None
        qo_indptr, _, kv_indices, _ = self._index
        try:
            number = PREPARE(
                q, k, v, kv_indices, work, beside, qo_indptr, options.flags | told,
                self._max_q_len, options.window_left, options.sm_scale, *(options.logits or ()),
            )  # fmt: skip
        except (RuntimeError, ValueError, TypeError):
            return None  # the run itself fails too, and says why
        if before is None or number != before.number:
            before = PreparedCall(number, report) if number else None
        self._calls[window_left] = before
        return before

    def _run_with(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        options: Options,
        out: Tensor | None,
        lse: Tensor | None,
        return_lse: bool,
        schedule: Tensor | None,
        lse_base: str,
        lse_layout: str,
    ) -> Result:
        index = self._index
        if index is None:
            self._planned()
        if is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad):
            refuse_grad(self._where("run"), q, k, v)
        if q.dtype != self._q_dtype or self._unvalidated:
            self._check_run(q, k, options)
        compiling = is_compiling()
        report = None
        if schedule is None:
            if compiling:
                schedule = self._make_list(q.shape[0], options.flags, options.window_left)
            else:
                key = (q.shape[0], options.flags, options.window_left)
                # Why looked at here: a call costs 0.1 us, and most runs find their list.
                captured = self._on_gpu and is_capturing(self._gpu)
                if not captured:
                    schedule = self._lists.eager.get(key)
                if schedule is None:
                    schedule = self._list_for(key)
                if self._lists.reports and not captured:
                    report = self._lists.reports.get(key)
        problem = self._problem if options is self._options else self._problem_of(options)
        if report is not None:
            told = report.settled
            if told is None:
                told = report.flags()
            if told:
                problem = (index[0], options.flags | told, *problem[2:])  # type: ignore[index]
        if lse_base != "ln" or lse_layout != "NH":
            one_of(self._where("run"), "lse_base", lse_base, ("ln", "log2"))
            one_of(self._where("run"), "lse_layout", lse_layout, ("NH", "HN"))
        try:
            plain = options.logits is None and lse_base == "ln" and lse_layout == "NH"
            if plain and out is None and lse is None:
                if compiling:
                    op = LSE if return_lse else NARROW
                elif len(problem) <= PLAIN_LENGTH - 2:
                    op = PLAIN_LSE_EAGER if return_lse else PLAIN_EAGER
                else:
                    op = LSE_EAGER if return_lse else NARROW_EAGER
                result: Result = op(q, k, v, index[2], schedule, *problem)  # type: ignore[index]
                return result
            return attend(
                self._where("run"), (q, k, v), (index[2], schedule, *problem), options.logits,  # type: ignore[index]
                out, lse, return_lse, lse_base, lse_layout,
            )  # fmt: skip
        except (RuntimeError, ValueError, TypeError):
            self._explain(q, k, v)
            raise

    def _list_for(self, key: tuple[int, int, int]) -> Tensor:
        """The work list of a number of queries, flags and window, made when first asked for.

        The runs of this plan share it, or those of this capture where the driver tells which it is.
        """
        gpu = self._device if self._on_gpu else None
        work = self._lists.find(key, self._make_list, gpu, self._keep_index)
        assert self._index is not None
        # Why not of decodes: they are one launch as they are.
        if gpu is not None and self._index[0] is not None and self._lists.eager.get(key) is work:
            self._lists.keep_report(key)
        return work

    def _keep_index(self) -> None:
        """Keep the index tensors: a graph reads them at every replay, whatever is planned later."""
        if not self._use_cuda_graph:
            assert self._index is not None
            self._captured_indices.append(self._index)

    def _make_list(self, num_tokens: int, flags: int, window_left: int) -> Tensor:
        assert self._index is not None
        qo_indptr, kv_indptr, _, kv_lens = self._index
        shape = self._shape
        work: Tensor = SCHEDULE(
            qo_indptr, kv_indptr, kv_lens, flags & ~HND, shape.page_size, num_tokens,
            shape.num_qo_heads, shape.num_kv_heads, shape.head_dim_qk, shape.head_dim_vo,
            self._max_q_len, window_left,
        )  # fmt: skip
        return work

    def _problem_of(self, options: Options) -> Problem:
        """The ops' arguments behind the work list; on a GPU that knows where requests are."""
        assert self._index is not None
        qo_indptr, kv_indptr, _, kv_lens = self._index
        lengths = (None, None) if self._on_gpu else (kv_indptr, kv_lens)
        flags, window_left, sm_scale, _ = options
        if self._on_gpu and sm_scale is not None and self._is_default(sm_scale):
            sm_scale = None
        problem = (qo_indptr, flags, self._max_q_len, window_left, sm_scale, *lengths)
        return trimmed(None, None, *problem)[2:]

    def _is_default(self, sm_scale: float) -> bool:
        """Whether a kernel, which takes a float, gets the scale that it has by itself."""
        default = c_float(self._shape.head_dim_qk**-0.5).value
        return isinstance(sm_scale, float) and c_float(sm_scale).value == default

    def _options_of(
        self,
        where: str,
        *,
        causal: bool = False,
        window_left: int = -1,
        logits_soft_cap: float | None = None,
        sm_scale: float | None = None,
        pos_encoding_mode: str = "NONE",
        rope_scale: float | None = None,
        rope_theta: float | None = None,
        use_fp16_qk_reduction: bool = False,
        batch_invariant: bool = False,
        lens_flag: int = 0,
    ) -> Options:
        """Check options and bring them into the form of the ops."""
        if pos_encoding_mode == "ALIBI":
            way_out = 'Use "NONE" or "ROPE_LLAMA".'
            _check.not_yet(where, "pos_encoding_mode", pos_encoding_mode, way_out)
        one_of(where, "pos_encoding_mode", pos_encoding_mode, tuple(POS_ENCODING_MODES))
        for name, value in (("rope_scale", rope_scale), ("rope_theta", rope_theta)):
            if value is not None and pos_encoding_mode == "NONE":
                way_out = 'Pass pos_encoding_mode="ROPE_LLAMA", or leave it out.'
                _check.fail(where, name, "None with pos_encoding_mode NONE", value, way_out)
        cap = 0.0 if logits_soft_cap is None else float(logits_soft_cap)
        rope = (
            1.0 if rope_scale is None else float(rope_scale),
            1e4 if rope_theta is None else float(rope_theta),
        )
        check_values(where, window_left, cap, *rope)
        flags = (
            (HND if self._kv_layout == "HND" else 0)
            + (CAUSAL if causal else 0)
            + (BATCH_INVARIANT if batch_invariant else 0)
            + lens_flag
        )
        plain = cap == 0.0 and pos_encoding_mode == "NONE" and not use_fp16_qk_reduction
        mode = POS_ENCODING_MODES[pos_encoding_mode]
        return Options(
            flags,
            window_left,
            None if sm_scale is None else float(sm_scale),
            None if plain else (cap, mode, *rope, bool(use_fp16_qk_reduction)),
        )

    def _with_window(self, window_left: int) -> Options:
        """The plan's options with another window."""
        if window_left < -1:
            where = self._where("run")
            _check.fail(where, "window_left", "at least -1", window_left, "-1 turns it off.")
        return self._options._replace(window_left=window_left)

    def _check_run(self, q: Tensor, k: Tensor, options: Options) -> None:
        """What a run asks beside what the op does: the plan's dtype, and contents if asked to."""
        where = self._where("run")
        if q.dtype != self._q_dtype:
            expected = f"dtype {self._q_dtype}, the q_data_type of plan"
            way_out = f"Pass q_data_type={q.dtype} to plan."
            raise TypeError(_check.message(where, "q", expected, q.dtype, way_out))
        if is_compiling() or (self._on_gpu and is_capturing(self._gpu)):
            way_out = "Run once eagerly first, or plan without validate=True."
            _check.fail(where, "validate", "False inside a graph", True, way_out)
        assert self._index is not None
        validate_contents(where, q, k, *self._index, options.flags)
        self._unvalidated = False

    def _explain(self, q: Tensor, k: Tensor, v: Tensor) -> None:
        """Raise where tensors differ from what the plan was told."""
        if k.dim() == 5:
            k = k.select(1, 0)
        if v.dim() == 5:
            v = v.select(1, 0)
        if q.dim() != 3 or k.dim() not in (3, 4) or v.dim() != k.dim():
            return
        shape = self._shape
        heads_dim, tokens_dim = (-3, -2) if self._kv_layout == "HND" else (-2, -3)
        got = Shape(
            q.shape[1],
            k.shape[heads_dim],
            q.shape[2],
            v.shape[-1],
            k.shape[tokens_dim] if k.dim() == 4 else shape.page_size,
        )
        for name, planned, given in zip(Shape._fields, shape, got, strict=True):
            if planned != given:
                expected = f"{planned}, as plan was told"
                way_out = "Plan with the numbers of these tensors (and check kv_layout)."
                _check.fail(self._where("run"), name, expected, given, way_out)

    def _planned(self) -> None:
        if self._index is None:
            raise RuntimeError(f"ridgeline.{self._where('run')}: call plan() first.")

    def _where(self, method: str) -> str:
        return f"{self._name}.{method}"


def _check_int32(where: str, name: str, tensor: Tensor) -> None:
    _check.dtype(where, name, tensor, (torch.int32,))
    _check.rank(where, name, tensor, 1)
    _check.last_stride(where, name, tensor)
