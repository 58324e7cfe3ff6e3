"""Access to a file's bytes: by memory mapping, or by reading into a buffer."""

import mmap
from pathlib import Path

from ee_tuning.storage.open_files import OpenMapping, Reopened


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
