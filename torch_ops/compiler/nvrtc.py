"""Compile one kernel with NVRTC: from its name to the bytes of an entry.

Nothing here imports torch: the workers of the pool run this file too.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from . import entry, toolchain

_PROGRAM = "ridgeline.cu"
# file(line): error: text, or with an error number: file(line): catastrophic error #1696: text
_FRONTEND_ERROR = re.compile(
    r"^(?P<file>[^\n(]+)\((?P<line>\d+)\): (?:catastrophic )?error(?: #[\w-]+)?: (?P<text>.+)$",
    re.MULTILINE,
)
_OTHER_ERROR = re.compile(r"^.*\b(?:error|fatal)\b\s*: (?P<text>.+)$", re.MULTILINE)
_FRAME = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
_USED = re.compile(r"Used (\d+) registers(?P<rest>[^\n]*)")
_SMEM = re.compile(r"(\d+) bytes smem")


class CompileError(RuntimeError):
    """A kernel did not compile.

    Attributes
    ----------
    kernel, arch : str
    options : tuple of str
    log : str
        NVRTC's log, whole.
    """

    def __init__(
        self, kernel: str, arch: str, options: Sequence[str], problem: str, log: str
    ) -> None:
        self.kernel, self.arch, self.options, self.log = kernel, arch, tuple(options), log
        super().__init__(
            f"ridgeline: kernel '{kernel}' does not compile for {arch}: {problem}\n"
            f"options: {' '.join(options)}"
        )


def compile_kernel(name: str, arch: str, key: str, options: str, kernels_dir: str) -> bytes:
    """Compile a kernel and return it as an entry.

    Parameters
    ----------
    name : str
        `<header>:<template-id>`, such as `norm/rmsnorm.cuh:rmsnorm<__half, 8>`.
    arch : str
        `sm_XX` for a cubin, `compute_XX` for PTX.
    key : str
        The entry's key, from `ridgeline_entry_key`.
    options : str
        Options for NVRTC, separated by spaces.
    kernels_dir : str
        The root that quoted includes are relative to.

    Raises
    ------
    CompileError
        If NVRTC refuses the kernel, the options or the architecture.
    CompilerMissingError
        If NVRTC or its headers are not installed.
    """
    tools = toolchain.load()
    header, template_id = split_name(name)
    arguments = [
        *options.split(),
        f"-arch={arch}",
        f"-I{kernels_dir}",
        f"-I{tools.include}",
        "--ptxas-options=-v",
    ]
    source = f'#include "{header}"\nusing namespace ridgeline;\n'
    program = _Program(tools.nvrtc, source, template_id)
    try:
        result = program.compile(arguments)
        log = program.log()
        if result != 0:
            problem = _problem(tools, arch, log, kernels_dir) or program.describe(result)
            raise CompileError(name, arch, arguments, problem, log)
        lowered = program.lowered_name()
        is_ptx = arch.startswith("compute_")
        raw = program.read("PTX" if is_ptx else "CUBIN")
    finally:
        program.destroy()
    usage = (-1, -1, -1, -1, -1) if is_ptx else _resource_usage(log)
    registers, static_smem, spill_stores, spill_loads, stack = usage
    return entry.Entry(
        name=name,
        arch=arch,
        kind="ptx" if is_ptx else "cubin",
        lowered=lowered,
        registers=registers,
        static_smem=static_smem,
        spill_stores=spill_stores,
        spill_loads=spill_loads,
        stack=stack,
        raw_size=len(raw),
        raw_sha256=hashlib.sha256(raw).hexdigest(),
        compiler=tools.compiler,
        key=key,
        payload=entry.deflate(raw),
    ).pack()


def split_name(name: str) -> tuple[str, str]:
    """Return the header and the template-id of a kernel name."""
    header, colon, template_id = name.partition(":")
    if not colon or not header or not template_id:
        raise ValueError(
            f"ridgeline: '{name}' is not a kernel name; expected '<header>:<template-id>', "
            f"such as 'norm/rmsnorm.cuh:rmsnorm<__half, 8>'"
        )
    return header, template_id


class _Program:
    """An NVRTC program with one name expression."""

    def __init__(self, nvrtc: Any, source: str, template_id: str) -> None:
        self._nvrtc = nvrtc
        self._template_id = template_id.encode()
        result, self._program = nvrtc.nvrtcCreateProgram(
            source.encode(), _PROGRAM.encode(), 0, [], []
        )
        self._expect(result, "nvrtcCreateProgram")
        self._expect(
            nvrtc.nvrtcAddNameExpression(self._program, self._template_id)[0],
            "nvrtcAddNameExpression",
        )

    def compile(self, arguments: Sequence[str]) -> int:
        encoded = [argument.encode() for argument in arguments]
        (result,) = self._nvrtc.nvrtcCompileProgram(self._program, len(encoded), encoded)
        return int(result)

    def log(self) -> str:
        return self.read("ProgramLog").rstrip(b"\0").decode(errors="replace").strip()

    def lowered_name(self) -> str:
        result, lowered = self._nvrtc.nvrtcGetLoweredName(self._program, self._template_id)
        self._expect(result, "nvrtcGetLoweredName")
        return bytes(lowered).decode()

    def read(self, what: str) -> bytes:
        """Return one of NVRTC's outputs; PTX keeps its final zero, which the driver wants."""
        result, size = getattr(self._nvrtc, f"nvrtcGet{what}Size")(self._program)
        self._expect(result, f"nvrtcGet{what}Size")
        # Why: NVRTC writes into the buffer, and one-byte objects are shared by Python.
        data = bytes(max(int(size), 2))
        self._expect(getattr(self._nvrtc, f"nvrtcGet{what}")(self._program, data)[0], what)
        return data[: int(size)]

    def describe(self, result: int) -> str:
        _, text = self._nvrtc.nvrtcGetErrorString(self._nvrtc.nvrtcResult(result))
        return bytes(text).decode()

    def destroy(self) -> None:
        self._nvrtc.nvrtcDestroyProgram(self._program)

    def _expect(self, result: Any, call: str) -> None:
        if int(result) != 0:
            raise RuntimeError(f"ridgeline: {call} failed: {self.describe(int(result))}")


def _problem(tools: toolchain.Toolchain, arch: str, log: str, kernels_dir: str) -> str:
    """Return the one line of `log` that says why, "" when there is none."""
    number = int(re.sub(r"\D", "", arch) or 0)
    if tools.arch_numbers and number not in tools.arch_numbers:
        known = ", ".join(str(known) for known in tools.arch_numbers)
        return (
            f"{tools.compiler} does not know this architecture; it knows {known}. "
            f"A newer NVRTC package may, or RIDGELINE_ARCH={_nearest(number)} runs an "
            f"older architecture's code"
        )
    match = _FRONTEND_ERROR.search(log)
    if match is None:
        match = _OTHER_ERROR.search(log)
        return match["text"].strip() if match else ""
    text = match["text"].strip()
    if match["file"] == "__nv_name_map":
        return f"the template-id is not valid: {text}"
    file = Path(match["file"])
    root = Path(kernels_dir)
    shown = file.relative_to(root) if file.is_relative_to(root) else file
    return f"{shown}:{match['line']}: {text}"


def _nearest(number: int) -> int:
    older = [known for known in (75, 80, 86, 89, 90) if known <= number]
    return max(older, default=75)


def _resource_usage(log: str) -> tuple[int, int, int, int, int]:
    """Read the assembler's report: registers, static shared memory, spill stores, loads, stack.

    Functions that were not inlined report frames of their own: spills add up, the deepest frame
    counts.
    """
    used = _USED.search(log)
    if used is None:
        return (-1, -1, -1, -1, -1)
    smem = _SMEM.search(used["rest"])
    frames = [tuple(int(number) for number in frame) for frame in _FRAME.findall(log)]
    return (
        int(used[1]),
        int(smem[1]) if smem else 0,
        sum(frame[1] for frame in frames),
        sum(frame[2] for frame in frames),
        max((frame[0] for frame in frames), default=0),
    )
