"""Progress bar of long commands: bytes, speed and time left. Shown on a terminal only."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

Advance = Callable[[int], None]
"""Adds to the number of bytes done."""


@contextmanager
def byte_progress(description: str, total: int, *, is_shown: bool = True) -> Iterator[Advance]:
    """Shows a bar of `total` bytes while the context is open."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), disable=not (is_shown and sys.stderr.isatty())) as progress:
        task = progress.add_task(description, total=total)
        yield lambda num_bytes: progress.advance(task, num_bytes)
