"""What is written aside and renamed into place when it is whole: folders, by all processes of a world together, and single files."""
import os
import re
import secrets
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TypeVar

from ee_tuning.errors import InputError
from ee_tuning.parallel.topology import Topology

Result = TypeVar("Result")


def on_first_rank(topology: Topology | None, action: Callable[[], Result]) -> Result:
    """What `action` returns on rank 0, on every rank; its InputError is raised on all of them. None is a world of one."""
    if topology is None:
        return action()
    answer: tuple[bool, Result | str] | None = None
    if topology.rank == 0:
        try:
            answer = (True, action())
        except InputError as error:
            answer = (False, str(error))
    is_done, value = topology.broadcast_object(answer)
    if not is_done:
        raise InputError(value)
    return value


@contextmanager
def written_aside(output: Path, topology: Topology | None) -> Iterator[Path]:
    """A new folder `<output>.partial-…`, the same on every rank, which becomes `output` when the block ends well.

    An `output` that exists is replaced then. When the block fails, or the process is killed, `output` is as it was. The block must end with
    rank 0 knowing that every rank has written. Raises InputError where the disk refuses. One writer at a time writes an `output`: what
    an earlier one left behind is removed.
    """
    def make() -> Path:
        remove_leftovers(output)
        partial = _partial(output)
        with refusals_named(output):
            partial.mkdir(parents=True)
        return partial

    partial = on_first_rank(topology, make)
    is_first = topology is None or topology.rank == 0
    try:
        with refusals_named(output):
            yield partial
        on_first_rank(topology, lambda: _put_in_place(partial, output))
    finally:
        if is_first:
            shutil.rmtree(partial, ignore_errors=True)


@contextmanager
def file_written_aside(output: Path) -> Iterator[Path]:
    """A path for the block to write a file to, in one process; the file becomes `output`, replacing it, when the block ends well.

    Raises InputError where the disk refuses.
    """
    remove_leftovers(output)
    partial = _partial(output)
    try:
        with refusals_named(output):
            yield partial
            _sync(partial)
            partial.replace(output)
            _sync(output.parent)
    finally:
        partial.unlink(missing_ok=True)


def remove_leftovers(output: Path) -> None:
    """Removes what writers of `output` that were killed left beside it."""
    ours = re.compile(re.escape(output.name) + r"\.partial-[0-9a-f]{8}")
    for path in output.parent.glob("*.partial-*"):
        if not ours.fullmatch(path.name) or path.is_symlink():
            continue
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            with suppress(OSError):
                path.unlink()


@contextmanager
def refusals_named(output: Path) -> Iterator[None]:
    """Turns what the file system refuses into an InputError that names `output`."""
    try:
        yield
    except OSError as error:
        raise InputError(f"{output} can not be written: {error.strerror or error}; make room, or choose another folder") from error


def _put_in_place(partial: Path, output: Path) -> None:
    with refusals_named(output):
        for path in (*partial.iterdir(), partial):  # else a power cut could leave a name without its content
            _sync(path)
        if not output.exists():
            partial.rename(output)
        else:
            old = output.with_name(f"{output.name}.replaced-{secrets.token_hex(4)}")
            output.rename(old)
            try:
                partial.rename(output)
            except OSError:
                old.rename(output)
                raise
            shutil.rmtree(old, ignore_errors=True)
        _sync(output.parent)


def _partial(output: Path) -> Path:
    return output.with_name(f"{output.name}.partial-{secrets.token_hex(4)}")


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
