"""Reports what a process waits for when the wait is long or fails. Otherwise a hang would be silent."""

import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch.distributed as dist

from ee_tuning.parallel.topology import Topology

REPORT_AFTER_SECONDS = 60.0
"""Seconds after which a wait is reported. The next report follows after twice as long, and so on."""


@dataclass
class _Wait:
    rank_name: str
    what: str
    since: float
    next_report_after: float


_active_waits: dict[int, _Wait] = {}
"""The current waits of this process, by thread."""
_watcher: threading.Thread | None = None


@contextmanager
def hang_watchdog(topology: Topology, what: str) -> Iterator[None]:
    """Wraps a wait for other ranks, described by `what`.

    If the process group gives up, by timeout or because a rank is gone, the RuntimeError names this rank and `what`.
    """
    rank_name = f"rank {topology.rank} (stage {topology.stage}, tensor {topology.tp_rank}, replica {topology.dp_rank})"
    wait = _active_waits[threading.get_ident()] = _Wait(rank_name, what, time.monotonic(), REPORT_AFTER_SECONDS)
    _start_watching()
    try:
        yield
    except RuntimeError as error:
        if not isinstance(error, dist.DistError) and "gloo" not in str(error):  # gloo raises plain RuntimeErrors
            raise
        waited = time.monotonic() - wait.since
        raise RuntimeError(
            f"{rank_name} waited {waited:.0f} s for {what}, in vain: {str(error).partition(chr(10))[0]}"
        ) from error
    finally:
        _active_waits.pop(threading.get_ident(), None)


def _start_watching() -> None:
    global _watcher
    if _watcher is None:
        _watcher = threading.Thread(target=_watch, name="waits", daemon=True)
        _watcher.start()


def _watch() -> None:
    while True:
        time.sleep(1.0)
        for line in _due_reports(time.monotonic()):
            print(line, file=sys.stderr, flush=True)


def _due_reports(now: float) -> list[str]:
    """Returns the reports that are due at `now`, in seconds of `time.monotonic`."""
    lines = []
    for wait in list(_active_waits.values()):
        waited = now - wait.since
        if waited >= wait.next_report_after:
            wait.next_report_after = 2 * waited
            lines.append(f"ee-tuning: {wait.rank_name} has waited {waited:.0f} s for {wait.what}")
    return lines
