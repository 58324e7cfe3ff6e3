"""Pipes among data.paths. A pipe can be read once, by one process, so its content is copied to a file first."""

import hashlib
import os
import secrets
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from ee_tuning.config import DataSection
from ee_tuning.errors import InputError
from ee_tuning.parallel.collectives import on_first_rank
from ee_tuning.parallel.topology import Topology
from ee_tuning.storage.atomic_write import os_errors_as_input_errors

_PREFIX = "piped-"
_given: dict[str, str] = {}
"""Copy -> its pipe."""


def has_pipes(paths: Sequence[str]) -> bool:
    """Whether one of `paths` is a pipe or a device, such as /dev/stdin."""
    return any(map(_is_pipe, paths))


@contextmanager
def pipes_copied(data: DataSection, root: Path, topology: Topology | None) -> Iterator[DataSection]:
    """Yields `data` with files within `root` instead of pipes, which rank 0 copies. All ranks of `topology` call it.

    The files are removed if the block succeeds, on all ranks; otherwise they stay, because errors name their lines.
    Raises InputError where a pipe can not be read or the disk refuses.
    """
    paths, valid_paths = on_first_rank(topology, lambda: (copied(data.paths, root), copied(data.valid_paths, root)))
    yield replace(data, paths=paths, valid_paths=valid_paths)
    if topology is None or topology.rank == 0:
        for path in {*paths, *valid_paths} - {*data.paths, *data.valid_paths}:
            if Path(path).parent.name.startswith(_PREFIX):
                shutil.rmtree(Path(path).parent, ignore_errors=True)


def copied(paths: Sequence[str], root: Path) -> tuple[str, ...]:
    """Returns `paths` with each pipe replaced by a file within `root`, and each device that stands for a file by that
    file.
    """
    return tuple(str(_copy(Path(path), root)) if _is_pipe(path) else path for path in paths)


def as_given(text: str) -> str:
    """Replaces the names of copies in `text` by those of their pipes."""
    for copy, pipe in _given.items():
        text = text.replace(copy, pipe)
    return text


def _is_pipe(path: str) -> bool:
    return (
        os.path.exists(path)
        and not os.path.isdir(path)
        and (not os.path.isfile(path) or path.startswith(("/dev/", "/proc/")))
    )


def _copy(path: Path, root: Path) -> Path:
    if path.is_file():  # /dev/stdin < FILE
        return path.resolve()
    partial = root / f"{_PREFIX}{secrets.token_hex(4)}.partial"
    digest = hashlib.sha256()
    with os_errors_as_input_errors(root):
        partial.mkdir(parents=True)
        with (partial / path.name).open("wb") as copy:
            for block in _blocks(path):
                digest.update(block)
                copy.write(block)
        # Token ids are cached under path, size and time, so the same content is found again.
        os.utime(partial / path.name, (0, 0))
        folder = root / f"{_PREFIX}{digest.hexdigest()[:32]}"
        shutil.rmtree(folder, ignore_errors=True)
        partial.rename(folder)
    _given[str(folder / path.name)] = str(path)
    return folder / path.name


def _blocks(path: Path) -> Iterator[bytes]:
    try:
        with path.open("rb", buffering=0) as pipe:
            while block := pipe.read(1 << 20):
                yield block
    except OSError as error:
        raise InputError(f"{path} can not be read: {error.strerror}; give a file, or another pipe") from error
