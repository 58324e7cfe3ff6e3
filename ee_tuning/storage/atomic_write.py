"""Atomic writes: a file or folder is written under a temporary name and renamed into place when it is complete.

Folders may be written by all processes of a world together.
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
"""Advice in case the disk refuses."""


@contextmanager
def atomic_folder(output: Path, topology: Topology | None, remedy: str = REMEDY) -> Iterator[Path]:
    """Yields a new folder `<output>.partial-…`, the same on every rank, which becomes `output` when the block succeeds.

    An existing `output` is replaced then. If the block fails, or the process is killed, `output` is unchanged. At the
    end of the block, rank 0 must know that all ranks have written. Partial folders of killed writers are removed; of
    two concurrent writers the later one to finish wins. Raises InputError where the disk refuses.
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
    """Yields a path to which the block, in one process, writes a file. The file replaces `output` when the block
    succeeds.

    If `output` is a link, its target is replaced. If it is no plain file (/dev/null, a pipe), it is written to
    directly. Raises InputError where the disk refuses.
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
    """Yields a new folder beside `output` for intermediate files, and removes it when the block ends.

    Raises InputError where the disk refuses.
    """
    partial, lock = _create_partial(output, Path.mkdir)
    try:
        with os_errors_as_input_errors(output):
            yield partial
    finally:
        _remove(partial)
        os.close(lock)


def move_into_place(made: Path, output: Path) -> None:
    """Renames the file `made` to `output`. After a power cut, `output` exists with its content or not at all."""
    _sync(made)
    made.replace(output)
    _sync(output.parent)


def remove_leftovers(output: Path) -> None:
    """Removes what killed writers of `output` left beside it. Partial outputs of living processes are locked, and
    stay.
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
    """Returns `output`, or the folder that it links to, which may lie on another disk: the link itself must stay.

    Raises InputError where `output` can not be replaced: it is a device, or it contains the working directory of this
    process, which would stay behind in the replaced folder.
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


def check_file(output: Path, name: str = "--output") -> None:
    """Raises InputError where no file can be written at `output`, the value of `name`. A cheap check before long
    work.
    """
    if output.is_dir():
        raise InputError(f"{name} must name a file, got the folder {output}")
    parent = next(folder for folder in output.absolute().parents if os.path.lexists(folder))
    if not parent.is_dir() or not (os.access(parent, os.W_OK | os.X_OK) or output.exists()):
        raise InputError(
            f"{name} must name a file that can be written, got {output}, and {parent} is no folder that can be written to"
        )


def check_room(output: Path, partial: Path, needed: int, remedy: str = REMEDY) -> None:
    """Raises InputError where the disk of `output` (written as `partial`) has less than `needed` bytes free."""
    if (free := shutil.disk_usage(partial).free) < needed:
        raise InputError(f"{output} takes {needed:,} bytes, and {free:,} are free there; {remedy}")


@contextmanager
def os_errors_as_input_errors(output: Path, remedy: str = REMEDY) -> Iterator[None]:
    """Turns an OSError into an InputError that names `output`."""
    try:
        yield
    except OutputRefused:  # raised by printing, not by the file system
        raise
    except OSError as error:
        raise InputError(f"{output} can not be written: {error.strerror or error}; {remedy}") from error


def _leftovers(output: Path, what: str) -> list[Path]:
    name = re.compile(re.escape(output.name) + rf"\.{what}-[0-9a-f]{{8}}")
    return [path for path in output.parent.glob(f"*.{what}-*") if name.fullmatch(path.name)]


def _create_partial(output: Path, make: Callable[[Path], None], remedy: str = REMEDY) -> tuple[Path, int]:
    """Creates a partial of `output` by `make`, and returns it with the handle that holds its lock."""
    with os_errors_as_input_errors(output, remedy):
        remove_leftovers(output)
        output.parent.mkdir(parents=True, exist_ok=True)
        while True:
            partial = output.with_name(f"{output.name}.partial-{secrets.token_hex(4)}")
            make(partial)
            if (lock := try_lock(partial, is_ours=True)) is not None:
                return partial, lock


def try_lock(path: Path, *, is_ours: bool = False) -> int | None:
    """Locks `path` and returns a handle, or None where another process holds the lock or `path` is gone.

    The lock ends when the handle is closed or the process ends. On a file system without locks, only new paths
    (`is_ours`) can be locked, so that no living writer's files are removed.
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
        # Between creation and locking, another writer may have removed it as a leftover.
        if is_locked and os.path.samestat(path.stat(), os.fstat(handle)):
            return handle
    os.close(handle)
    return None


def _commit(partial: Path, output: Path, remedy: str) -> None:
    with os_errors_as_input_errors(output, remedy):
        for path in (*partial.iterdir(), partial):  # otherwise a power cut could leave a name without its content
            _sync(path)
        if not os.path.lexists(output):
            partial.rename(output)
        else:
            exchange(partial, output)
        _sync(output.parent)


def exchange(first: Path, second: Path) -> None:
    """Exchanges two paths atomically, so that a killed process leaves both. Raises OSError.

    On file systems without this operation (some network ones) it renames in steps; a process killed in between leaves
    `second` complete, under a name `….replaced-…`.
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
    """Exchanges two paths by Linux's system call. Returns False where it is not available."""
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
