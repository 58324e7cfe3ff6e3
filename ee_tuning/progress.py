"""Progress of long work on standard error: a bar at a terminal, a line now and then elsewhere."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    ProgressColumn,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

from ee_tuning.notices import say

Advance = Callable[[int], None]
"""Adds to the number of bytes done."""
_QUIET_SECONDS = 2.0
_SECONDS_BETWEEN_LINES = 10.0


def progress_bar(*columns: ProgressColumn, is_shown: bool = True, is_transient: bool = False) -> Progress:
    """Returns a bar whose `columns` stand before the time left. It is disabled where standard error is no terminal."""
    console = Console(stderr=True)
    return Progress(
        *columns,
        TimeRemainingColumn(),
        console=console,
        disable=not (is_shown and console.is_terminal),
        transient=is_transient,
    )


def time_left(seconds: float, done: int, total: int) -> str:
    """Returns the time for the rest as minutes:seconds, where `done` of `total` items took `seconds`."""
    left = round(seconds * (total - done) / max(done, 1))
    return f"{left // 60}:{left % 60:02d}"


class ProgressLines:
    """Lines about work that begins when this object is created. The longer it lasts, the rarer they are."""

    def __init__(self, num_done_before: int = 0):
        """`num_done_before` items were done by an earlier process and say nothing about the time left."""
        self._before = num_done_before
        self._began = self._printed_at = time.monotonic()

    @property
    def seconds(self) -> float:
        """Seconds since the work began."""
        return time.monotonic() - self._began

    def show(self, text: str, done: int, total: int) -> None:
        """Prints `text` and the time left where a line is due."""
        now, seconds = time.monotonic(), self.seconds
        if now - self._printed_at >= max(_SECONDS_BETWEEN_LINES, seconds / 50):
            self._printed_at = now
            before = self._before
            say(f"{text} · {time_left(seconds, done - before, total - before)} left" if done > before else text)


@contextmanager
def byte_progress(description: str, total: int, *, is_shown: bool = True) -> Iterator[Advance]:
    """Shows a bar of `total` bytes at a terminal while the context is open."""
    with progress_bar(*_byte_columns(), is_shown=is_shown) as bar:
        task = bar.add_task(description, total=total)
        yield lambda num_bytes: bar.advance(task, num_bytes)


class ByteProgress:
    """Progress of work whose size becomes known as it goes on; quick work shows nothing. A context manager."""

    def __init__(self, description: str, *, is_shown: bool):
        self._description, self._is_shown = description, is_shown
        self._lines = ProgressLines()
        self._done = self._total = 0
        self._bar = progress_bar(*_byte_columns(), is_shown=is_shown, is_transient=True)
        self._task = self._bar.add_task(description, total=0)

    def __enter__(self) -> "ByteProgress":
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar.live.is_started:
            self._bar.stop()

    def expect(self, num_bytes: int) -> None:
        """Adds to the expected bytes."""
        self._total += num_bytes
        self._show()

    def advance(self, num_bytes: int) -> None:
        """Adds to the bytes done."""
        self._done += num_bytes
        self._show()

    def _show(self) -> None:
        if not self._is_shown or self._lines.seconds < _QUIET_SECONDS:
            return
        self._bar.start()
        self._bar.update(self._task, completed=self._done, total=self._total)
        if self._bar.disable:
            done, total = self._done / 1e6, self._total / 1e6
            self._lines.show(f"{self._description}: {done:,.0f} of {total:,.0f} MB", self._done, self._total)


def _byte_columns() -> tuple[ProgressColumn, ...]:
    return TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn()
