"""The installed package as a whole: where it comes from, what an import costs, its examples."""

from __future__ import annotations

import doctest
import importlib
import importlib.util
import inspect
import os
import sys
from pathlib import Path

import pytest
from support import run_python

MAX_IMPORT_SECONDS = 0.2
PREFIX = os.environ.get("RIDGELINE_TEST_PREFIX")


def package_root() -> Path:
    spec = importlib.util.find_spec("ridgeline")
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).resolve().parent


def module_names() -> list[str]:
    """Modules of the package, found as files: nothing is imported to collect the tests."""
    root = package_root()
    names = []
    for file in sorted(root.rglob("*.py")):
        parts = ("ridgeline", *file.relative_to(root).with_suffix("").parts)
        if parts[-1] != "__main__":
            names.append(".".join(parts[:-1] if parts[-1] == "__init__" else parts))
    return names


@pytest.mark.skipif(PREFIX is None, reason="only `make test` says which environment is meant")
def test_the_wheel_is_what_is_imported(repository: Path) -> None:
    import ridgeline

    assert PREFIX is not None
    assert Path(ridgeline.__file__).is_relative_to(PREFIX)
    assert package_root().parent.name == "site-packages"
    assert not any(Path(entry or ".").resolve() == repository for entry in sys.path)


@pytest.mark.parametrize("name", module_names())
def test_examples(name: str) -> None:
    module = importlib.import_module(name)
    results = doctest.testmod(module, optionflags=doctest.NORMALIZE_WHITESPACE)
    assert results.failed == 0, f"{results.failed} of {results.attempted} examples of {name}"


def test_every_public_function_has_an_example() -> None:
    import ridgeline

    functions = [getattr(ridgeline, name) for name in ridgeline.__all__]
    functions = [function for function in functions if inspect.isfunction(function)]
    without = [f.__name__ for f in functions if ">>>" not in (f.__doc__ or "")]
    assert functions
    assert not without


def test_import_is_quick_and_touches_nothing(tmp_path: Path) -> None:
    code = """
import sys, time, torch
before = set(sys.modules)
start = time.perf_counter()
import ridgeline
seconds = time.perf_counter() - start
assert not torch.cuda.is_initialized()
names = {name.split(".")[0] for name in set(sys.modules) - before}
print(seconds, *sorted(names & {"cuda", "transformers", "triton", "urllib", "http"}))
"""
    home = tmp_path / "home"
    seconds = []
    for _ in range(3):
        result = run_python(code, {"HOME": str(home), "PATH": "", "XDG_CACHE_HOME": ""})
        assert result.returncode == 0, result.stderr
        first, *loaded = result.stdout.split()
        seconds.append(float(first))
        assert not loaded
    assert not home.exists()
    assert min(seconds) < MAX_IMPORT_SECONDS
