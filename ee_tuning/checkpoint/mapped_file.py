"""A file's bytes by place: mapped, or read into a buffer."""

import mmap
from pathlib import Path

from ee_tuning.checkpoint.open_files import OpenMapping, Reopened


class MappedFile:
    """A file's bytes, mapped whenever they are asked for; what was taken from a mapping keeps it."""

    def __init__(self, path: Path):
        self._file: Reopened[OpenMapping] = Reopened(path, OpenMapping)
        self._size = self._file.now().size

    def __len__(self) -> int:
        return self._size

    def __getitem__(self, part: slice) -> bytes:
        return self._file.now().bytes[part]

    def mapping(self) -> mmap.mmap:
        """All of it."""
        return self._file.now().bytes

    def read_at(self, offset: int, into: memoryview) -> None:
        """Fills `into` with what lies from `offset` on. Raises OSError; EOFError where the file ends before that."""
        self._file.now().read_at(offset, into)


def map_file(path: Path) -> MappedFile:
    """The file, mapped until nobody refers to it. Raises InputError where it can not be opened or is empty."""
    return MappedFile(path)
