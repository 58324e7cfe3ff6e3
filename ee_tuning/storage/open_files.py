"""Opens a model's files on demand and keeps only a few of them open, however many shards the model has.

Otherwise the limit of open files (`ulimit -n`) is soon reached. A file that is opened again must be unchanged.
"""

import errno
import mmap
import os
import resource
import stat
import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any, Generic, TypeVar, cast

from ee_tuning.errors import InputError
from ee_tuning.foreign_content import describe_content

Opened = TypeVar("Opened", bound="OpenFile")


class OpenFile:
    """A handle of a plain file, closed when no reference is left. Raises OSError."""

    def __init__(self, path: Path):
        if not stat.S_ISREG(path.stat().st_mode):  # opening a pipe would block forever
            raise OSError(errno.EINVAL, "it is no plain file")
        self.handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        weakref.finalize(self, os.close, self.handle)
        status = os.fstat(self.handle)
        self.size = status.st_size
        self.identity = (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)

    def read_at(self, offset: int, into: memoryview) -> None:
        """Fills `into` with the bytes from `offset` on. Raises OSError, or EOFError where the file ends earlier."""
        done = 0
        while done < len(into):  # one call reads at most 2 GB
            count = os.preadv(self.handle, [into[done:]], offset + done)
            if count == 0:
                raise EOFError
            done += count


class OpenMapping(OpenFile):
    """An open file and its mapped bytes. Raises ValueError where it is empty."""

    def __init__(self, path: Path):
        super().__init__(path)
        self.bytes = mmap.mmap(self.handle, 0, access=mmap.ACCESS_READ)


class Reopened(Generic[Opened]):
    """A file that `now` opens when needed. Raises InputError where that fails, or the file has changed."""

    def __init__(self, path: Path, kind: Callable[[Path], Opened]):
        self.path, self._kind = path, kind
        self._identity: Any = None
        weakref.finalize(self, _recent.drop, id(self))
        self._identity = self.now().identity

    def now(self) -> Opened:
        """Returns the open file, which stays open while the caller refers to it."""
        return cast(Opened, _recent.get(id(self), self._open))

    def close(self) -> None:
        """Closes the file until it is needed again."""
        _recent.drop(id(self))

    def _open(self) -> Opened:
        try:
            opened = self._kind(self.path)
        except (OSError, ValueError) as error:
            raise unreadable(self.path, error) from error
        if self._identity not in (None, opened.identity):
            raise InputError(f"{self.path} was changed while it was read; wait until it is written, and begin again")
        return opened


class MappedFile:
    """The bytes of a file, mapped on request. A mapping stays alive while memory from it is used.

    Raises InputError where the file can not be opened or is empty.
    """

    def __init__(self, path: Path):
        self._file: Reopened[OpenMapping] = Reopened(path, OpenMapping)
        self._size = self._file.now().size

    def __len__(self) -> int:
        return self._size

    def __getitem__(self, part: slice) -> bytes:
        return self._file.now().bytes[part]

    def mapping(self) -> mmap.mmap:
        """Returns the mapping of the whole file."""
        return self._file.now().bytes

    def read_at(self, offset: int, into: memoryview) -> None:
        """Fills `into` with the bytes from `offset` on. Raises OSError, or EOFError where the file ends earlier."""
        self._file.now().read_at(offset, into)


class _Recent:
    """The most recently used files."""

    def __init__(self) -> None:
        self._held: OrderedDict[int, Any] = OrderedDict()
        self._lock = threading.RLock()  # a finalizer may run within `get`

    def get(self, key: int, opened: Callable[[], Any]) -> Any:
        """Returns the file of that key, and marks it as the most recently used one."""
        with self._lock:
            file = self._held.pop(key, None) or opened()
            self._held[key] = file
            while len(self._held) > _num_open():
                self._held.popitem(last=False)
            return file

    def drop(self, key: int) -> None:
        """Drops the file."""
        with self._lock:
            self._held.pop(key, None)


_recent = _Recent()


def _num_open() -> int:
    """Returns how many files may be open: a small part of the process's limit, since torch and Python open files,
    too.
    """
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return 32 if limit == resource.RLIM_INFINITY else min(32, max(2, limit // 16))


def unreadable(path: Path, error: Exception) -> InputError:
    """Returns the error for a file that can not be opened or read, with cause and remedy."""
    if isinstance(error, OSError) and error.errno in (errno.EMFILE, errno.ENFILE):
        return InputError(f"{path} can not be read: {error.strerror}; raise the limit (ulimit -n 4096) and begin again")
    if isinstance(error, OSError) and error.errno in (errno.EACCES, errno.EPERM):
        return InputError(f"{path} can not be read: {error.strerror}; make it readable for you (chmod u+r), or copy it")
    reason = f"can not be read: {error.strerror}" if isinstance(error, OSError) else "is empty"
    return InputError(f"{path} {describe_content(path) or reason + '; fetch the file again'}")
