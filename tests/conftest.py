"""Options, fixtures and reports that every test file shares.

``--arch X``   run that architecture's code path (75, 80, 86, 89, 90a); default: the GPU's own.
``--shard I/N``  a part of the tests, for N processes side by side.
``device``     "cpu" and "cuda"; without a GPU the second is left out, and the last lines say so.
``rng``        a generator seeded afresh each run; a failure prints the seed and how to rerun alone.

Nothing here imports ridgeline: ``--arch`` has to be in the environment before that happens.
"""

from __future__ import annotations

import contextlib
import fcntl
import gc
import os
import secrets
import shlex
import tempfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

ARCHITECTURES = ("75", "80", "86", "89", "90a")
LEFT_OUT = pytest.StashKey[int]()
RUN_SEED = pytest.StashKey[int]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--arch",
        choices=("native", *ARCHITECTURES),
        default="native",
        help="architecture whose code path the GPU tests run (default: the GPU's own)",
    )
    parser.addoption(
        "--shard",
        default="0/1",
        metavar="I/N",
        help="every N-th test from the I-th on, so that N processes share a run",
    )


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "gpu: needs a CUDA GPU; left out, and counted, without one")
    config.addinivalue_line("markers", "slow: takes over 20 seconds or tens of gigabytes")
    config.addinivalue_line("markers", "large: needs gigabytes of the GPU's memory for itself")
    config.addinivalue_line(
        "markers", "once: the same on every architecture; runs on the GPU's own"
    )
    arch = config.getoption("--arch")
    if arch != "native":
        os.environ["RIDGELINE_ARCH"] = arch
    # In the environment, so that the worker processes of pytest-xdist draw the same inputs.
    seed = os.environ.setdefault("RIDGELINE_TEST_SEED", str(secrets.randbelow(2**31)))
    config.stash[RUN_SEED] = int(seed)
    config.stash[LEFT_OUT] = 0


def pytest_report_header(config: pytest.Config) -> list[str]:
    gpu = torch.cuda.get_device_name(0) if torch.cuda.is_available() else "none"
    return [
        f"ridgeline tests: torch {torch.__version__}, GPU: {gpu}, "
        f"architecture: {os.environ.get('RIDGELINE_ARCH', 'native')}, "
        f"RIDGELINE_TEST_SEED={config.stash[RUN_SEED]}"
    ]


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    shard, num_shards = (int(part) for part in config.getoption("--shard").split("/"))
    if num_shards > 1:
        kept = [i for i in items if zlib.crc32(i.nodeid.encode()) % num_shards == shard]
        config.hook.pytest_deselected(items=[i for i in items if i not in set(kept)])
        items[:] = kept
    if torch.cuda.is_available():
        major, _ = torch.cuda.get_device_capability()
        if config.getoption("--arch") not in ("native", "90a" if major == 9 else "native"):
            again = [item for item in items if item.get_closest_marker("once")]
            items[:] = [item for item in items if not item.get_closest_marker("once")]
            config.hook.pytest_deselected(items=again)
        return
    left_out = [item for item in items if item.get_closest_marker("gpu")]
    if left_out:
        items[:] = [item for item in items if not item.get_closest_marker("gpu")]
        config.hook.pytest_deselected(items=left_out)
        config.stash[LEFT_OUT] = len(left_out)


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Tell the process that prints the report what a pytest-xdist worker left out."""
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["left_out"] = session.config.stash[LEFT_OUT]


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    # Every worker collects everything, so the counts are one count.
    node.config.stash[LEFT_OUT] = getattr(node, "workeroutput", {}).get("left_out", 0)


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> None:
    left_out = config.stash[LEFT_OUT]
    if left_out:
        terminalreporter.section("not run")
        terminalreporter.write_line(
            f"not run: {left_out} tests need a GPU (no CUDA device found); "
            "run `make test-gpu` on a machine that has one"
        )


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    """Tests that may fill a GPU take turns over the processes of a run, and clean up."""
    if not item.get_closest_marker("large"):
        yield
        return
    with (Path(tempfile.gettempdir()) / "ridgeline-tests.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
        gc.collect()
        # Why suppressed: after an illegal access every call fails, and the test has said so.
        with contextlib.suppress(RuntimeError):
            torch.cuda.empty_cache()


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Iterator[None]:
    """Add to a failure the configuration that failed and the command that reruns it alone."""
    outcome = yield
    report = outcome.get_result()  # type: ignore[attr-defined]
    if report.when != "call" or not report.failed:
        return
    callspec = getattr(item, "callspec", None)
    config_lines = (
        [f"{name} = {value!r}" for name, value in callspec.params.items()] if callspec else []
    )
    arch = item.config.getoption("--arch")
    command = [f"RIDGELINE_TEST_SEED={item.config.stash[RUN_SEED]}", "python", "-m", "pytest"]
    if arch != "native":
        command += ["--arch", arch]
    command.append(shlex.quote(item.nodeid))
    text = "\n".join([*config_lines, "rerun alone: " + " ".join(command)])
    report.sections.append(("configuration", text))


@pytest.fixture(scope="session", params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> torch.device:
    """The device under test; "cuda" is device 0 of the process."""
    return torch.device("cuda", 0) if request.param == "cuda" else torch.device("cpu")


@pytest.fixture(scope="session")
def second_device() -> torch.device:
    """A GPU other than the current one."""
    if torch.cuda.device_count() < 2:
        pytest.skip(f"needs a second GPU; this machine has {torch.cuda.device_count()}")
    return torch.device("cuda", 1)


@pytest.fixture
def seed(request: pytest.FixtureRequest) -> int:
    """Seed of this test: the run's seed mixed with the test's name."""
    return request.config.stash[RUN_SEED] ^ zlib.crc32(request.node.nodeid.encode())


@pytest.fixture
def rng(seed: int) -> torch.Generator:
    """CPU generator: the same numbers whatever device the test then moves them to."""
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """The demo's steps are too short to share: on a busy machine each would wait for threads."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(num_threads)


@pytest.fixture(scope="session")
def repository() -> Path:
    """Root of the checkout that holds these tests (not of the installed package)."""
    return Path(__file__).resolve().parent.parent
