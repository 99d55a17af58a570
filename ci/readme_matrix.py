"""The README's support matrix, written from the core table: `python3 ci/readme_matrix.py --write`.

The table that the dispatcher reads is exported by the installed library; this turns it into
markdown between the two markers of README.md. `--check` (in `make lint`) compares instead.
"""

from __future__ import annotations

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


def matrix(table: Sequence[CoreRow]) -> str:
    """One line an op: the kernels that the wheel carries for each architecture."""
    lines = [
        "| op | " + " | ".join(ARCHS) + " | CPU |",
        "|---" * (len(ARCHS) + 2) + "|",
    ]
    for op in dict.fromkeys(row.op for row in table):
        rows = [row for row in table if row.op == op]
        counts = [len({row.kernel for row in rows if row.core and row.serves(a)}) for a in ARCHS]
        jit = [any(row.serves(arch) for row in rows) for arch in ARCHS]
        texts = [str(n) if n else "JIT" if j else "no" for n, j in zip(counts, jit, strict=True)]
        lines.append(f"| `{op}` | {' | '.join(texts)} | yes |")
    return "\n".join(lines)


def main() -> int:
    from ridgeline import compiler

    text = README.read_text()
    head, _, rest = text.partition(BEGIN)
    _, _, tail = rest.partition(END)
    if not tail:
        sys.exit(f"error: {README.name} has not both markers, {BEGIN} and {END}")
    wanted = f"{head}{BEGIN}\n{matrix(compiler.library().core_table())}\n{END}{tail}"
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
