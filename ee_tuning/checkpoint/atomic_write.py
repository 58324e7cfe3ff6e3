"""What is written aside and renamed into place when it is whole: folders, by all processes of a world together, and
single files.
"""

import ctypes
import errno
import fcntl
import os
import re
import secrets
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from ee_tuning.errors import InputError
from ee_tuning.parallel.collectives import on_first_rank
from ee_tuning.parallel.topology import Topology
from ee_tuning.standard_streams import OutputRefused

REMEDY = "make room, or choose another folder"
"""What helps where the disk refuses."""


@contextmanager
def atomic_folder(output: Path, topology: Topology | None, remedy: str = REMEDY) -> Iterator[Path]:
    """A new folder `<output>.partial-…`, the same on every rank, which becomes `output` when the block ends well.

    An `output` that exists is replaced then. When the block fails, or the process is killed, `output` is as it was. The
    block must end with rank 0 knowing that every rank has written. Raises InputError where the disk refuses. What
    writers of `output` that were killed left is removed; of two that write it at once, the later one to end has its
    way.
    """
    partial, lock = on_first_rank(topology, lambda: _create_partial(resolve_target(output), Path.mkdir, remedy))
    is_first = topology is None or topology.rank == 0
    try:
        with os_errors_as_input_errors(output, remedy):
            yield partial
        on_first_rank(topology, lambda: _commit(partial, resolve_target(output), remedy))
    finally:
        if is_first:
            _remove(partial)
            os.close(lock)


@contextmanager
def atomic_file(output: Path) -> Iterator[Path]:
    """A path for the block to write a file to, in one process; the file becomes `output`, replacing it, when the block
    ends well.

    Of a link, what it names is replaced; what is no plain file (/dev/null, a pipe) is written to as it is. Raises
    InputError where the disk refuses.
    """
    if output.exists() and not output.is_file():
        with os_errors_as_input_errors(output):
            yield output
        return
    named, output = output, Path(os.path.realpath(output))
    partial, lock = _create_partial(output, lambda path: path.touch(exist_ok=False))
    try:
        with os_errors_as_input_errors(named):
            yield partial
            _sync(partial)
            partial.replace(output)
            _sync(output.parent)
    finally:
        _remove(partial)
        os.close(lock)


@contextmanager
def scratch_folder(output: Path) -> Iterator[Path]:
    """A new folder beside `output`, for what is on the way to it; gone when the block ends. Raises InputError where the
    disk refuses.
    """
    partial, lock = _create_partial(output, Path.mkdir)
    try:
        with os_errors_as_input_errors(output):
            yield partial
    finally:
        _remove(partial)
        os.close(lock)


def move_into_place(made: Path, output: Path) -> None:
    """Renames the file `made` to `output`, such that a power cut leaves no name without its content."""
    _sync(made)
    made.replace(output)
    _sync(output.parent)


def remove_leftovers(output: Path) -> None:
    """Removes what writers of `output` that were killed left beside it. What a living process still writes has its
    lock, and stays.
    """
    for path in _leftovers(output, "replaced"):
        if os.path.lexists(output):
            _remove(path)
        else:
            path.rename(output)
    for path in _leftovers(output, "partial"):
        if not path.is_symlink() and (lock := try_lock(path)) is not None:
            _remove(path)
            os.close(lock)


def resolve_target(output: Path) -> Path:
    """`output`, or the folder that it is a link to: what replaces that folder must not replace the link, which may lead
    to another disk.

    Raises InputError where it is no folder that can be replaced: a device, or what this process stands in, which would
    stay behind in the folder that was.
    """
    if output.exists() and not (output.is_dir() or output.is_file()):
        raise InputError(f"{output} is a device or a pipe, and is not replaced; name a folder")
    place = output.resolve() if output.is_symlink() or output.name in ("", "..") else output
    with suppress(OSError):
        if Path.cwd().is_relative_to(place.resolve(strict=True)):
            raise InputError(
                f"--output must not be {place.resolve()}, the folder that this command runs in (or one around it), for it is "
                "replaced as a whole; name a new folder, or run the command from elsewhere"
            )
    return place


def check_file(output: Path) -> None:
    """Raises InputError where no file can be written at `output`: cheap, before the work whose result it is to take."""
    if output.is_dir():
        raise InputError(f"--output must name a file, got the folder {output}")
    parent = next(folder for folder in output.absolute().parents if os.path.lexists(folder))
    if not parent.is_dir() or not (os.access(parent, os.W_OK | os.X_OK) or output.exists()):
        raise InputError(
            f"--output must name a file that can be written, got {output}, and {parent} is no folder that can be written to"
        )


def check_room(output: Path, partial: Path, needed: int, remedy: str = REMEDY) -> None:
    """Raises InputError where the disk that `output` is written to (as `partial`) has no room for `needed` bytes."""
    if (free := shutil.disk_usage(partial).free) < needed:
        raise InputError(f"{output} takes {needed:,} bytes, and {free:,} are free there; {remedy}")


@contextmanager
def os_errors_as_input_errors(output: Path, remedy: str = REMEDY) -> Iterator[None]:
    """Turns what the file system refuses into an InputError that names `output`."""
    try:
        yield
    except OutputRefused:  # of what is printed meanwhile
        raise
    except OSError as error:
        raise InputError(f"{output} can not be written: {error.strerror or error}; {remedy}") from error


def _leftovers(output: Path, what: str) -> list[Path]:
    name = re.compile(re.escape(output.name) + rf"\.{what}-[0-9a-f]{{8}}")
    return [path for path in output.parent.glob(f"*.{what}-*") if name.fullmatch(path.name)]


def _create_partial(output: Path, make: Callable[[Path], None], remedy: str = REMEDY) -> tuple[Path, int]:
    """A partial of `output` that `make` has made, and the handle that holds its lock."""
    with os_errors_as_input_errors(output, remedy):
        remove_leftovers(output)
        output.parent.mkdir(parents=True, exist_ok=True)
        while True:
            partial = output.with_name(f"{output.name}.partial-{secrets.token_hex(4)}")
            make(partial)
            if (lock := try_lock(partial, is_ours=True)) is not None:
                return partial, lock


def try_lock(path: Path, *, is_ours: bool = False) -> int | None:
    """A handle that locks `path` until it is closed or this process ends, however it ends; None where another process
    has it, or where it is gone. A file system without locks gives none for what is there already, so that no living
    writer's work is removed.
    """
    try:
        handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        is_locked = True
    except BlockingIOError:
        is_locked = False
    except OSError:
        is_locked = is_ours
    with suppress(OSError):
        # Between its making and its locking, another writer may have taken it for a leftover, and removed it.
        if is_locked and os.path.samestat(path.stat(), os.fstat(handle)):
            return handle
    os.close(handle)
    return None


def _commit(partial: Path, output: Path, remedy: str) -> None:
    with os_errors_as_input_errors(output, remedy):
        for path in (*partial.iterdir(), partial):  # else a power cut could leave a name without its content
            _sync(path)
        if not os.path.lexists(output):
            partial.rename(output)
        else:
            exchange(partial, output)
        _sync(output.parent)


def exchange(first: Path, second: Path) -> None:
    """Each path becomes the other at one stroke, so that a process killed here leaves both. Raises OSError.

    Where the file system can not (some network ones), by renames: killed between them, `second` is whole, under a name
    `….replaced-…`.
    """
    if _renameat2(first, second):
        return
    old = second.with_name(f"{second.name}.replaced-{secrets.token_hex(4)}")
    second.rename(old)
    try:
        first.rename(second)
    except OSError:
        old.rename(second)
        raise
    old.rename(first)


def _renameat2(first: Path, second: Path) -> bool:
    """Linux's exchange of two paths; False where it is not to be had."""
    call = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if call is None:
        return False
    at_fdcwd, exchanges = -100, 2
    if call(at_fdcwd, os.fsencode(first), at_fdcwd, os.fsencode(second), exchanges) == 0:
        return True
    if (number := ctypes.get_errno()) in (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP):
        return False
    raise OSError(number, os.strerror(number), str(second))


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(OSError):
            path.unlink()


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
