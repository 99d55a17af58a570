"""Prepare the kernels of a described model before its first call."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from . import _model, compiler
from .compiler.native import Native, arch_number


@dataclass(frozen=True)
class Warmup:
    """What `warmup` found and did.

    Attributes
    ----------
    arch : str
        Architecture of the kernels, such as "sm_90a".
    kernels : tuple of str
        Names of all kernels that were asked for.
    num_packed, num_cached, num_compiled : int
        How many of them came from a pack, from the disk cache and from the compiler.
    seconds : float
    """

    arch: str
    kernels: tuple[str, ...]
    num_packed: int
    num_cached: int
    num_compiled: int
    seconds: float


def warmup(
    config: Any,
    *,
    device: torch.device | str | int | None = None,
    arch: str | None = None,
    progress: bool = True,
) -> Warmup:
    """Compile and load what a model's forward pass needs, so that no call has to.

    That is its norms, RoPE, activation and attention, for single requests and for batches over a
    paged cache, the appends to that cache and the sampler of float32 logits.

    Parameters
    ----------
    config : transformers config, mapping or sequence of str
        A `transformers` config object; a dict such as `{"num_qo_heads": 32, "num_kv_heads": 8,
        "head_dim": 128, "dtype": "bfloat16"}`; or kernel names
        (`["norm/rmsnorm.cuh:rmsnorm<__half, __half, 8>"]`).
    device : torch.device, str or int, optional
        A CUDA device; the default is the current one.
    arch : str, optional
        Compile for this architecture (such as "sm_90a") into the disk cache and load nothing; no
        GPU is needed then.
    progress : bool
        Show on stderr how far the compilers are.

    Returns
    -------
    Warmup

    Raises
    ------
    RuntimeError
        If there is no GPU and no `arch`, if no kernel serves the model, or if one fails to
        compile.

    Examples
    --------
    >>> import ridgeline
    >>> report = ridgeline.warmup([], arch="sm_90a")
    >>> report.num_compiled
    0
    """
    start = time.perf_counter()
    library = compiler.library()
    index = None
    if arch is None:
        index = _device_index(device)
        arch, sm = _arch_of(library, index)
    elif device is not None:
        raise ValueError(
            "ridgeline.warmup: arguments 'device' and 'arch': expected one of them, got both. "
            "'arch' compiles for a GPU that need not be here."
        )
    else:
        sm = _sm_of(arch)
    names = _kernel_names(library, config, sm)
    sources = {name: library.find(name, arch) for name in names}
    missing = [name for name, source in sources.items() if not source]
    _compile(library, missing, arch, progress)
    if index is not None:
        for name in names:
            library.load(name, index)
    found = list(sources.values())
    return Warmup(
        arch=arch,
        kernels=tuple(names),
        num_packed=found.count("pack"),
        num_cached=found.count("cache"),
        num_compiled=len(missing),
        seconds=time.perf_counter() - start,
    )


def _device_index(device: torch.device | str | int | None) -> int:
    chosen = torch.device("cuda" if device is None else device)
    if chosen.type != "cuda":
        raise ValueError(
            f"ridgeline.warmup: argument 'device': expected a CUDA device, got '{chosen}'. "
            "The CPU needs no kernels."
        )
    if not torch.cuda.is_available():
        raise RuntimeError(
            "ridgeline.warmup: argument 'device': expected a CUDA device, got none: torch sees no "
            'GPU here. warmup(..., arch="sm_90a") compiles into the disk cache without one; '
            "`python -m ridgeline doctor` says what is wrong."
        )
    return torch.cuda.current_device() if chosen.index is None else chosen.index


def _arch_of(library: Native, index: int) -> tuple[str, int]:
    """Return the architecture that runs on a GPU, and its number, both RIDGELINE_ARCH's if set."""
    report = library.driver_report()
    for found in report["devices"]:
        if found["index"] == index:
            return str(found["arch"]), int(found["sm"])
    reason = report["error"] or f"the driver lists {len(report['devices'])} GPUs"
    raise RuntimeError(f"ridgeline.warmup: argument 'device': GPU {index} is not there: {reason}")


def _sm_of(arch: str) -> int:
    kind, _, number = arch.partition("_")
    if kind not in ("sm", "compute") or not number.rstrip("af").isdigit():
        raise ValueError(
            f"ridgeline.warmup: argument 'arch': expected a name such as 'sm_90a' or 'compute_80', "
            f"got '{arch}'"
        )
    return arch_number(arch)


def _kernel_names(library: Native, config: Any, sm: int) -> list[str]:
    if isinstance(config, Sequence) and not isinstance(config, str):
        return list(dict.fromkeys(config))
    described = (
        _model.from_mapping(config)
        if isinstance(config, Mapping)
        else _model.from_transformers(config)
    )
    names: dict[str, None] = {}
    for op, question in _model.questions(described):
        answer = library.explain(op, sm, question)
        if not answer["ok"]:
            raise RuntimeError(
                f"ridgeline.warmup: no kernel of {op} serves this model on SM {sm}: "
                f"{'; '.join(answer['reasons'])}"
            )
        names.update(dict.fromkeys(answer["kernels"]))
    return list(names)


def _compile(library: Native, names: Sequence[str], arch: str, progress: bool) -> None:
    """Compile `names` in parallel into the disk cache, or into memory where that is read-only."""
    if not names:
        return
    if os.environ.get("RIDGELINE_JIT") == "0":
        raise RuntimeError(
            f"ridgeline.warmup: {len(names)} kernels for {arch} have to be compiled, which "
            f"RIDGELINE_JIT=0 forbids; the first is '{names[0]}'. Unset RIDGELINE_JIT."
        )
    from .compiler import jit, pool
    from .compiler.progress import Progress

    jobs = [pool.Job(name, arch, library.entry_key(name, arch)) for name in names]
    errors = []
    outcomes = pool.compile_all(jobs, library.compile_options(), str(library.kernels_dir()))
    with contextlib.closing(outcomes), Progress(len(jobs), shown=progress) as shown:
        for outcome in outcomes:
            if outcome.entry is None:
                errors.append(outcome.error)
            else:
                jit.keep(library, arch, outcome.job.key, outcome.entry)
            shown.step(f"{arch} {outcome.job.name} ({outcome.seconds:.1f} s)")
    if errors:
        raise RuntimeError("\n".join(errors))
