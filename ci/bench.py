"""Measures everything on this machine's GPU: `make bench`.

Installs the library beside the torch that is there and runs `python -m benchmarks`. QUICK=1 takes a
few sizes only, ARGS is passed on: make bench ARGS="norm rope".
"""

from __future__ import annotations

import os
import shlex
import sys

from common import ROOT, run
from gpu import install_site, require_gpu


def main() -> None:
    require_gpu()
    env = install_site()
    arguments = shlex.split(os.environ.get("ARGS", ""))
    if os.environ.get("QUICK"):
        arguments.append("--quick")
    # Why: the repository's root holds `benchmarks`, and no package named ridgeline.
    command = [sys.executable, "-m", "benchmarks", "--out", ROOT / "benchmarks" / "results"]
    sys.exit(run([*command, *arguments], env=env, check=False))


if __name__ == "__main__":
    main()
