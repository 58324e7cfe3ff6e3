"""A file to which whole lines are appended. A kill loses none that `append` has returned from."""

import os
from pathlib import Path


class AppendedFile:
    """An open file, cut to `end` bytes: what follows the last whole line, where a kill cut one off, goes.

    It is created, with its folder, where it is missing. Methods raise OSError where the disk refuses.
    """

    def __init__(self, path: Path, end: int = 0) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("a+b", buffering=0)  # unbuffered, so that a line is the system's at once
        self._file.truncate(end)
        self.end = end
        """Offset of the next line, in bytes."""

    def append(self, line: bytes) -> int:
        """Appends a line, which ends with a line feed, and returns its offset. Where that fails, the next line replaces
        it.
        """
        self._file.truncate(self.end)
        rest = memoryview(line)
        while rest:
            rest = rest[self._file.write(rest) :]
        offset, self.end = self.end, self.end + len(line)
        return offset

    def read(self, offset: int, length: int) -> bytes:
        """Returns `length` bytes from `offset`."""
        return os.pread(self._file.fileno(), length, offset)

    def close(self) -> None:
        """Closes the file."""
        self._file.close()
