"""From a kernel's name to its machine code.

The C++ runtime looks into the AOT pack and the disk cache by itself; what it does not find there
it asks of the callback that `install` registers. Everything slow is imported by that callback.
"""

from __future__ import annotations

import atexit
import ctypes
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .native import Native

_native: Native | None = None
_callbacks: tuple[Any, Any] | None = None
_tag: ctypes.Array[ctypes.c_char] | None = None


def install(handle: ctypes.CDLL) -> None:
    """Let the op library compile what neither its packs nor the disk cache have."""
    global _native, _callbacks
    from .native import COMPILE_CALLBACK, TAG_CALLBACK, Native

    _native = Native(handle)
    # Why kept: the library holds only the addresses.
    _callbacks = (COMPILE_CALLBACK(_compile), TAG_CALLBACK(_tag_address))
    _native.set_compiler(*_callbacks)
    atexit.register(_uninstall)


def _uninstall() -> None:
    """Take the callbacks back before the interpreter frees what they run."""
    from .native import COMPILE_CALLBACK, TAG_CALLBACK

    library().set_compiler(COMPILE_CALLBACK(), TAG_CALLBACK())


def library() -> Native:
    """Return the installed library's kernel functions."""
    if _native is None:
        raise RuntimeError("ridgeline.compiler: no library is installed; import ridgeline first")
    return _native


def obtain(name: str, arch: str) -> bytes:
    """Return a kernel's entry from the disk cache, compiled into it when it is not there."""
    from . import jit

    found = library()
    return jit.obtain(found, name, arch, found.entry_key(name, arch))


def _compile(name: bytes, arch: bytes, key: bytes) -> int:
    """Serve the runtime's request; no exception may cross back into C++."""
    try:
        from . import jit

        library().supply_entry(jit.obtain(library(), name.decode(), arch.decode(), key.decode()))
        return 0
    except KeyboardInterrupt:
        library().supply_error(f"ridgeline: interrupted while compiling '{name.decode()}'")
    except BaseException as error:
        library().supply_error(_message(error, name.decode(), arch.decode()))
    return 1


def _message(error: BaseException, name: str, arch: str) -> str:
    text = str(error) or type(error).__name__
    if text.startswith("ridgeline"):
        return text
    return f"ridgeline: kernel '{name}' for {arch} is not available: {text}"


def _tag_address() -> int:
    """Return the address of the compiler's tag, which stays valid."""
    global _tag
    if _tag is None:
        try:
            from .toolchain import compiler_tag

            text = compiler_tag()
        except BaseException:
            text = "nvrtc_unknown"
        _tag = ctypes.create_string_buffer(text.encode())
    return ctypes.addressof(_tag)
