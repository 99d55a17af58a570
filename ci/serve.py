"""Sets everything up, then serves a file of requests and checks every token: `make serve`.

Runs examples/serve.py --check as ci/demo.py runs the demo. The variables of VARIABLES are
passed on; ARGS holds further options.
"""

from __future__ import annotations

import os
import shlex
import sys

from common import ROOT
from demo import run_with_options

VARIABLES = (
    "REQUESTS",
    "MODEL",
    "DEVICE",
    "DTYPE",
    "PAGES",
    "PAGE_SIZE",
    "MAX_REQUESTS",
    "MAX_BATCH_TOKENS",
    "GRAPHS",
    "OUT",
    "COMPARE",
)


def main() -> None:
    arguments = ["--check", *shlex.split(os.environ.get("ARGS", ""))]
    sys.exit(run_with_options([ROOT / "examples" / "serve.py", *arguments], VARIABLES))


if __name__ == "__main__":
    main()
