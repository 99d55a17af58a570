"""What the jobs of a GPU machine share: the library, installed beside the torch that is there.

Nothing is downloaded. The Python that runs this script has torch (built for CUDA); the library goes
into build/gpu/site, from the file that WHEEL names, or compiled here without kernel packs.
"""

from __future__ import annotations

import os
import shutil
import sys
from glob import glob
from pathlib import Path

from build_wheel import compiler_version
from common import (
    BUILD,
    PACKAGE_SOURCES,
    ROOT,
    Stopwatch,
    digest_of,
    files_of,
    read_stamp,
    run,
    say,
    stop,
    write_stamp,
)

GPU_BUILD = BUILD / "gpu"
SITE = GPU_BUILD / "site"


def require_gpu() -> str:
    """Name of GPU 0; without one the job ends and says what to do."""
    try:
        import torch
    except ImportError:
        stop(f"{sys.executable} has no torch; PYTHON=... names one that has it, built for CUDA")
        raise
    if not torch.cuda.is_available():
        stop(
            f"torch {torch.__version__} of {sys.executable} sees no GPU. The tests that need none "
            "run with `make test`."
        )
    name = torch.cuda.get_device_name(0)
    cuda = torch.version.cuda
    say(f"{name}, torch {torch.__version__} (CUDA {cuda}), Python {sys.version.split()[0]}")
    return name


def count_gpus() -> int:
    import torch

    return torch.cuda.device_count()


def install_site() -> dict[str, str]:
    """Install into build/gpu/site unless it is there; returns the variables that find it."""
    wanted = os.environ.get("WHEEL", "")
    wheels = sorted(glob(wanted)) if wanted else []
    if wanted and len(wheels) != 1:
        stop(f"WHEEL={wanted}: expected one file, got {len(wheels)}")
    if wheels:
        source, how = str(Path(wheels[0]).resolve()), f"the wheel {Path(wheels[0]).name}"
        digest = digest_of([], str(Path(source).stat().st_mtime_ns), source)
    else:
        source, how = str(ROOT), "this checkout (no kernel packs: kernels come by JIT)"
        digest = digest_of(files_of(PACKAGE_SOURCES), compiler_version(), sys.version)
    stamp_file = GPU_BUILD / "site.json"
    if read_stamp(stamp_file) != {"source": digest}:
        watch = Stopwatch()
        shutil.rmtree(SITE, ignore_errors=True)
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        options = ["--no-index", "--no-deps", "--no-build-isolation", "--target", SITE]
        run([*pip, *options, source])
        write_stamp(stamp_file, {"source": digest})
        say(f"installed {how} in {watch}")
    else:
        say(f"using {how}, installed before")
    path = os.pathsep.join([str(SITE), *filter(None, [os.environ.get("PYTHONPATH")])])
    cache = os.environ.get("RIDGELINE_CACHE_DIR") or str(GPU_BUILD / "cache")
    return {"PYTHONPATH": path, "RIDGELINE_CACHE_DIR": cache}
