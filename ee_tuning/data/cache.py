"""The data cache: token ids, which are made once and mapped into memory by every process of a machine.

An entry is a folder named by a hash of its inputs. One process per machine makes it, or one process in total where all
share the disk; it is renamed into place when complete. Two runs that need the same entry at once wait for each other at
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
from ee_tuning.errors import InputError
from ee_tuning.json_file import to_json
from ee_tuning.parallel.collectives import on_first_rank, run_with_heartbeat
from ee_tuning.parallel.topology import Topology
from ee_tuning.progress import ByteProgress
from ee_tuning.storage.atomic_write import atomic_folder, os_errors_as_input_errors, try_lock

FORMAT = 3
"""Version of the entries. Raise it when the same inputs give other content."""
DAYS_KEPT = 90
"""Days without use after which an entry is removed, when another one is made."""
_REMEDY = f"make room, or set data.cache (or {VARIABLE}) to another folder"
_SECONDS_TO_APPEAR = 90.0  # other machines may see a new folder on a shared disk late


@dataclass(frozen=True, kw_only=True)
class CacheEntry:
    """An entry of the cache."""

    depends_on: Callable[[], dict[str, Any]]
    """Returns all inputs of its content, as JSON. Called on rank 0 only."""
    make: Callable[[Path, ByteProgress], Iterator[None]]
    """Writes the content into a folder, in steps."""

    def name(self) -> str:
        """Returns the name of its folder."""
        canonical = to_json({"format": FORMAT, **self.depends_on()}, sort_keys=True)
        return hashlib.sha256(canonical.encode()).hexdigest()[:32]


def cache_root(given: str | None) -> Path:
    """Returns data.cache, or the default."""
    return Path(given) if given else cache_folder()


def file_stamps(files: Sequence[Path]) -> list[list[Any]]:
    """Returns path, size and modification time of each file, which identify its content at little cost."""
    stamps = []
    for path in files:
        try:
            stat = path.stat()
        except OSError as error:
            raise InputError(f"{path} can not be read: {error.strerror}; make it readable, or leave it out") from error
        stamps.append([str(path.resolve()), stat.st_size, stat.st_mtime_ns])
    return stamps


def get_or_build(entries: Sequence[CacheEntry], root: Path, topology: Topology | None) -> list[Path]:
    """Returns the folders of `entries`, and makes missing ones. All ranks call it.

    Raises InputError, the same on every rank, where the data or the disk refuse.
    """
    # Rank 0's names for all ranks: modification times may differ where each machine has its own copy of the files.
    folders = [root / name for name in on_first_rank(topology, lambda: [entry.name() for entry in entries])]
    with ByteProgress("tokenizing", is_shown=topology is None or topology.is_logging_rank) as progress:
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
    entries: Sequence[CacheEntry], folders: Sequence[Path], root: Path, progress: ByteProgress
) -> Iterator[None]:
    for entry, folder in zip(entries, folders, strict=True):
        if folder.is_dir():
            with suppress(OSError):
                os.utime(folder)  # records the last use
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
            with suppress(OSError):  # other processes that wait for the lock check for the folder first
                _lock_file(folder).unlink()
            os.close(lock)


def _remove_unused(root: Path) -> None:
    """Removes the entries that no run has used for DAYS_KEPT."""
    for folder in root.iterdir():
        with suppress(OSError):
            is_entry = re.fullmatch(r"(piped-)?[0-9a-f]{32}|piped-[0-9a-f]{8}\.partial", folder.name)
            if is_entry and time.time() - folder.stat().st_mtime > DAYS_KEPT * 86400:
                shutil.rmtree(folder)


def _wait_for(path: Path) -> Generator[None, None, int]:
    """Yields until this process holds the lock file `path`. Returns the handle, which holds the lock until it is
    closed.
    """
    while True:
        with os_errors_as_input_errors(path, _REMEDY):
            path.touch()  # created each time, because the former holder removed it
        # On a disk without locks it is granted at once: at worst, two runs make the same entry.
        if (lock := try_lock(path, is_ours=True)) is not None:
            return lock
        time.sleep(0.5)
        yield


def _lock_file(folder: Path) -> Path:
    return folder.with_name(folder.name + ".lock")


def _makes(root: Path, topology: Topology) -> bool:
    """Whether this rank makes missing entries: rank 0, and the first rank of each machine that does not see rank 0's
    disk.
    """
    hosts: list[str] = [""] * topology.world_size
    dist.all_gather_object(hosts, socket.gethostname(), group=topology.world_control)
    probe = root / topology.broadcast_object(f"probe-{secrets.token_hex(4)}")
    if topology.rank == 0:
        with suppress(OSError):  # reported where it matters
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
            os.listdir(folder.parent)  # makes a network disk refresh its listing
