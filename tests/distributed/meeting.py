"""Whether all stages can be at work at once, without a clock.

A stage in its n-th work waits for every other one to be in the work it is due for then: the n-th for the stage itself,
the n+1st for the stage before, and so on. If they always meet, no stage has to idle while all work takes equally long.
If one waits for something that a later stage does only after the meeting, they do not meet, and patience runs out.
"""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

LONG, SHORT = 60.0, 0.5
"""Patience in seconds: where stages should meet, on a machine however busy, and where they can not."""


class Meeting:
    """This stage's part. Ranks see each other by files in `folder`, so nothing of what is tested carries the
    messages.
    """

    def __init__(self, folder: Path, stage: int, num_stages: int, num_works: int, patience: float) -> None:
        self._folder, self._stage, self._num_stages, self._num_works, self._patience = (
            folder,
            stage,
            num_stages,
            num_works,
            patience,
        )
        self.num_done = 0
        self.all_met = True
        """Whether this stage saw all others at their works in each of its own. Nobody waits any more after the first
        time it did not.
        """

    def at_work(self, work: Callable[..., Any]) -> Callable[..., Any]:
        """`work`, which begins when all have met."""

        def met(*args: Any, **options: Any) -> Any:
            moment = self.num_done + self._stage
            _mark(self._folder, moment, self._stage).touch()
            others = [each for each in range(self._num_stages) if 0 <= moment - each < self._num_works]
            self._expect(lambda: all(_mark(self._folder, moment, each).exists() for each in others))
            self.num_done += 1
            return work(*args, **options)

        return met

    def goes_on_meanwhile(self, write: Callable[..., Any]) -> Callable[..., Any]:
        """`write`, which begins when this stage has done two more works, or all there are."""

        def later(*args: Any) -> Any:
            due = min(self.num_done + 2, self._num_works)
            self._expect(lambda: self.num_done >= due)
            return write(*args)

        return later

    def _expect(self, condition: Callable[[], bool]) -> None:
        ends = time.monotonic() + self._patience
        while self.all_met and not condition():
            self.all_met = time.monotonic() < ends
            time.sleep(0.002)


def _mark(folder: Path, moment: int, stage: int) -> Path:
    return folder / f"{moment}.{stage}"
