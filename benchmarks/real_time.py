"""Real-time priority, so that other processes do not disturb a measurement on a busy machine. Use it for about a
second: all others wait.
"""

import contextlib
import os


def set_real_time(is_wanted: bool) -> None:
    """Sets the priority of all threads of this process. Needs root; otherwise nothing happens."""
    for thread in os.listdir("/proc/self/task"):
        with contextlib.suppress(PermissionError):
            os.sched_setscheduler(
                int(thread), os.SCHED_FIFO if is_wanted else os.SCHED_OTHER, os.sched_param(10 if is_wanted else 0)
            )
