"""Files of models, opened when something is read from them: a few are open at a time, however many a model is cut into.

A limit of open files (`ulimit -n`) is soon reached otherwise. A file that was closed meanwhile must be the same when it
is opened again.
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
    """A handle to a plain file, closed when nobody refers to it. Raises OSError."""

    def __init__(self, path: Path):
        if not stat.S_ISREG(path.stat().st_mode):  # a pipe would be waited for without end
            raise OSError(errno.EINVAL, "it is no plain file")
        self.handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        weakref.finalize(self, os.close, self.handle)
        status = os.fstat(self.handle)
        self.size = status.st_size
        self.identity = (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)

    def read_at(self, offset: int, into: memoryview) -> None:
        """Fills `into` with what lies from `offset` on. Raises OSError; EOFError where the file ends before that."""
        done = 0
        while done < len(into):  # one call reads at most 2 GB
            count = os.preadv(self.handle, [into[done:]], offset + done)
            if count == 0:
                raise EOFError
            done += count


class OpenMapping(OpenFile):
    """The same, and its bytes mapped. Raises ValueError where there are none."""

    def __init__(self, path: Path):
        super().__init__(path)
        self.bytes = mmap.mmap(self.handle, 0, access=mmap.ACCESS_READ)


class Reopened(Generic[Opened]):
    """A file that is open whenever it is asked for (`now`). Raises InputError where it can not be, or is another than
    it was.
    """

    def __init__(self, path: Path, kind: Callable[[Path], Opened]):
        self.path, self._kind = path, kind
        self._identity: Any = None
        weakref.finalize(self, _recent.drop, id(self))
        self._identity = self.now().identity

    def now(self) -> Opened:
        """The file, open for as long as the caller keeps it."""
        return cast(Opened, _recent.get(id(self), self._open))

    def close(self) -> None:
        """Closes it until it is asked for again."""
        _recent.drop(id(self))

    def _open(self) -> Opened:
        try:
            opened = self._kind(self.path)
        except (OSError, ValueError) as error:
            raise unreadable(self.path, error) from error
        if self._identity not in (None, opened.identity):
            raise InputError(f"{self.path} was changed while it was read; wait until it is written, and begin again")
        return opened


class _Recent:
    """The files that were asked for last."""

    def __init__(self) -> None:
        self._held: OrderedDict[int, Any] = OrderedDict()
        self._lock = threading.RLock()  # a finalizer may run within `get`

    def get(self, key: int, opened: Callable[[], Any]) -> Any:
        """The file of that key, which becomes the last to be closed."""
        with self._lock:
            file = self._held.pop(key, None) or opened()
            self._held[key] = file
            while len(self._held) > _num_open():
                self._held.popitem(last=False)
            return file

    def drop(self, key: int) -> None:
        """Lets go of it."""
        with self._lock:
            self._held.pop(key, None)


_recent = _Recent()


def _num_open() -> int:
    """How many may be open: a small part of what the process may open, for torch and Python open files, too."""
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return 32 if limit == resource.RLIM_INFINITY else min(32, max(2, limit // 16))


def unreadable(path: Path, error: Exception) -> InputError:
    """The error to raise where a file can not be opened or read: the cause, and what helps against it."""
    if isinstance(error, OSError) and error.errno in (errno.EMFILE, errno.ENFILE):
        return InputError(f"{path} can not be read: {error.strerror}; raise the limit (ulimit -n 4096) and begin again")
    if isinstance(error, OSError) and error.errno in (errno.EACCES, errno.EPERM):
        return InputError(f"{path} can not be read: {error.strerror}; make it readable for you (chmod u+r), or copy it")
    reason = f"can not be read: {error.strerror}" if isinstance(error, OSError) else "is empty"
    return InputError(f"{path} {describe_content(path) or reason + '; fetch the file again'}")
