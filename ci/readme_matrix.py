"""The README's support matrix, written from the core table: `python3 ci/readme_matrix.py --write`.

The table that the dispatcher reads is exported by the installed library; this turns it into
markdown between the two markers of README.md. `--check` (in `make lint`) compares instead.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

README = Path(__file__).resolve().parent.parent / "README.md"
BEGIN = "<!-- matrix: ci/readme_matrix.py writes what follows -->"
END = "<!-- matrix: end -->"
ARCHS = (75, 80, 86, 89, 90)


def rows_of_library() -> list[dict[str, Any]]:
    from ridgeline import _library

    table: list[dict[str, Any]] = json.loads(_library.core_table())
    return table


def serves(row: dict[str, Any], sm: int) -> bool:
    return bool(row["core"]) and row["min_sm"] <= sm <= row["max_sm"]


def matrix(table: list[dict[str, Any]]) -> str:
    """One line an op: how many kernels of each architecture the wheel carries."""
    names = dict.fromkeys(row["op"] for row in table)
    lines = [
        "| op | " + " | ".join(f"sm_{sm}{'a' if sm == 90 else ''}" for sm in ARCHS) + " | CPU |",
        "|---" * (len(ARCHS) + 2) + "|",
    ]
    for name in names:
        counts = [sum(row["op"] == name and serves(row, sm) for row in table) for sm in ARCHS]
        lines.append(f"| `{name}` | " + " | ".join(str(n or "JIT") for n in counts) + " | yes |")
    return "\n".join(lines)


def main() -> int:
    text = README.read_text()
    head, _, rest = text.partition(BEGIN)
    _, _, tail = rest.partition(END)
    if not tail:
        sys.exit(f"error: {README.name} has not both markers, {BEGIN} and {END}")
    wanted = f"{head}{BEGIN}\n{matrix(rows_of_library())}\n{END}{tail}"
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
