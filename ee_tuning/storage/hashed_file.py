"""A file that is hashed while it is written: reading, writing and hashing run concurrently.

sha256 processes 1.5 to 2 GB/s per core, about the time of everything else together, and hashing afterwards would read
the file twice.
"""

import hashlib
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Self

import torch
from torch import Tensor

from ee_tuning.storage.direct_file import DirectFile
from ee_tuning.storage.tensor_blocks import as_bytes

_MAX_QUEUED = 8
"""Blocks that may be queued. More would need memory and save no time."""
_SMALL = 1 << 20
"""Bytes that are gathered before they are queued."""


class HashedFile:
    """Writes and hashes a new file at `path`; with None it only hashes. A context manager. Raises OSError.

    Set `beside_other_work` if this process computes meanwhile, with torch's threads.
    """

    def __init__(self, path: Path | None, *, beside_other_work: bool = False):
        self.num_bytes = 0
        self._file = None if path is None else DirectFile(path)
        self._digest = hashlib.sha256()
        # torch's threads spin between its short jobs on the cores that hashing and writing need, which costs a third of
        # the time on two cores.
        self._torch_threads = None if beside_other_work else torch.get_num_threads()
        if self._torch_threads:
            torch.set_num_threads(1)
        self._threads = (ThreadPoolExecutor(1), ThreadPoolExecutor(1))
        self._under_way: deque[Future[None]] = deque()
        self._small = bytearray()
        self._sum: str | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if kind is None:
                self._hand_on_small()
                self._wait(0)
                self._sum = self._digest.hexdigest()
                if self._file is not None:
                    self._file.finish()
        finally:
            if self._torch_threads:
                torch.set_num_threads(self._torch_threads)
            for threads in self._threads:
                threads.shutdown(cancel_futures=True)
            if self._file is not None:
                self._file.close()

    @property
    def sha256(self) -> str:
        """The sha256 of the whole file, in hex. Valid once the file is closed."""
        assert self._sum is not None, "close the file first"
        return self._sum

    def write(self, data: Tensor | bytes | bytearray | memoryview) -> int:
        """Appends bytes, which must not change afterwards. Returns their number."""
        view = memoryview(as_bytes(data) if isinstance(data, Tensor) else data).cast("B")
        self.num_bytes += len(view)
        if len(view) < _SMALL:
            self._small += view
            if len(self._small) >= _SMALL:
                self._hand_on_small()
        else:
            self._hand_on_small()
            self._hand_on(view)
        return len(view)

    def flush(self) -> None:
        """Does nothing. Present for callers that expect a file."""

    def _hand_on_small(self) -> None:
        if self._small:
            self._hand_on(memoryview(self._small))
            self._small = bytearray()

    def _hand_on(self, view: memoryview) -> None:
        writer, hasher = self._threads
        if self._file is not None:
            self._under_way.append(writer.submit(self._file.write, view))
        self._under_way.append(hasher.submit(self._digest.update, view))
        self._wait(2 * _MAX_QUEUED)

    def _wait(self, num_left: int) -> None:
        while len(self._under_way) > num_left:
            self._under_way.popleft().result()
