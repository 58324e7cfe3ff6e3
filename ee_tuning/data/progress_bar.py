"""Progress of tokenizing: a bar in bytes at a terminal, a line now and then elsewhere, nothing for quick work."""

import sys
import time

import rich.progress
from rich.console import Console

_QUIET_SECONDS = 2.0
_SECONDS_BETWEEN_LINES = 10.0


class ProgressBar:
    """Bytes done and expected. A context manager; only the process with `is_shown` prints."""

    def __init__(self, what: str, *, is_shown: bool) -> None:
        self._what, self._is_shown = what, is_shown
        self._began = self._printed_at = time.monotonic()
        self._done = self._total = 0
        self._bar: rich.progress.Progress | None = None
        self._task: rich.progress.TaskID | None = None

    def __enter__(self) -> "ProgressBar":
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar:
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
        now = time.monotonic()
        if not self._is_shown or now - self._began < _QUIET_SECONDS:
            return
        if self._bar is None:
            self._bar = self._make_bar()
            self._task = self._bar.add_task(self._what, total=self._total)
            self._bar.start()
        if not self._bar.disable and self._task is not None:
            self._bar.update(self._task, completed=self._done, total=self._total)
        elif now - self._printed_at >= _SECONDS_BETWEEN_LINES:
            self._printed_at = now
            left = int((now - self._began) * (self._total - self._done) / max(self._done, 1))
            ending = f" · {left // 60}:{left % 60:02d} left" if self._done else ""
            print(
                f"{self._what}: {self._done / 1e6:,.0f} of {self._total / 1e6:,.0f} MB{ending}",
                file=sys.stderr,
                flush=True,
            )

    def _make_bar(self) -> rich.progress.Progress:
        console = Console(stderr=True)
        return rich.progress.Progress(
            rich.progress.TextColumn("{task.description}"),
            rich.progress.BarColumn(),
            rich.progress.DownloadColumn(),
            rich.progress.TransferSpeedColumn(),
            rich.progress.TimeRemainingColumn(),
            console=console,
            disable=not console.is_terminal,
            transient=True,
        )
