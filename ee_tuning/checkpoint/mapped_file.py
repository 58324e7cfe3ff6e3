"""A file's bytes by place: mapped, or read into a buffer."""
import errno
import mmap
import os
import stat
import weakref
from pathlib import Path

from ee_tuning.errors import InputError


class MappedFile(mmap.mmap):
    """A file's bytes, mapped, and a handle to read stretches of it by."""

    handle: int


def map_file(path: Path) -> MappedFile:
    """The file, mapped until nobody refers to it. Raises InputError where it can not be opened or is empty."""
    try:
        if not stat.S_ISREG(path.stat().st_mode):  # a pipe would be waited for without end
            raise OSError(errno.EINVAL, "it is no plain file")
        handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            mapped = MappedFile(handle, 0, access=mmap.ACCESS_READ)
        except BaseException:
            os.close(handle)
            raise
    except OSError as error:
        raise InputError(f"{path} can not be read: {error.strerror}; fetch the file again") from error
    except ValueError as error:
        raise InputError(f"{path} is empty; fetch the file again") from error
    mapped.handle = handle
    weakref.finalize(mapped, os.close, handle)
    return mapped


def read_at(handle: int, offset: int, into: memoryview) -> None:
    """Fills `into` with what lies from `offset` on. Raises OSError; EOFError where the file ends before that."""
    done = 0
    while done < len(into):  # one call reads at most 2 GB
        count = os.preadv(handle, [into[done:]], offset + done)
        if count == 0:
            raise EOFError
        done += count
