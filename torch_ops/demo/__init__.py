"""The demo: a small Llama writes text through Ridgeline's ops, checked against transformers."""

from __future__ import annotations

from .cli import main

__all__ = ["main"]
