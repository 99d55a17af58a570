"""One record and one table format for every benchmark."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass
class Row:
    """One measured case.

    `limit_us` is the roofline's time: bytes over the measured bandwidth or operations over the
    measured rate of the matrix units, whichever is longer. `predicted_us` was fixed before the run.
    `goal_us` is what the case has to reach. Peers in `beside` are shown, and not counted.
    """

    op: str
    case: str
    us: float
    net_us: float | None = None
    num_bytes: float = 0.0
    num_flops: float = 0.0
    limit_us: float | None = None
    predicted_us: float | None = None
    goal_us: float | None = None
    peers: dict[str, float] = field(default_factory=dict)
    beside: dict[str, float] = field(default_factory=dict)
    difference: float | None = None
    notes: list[str] = field(default_factory=list)

    @property
    def ratio(self) -> float | None:
        """Time of the best peer over ours: above 1, ours is faster."""
        return min(self.peers.values()) / self.us if self.peers else None

    @property
    def misses_goal(self) -> bool:
        return self.goal_us is not None and self.us > self.goal_us

    def rate(self) -> str:
        if self.num_flops:
            return f"{self.num_flops / self.us / 1e6:.0f} TFLOP/s"
        return f"{self.num_bytes / self.us / 1e3:.0f} GB/s" if self.num_bytes else ""

    def as_json(self) -> dict[str, Any]:
        return {**asdict(self), "ratio": self.ratio, "rate": self.rate()}


HEADER = (
    "case",
    "us",
    "net us",
    "rate",
    "% of roofline",
    "predicted us",
    "goal us",
    "peers us",
    "best peer / ours",
    "beside us",
)


def cells(row: Row) -> list[str]:
    def number(value: float | None, form: str = ".1f") -> str:
        return "" if value is None else format(value, form)

    share = None if row.limit_us is None else 100 * row.limit_us / row.us

    def listed(peers: dict[str, float]) -> str:
        return ", ".join(f"{name} {us:.1f}" for name, us in peers.items())

    return [
        f"{row.op} {row.case}",
        number(row.us),
        number(row.net_us),
        row.rate(),
        number(share, ".0f"),
        number(row.predicted_us),
        number(row.goal_us) + (" MISSED" if row.misses_goal else ""),
        listed(row.peers),
        number(row.ratio, ".2f"),
        listed(row.beside),
    ]


def markdown(rows: list[Row]) -> str:
    """The table, columns padded so that it reads in a terminal too, then the notes.

    A column that has nothing in any row is left out.
    """
    every = [list(HEADER), *(cells(row) for row in rows)]
    used = [i for i in range(len(HEADER)) if any(line[i] for line in every[1:])]
    lines = [[line[i] for i in used] for line in every]
    widths = [max(len(line[i]) for line in lines) for i in range(len(used))]

    def text(line: list[str]) -> str:
        padded = (cell.ljust(width) for cell, width in zip(line, widths, strict=True))
        return f"| {' | '.join(padded)} |"

    rule = "|" + "|".join("-" * (width + 2) for width in widths) + "|"
    notes = dict.fromkeys(note for row in rows for note in row.notes)
    table = [text(lines[0]), rule, *(text(line) for line in lines[1:])]
    return "\n".join([*table, *(["", *(f"- {note}" for note in notes)] if notes else [])])


def geometric_mean(values: list[float]) -> float | None:
    return math.exp(sum(math.log(v) for v in values) / len(values)) if values else None


def summary(rows: list[Row]) -> str:
    """Geometric mean of peer / ours for every peer, over the cases that it ran."""
    names = dict.fromkeys(name for row in rows for name in row.peers)
    parts = []
    for name in names:
        ratios = [row.peers[name] / row.us for row in rows if name in row.peers]
        mean = geometric_mean(ratios)
        if mean is not None:
            parts.append(f"{name} / ours: {mean:.3f} over {len(ratios)} cases")
    return "; ".join(parts)
