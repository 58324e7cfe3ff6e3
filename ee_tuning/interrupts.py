"""Makes Ctrl-C end a command quietly, even if a library turns KeyboardInterrupt into another exception."""

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import NoReturn

STOPPED_BY_TERM = 143
"""A shell's exit code for a process that SIGTERM ended."""
_SECONDS = 10.0
_last = -_SECONDS


def end_at_once() -> None:
    """Makes Ctrl-C end the process without a traceback, during imports and at exit.

    If SIGINT is ignored, as for a background job of a shell, it stays ignored.
    """
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)


@contextmanager
def interrupts_raised() -> Iterator[None]:
    """Makes Ctrl-C raise KeyboardInterrupt within the block, and records it. Works in the main thread only."""
    former = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or former not in (
        signal.SIG_DFL,
        signal.default_int_handler,
    ):
        yield
        return
    global _last
    _last = -_SECONDS  # a Ctrl-C during an earlier command of this process does not count
    signal.signal(signal.SIGINT, _raise)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, former)


@contextmanager
def term_raises() -> Iterator[None]:
    """Lets SIGTERM end the block as an exception does, so that what is finished is kept."""

    def stop(_: int, __: FrameType | None) -> NoReturn:
        raise SystemExit(STOPPED_BY_TERM)

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def were_interrupted() -> bool:
    """Whether Ctrl-C came within the last seconds of this command.

    If it interrupts an import, an exception of any kind may follow, then or at the next use of the module.
    """
    return time.monotonic() - _last < _SECONDS


def _raise(_: int, __: FrameType | None) -> NoReturn:
    global _last
    _last = time.monotonic()
    raise KeyboardInterrupt
