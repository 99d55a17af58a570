"""The C functions of libridgeline.so that concern kernels, with Python types."""

from __future__ import annotations

import ctypes
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

_BUFFER_SIZE = 1 << 16
COMPILE_CALLBACK = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_char_p, ctypes.c_char_p, ctypes.c_char_p)
# Why void*: ctypes cannot keep a returned string alive, so the callback returns an address.
TAG_CALLBACK = ctypes.CFUNCTYPE(ctypes.c_void_p)

_STRING, _SIZE, _INT = ctypes.c_char_p, ctypes.c_size_t, ctypes.c_int
_SIGNATURES: dict[str, tuple[Any, tuple[Any, ...]]] = {
    "last_error": (_STRING, ()),
    "compile_options": (_STRING, ()),
    "kernels_dir": (_STRING, ()),
    "pack_dir": (_STRING, ()),
    "cache_dir": (_STRING, ()),
    "core_table": (_STRING, ()),
    "driver_report": (_STRING, ()),
    "entry_key": (_INT, (_STRING, _STRING, _STRING)),
    "check_entry": (_INT, (_STRING, _SIZE)),
    "find": (_INT, (_STRING, _STRING, _STRING, _SIZE)),
    "load": (_INT, (_STRING, _INT)),
    "explain": (_INT, (_STRING, _INT, _STRING, _STRING, _SIZE)),
    "set_compiler": (None, (COMPILE_CALLBACK, TAG_CALLBACK)),
    "supply_entry": (None, (_STRING, _SIZE)),
    "supply_error": (None, (_STRING,)),
}


@dataclass(frozen=True)
class CoreRow:
    """A row of the core table: a kernel, the SMs it runs on, and what a launch of it takes."""

    op: str
    kernel: str
    min_sm: int
    max_sm: int
    core: bool
    block: int
    dynamic_smem: int
    why: str

    def serves(self, arch: str) -> bool:
        """Say whether the row's kernel is for `arch`, such as "sm_90a"."""
        return self.min_sm <= arch_number(arch) <= self.max_sm


class Native:
    """The library's kernel functions; a failure raises RuntimeError with the library's message."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self.library = library
        self._functions: dict[str, Any] = {}
        for name, (result, arguments) in _SIGNATURES.items():
            # Why [] and not an attribute: this makes an object of our own, with our own types.
            function = library[f"ridgeline_{name}"]
            function.restype, function.argtypes = result, arguments
            self._functions[name] = function

    def compile_options(self) -> str:
        return self._text("compile_options")

    def kernels_dir(self) -> Path:
        return Path(self._text("kernels_dir"))

    def pack_dir(self) -> Path | None:
        return _path(self._text("pack_dir"))

    def cache_dir(self) -> Path | None:
        return _path(self._text("cache_dir"))

    @cached_property
    def core_table(self) -> tuple[CoreRow, ...]:
        rows = json.loads(self._text("core_table"))
        fields = CoreRow.__dataclass_fields__
        return tuple(CoreRow(**{field: row[field] for field in fields}) for row in rows)

    def driver_report(self) -> dict[str, Any]:
        report: dict[str, Any] = json.loads(self._text("driver_report"))
        return report

    def entry_key(self, name: str, arch: str) -> str:
        key = ctypes.create_string_buffer(65)
        self._check("entry_key", name.encode(), arch.encode(), key)
        return key.value.decode()

    def check_entry(self, data: bytes) -> None:
        self._check("check_entry", data, len(data))

    def find(self, name: str, arch: str) -> str:
        """Say where a kernel lies without compiling: "pack", "cache" or ""."""
        source = ctypes.create_string_buffer(64)
        self._check("find", name.encode(), arch.encode(), source, len(source))
        return source.value.decode()

    def load(self, name: str, device: int) -> None:
        """Resolve a kernel, compiling it when needed, and load it on a GPU."""
        self._check("load", name.encode(), device)

    def explain(self, op: str, sm: int, config: Mapping[str, object]) -> dict[str, Any]:
        """Ask the dispatcher what it would choose: {"ok", "kernels", "reasons"}."""
        text = ";".join(f"{key}={_config_value(value)}" for key, value in config.items())
        out = ctypes.create_string_buffer(_BUFFER_SIZE)
        self._check("explain", op.encode(), sm, text.encode(), out, len(out))
        answer: dict[str, Any] = json.loads(out.value.decode())
        return answer

    def set_compiler(self, compile_callback: Any, tag_callback: Any) -> None:
        self._functions["set_compiler"](compile_callback, tag_callback)

    def supply_entry(self, data: bytes) -> None:
        self._functions["supply_entry"](data, len(data))

    def supply_error(self, message: str) -> None:
        self._functions["supply_error"](message.encode(errors="replace"))

    def _text(self, name: str) -> str:
        value: bytes | None = self._functions[name]()
        return (value or b"").decode()

    def _check(self, name: str, *arguments: object) -> None:
        if self._functions[name](*arguments) != 0:
            raise RuntimeError(self._text("last_error"))


def arch_number(arch: str) -> int:
    """Return 90 for "sm_90a", 80 for "compute_80"."""
    return int("".join(character for character in arch if character.isdigit()))


def _path(text: str) -> Path | None:
    return Path(text) if text else None


def _config_value(value: object) -> str:
    if isinstance(value, bool):
        return "1" if value else "0"
    return str(value).removeprefix("torch.")
