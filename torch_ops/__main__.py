"""``python -m ridgeline``: doctor, kernels, warmup, demo."""

import sys

from .cli import main

sys.exit(main(sys.argv[1:]))
