"""Which CUDA-graph capture a stream belongs to, if any."""

from __future__ import annotations

import ctypes
import os
from functools import lru_cache
from typing import Any

import torch

# Why the private names: what the public functions call, without their frames.
_stream_is_captured = getattr(
    torch._C, "_cuda_isCurrentStreamCapturing", torch.cuda.is_current_stream_capturing
)
_current_stream = getattr(torch._C, "_cuda_getCurrentRawStream", lambda _: -1)


def is_capturing(gpu: int) -> bool:
    """Whether the current stream of a GPU, which is the current one, is being captured."""
    # No capture takes the default stream, and the driver's own answer costs 0.3 us.
    return _current_stream(gpu) != 0 and _stream_is_captured()


def current_capture(device: torch.device) -> tuple[int, int] | None:
    """Id of the capture that records the device's current stream, and the stream.

    The id is the driver's own: no other capture of the process ever has the same. None: the
    driver does not say.
    """
    query = _capture_info()
    if query is None:
        return None
    stream = torch._C._cuda_getCurrentRawStream(device.index)
    status, number = ctypes.c_int(), ctypes.c_uint64()
    failed = query(stream, ctypes.byref(status), ctypes.byref(number), None, None, None)
    return None if failed or status.value != 1 else (number.value, stream)


@lru_cache(maxsize=1)
def _capture_info() -> Any:
    """``cuStreamGetCaptureInfo_v2`` of the driver, or None."""
    try:
        library = ctypes.CDLL(os.environ.get("RIDGELINE_LIBCUDA", "libcuda.so.1"))
        function = library.cuStreamGetCaptureInfo_v2
    except (OSError, AttributeError):
        return None
    pointer = ctypes.c_void_p
    function.argtypes = [pointer, pointer, pointer, pointer, pointer, pointer]
    function.restype = ctypes.c_int
    return function
