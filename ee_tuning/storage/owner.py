"""Exclusive ownership of an output that takes long to write: a second job is refused at once, with the owner's name.

The owner holds a lock file that names its process and machine. The lock ends with the process in any case, so a file
left by a killed job blocks no one. Network file systems carry locks between machines (NFS 3 and later, Lustre mounted
with `flock`, GPFS). Without locks, a process on the same machine is looked up; one on another machine can not be, and
is overruled with a warning.
"""

import fcntl
import json
import os
import shlex
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil

from ee_tuning.errors import InputError
from ee_tuning.json_file import to_json
from ee_tuning.notices import warn
from ee_tuning.parallel.collectives import on_first_rank
from ee_tuning.parallel.topology import Topology
from ee_tuning.storage.atomic_write import os_errors_as_input_errors, resolve_target

_CLOCK_TOLERANCE = 2.0
"""Seconds by which two readings of a process's start may differ."""


@dataclass(frozen=True, kw_only=True)
class Owner:
    """The process that writes an output."""

    pid: int
    host: str
    started: float
    """Start of the process in seconds since 1970, because a process id may be reused."""
    command: str

    @classmethod
    def current(cls) -> "Owner":
        """Returns this process as owner."""
        return cls(
            pid=os.getpid(),
            host=socket.gethostname(),
            started=psutil.Process().create_time(),
            command=shlex.join(sys.argv)[:300],
        )

    def is_running(self) -> bool:
        """Whether the process runs on this machine. Always false for another machine."""
        if self.host != socket.gethostname():
            return False
        try:
            return abs(psutil.Process(self.pid).create_time() - self.started) < _CLOCK_TOLERANCE
        except psutil.Error:
            return False

    def __str__(self) -> str:
        since = time.strftime("%Y-%m-%d %H:%M", time.localtime(self.started))
        return f"process {self.pid} on {self.host} (since {since}: {self.command})"


@contextmanager
def owned(output: Path, topology: Topology | None, *, lock_file: Path | None = None) -> Iterator[None]:
    """Makes this job the only owner of `output` while the context is open. All ranks call it.

    Rank 0 holds `lock_file`, by default a hidden file beside `output`. Folders created for it are removed if they are
    still empty. Raises InputError, naming the owner, where another job has it, or where the disk refuses the file.
    """
    if lock_file is None:
        place = resolve_target(output)
        lock_file = place.with_name(f".{place.name}.owner")
    handle, made = on_first_rank(topology, lambda: _acquire(output, lock_file))
    try:
        yield
    finally:
        if topology is None or topology.rank == 0:
            _release(lock_file, handle, made)


def _acquire(output: Path, lock_file: Path) -> tuple[int, list[Path]]:
    """Locks the file. Returns it with the folders that were created for it, innermost first."""
    with os_errors_as_input_errors(output):
        made = [folder for folder in (lock_file.parent, *lock_file.parent.parents) if not folder.exists()]
        lock_file.parent.mkdir(parents=True, exist_ok=True)
        while True:
            # Opened for writing: NFS grants an exclusive lock to no other handle.
            handle = os.open(lock_file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
            owner, is_locked = _read_owner(lock_file), _lock(handle)
            if is_locked is False or (is_locked is None and owner is not None and owner.is_running()):
                os.close(handle)
                if not lock_file.exists():  # released in between
                    continue
                raise InputError(
                    f"{output} is being written by {owner or 'another process'}; wait for it, stop it, or give another "
                    "--output"
                )
            if is_locked is None and owner is not None and owner.host != socket.gethostname():
                warn(
                    f"{output} was being written by {owner}, and its file system has no locks to show whether it "
                    "still is; make sure that it is not"
                )
            if lock_file.exists() and os.path.samestat(lock_file.stat(), os.fstat(handle)):
                os.truncate(handle, 0)
                os.write(handle, to_json(asdict(Owner.current())).encode())
                return handle, made
            os.close(handle)  # the former owner removed it after it was opened here


def _lock(handle: int) -> bool | None:
    """Tries to lock the file. False where another process holds the lock, None on a file system without locks."""
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


def _read_owner(lock_file: Path) -> Owner | None:
    """Returns None where the file names no owner, which is about to write it or was killed before."""
    try:
        tree: dict[str, Any] = json.loads(lock_file.read_text(encoding="utf-8"))
        return Owner(
            pid=int(tree["pid"]), host=str(tree["host"]), started=float(tree["started"]), command=str(tree["command"])
        )
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _release(lock_file: Path, handle: int, made: list[Path]) -> None:
    with suppress(OSError):
        lock_file.unlink()  # before the lock ends, so that no later owner's file is removed
    os.close(handle)
    for folder in made:
        try:
            folder.rmdir()
        except OSError:  # other files are in it
            break
