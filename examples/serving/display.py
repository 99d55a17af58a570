"""What a run shows while it goes on: the text of every request, and how far it is."""

from __future__ import annotations

import importlib
from typing import Any, Protocol, TextIO

from ridgeline.demo.generate import Utf8Stream

from .engine import Progress
from .scheduler import Scheduler, Sequence

WIDTH = 72
#: Seconds between two lines of progress.
INTERVAL = 1.0


class Display(Protocol):
    """Shows each step as it comes."""

    def show(self, progress: Progress) -> None:
        """Show what a step wrote."""
        ...

    def close(self) -> None:
        """Show nothing more."""
        ...


def make_display(scheduler: Scheduler, out: TextIO, plain: bool) -> Display:
    """Return a live table where rich is installed and `out` is a terminal, else plain lines."""
    if not plain and out.isatty():
        try:
            importlib.import_module("rich")
        except ImportError:
            pass
        else:
            return LiveTable(scheduler, out)
    return PlainLines(scheduler, out)


class TextOf:
    """A sequence's text, a whole character at a time, on one line."""

    def __init__(self) -> None:
        self._stream = Utf8Stream()
        self.text = ""
        self._num_read = 0

    def update(self, sequence: Sequence) -> None:
        """Read the sequence's new tokens."""
        for token in sequence.written[self._num_read :]:
            self.text += self._stream.feed(token).replace("\n", " ")
            self._num_read += 1
        if sequence.is_done:
            self.text += self._stream.finish()


def state_line(scheduler: Scheduler, now: float) -> str:
    """Tell how far the run is."""
    done = sum(sequence.is_done for sequence in scheduler.sequences)
    pool = scheduler.pool
    return (
        f"{done} of {len(scheduler.sequences)} done, {len(scheduler.running)} running, "
        f"{scheduler.num_waiting(now)} waiting, {pool.num_used} of {pool.num_pages} pages held"
    )


class PlainLines:
    """Prints a line of a request's text when it is full, and a line of progress a second.

    Parameters
    ----------
    scheduler
        What runs.
    out
        Where lines go.
    """

    def __init__(self, scheduler: Scheduler, out: TextIO) -> None:
        self.scheduler, self.out = scheduler, out
        self._texts = {s.request.name: TextOf() for s in scheduler.sequences}
        self._column = max(map(len, self._texts))
        self._last_state = 0.0

    def show(self, progress: Progress) -> None:
        """Print what has become a whole line."""
        for sequence in progress.grown:
            text = self._texts[sequence.request.name]
            text.update(sequence)
            while len(text.text) > WIDTH:
                cut = text.text.rfind(" ", 1, WIDTH + 1)
                cut = WIDTH if cut < 0 else cut + 1
                self._line(progress.now, sequence, text.text[:cut])
                text.text = text.text[cut:]
            if sequence.is_done:
                self._line(progress.now, sequence, text.text + " [done]")
        if progress.now - self._last_state >= INTERVAL:
            self._last_state = progress.now
            state = state_line(self.scheduler, progress.now)
            print(f"{progress.now:7.2f} s  -- {state}", file=self.out, flush=True)

    def _line(self, now: float, sequence: Sequence, text: str) -> None:
        name = sequence.request.name.ljust(self._column)
        print(f"{now:7.2f} s  {name}  {text}", file=self.out, flush=True)

    def close(self) -> None:
        """End the text."""
        print(file=self.out)


class LiveTable:
    """Finished texts, a bar of progress, and a table of the running requests and their texts."""

    def __init__(self, scheduler: Scheduler, out: TextIO) -> None:
        console: Any = importlib.import_module("rich.console")
        live: Any = importlib.import_module("rich.live")
        self._table: Any = importlib.import_module("rich.table")
        self._bar: Any = importlib.import_module("rich.progress_bar")
        self._group = console.Group
        self.scheduler = scheduler
        self._texts = {s.request.name: TextOf() for s in scheduler.sequences}
        self._num_tokens = sum(s.request.max_tokens for s in scheduler.sequences)
        self._now = 0.0
        # Drawn by a thread of rich's own, so that a step waits for no terminal.
        self._live = live.Live(
            console=console.Console(file=out, markup=False, highlight=False),
            get_renderable=self._render,
            refresh_per_second=12,
        )
        self._live.start()

    def show(self, progress: Progress) -> None:
        """Take in what a step wrote."""
        self._now = progress.now
        for sequence in progress.grown:
            name = sequence.request.name
            self._texts[name].update(sequence)
            if sequence.is_done:
                self._live.console.print(f"{name}  {self._texts[name].text}\n")

    def close(self) -> None:
        """Draw the end."""
        self._live.stop()

    def _render(self) -> Any:
        table = self._table.Table(box=None, show_header=False, expand=True)
        table.add_column(no_wrap=True)
        table.add_column(no_wrap=True, justify="right")
        table.add_column(no_wrap=True, ratio=1)
        for sequence in list(self.scheduler.running):
            request = sequence.request
            count = f"{len(sequence.times)}/{request.max_tokens}"
            table.add_row(request.name, count, self._texts[request.name].text[-WIDTH:])
        written = sum(len(s.times) for s in self.scheduler.sequences)
        bar = self._bar.ProgressBar(total=self._num_tokens, completed=written, width=WIDTH)
        above = self._table.Table.grid()
        above.add_row(bar)
        above.add_row(state_line(self.scheduler, self._now))
        return self._group(above, table)
