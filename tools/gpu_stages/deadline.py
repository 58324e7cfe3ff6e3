"""The end of the available time: the record is written then, and the process ends, even if a call hangs."""

import faulthandler
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable
from multiprocessing import active_children

CUT_OFF = 3
"""Exit code of a process that has exceeded its time."""
MARGIN = 6.0
"""Seconds before the end at which the record is written."""


class Deadline:
    """A deadline `budget` seconds from now. At its end, `at_end` is called from a thread, with the stack of the main
    thread.
    """

    def __init__(self, budget: float, at_end: Callable[[str], None]) -> None:
        self._end, self._at_end = time.monotonic() + budget, at_end
        self._main = threading.get_ident()
        self._is_over = threading.Event()
        threading.Thread(target=self._watch, name="deadline", daemon=True).start()
        # If a call never releases the interpreter's lock, no thread runs; this timer needs none.
        faulthandler.dump_traceback_later(budget, exit=True)

    @property
    def seconds_left(self) -> float:
        """Seconds until the record is written in any case."""
        return self._end - MARGIN - time.monotonic()

    def reached_in_time(self) -> None:
        """Cancels the deadline."""
        self._is_over.set()
        faulthandler.cancel_dump_traceback_later()

    def _watch(self) -> None:
        if self._is_over.wait(max(self.seconds_left, 0.0)):
            return
        frame = sys._current_frames().get(self._main)
        try:
            self._at_end("".join(traceback.format_stack(frame)) if frame else "")
            sys.stdout.flush()
            for child in active_children():
                child.kill()
        finally:
            os._exit(CUT_OFF)
