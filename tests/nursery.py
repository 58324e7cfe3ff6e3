"""Processes to be killed: forked from one that has imported everything, so that a life costs milliseconds before its
work begins.
"""

import contextlib
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from warm_parent import forked

from ee_tuning.parallel.ports import free_port


class Nursery:
    """Starts process groups from the warm parent."""

    def __init__(self) -> None:
        self._context = forked()

    def start(self, function: Callable[..., Any], *arguments: Any, log: Path) -> "Life":
        """`function(*arguments)` in one process."""
        return Life([self._begun(function, arguments, {}, log)])

    def start_world(self, size: int, function: Callable[..., Any], *arguments: Any, log: Path) -> "Life":
        """`function(*arguments)` in each of `size` processes that a launcher's environment makes one world."""
        world = {"WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
        return Life(
            [
                self._begun(function, arguments, {**world, "RANK": str(rank), "LOCAL_RANK": str(rank)}, log)
                for rank in range(size)
            ]
        )

    def _begun(
        self, function: Callable[..., Any], arguments: tuple[Any, ...], environment: dict[str, str], log: Path
    ) -> BaseProcess:
        process = self._context.Process(target=_live, args=(function, arguments, environment, str(log)))
        process.start()
        return process


class Life:
    """Processes that are under way."""

    def __init__(self, processes: list[BaseProcess]):
        self.processes, self._since = processes, time.monotonic()

    def wait(self, seconds: float) -> float:
        """Until all have ended, for at most so long from now. Returns how long they have lived."""
        end = time.monotonic() + seconds
        for process in self.processes:
            process.join(max(0.0, end - time.monotonic()))
        return time.monotonic() - self._since

    def wait_for(self, path: Path, *, other_than: int | None = None) -> float:
        """Until there is such a file, with another inode than `other_than`, or one of them has ended. Returns how long
        they have lived.
        """
        while inode(path) in (None, other_than) and all(process.is_alive() for process in self.processes):
            time.sleep(0.01)
        return time.monotonic() - self._since

    def codes(self) -> list[int | None]:
        """Exit codes; None of those that live."""
        return [process.exitcode for process in self.processes]

    def kill(self, *, first: int = 0, pause: float = 0.0, with_children: bool = True) -> None:
        """kill -9: one process, after a pause the others, each with what it started where `with_children`. Returns when
        all is gone.

        Raises AssertionError where something that they started lives on.
        """
        order = [
            self.processes[first],
            *(process for process in self.processes if process is not self.processes[first]),
        ]
        for process in order:
            if with_children:
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.killpg(process.pid, signal.SIGKILL)
            process.kill()
            time.sleep(pause if process is order[0] else 0)
        for process in order:
            process.join()
        self.check_gone()

    def check_gone(self) -> None:
        """Raises AssertionError where a process of one of the groups lives on for long after the first of it has
        ended.
        """
        groups = {process.pid for process in self.processes}
        # One that is just being started learns of its parent's end when it has imported what it needs.
        deadline = time.monotonic() + 90
        while time.monotonic() < deadline and any(_members(groups)):
            time.sleep(0.01)
        left = [Path(f"/proc/{pid}/cmdline").read_text().replace("\0", " ") for pid in _members(groups)]
        assert not left, f"processes outlive the ones that started them: {left}"


def inode(path: Path) -> int | None:
    """Which file it is; None where there is none."""
    return path.stat().st_ino if path.exists() else None


def _members(groups: set[int | None]) -> Iterator[int]:
    """Living processes of these groups."""
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            state, _, group = stat.read_text().rpartition(")")[2].split()[:3]
            if int(group) in groups and state not in "ZX":
                yield int(stat.parent.name)


def _live(function: Callable[..., Any], arguments: tuple[Any, ...], environment: dict[str, str], log: str) -> None:
    os.setsid()
    with contextlib.suppress(OSError):
        os.setpgid(0, 0)
    out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(out, 1)
    os.dup2(out, 2)
    os.environ.update(environment)
    import torch

    torch.set_num_threads(1)
    code = function(*arguments)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code if isinstance(code, int) and not isinstance(code, bool) else 0)
