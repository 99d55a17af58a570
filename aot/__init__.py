"""Ahead of time: which kernels a wheel carries, for which SMs, and how they are packed and checked.

The list is the core table of the op library; `python -m ridgeline.aot build` compiles it.
"""
