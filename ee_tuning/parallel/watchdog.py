"""Reports what a process waits for when the wait is long or fails. Otherwise a hang would be silent."""

import re
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch.distributed as dist

from ee_tuning.notices import say
from ee_tuning.parallel.topology import Topology

REPORT_AFTER_SECONDS = 60.0
"""Seconds after which a wait is reported. The next report follows after twice as long, and so on."""


@dataclass
class _Wait:
    rank_name: str
    what: str
    since: float
    next_report_after: float


class LostRankError(RuntimeError):
    """The process group gave up on another rank. The text is one line and names this rank and what it awaited."""


_LOST = re.compile(
    "connection|closed by peer|timed? ?out|broken pipe|unreachable|no route|remote process", re.IGNORECASE
)


_active_waits: dict[int, _Wait] = {}
"""The current waits of this process, by thread."""
_watcher: threading.Thread | None = None


@contextmanager
def hang_watchdog(topology: Topology, what: str) -> Iterator[None]:
    """Wraps a wait for other ranks, described by `what`.

    If the process group gives up, by timeout or because a rank is gone, LostRankError names this rank and `what`.
    """
    rank_name = f"rank {topology.rank} (stage {topology.stage}, tensor {topology.tp_rank}, replica {topology.dp_rank})"
    wait = _active_waits[threading.get_ident()] = _Wait(rank_name, what, time.monotonic(), REPORT_AFTER_SECONDS)
    _start_watching()
    try:
        yield
    except RuntimeError as error:
        if not _is_of_the_group(error):
            raise
        waited = time.monotonic() - wait.since
        raise LostRankError(f"{rank_name} waited {waited:.0f} s for {what}, in vain: {_first_line(error)}") from error
    finally:
        _active_waits.pop(threading.get_ident(), None)


def lost_rank_text(error: BaseException) -> str | None:
    """Returns one line where `error` says that another rank is gone, hangs or can not be reached, else None."""
    if not _is_of_the_group(error) or not _LOST.search(str(error)):
        return None
    if isinstance(error, LostRankError):
        return str(error)
    return f"rank {dist.get_rank() if dist.is_initialized() else 0} lost another rank: {_first_line(error)}"


def _is_of_the_group(error: BaseException) -> bool:
    # gloo raises plain RuntimeErrors
    return isinstance(error, LostRankError | dist.DistError) or (
        isinstance(error, RuntimeError) and "gloo" in str(error)
    )


def _first_line(error: BaseException) -> str:
    """Returns the error text without the place in gloo's sources and without its advice."""
    line, _, _ = str(error).partition("\n")
    return re.sub(r"^\[[^\]]*gloo[^\]]*\] ", "", line).partition(" This is typically")[0].rstrip(".")


def _start_watching() -> None:
    global _watcher
    if _watcher is None:
        _watcher = threading.Thread(target=_watch, name="waits", daemon=True)
        _watcher.start()


def _watch() -> None:
    while True:
        time.sleep(1.0)
        for line in _due_reports(time.monotonic()):
            say(line)


def _due_reports(now: float) -> list[str]:
    """Returns the reports that are due at `now`, in seconds of `time.monotonic`."""
    lines = []
    for wait in list(_active_waits.values()):
        waited = now - wait.since
        if waited >= wait.next_report_after:
            wait.next_report_after = 2 * waited
            lines.append(f"ee-tuning: {wait.rank_name} has waited {waited:.0f} s for {wait.what}")
    return lines
