"""Ctrl-C ends a command quietly, whatever the libraries that it meets on their way make of it."""

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import NoReturn

_SECONDS = 10.0
_last = -_SECONDS


def end_at_once() -> None:
    """Lets Ctrl-C end the process as it ends any other, without a traceback: while Python is still importing, or
    already going.

    Where it is ignored, as for a job in a shell's background, it stays so.
    """
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)


@contextmanager
def interrupts_raised() -> Iterator[None]:
    """Ctrl-C raises KeyboardInterrupt within the block, and is remembered. In the main thread; elsewhere nothing
    changes.
    """
    former = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or former not in (
        signal.SIG_DFL,
        signal.default_int_handler,
    ):
        yield
        return
    global _last
    _last = -_SECONDS  # one that an earlier command met, in the same process, tells nothing of this one
    signal.signal(signal.SIGINT, _raise)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, former)


def were_interrupted() -> bool:
    """Whether Ctrl-C came within the last seconds, in this command: an import that it breaks off comes out as an error
    of any kind, now or at the next use of what was not imported.
    """
    return time.monotonic() - _last < _SECONDS


def _raise(_: int, __: FrameType | None) -> NoReturn:
    global _last
    _last = time.monotonic()
    raise KeyboardInterrupt
