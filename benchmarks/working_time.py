"""Working time of a stage, and a simulation of stages that wait for each other, for measurements and tests of the
relay.
"""

import time
from collections.abc import Callable
from typing import Any

from ee_tuning.tuning.exit_trainer import ExitTrainer


class Clock:
    """This stage's working time, from its first work to its last."""

    def __init__(self) -> None:
        self.busy = self.ended = 0.0
        self.began: float | None = None

    @property
    def elapsed(self) -> float:
        """Seconds from the beginning of the first work to the end of the last one."""
        assert self.began is not None, "nothing was timed"
        return self.ended - self.began

    @property
    def idle_share(self) -> float:
        """Share of the elapsed time without work."""
        return 1 - self.busy / self.elapsed

    def timed(self, work: Callable[..., Any], at_least: float = 0.0) -> Callable[..., Any]:
        """Returns `work`, made to last `at_least` this many seconds."""

        def padded(*args: Any) -> Any:
            began = time.perf_counter()
            result = work(*args)
            time.sleep(max(at_least - (time.perf_counter() - began), 0.0))
            self.began, self.ended = began if self.began is None else self.began, time.perf_counter()
            self.busy += self.ended - began
            return result

        return padded


class DrainingWork(ExitTrainer):
    """Makes every stage wait for the last one at the end of a step."""

    def end_step(self, *args: Any) -> None:
        """Does ExitTrainer's work, and then waits."""
        super().end_step(*args)
        self._topology.barrier()
