"""A compiler process of the pool: JSON requests line by line on stdin, JSON answers on stdout.

Started by file path, without the ridgeline package, so that it need not import torch. The first
line is the setup {"path": sys.path of the parent, "options": ..., "kernels_dir": ...}; each further
line is {"name", "arch", "key"} and is answered by {"entry": base64, "seconds"} or by
{"error": text, "missing": whether the compiler itself is}.
"""

from __future__ import annotations

import base64
import importlib
import importlib.util
import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any, TextIO

_PACKAGE = "ridgeline_compiler"


def main() -> None:
    """Answer requests until the parent closes the pipe."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides what Ctrl-C means
    answers = _private_stdout()
    setup = json.loads(sys.stdin.readline())
    sys.path[:] = setup["path"]
    nvrtc, toolchain = _load_package()
    for line in sys.stdin:
        request = json.loads(line)
        start = time.perf_counter()
        answer: dict[str, Any] = {}
        try:
            data = nvrtc.compile_kernel(
                request["name"],
                request["arch"],
                request["key"],
                setup["options"],
                setup["kernels_dir"],
            )
            answer["entry"] = base64.b64encode(data).decode()
        except Exception as error:
            answer["error"] = str(error) or type(error).__name__
            answer["missing"] = isinstance(error, toolchain.CompilerMissingError)
        answer["seconds"] = time.perf_counter() - start
        print(json.dumps(answer), file=answers, flush=True)


def _private_stdout() -> TextIO:
    """Return the pipe to the parent; whatever a library prints goes to stderr."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    return answers


def _load_package() -> tuple[Any, Any]:
    """Import the folder of this file as a package of its own name."""
    folder = Path(__file__).resolve().parent
    spec = importlib.util.spec_from_file_location(
        _PACKAGE, folder / "__init__.py", submodule_search_locations=[str(folder)]
    )
    if spec is None or spec.loader is None:
        raise ImportError(f"{folder} is not a package")
    package = importlib.util.module_from_spec(spec)
    sys.modules[_PACKAGE] = package
    spec.loader.exec_module(package)
    return (
        importlib.import_module(f"{_PACKAGE}.nvrtc"),
        importlib.import_module(f"{_PACKAGE}.toolchain"),
    )


if __name__ == "__main__":
    main()
