"""Ridgeline: CUDA kernels for LLM serving, as torch custom ops."""

from __future__ import annotations

from . import _library as _library

__version__ = "0.1.0"
