"""The end of the time: whatever hangs by then, the record is written and the process gone."""

import faulthandler
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable
from multiprocessing import active_children

CUT_OFF = 3
"""Exit code of a process whose time was over."""
MARGIN = 6.0
"""Seconds before the end at which it is written down what there is."""


class Deadline:
    """`budget` seconds from now on. `at_end` is called, from a thread, with the stack of the main thread, if it comes
    to that.
    """

    def __init__(self, budget: float, at_end: Callable[[str], None]) -> None:
        self._end, self._at_end = time.monotonic() + budget, at_end
        self._main = threading.get_ident()
        self._is_over = threading.Event()
        threading.Thread(target=self._watch, name="deadline", daemon=True).start()
        # A call that keeps the interpreter's lock for good leaves no thread a turn; this timer needs none.
        faulthandler.dump_traceback_later(budget, exit=True)

    @property
    def seconds_left(self) -> float:
        """Until the record is written whatever runs."""
        return self._end - MARGIN - time.monotonic()

    def reached_in_time(self) -> None:
        """Calls it off."""
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
