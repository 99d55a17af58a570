"""Continuous batching with the demo model on Ridgeline's ops; `examples/serve.py` runs it."""
