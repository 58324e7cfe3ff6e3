"""Sends that other ranks have not taken yet, and the tensors that they read."""

import time
from collections import deque
from collections.abc import Iterable
from typing import Any, NamedTuple

from torch import Tensor

from ee_tuning.parallel.time_parts import part
from ee_tuning.parallel.topology import Topology
from ee_tuning.parallel.watchdog import hang_watchdog

MAX_IN_FLIGHT = 2
"""Unfinished sends of micro-batches to one receiver."""


class _Send(NamedTuple):
    tensors: tuple[Tensor, ...]
    """The tensors must live until the send has finished."""
    works: tuple[Any, ...]
    waits_for: str


class PendingSends:
    """A queue of at most `max_in_flight` unfinished sends. They finish in the order in which they were added."""

    def __init__(self, topology: Topology, max_in_flight: int) -> None:
        assert max_in_flight >= 1, f"max_in_flight must be at least 1, got {max_in_flight}"
        self._topology, self._max_in_flight = topology, max_in_flight
        self._sends: deque[_Send] = deque()

    def __len__(self) -> int:
        return len(self._sends)

    def add(self, tensors: Iterable[Tensor], works: Iterable[Any], waits_for: str) -> float:
        """Adds a send with its handles `works`, and waits for the oldest ones where too many are unfinished.

        `waits_for` describes the wait in reports of a hang. Returns the seconds waited.
        """
        self._sends.append(_Send(tuple(tensors), tuple(works), waits_for))
        return self.wait(self._max_in_flight)

    @part("waiting")
    def wait(self, max_in_flight: int = 0) -> float:
        """Waits until at most `max_in_flight` sends are unfinished. Returns the seconds waited."""
        began = time.perf_counter()
        while len(self._sends) > max_in_flight:
            send = self._sends.popleft()
            with hang_watchdog(self._topology, send.waits_for):
                for work in send.works:
                    work.wait()
        return time.perf_counter() - began
