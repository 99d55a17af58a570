"""Progress of a batch of compiles: one line that is rewritten, or a line now and then in a log."""

from __future__ import annotations

import sys
import time
from types import TracebackType

_LOG_SECONDS = 10.0
_WIDTH = 100


class Progress:
    """Counts finished kernels on stderr; `shown` False keeps silent."""

    def __init__(self, total: int, *, shown: bool = True) -> None:
        self._total = total
        self._done = 0
        self._shown = shown and total > 0
        self._stream = sys.stderr
        self._terminal = self._stream.isatty()
        self._start = self._last = time.monotonic()

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._shown and self._terminal:
            self._stream.write("\n")
            self._stream.flush()

    def step(self, what: str) -> None:
        """Count one more; `what` names it."""
        self._done += 1
        if not self._shown:
            return
        now = time.monotonic()
        line = f"[{self._done}/{self._total}] {now - self._start:.0f} s  {what}"
        if self._terminal:
            self._stream.write(f"\r{line[:_WIDTH]:<{_WIDTH}}")
        elif self._done == self._total or now - self._last >= _LOG_SECONDS:
            self._stream.write(line + "\n")
            self._last = now
        self._stream.flush()
