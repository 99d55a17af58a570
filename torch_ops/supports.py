"""Whether a call is served, and by which kernel."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from . import compiler
from .compiler.native import arch_number


@dataclass(frozen=True)
class Support:
    """What `supports` found.

    Attributes
    ----------
    ok : bool
    kernel : str
        Names of the kernels that the dispatcher would launch, joined by " + "; "" when not `ok`,
        "cpu" on the CPU.
    source : str
        Where the first of them lies: "pack", "cache", or "jit" when it would be compiled first;
        "cpu" on the CPU.
    reasons : tuple of str
        Why the call is not served; empty when `ok`.
    """

    ok: bool
    kernel: str
    source: str
    reasons: tuple[str, ...]


def supports(
    op: str, *, device: torch.device | str | int | None = None, **config: object
) -> Support:
    """Tell whether an op serves a configuration on a device, and with which kernel.

    Parameters
    ----------
    op : str
        Name of an op of ``torch.ops.ridgeline``, such as "rmsnorm".
    device : torch.device, str or int, optional
        A CUDA device, "cpu", or an architecture such as "sm_80" (no GPU is needed then). Default:
        the current CUDA device, or the CPU where there is none.
    **config
        What the call would be: ``dtype``, and for attention ``head_dim_qk``, ``head_dim_vo``,
        ``num_qo_heads``, ``num_kv_heads``, ``qo_len``, ``kv_len``, ``pos_encoding_mode``. What is
        left out is taken at its most common value.

    Returns
    -------
    Support

    Raises
    ------
    RuntimeError
        If there is no such op, no such device or no driver.

    Examples
    --------
    >>> import ridgeline
    >>> ridgeline.supports("rmsnorm", device="sm_80", dtype="float16").ok
    True
    >>> ridgeline.supports("rmsnorm", device="sm_80", dtype="int8").ok
    False
    """
    arch = _arch(device)
    library = compiler.library()
    sm = 0 if arch == "cpu" else arch_number(arch)
    answer = library.explain(op, sm or 90, config)
    if arch == "cpu":
        return Support(True, "cpu", "cpu", ())
    kernels = answer["kernels"]
    source = (library.find(kernels[0], arch) or "jit") if kernels else ""
    return Support(bool(answer["ok"]), " + ".join(kernels), source, tuple(answer["reasons"]))


def _arch(device: torch.device | str | int | None) -> str:
    """The architecture that a device's kernels are for, or "cpu"."""
    if isinstance(device, str) and device.startswith(("sm_", "compute_")):
        return device
    if device is None and not torch.cuda.is_available():
        return "cpu"
    target = torch.device("cuda" if device is None else device)
    if target.type == "cpu":
        return "cpu"
    index = torch.cuda.current_device() if target.index is None else target.index
    report = compiler.library().driver_report()
    if report["error"]:
        raise RuntimeError(f"ridgeline.supports: argument 'device': {target}: {report['error']}")
    arch: str = report["devices"][index]["arch"]
    return arch
