"""What is made of the data once and kept: token ids, mapped into memory by every process of a machine.

An entry is a folder named by a hash of all it depends on. One process of a machine makes it, or one of all where they
share the disk; it is renamed into place when whole. Two runs that want the same entry at a time wait for each other at
a lock.
"""

import hashlib
import os
import re
import secrets
import shutil
import socket
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist

from ee_tuning.cache_folder import VARIABLE, cache_folder
from ee_tuning.checkpoint.atomic_write import atomic_folder, os_errors_as_input_errors, try_lock
from ee_tuning.data.progress_bar import ProgressBar
from ee_tuning.errors import InputError
from ee_tuning.json_file import to_json
from ee_tuning.parallel.collectives import on_first_rank
from ee_tuning.parallel.heartbeat import run_with_heartbeat
from ee_tuning.parallel.topology import Topology

FORMAT = 3
"""Raise it when entries of before are no longer what would be made now."""
DAYS_KEPT = 90
"""An entry that no run has begun with for so long is removed when another one is made."""
_REMEDY = f"make room, or set data.cache (or {VARIABLE}) to another folder"
_SECONDS_TO_APPEAR = 90.0  # other machines may learn of a new folder on a shared disk late


@dataclass(frozen=True, kw_only=True)
class CacheEntry:
    """Something to be kept."""

    depends_on: Callable[[], dict[str, Any]]
    """All that its content depends on, as JSON. Asked on rank 0 alone."""
    make: Callable[[Path, ProgressBar], Iterator[None]]
    """Writes it into a folder, in steps."""

    def name(self) -> str:
        """The name of its folder."""
        canonical = to_json({"format": FORMAT, **self.depends_on()}, sort_keys=True)
        return hashlib.sha256(canonical.encode()).hexdigest()[:32]


def cache_root(given: str | None) -> Path:
    """data.cache, or the default."""
    return Path(given) if given else cache_folder()


def file_stamps(files: Sequence[Path]) -> list[list[Any]]:
    """What tells that a file is still the one it was, cheap for files of any size: path, size, and time of its last
    change.
    """
    stamps = []
    for path in files:
        try:
            stat = path.stat()
        except OSError as error:
            raise InputError(f"{path} can not be read: {error.strerror}; make it readable, or leave it out") from error
        stamps.append([str(path.resolve()), stat.st_size, stat.st_mtime_ns])
    return stamps


def get_or_build(entries: Sequence[CacheEntry], root: Path, topology: Topology | None) -> list[Path]:
    """The folders of `entries`, made where they are not there yet. All ranks call it.

    Raises InputError, the same on every rank, where the data or the disk refuse.
    """
    # Rank 0's names for all: the files' times of change may differ where each machine has a copy of them.
    folders = [root / name for name in on_first_rank(topology, lambda: [entry.name() for entry in entries])]
    with ProgressBar("tokenizing", speaks=topology is None or topology.is_logging_rank) as progress:
        makes = topology is None or _makes(root, topology)
        steps = _make_missing(entries, folders, root, progress) if makes else iter(())
        if topology is None:
            for _ in steps:
                pass
        else:
            run_with_heartbeat(steps, topology)
    for folder in folders:
        _await(folder)
    return folders


def _make_missing(
    entries: Sequence[CacheEntry], folders: Sequence[Path], root: Path, progress: ProgressBar
) -> Iterator[None]:
    for entry, folder in zip(entries, folders, strict=True):
        if folder.is_dir():
            with suppress(OSError):
                os.utime(folder)  # when it was last of use
            continue
        with os_errors_as_input_errors(folder, _REMEDY):
            root.mkdir(parents=True, exist_ok=True)
            _remove_unused(root)
        lock = yield from _wait_for(_lock_file(folder))
        try:
            if not folder.is_dir():
                with atomic_folder(folder, None, _REMEDY) as partial:
                    yield from entry.make(partial, progress)
        finally:
            with suppress(OSError):  # whoever waits for it looks for the folder first
                _lock_file(folder).unlink()
            os.close(lock)


def _remove_unused(root: Path) -> None:
    """Removes the entries that no run has begun with for DAYS_KEPT."""
    for folder in root.iterdir():
        with suppress(OSError):
            is_entry = re.fullmatch(r"(piped-)?[0-9a-f]{32}|piped-[0-9a-f]{8}\.partial", folder.name)
            if is_entry and time.time() - folder.stat().st_mtime > DAYS_KEPT * 86400:
                shutil.rmtree(folder)


def _wait_for(path: Path) -> Generator[None, None, int]:
    """Steps to go through until the lock file `path` is ours; its handle, which holds it until it is closed or this
    process ends.
    """
    while True:
        with os_errors_as_input_errors(path, _REMEDY):
            path.touch()  # anew each time: who had it before has removed it
        # On a disk without locks it is ours at once: at worst, two runs that start at a time make the same.
        if (lock := try_lock(path, is_ours=True)) is not None:
            return lock
        time.sleep(0.5)
        yield


def _lock_file(folder: Path) -> Path:
    return folder.with_name(folder.name + ".lock")


def _makes(root: Path, topology: Topology) -> bool:
    """Whether this rank makes what is missing: rank 0, and the first of each machine that does not see rank 0's
    disk.
    """
    hosts: list[str] = [""] * topology.world_size
    dist.all_gather_object(hosts, socket.gethostname(), group=topology.world_control)
    probe = root / topology.broadcast_object(f"probe-{secrets.token_hex(4)}")
    if topology.rank == 0:
        with suppress(OSError):  # told of where it hinders
            root.mkdir(parents=True, exist_ok=True)
            probe.touch()
    topology.barrier()
    sees = probe.exists()
    topology.barrier()
    if topology.rank == 0:
        with suppress(OSError):
            probe.unlink()
        return True
    return hosts.index(hosts[topology.rank]) == topology.rank and not sees


def _await(folder: Path) -> None:
    until = time.monotonic() + _SECONDS_TO_APPEAR
    while not folder.is_dir():
        if time.monotonic() > until:
            raise InputError(
                f"{folder} does not appear on {socket.gethostname()}, though it was made; set data.cache to a folder that "
                "every machine sees, or each has for itself"
            )
        time.sleep(0.5)
        with suppress(OSError):
            os.listdir(folder.parent)  # makes a network disk look anew
