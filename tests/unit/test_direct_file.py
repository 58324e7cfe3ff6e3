"""Bytes reach the file in order whether the system writes directly, refuses to, or refuses in the middle."""

import errno
import fcntl
import os
from pathlib import Path

import pytest

from ee_tuning.storage import direct_file
from ee_tuning.storage.direct_file import DirectFile

STAGE = 8192


def written(path: Path, content: bytes, piece: int) -> bytes:
    file = DirectFile(path)
    try:
        for start in range(0, len(content), piece):
            file.write(memoryview(content)[start : start + piece])
        file.finish()
    finally:
        file.close()
    return path.read_bytes()


@pytest.mark.parametrize("refused_at", ["never", "asking", "writing"])
@pytest.mark.parametrize(
    ("size", "piece"),
    [(0, 1), (1, 1), (STAGE - 1, 100), (STAGE, STAGE), (STAGE + 1, 4096), (5 * STAGE + 4097, 3 * STAGE + 7)],
)
def test_what_is_written_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refused_at: str, size: int, piece: int
) -> None:
    """A stretch lost or written twice where direct writing begins, where it ends, or where a file system will not have
    it.
    """
    monkeypatch.setattr(direct_file, "STAGE_BYTES", STAGE)
    real_fcntl, real_write = fcntl.fcntl, os.write
    asked = []

    def ask(handle: int, what: int, flags: int = 0) -> int:
        asked.append(bool(what == fcntl.F_SETFL and flags & os.O_DIRECT))
        if refused_at == "asking" and what == fcntl.F_SETFL and flags & os.O_DIRECT:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        return real_fcntl(handle, what, flags)

    def write(handle: int, view: memoryview) -> int:
        if refused_at == "writing" and real_fcntl(handle, fcntl.F_GETFL) & os.O_DIRECT:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        return real_write(handle, view)

    monkeypatch.setattr(direct_file.fcntl, "fcntl", ask)
    monkeypatch.setattr(direct_file.os, "write", write)
    content = os.urandom(size)
    assert written(tmp_path / "file", content, piece) == content
    assert any(asked) == (size >= STAGE), "small files go through the cache, and no others"


def test_a_full_disk_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file that ends where the disk did, taken for whole."""
    monkeypatch.setattr(direct_file, "STAGE_BYTES", STAGE)

    def full(handle: int, view: memoryview) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(direct_file.os, "write", full)
    with pytest.raises(OSError, match="No space left"):
        written(tmp_path / "file", bytes(3 * STAGE), STAGE)
