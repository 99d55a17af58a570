"""Sampling without sorting: from logits or probabilities to tokens, and the filters on the way.

What all samplers share:

- Rows are ``[batch_size, vocab_size]``: logits in float32, float16 or bfloat16, probabilities in
  float32, which need not sum to 1; any row stride. With `indices`, int32 or int64 ``[num_rows]``,
  output row i is drawn from input row ``indices[i]``.
- Filters keep the first tokens of one order, the larger first and of equal ones the lower index.
  `top_k` keeps k of them (below 1 or from the vocabulary's size on: all), `top_p` the fewest whose
  probabilities reach p (0: one token; 1: all), `min_p` those of at least `min_p` times the largest
  probability. Thresholds are numbers or tensors of one value a row: float32, and int32 or int64 for
  `top_k`. They are found exactly: no token outside the set is drawn, except that float32 rounding
  of the probabilities may move top-p's end by tokens within 1e-6 of it.
- A draw is a function of the row's own seed and offset (Philox4x32-10) and of the row: not of its
  place in the batch or its neighbours, and the same on CPU and GPU but where float32 rounding of a
  probability decides. `seed` and `offset` are int64 tensors of one value a row; a number counts
  for every row, so equal rows then draw equal tokens. Without a seed one `torch.randint` draws a
  seed a row, from `generator` or torch's own, so that CUDA graphs and torch.compile draw anew.
- A row with NaN, an infinity above (or a negative probability), or without mass gives token 0 and
  ``valid`` False.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from . import _check
from . import _sampling_cpu as _sampling_cpu  # registers the CPU implementations
from ._ops import fake_impl, find_op, refuse_grad

__all__ = [
    "chain_speculative_sampling",
    "min_p_sampling_from_probs",
    "sample_from_logits",
    "sampling_from_logits",
    "sampling_from_probs",
    "softmax",
    "top_k",
    "top_k_mask_logits",
    "top_k_renorm_probs",
    "top_k_sampling_from_probs",
    "top_k_top_p_sampling_from_logits",
    "top_k_top_p_sampling_from_probs",
    "top_p_renorm_probs",
    "top_p_sampling_from_probs",
]

_CHAIN_SPECULATIVE_SAMPLING = find_op("chain_speculative_sampling")
_SAMPLE = find_op("sample")
_SOFTMAX = find_op("softmax")
_TOP_K = find_op("top_k")
_TOP_K_MASK_LOGITS = find_op("top_k_mask_logits")
_TOP_K_RENORM_PROBS = find_op("top_k_renorm_probs")
_TOP_P_RENORM_PROBS = find_op("top_p_renorm_probs")

_MAX_SORTED_K = 256  # that the op sorts itself

Value = Tensor | float
Integer = Tensor | int
FilterOrder = Literal["top_k_first", "joint"]


def softmax(logits: Tensor, temperature: Value | None = None) -> Tensor:
    """Probabilities of logits: ``exp(logits / temperature)`` over their sum.

    Parameters
    ----------
    logits : Tensor
        ``[batch_size, vocab_size]``, float32, float16 or bfloat16.
    temperature : float or Tensor, optional
        A number or float32 ``[batch_size]``; default 1. 0 divides the mass among the largest.

    Returns
    -------
    Tensor
        ``[batch_size, vocab_size]``, float32. Rows with NaN, +inf or nothing above -inf are NaN.

    Examples
    --------
    >>> import torch, ridgeline
    >>> ridgeline.softmax(torch.tensor([[0.0, 1.0]]))
    tensor([[0.2689, 0.7311]])
    """
    refuse_grad("softmax", logits)
    tensor, value = _split(temperature, 1.0)
    return _SOFTMAX(logits, tensor, value)  # type: ignore[no-any-return]


def sample_from_logits(
    logits: Tensor,
    temperature: Value = 1.0,
    top_k: Integer = 0,
    top_p: Value = 1.0,
    min_p: Value = 0.0,
    *,
    indices: Tensor | None = None,
    filter_apply_order: FilterOrder = "top_k_first",
    generator: torch.Generator | None = None,
    seed: Integer | None = None,
    offset: Integer | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """From logits to tokens in one call: temperature, top-k, top-p, min-p, draw, log-probability.

    Parameters
    ----------
    logits : Tensor
        ``[batch_size, vocab_size]``, float32, float16 or bfloat16; -inf masks a token.
    temperature : float or Tensor
        A number or float32 ``[num_rows]``. 0: greedy, the largest logit of the lowest index.
    top_k, top_p, min_p
        Filters, as the module describes them; top-p is of what top-k leaves, min-p is relative to
        the row's largest probability.
    indices : Tensor, optional
        Which row each output row is drawn from.
    filter_apply_order : {"top_k_first", "joint"}
        "joint": top-p is of the whole row's mass, not of what top-k leaves.
    generator : torch.Generator, optional
        Where seeds come from when none are given.
    seed, offset : int or Tensor, optional
        int64 ``[num_rows]``, or a number for all rows.

    Returns
    -------
    tokens : Tensor
        ``[num_rows]``, int32.
    log_probs : Tensor
        ``[num_rows]``, float32: of the tokens under the softmax of the whole row at its
        temperature (at 1 for greedy rows), before any filter.
    valid : Tensor
        ``[num_rows]``, bool.

    Examples
    --------
    >>> import torch, ridgeline
    >>> logits = torch.tensor([[0.0, 5.0, 1.0]])
    >>> tokens, log_probs, valid = ridgeline.sample_from_logits(logits, temperature=0.0)
    >>> tokens, log_probs
    (tensor([1], dtype=torch.int32), tensor([-0.0247]))
    """
    tokens, valid, log_probs = _sample(
        "sample_from_logits",
        logits,
        True,
        indices,
        (generator, seed, offset),
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        joint=_is_joint("sample_from_logits", filter_apply_order),
    )
    return tokens, log_probs, valid


def sampling_from_probs(
    probs: Tensor,
    indices: Tensor | None = None,
    deterministic: bool = True,  # noqa: ARG001  always is
    generator: torch.Generator | None = None,
    check_nan: bool = False,
    seed: Integer | None = None,
    offset: Integer | None = None,
    return_valid: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Draw a token of every row of probabilities.

    Parameters
    ----------
    probs : Tensor
        ``[batch_size, vocab_size]``, float32.
    indices, generator, seed, offset
        As in `sample_from_logits`.
    deterministic : bool
        Accepted for compatibility: every call is deterministic.
    check_nan : bool
        Raise ValueError when the input holds NaN; waits for the GPU.
    return_valid : bool
        Return ``(tokens, valid)``.

    Returns
    -------
    Tensor or tuple of Tensor
        Tokens ``[num_rows]``, int32; and with `return_valid` bools ``[num_rows]``.

    Examples
    --------
    >>> import torch, ridgeline
    >>> ridgeline.sampling_from_probs(torch.tensor([[0.0, 1.0, 0.0]]), seed=3)
    tensor([1], dtype=torch.int32)
    """
    op = "sampling_from_probs"
    return _tokens(op, probs, False, indices, (generator, seed, offset), check_nan, return_valid)


def sampling_from_logits(
    logits: Tensor,
    indices: Tensor | None = None,
    deterministic: bool = True,  # noqa: ARG001
    generator: torch.Generator | None = None,
    check_nan: bool = False,
    seed: Integer | None = None,
    offset: Integer | None = None,
    return_valid: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Draw a token of every row's softmax; arguments as in `sampling_from_probs`.

    Examples
    --------
    >>> import torch, ridgeline
    >>> ridgeline.sampling_from_logits(torch.tensor([[-float("inf"), 1.0]]), seed=3)
    tensor([1], dtype=torch.int32)
    """
    op = "sampling_from_logits"
    return _tokens(op, logits, True, indices, (generator, seed, offset), check_nan, return_valid)


def top_p_sampling_from_probs(
    probs: Tensor,
    top_p: Value,
    indices: Tensor | None = None,
    deterministic: bool = True,  # noqa: ARG001
    generator: torch.Generator | None = None,
    check_nan: bool = False,
    seed: Integer | None = None,
    offset: Integer | None = None,
    return_valid: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Draw among the fewest tokens that reach `top_p`; arguments as in `sampling_from_probs`.

    Examples
    --------
    >>> import torch, ridgeline
    >>> ridgeline.top_p_sampling_from_probs(torch.tensor([[0.2, 0.5, 0.3]]), 0.4, seed=3)
    tensor([1], dtype=torch.int32)
    """
    op, keys = "top_p_sampling_from_probs", (generator, seed, offset)
    return _tokens(op, probs, False, indices, keys, check_nan, return_valid, top_p=top_p)


def top_k_sampling_from_probs(
    probs: Tensor,
    top_k: Integer,
    indices: Tensor | None = None,
    deterministic: bool = True,  # noqa: ARG001
    generator: torch.Generator | None = None,
    check_nan: bool = False,
    seed: Integer | None = None,
    offset: Integer | None = None,
    return_valid: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Draw among the `top_k` largest; arguments as in `sampling_from_probs`.

    Examples
    --------
    >>> import torch, ridgeline
    >>> ridgeline.top_k_sampling_from_probs(torch.tensor([[0.2, 0.5, 0.3]]), 1, seed=3)
    tensor([1], dtype=torch.int32)
    """
    op, keys = "top_k_sampling_from_probs", (generator, seed, offset)
    return _tokens(op, probs, False, indices, keys, check_nan, return_valid, top_k=top_k)


def min_p_sampling_from_probs(
    probs: Tensor,
    min_p: Value,
    indices: Tensor | None = None,
    deterministic: bool = True,  # noqa: ARG001
    generator: torch.Generator | None = None,
    check_nan: bool = False,
    seed: Integer | None = None,
    offset: Integer | None = None,
    return_valid: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Draw among tokens of `min_p` times the largest probability or more.

    Arguments as in `sampling_from_probs`.

    Examples
    --------
    >>> import torch, ridgeline
    >>> ridgeline.min_p_sampling_from_probs(torch.tensor([[0.2, 0.5, 0.3]]), 0.7, seed=3)
    tensor([1], dtype=torch.int32)
    """
    op, keys = "min_p_sampling_from_probs", (generator, seed, offset)
    return _tokens(op, probs, False, indices, keys, check_nan, return_valid, min_p=min_p)


def top_k_top_p_sampling_from_logits(
    logits: Tensor,
    top_k: Integer,
    top_p: Value,
    indices: Tensor | None = None,
    filter_apply_order: FilterOrder = "top_k_first",
    deterministic: bool = True,  # noqa: ARG001
    generator: torch.Generator | None = None,
    check_nan: bool = False,
    seed: Integer | None = None,
    offset: Integer | None = None,
    return_valid: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Draw of the softmax's `top_k` largest, of them the fewest that reach `top_p`.

    With ``filter_apply_order="joint"`` top-p is of the whole row's mass. Other arguments as in
    `sampling_from_probs`.

    Examples
    --------
    >>> import torch, ridgeline
    >>> ridgeline.top_k_top_p_sampling_from_logits(torch.tensor([[1.0, 4.0, 2.0]]), 2, 0.5, seed=3)
    tensor([1], dtype=torch.int32)
    """
    op, keys = "top_k_top_p_sampling_from_logits", (generator, seed, offset)
    joint = _is_joint(op, filter_apply_order)
    return _tokens(
        op, logits, True, indices, keys, check_nan, return_valid, joint, top_k=top_k, top_p=top_p
    )


def top_k_top_p_sampling_from_probs(
    probs: Tensor,
    top_k: Integer,
    top_p: Value,
    indices: Tensor | None = None,
    filter_apply_order: FilterOrder = "top_k_first",
    deterministic: bool = True,  # noqa: ARG001
    generator: torch.Generator | None = None,
    check_nan: bool = False,
    seed: Integer | None = None,
    offset: Integer | None = None,
    return_valid: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """As `top_k_top_p_sampling_from_logits`, of probabilities.

    Examples
    --------
    >>> import torch, ridgeline
    >>> ridgeline.top_k_top_p_sampling_from_probs(torch.tensor([[0.2, 0.5, 0.3]]), 2, 0.5, seed=3)
    tensor([1], dtype=torch.int32)
    """
    op, keys = "top_k_top_p_sampling_from_probs", (generator, seed, offset)
    joint = _is_joint(op, filter_apply_order)
    return _tokens(
        op, probs, False, indices, keys, check_nan, return_valid, joint, top_k=top_k, top_p=top_p
    )


def top_p_renorm_probs(probs: Tensor, top_p: Value) -> Tensor:
    """Keep the fewest probabilities that reach `top_p`, over their sum; the others are 0.

    Parameters
    ----------
    probs : Tensor
        ``[batch_size, vocab_size]``, float32.
    top_p : float or Tensor
        A number or float32 ``[batch_size]``.

    Returns
    -------
    Tensor
        Shape of `probs`; a row that is not valid (as in the samplers) is 0.

    Examples
    --------
    >>> import torch, ridgeline
    >>> ridgeline.top_p_renorm_probs(torch.tensor([[0.25, 0.5, 0.25]]), 0.7)
    tensor([[0.3333, 0.6667, 0.0000]])
    """
    refuse_grad("top_p_renorm_probs", probs)
    tensor, value = _split(top_p, 1.0)
    return _TOP_P_RENORM_PROBS(  # type: ignore[no-any-return]
        probs, tensor, value
    )


def top_k_renorm_probs(probs: Tensor, top_k: Integer) -> Tensor:
    """Keep the `top_k` largest probabilities, over their sum; the others are 0.

    Parameters
    ----------
    probs : Tensor
        ``[batch_size, vocab_size]``, float32.
    top_k : int or Tensor
        A number, or int32 or int64 ``[batch_size]``.

    Returns
    -------
    Tensor
        Shape of `probs`; a row that is not valid (as in the samplers) is 0.

    Examples
    --------
    >>> import torch, ridgeline
    >>> ridgeline.top_k_renorm_probs(torch.tensor([[0.25, 0.5, 0.25]]), 2)
    tensor([[0.3333, 0.6667, 0.0000]])
    """
    refuse_grad("top_k_renorm_probs", probs)
    tensor, value = _split(top_k, 0)
    return _TOP_K_RENORM_PROBS(  # type: ignore[no-any-return]
        probs, tensor, int(value)
    )


def top_k_mask_logits(logits: Tensor, top_k: Integer) -> Tensor:
    """Keep the `top_k` largest logits as they are; the others are -inf.

    Parameters
    ----------
    logits : Tensor
        ``[batch_size, vocab_size]``, float32, float16 or bfloat16. NaN counts as the largest.
    top_k : int or Tensor
        A number, or int32 or int64 ``[batch_size]``.

    Returns
    -------
    Tensor
        Shape and dtype of `logits`.

    Examples
    --------
    >>> import torch, ridgeline
    >>> ridgeline.top_k_mask_logits(torch.tensor([[1.0, 3.0, 2.0]]), 2)
    tensor([[-inf, 3., 2.]])
    """
    refuse_grad("top_k_mask_logits", logits)
    tensor, value = _split(top_k, 0)
    return _TOP_K_MASK_LOGITS(  # type: ignore[no-any-return]
        logits, tensor, int(value)
    )


def top_k(
    input: Tensor,
    k: int,
    sorted: bool = False,  # noqa: A002  as torch.topk names it
    deterministic: bool = False,  # noqa: ARG001  always is
    tie_break: int = 0,
) -> tuple[Tensor, Tensor]:
    """The k largest elements of every row and their indices; of equal ones the lowest index.

    Parameters
    ----------
    input : Tensor
        ``[batch_size, size]``, float32, float16 or bfloat16. NaN counts as the largest.
    k : int
        From 1 to size.
    sorted : bool
        Largest first; else in the order of the indices.
    deterministic : bool
        Accepted for compatibility: every call is deterministic.
    tie_break : int
        0 or 1: the lowest index. 2, the highest, raises NotImplementedError.

    Returns
    -------
    values : Tensor
        ``[batch_size, k]``, the input's dtype.
    indices : Tensor
        ``[batch_size, k]``, int64.

    Examples
    --------
    >>> import torch, ridgeline
    >>> ridgeline.top_k(torch.tensor([[1.0, 3.0, 2.0]]), 2, sorted=True)
    (tensor([[3., 2.]]), tensor([[1, 2]]))
    """
    refuse_grad("top_k", input)
    if tie_break not in (0, 1):
        _check.not_yet("top_k", "tie_break", tie_break, "Pass 0 or 1: the lowest index wins.")
    in_kernel = sorted and k <= _MAX_SORTED_K
    values, indices = _TOP_K(input, k, in_kernel)
    if sorted and not in_kernel:
        values, order = values.sort(dim=1, descending=True, stable=True)
        indices = indices.gather(1, order)
    return values, indices


def chain_speculative_sampling(
    draft_probs: Tensor,
    draft_token_ids: Tensor,
    target_probs: Tensor,
    maybe_output_accepted_token_num: Tensor | None = None,
    maybe_output_emitted_draft_token_num: Tensor | None = None,
    deterministic: bool = True,  # noqa: ARG001  always is
    generator: torch.Generator | None = None,
    seed: Integer | None = None,
    offset: Integer | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Accept a chain of draft tokens, so that what comes out is distributed as the target.

    Token i is accepted with probability ``min(1, target / draft)``; after the first rejection the
    next token is drawn from ``max(target - draft, 0)``, after none from the last target row.

    Parameters
    ----------
    draft_probs : Tensor
        ``[batch_size, num_speculative_tokens, vocab_size]``, float32, normalised.
    draft_token_ids : Tensor
        ``[batch_size, num_speculative_tokens]``, int32 or int64, drawn from `draft_probs`.
    target_probs : Tensor
        ``[batch_size, num_speculative_tokens + 1, vocab_size]``, float32, normalised.
    maybe_output_accepted_token_num, maybe_output_emitted_draft_token_num : Tensor, optional
        int32 ``[batch_size]``; the counts are added to them, and they are returned.
    deterministic : bool
        Accepted for compatibility: every call is deterministic.
    generator, seed, offset
        As in `sample_from_logits`, one value a request.

    Returns
    -------
    tokens : Tensor
        ``[batch_size, num_speculative_tokens + 1]``, int32: accepted tokens, one drawn, then -1.
    accepted : Tensor
        ``[batch_size]``, int32: how many tokens pass their own test, also after a rejection.
    emitted : Tensor
        ``[batch_size]``, int32: how many draft tokens `tokens` begins with.

    Examples
    --------
    >>> import torch, ridgeline
    >>> draft, target = torch.tensor([[[1.0, 0.0]]]), torch.tensor([[[1.0, 0.0], [0.0, 1.0]]])
    >>> ridgeline.chain_speculative_sampling(draft, torch.tensor([[0]]), target, seed=3)[0]
    tensor([[0, 1]], dtype=torch.int32)
    """
    op = "chain_speculative_sampling"
    refuse_grad(op, draft_probs, target_probs)
    seeds, offsets = _keys(op, draft_probs, draft_probs.shape[0], (generator, seed, offset))
    tokens, accepted, emitted = _CHAIN_SPECULATIVE_SAMPLING(
        draft_probs,
        draft_token_ids,
        target_probs,
        seeds,
        offsets,
    )
    if maybe_output_accepted_token_num is not None:
        accepted = maybe_output_accepted_token_num.add_(accepted)
    if maybe_output_emitted_draft_token_num is not None:
        emitted = maybe_output_emitted_draft_token_num.add_(emitted)
    return tokens, accepted, emitted


_Keys = tuple[torch.Generator | None, Integer | None, Integer | None]


def _tokens(
    op: str,
    input: Tensor,
    from_logits: bool,
    indices: Tensor | None,
    keys: _Keys,
    check_nan: bool,
    return_valid: bool,
    joint: bool = False,
    top_k: Integer = 0,
    top_p: Value = 1.0,
    min_p: Value = 0.0,
) -> Tensor | tuple[Tensor, Tensor]:
    if check_nan and bool(input.isnan().any()):
        name = "logits" if from_logits else "probs"
        _check.fail(op, name, "no NaN", "some", "Leave check_nan out and look at return_valid.")
    tokens, valid, _ = _sample(
        op, input, from_logits, indices, keys, joint=joint, top_k=top_k, top_p=top_p, min_p=min_p
    )
    return (tokens, valid) if return_valid else tokens


def _sample(
    op: str,
    input: Tensor,
    from_logits: bool,
    indices: Tensor | None,
    keys: _Keys,
    *,
    joint: bool,
    temperature: Value = 1.0,
    top_k: Integer = 0,
    top_p: Value = 1.0,
    min_p: Value = 0.0,
) -> tuple[Tensor, Tensor, Tensor]:
    refuse_grad(op, input)
    num_rows = input.shape[0] if indices is None else indices.shape[0]
    seeds, offsets = _keys(op, input, num_rows, keys)
    k, k_value = _split(top_k, 0)
    return _SAMPLE(  # type: ignore[no-any-return]
        input,
        seeds,
        offsets,
        from_logits,
        joint,
        indices,
        *_split(temperature, 1.0),
        k,
        int(k_value),
        *_split(top_p, 1.0),
        *_split(min_p, 0.0),
    )


def _split(value: Value | None, default: float) -> tuple[Tensor | None, float]:
    """A setting as the ops take it: a tensor, or a number."""
    if isinstance(value, Tensor):
        return (value.reshape(1) if value.dim() == 0 else value), default
    return None, default if value is None else value


def _keys(op: str, input: Tensor, num_rows: int, keys: _Keys) -> tuple[Tensor, Tensor | None]:
    generator, seed, offset = keys
    if seed is None:
        if offset is not None:
            way_out = "Pass both, or neither."
            _check.fail(op, "seed", "a seed, since 'offset' is given", None, way_out)
        limit = 2**63 - 1
        return torch.randint(
            limit, (num_rows,), generator=generator, device=input.device, dtype=torch.int64
        ), None
    return _key(seed, input), None if offset is None else _key(offset, input)


def _key(value: Integer, input: Tensor) -> Tensor:
    if isinstance(value, Tensor):
        return value.reshape(1) if value.dim() == 0 else value
    return torch.full((1,), value, device=input.device, dtype=torch.int64)


def _is_joint(op: str, order: str) -> bool:
    if order not in ("top_k_first", "joint"):
        expected = "'top_k_first' or 'joint'"
        _check.fail(op, "filter_apply_order", expected, repr(order), "Pass one of them.")
    return order == "joint"


@fake_impl("sample")
def _sample_fake(
    input: Tensor,
    seed: Tensor,  # noqa: ARG001
    offset: Tensor | None,  # noqa: ARG001
    from_logits: bool,  # noqa: ARG001
    joint: bool,  # noqa: ARG001
    indices: Tensor | None,
    *_: object,
) -> tuple[Tensor, Tensor, Tensor]:
    num_rows = input.shape[0] if indices is None else indices.shape[0]
    return (
        input.new_empty(num_rows, dtype=torch.int32),
        input.new_empty(num_rows, dtype=torch.bool),
        input.new_empty(num_rows, dtype=torch.float32),
    )


@fake_impl("softmax")
def _softmax_fake(logits: Tensor, *_: object) -> Tensor:
    return logits.new_empty(logits.shape, dtype=torch.float32)


@fake_impl("top_p_renorm_probs")
@fake_impl("top_k_renorm_probs")
@fake_impl("top_k_mask_logits")
def _like_input(input: Tensor, *_: object) -> Tensor:
    return input.new_empty(input.shape)


@fake_impl("top_k")
def _top_k_fake(input: Tensor, k: int, *_: object) -> tuple[Tensor, Tensor]:
    shape = (input.shape[0], k)
    return input.new_empty(shape), input.new_empty(shape, dtype=torch.int64)


@fake_impl("chain_speculative_sampling")
def _chain_fake(
    draft_probs: Tensor, draft_token_ids: Tensor, *_: object
) -> tuple[Tensor, Tensor, Tensor]:
    batch, num_draft = draft_token_ids.shape
    return (
        draft_probs.new_empty((batch, num_draft + 1), dtype=torch.int32),
        draft_probs.new_empty(batch, dtype=torch.int32),
        draft_probs.new_empty(batch, dtype=torch.int32),
    )
