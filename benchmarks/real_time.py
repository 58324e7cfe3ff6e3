"""Priority that nothing else on the machine can disturb, so that an idle one can be had on a busy one. For a second or
so: others wait.
"""

import contextlib
import os


def set_real_time(is_wanted: bool) -> None:
    """Of all threads there are. Needs root; nothing happens without."""
    for thread in os.listdir("/proc/self/task"):
        with contextlib.suppress(PermissionError):
            os.sched_setscheduler(
                int(thread), os.SCHED_FIFO if is_wanted else os.SCHED_OTHER, os.sched_param(10 if is_wanted else 0)
            )
