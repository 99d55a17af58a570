"""Loads the op library, which registers the schemas and the CUDA implementations."""

from __future__ import annotations

import ctypes
from pathlib import Path

import torch

from . import compiler

PATH = Path(__file__).resolve().parent / "libridgeline.so"


def _load() -> ctypes.CDLL:
    if not PATH.exists():
        raise ImportError(
            f"ridgeline's op library is missing ({PATH}). In a checkout, build it with: "
            "pip install --no-build-isolation -e ."
        )
    if torch._C._dispatch_has_kernel("ridgeline::rmsnorm"):
        # Two libraries that register the same ops crash the process, so the second one stops here.
        raise ImportError(
            f"another copy of ridgeline is loaded in this process; {PATH} was not loaded. Keep "
            "one installation on sys.path."
        )
    torch.ops.load_library(PATH)
    return ctypes.CDLL(str(PATH))


compiler.install(_load())
