"""Requests to stop, by signals. save_stop_policy.py acts on them.

A signal requests a checkpoint and an orderly end. Launchers repeat signals: a group kill reaches the agent and its
workers, and the agent forwards its own. So repeats change nothing, except a second Ctrl-C after a while, which ends the
process at once.
"""

import signal
import threading
import time
from types import FrameType
from typing import Any

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
SECONDS_OF_ONE_PRESS = 2.0
"""A Ctrl-C within this time after another one is the same one, forwarded by the launcher."""


class StopRequest:
    """Records SIGTERM (torchrun, Slurm), SIGINT (Ctrl-C) and SIGUSR1 while the context is open, instead of ending the
    process.

    A signal counts if it reaches a rank of the first stage; launchers signal all ranks. Repeats are ignored, except a
    SIGINT at least `SECONDS_OF_ONE_PRESS` after the first one, which has its usual effect.
    """

    def __init__(self) -> None:
        self.is_requested = False
        self._pressed_at: float | None = None
        self._former: dict[signal.Signals, Any] = {}

    def __enter__(self) -> "StopRequest":
        if threading.current_thread() is threading.main_thread():  # Python sets handlers in the main thread only
            self._former = {number: signal.signal(number, self._note) for number in SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._former.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.is_requested = True
        if number != signal.SIGINT:
            signal.signal(number, signal.SIG_IGN)
        elif self._pressed_at is None:
            self._pressed_at = time.monotonic()
        elif time.monotonic() - self._pressed_at >= SECONDS_OF_ONE_PRESS:
            signal.signal(number, self._former[signal.SIGINT])
            signal.raise_signal(number)
