"""The README's support matrix, written from the core table: `python3 ci/readme_matrix.py --write`.

The table that the dispatcher reads is exported by the installed library; this turns it into
markdown between the two markers of README.md. `--check` (in `make lint`) compares instead.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ridgeline.compiler.native import CoreRow

README = Path(__file__).resolve().parent.parent / "README.md"
BEGIN = "<!-- matrix: ci/readme_matrix.py writes what follows -->"
END = "<!-- matrix: end -->"
ARCHS = ("sm_75", "sm_80", "sm_86", "sm_89", "sm_90a")


DTYPES = {"__half": "fp16", "__nv_bfloat16": "bf16", "float": "fp32"}
ORDER = (*DTYPES.values(), "any")


def dtype_of(kernel: str) -> str:
    """The first template argument is the type that a kernel works on, if it works on one."""
    found = re.search(r"<(\w+)", kernel)
    return DTYPES.get(found[1], "any") if found else "any"


def head_dims_of(kernels: Sequence[str]) -> list[str]:
    """Head dims of the attention kernels, as the README writes them, ascending."""
    found = {
        (int(qk), int(vo))
        for kernel in kernels
        for qk, vo in re.findall(r"HeadDims<(\d+), (\d+)>", kernel)
    }
    return [str(qk) if qk == vo else f"({qk}, {vo})" for qk, vo in sorted(found)]


def in_pack(rows: Sequence[CoreRow], arch: str) -> str:
    """What an architecture's pack holds of an op; JIT: nothing, but it can be compiled."""
    packed = [row.kernel for row in rows if row.core and row.serves(arch)]
    if not packed:
        return "JIT" if any(row.serves(arch) for row in rows) else "no"
    dtypes = " ".join(sorted({dtype_of(kernel) for kernel in packed}, key=ORDER.index))
    dims = head_dims_of(packed)
    return dtypes + (f": {', '.join(dims)}" if dims else "")


def matrix(table: Sequence[CoreRow]) -> str:
    """The types, and the head dims of attention, in each pack; ops that agree share a line."""
    ops_of: dict[tuple[str, ...], list[str]] = {}
    for op in dict.fromkeys(row.op for row in table):
        rows = [row for row in table if row.op == op]
        ops_of.setdefault(tuple(in_pack(rows, arch) for arch in ARCHS), []).append(f"`{op}`")
    lines = [f"| op | {' | '.join(ARCHS)} |", "|---" * (len(ARCHS) + 1) + "|"]
    lines += [f"| {', '.join(ops)} | {' | '.join(cells)} |" for cells, ops in ops_of.items()]
    return "\n".join(lines)


def main() -> int:
    from ridgeline import compiler

    text = README.read_text()
    head, _, rest = text.partition(BEGIN)
    _, _, tail = rest.partition(END)
    if not tail:
        sys.exit(f"error: {README.name} has not both markers, {BEGIN} and {END}")
    wanted = f"{head}{BEGIN}\n{matrix(compiler.library().core_table)}\n{END}{tail}"
    if text == wanted:
        print("README matrix: as the core table says")
        return 0
    if "--write" in sys.argv:
        README.write_text(wanted)
        print("README matrix: written")
        return 0
    print("README matrix: not what the core table says; run `make lint ARGS=--fix`")
    return 1


if __name__ == "__main__":
    sys.exit(main())
