"""Closed, full or broken standard streams: reported in one line on standard error, if possible, without a traceback."""

import errno
import io
import os
import sys
from contextlib import suppress
from typing import TypeVar

Stream = TypeVar("Stream", bound=io.TextIOWrapper)

_NO_ROOM = (errno.ENOSPC, errno.EDQUOT)


class OutputRefused(OSError):
    """Standard output accepts no more data."""


def prepare_streams() -> None:
    """Replaces streams that were closed when Python started. Standard output then raises OutputRefused; standard error
    drops data.

    A free descriptor would be given to the next opened file, and standard output would be written into it. Streams of
    other owners (a test's, a notebook's) are left alone.
    """
    for number, stream, flags in (
        (0, sys.stdin, os.O_WRONLY),
        (1, sys.stdout, os.O_RDONLY),
        (2, sys.stderr, os.O_WRONLY),
    ):
        if stream is None:  # /dev/null opened in the other direction refuses like a closed stream
            handle = os.open(os.devnull, flags)
            if handle != number:
                os.dup2(handle, number)
                os.close(handle)
            os.set_inheritable(number, True)
    if sys.stdin is None:
        sys.stdin = io.TextIOWrapper(io.BufferedReader(io.FileIO(0, closefd=False)), encoding="utf-8")
    if sys.stdout is None or (type(sys.stdout) is io.TextIOWrapper and sys.stdout is sys.__stdout__):
        sys.stdout = _remade(_Output, 1, sys.stdout)
    if sys.stderr is None or (type(sys.stderr) is io.TextIOWrapper and sys.stderr is sys.__stderr__):
        sys.stderr = _remade(_Lenient, 2, sys.stderr)


def output_error_text(error: OSError) -> str | None:
    """Returns the line for an `error` of a standard stream or a full disk, or None for a bug."""
    if isinstance(error, OutputRefused):
        return f"standard output can not be written: {error.strerror}; give it a file with room, a pipe or a terminal"
    if error.errno in _NO_ROOM:
        return f"{error.filename or 'a file'} can not be written: {error.strerror}; make room"
    if error.errno == errno.EBADF and error.filename is None:
        return f"standard input can not be read: {error.strerror}; open it, for example with < /dev/null"
    return None


def settle_output() -> None:
    """Discards unwritten standard output: otherwise the interpreter would try again at exit, and print an error."""
    try:
        sys.stdout.flush()
    except (OSError, ValueError):
        with suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            sys.stdout.flush()


class _Output(io.TextIOWrapper):
    def write(self, text: str, /) -> int:
        try:
            return super().write(text)
        except OSError as error:
            raise _refused(error) from error

    def flush(self) -> None:
        try:
            super().flush()
        except OSError as error:
            raise _refused(error) from error


class _Lenient(io.TextIOWrapper):
    """A stream that ignores write errors, so that a full disk under a log ends no job."""

    def write(self, text: str, /) -> int:
        with suppress(OSError):
            return super().write(text)
        return len(text)

    def flush(self) -> None:
        with suppress(OSError):
            super().flush()


def _refused(error: OSError) -> OSError:
    return error if isinstance(error, BrokenPipeError) else OutputRefused(error.errno, error.strerror)


def _remade(kind: type[Stream], number: int, stream: object) -> Stream:
    """Wraps the bytes of `stream`, or of descriptor `number` if it is None, in a stream of `kind`."""
    if not isinstance(stream, io.TextIOWrapper):
        return kind(
            io.BufferedWriter(io.FileIO(number, "w", closefd=False)), encoding="utf-8", errors="backslashreplace"
        )
    return kind(
        stream.buffer,
        encoding=stream.encoding,
        errors=stream.errors,
        line_buffering=stream.line_buffering,
        write_through=stream.write_through,
    )
