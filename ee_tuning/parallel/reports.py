"""Reports from all ranks to rank 0, while all of them continue to work.

A thread of each rank meets those of the others about once a second, on a group of its own, so that ranks need not reach
the same line of their work at the same time. While a rank waits for the end of the others, messages arrive at least
once a second, and a lost rank is noticed at once.
"""

import threading
from collections.abc import Callable
from types import TracebackType
from typing import Generic, TypeVar

import torch.distributed as dist

from ee_tuning.parallel.collectives import RankFailure
from ee_tuning.parallel.topology import Topology
from ee_tuning.parallel.watchdog import hang_watchdog

Item = TypeVar("Item")
_SECONDS_BETWEEN_MEETINGS = 1.0


class Reports(Generic[Item]):
    """A context manager, entered by all ranks: rank 0 takes the items that any rank puts.

    Its end waits for all ranks. Where a block or `take` fails on one rank, all raise: the same InputError, or else that
    rank's own exception and a RuntimeError on the others.
    """

    def __init__(self, topology: Topology, take: Callable[[Item], None]):
        """Creates the reports. `take` is called on rank 0 only: in the calling thread for its own items, in another
        thread for items of other ranks, never twice at a time.
        """
        self._topology, self._take = topology, take
        self._items: list[Item] = []
        self._is_over = False
        self._own_failure: Exception | None = None
        self._failure: Exception | None = None
        """The failure that ends this rank, if any."""
        self._lock, self._wakes = threading.Lock(), threading.Event()
        self._thread = threading.Thread(target=self._meet_until_the_end, name="reports", daemon=True)

    def put(self, item: Item) -> None:
        """Queues an item for rank 0. Raises where another rank has failed."""
        self.check()
        with self._lock:
            if self._topology.rank == 0:
                self._take(item)
            else:
                self._items.append(item)

    def check(self) -> None:
        """Raises where another rank has failed."""
        if self._failure is not None:
            raise self._failure

    def __enter__(self) -> "Reports[Item]":
        if self._topology.world_size > 1:
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._topology.world_size == 1:
            return
        with self._lock:
            self._is_over = True
            if error is not None and error is not self._failure:
                self._own_failure = error if isinstance(error, Exception) else RuntimeError("it was stopped")
        self._wakes.set()
        # A rank that a signal stops leaves the others a moment to bring their items, and no more.
        self._thread.join(None if error is None or isinstance(error, Exception) else 2 * _SECONDS_BETWEEN_MEETINGS)
        if error is None:
            self.check()

    def _meet_until_the_end(self) -> None:
        try:
            while self._meet():
                self._wakes.wait(_SECONDS_BETWEEN_MEETINGS)
        except Exception as error:  # raised in the thread that decodes
            self._failure = error

    def _meet(self) -> bool:
        """Exchanges the queued items, and returns whether to meet again."""
        with self._lock:
            items, self._items = self._items, []
            failure, is_over = self._own_failure, self._is_over
        answers: list[tuple[list[Item], bool, RankFailure | None]] = [([], False, None)] * self._topology.world_size
        with hang_watchdog(self._topology, "the reports of the other ranks"):
            dist.all_gather_object(
                answers,
                (items, is_over, RankFailure.of(failure, self._topology.rank)),
                group=self._topology.save_control,
            )
        for _, _, reported in answers:
            if reported is not None:
                self._failure = failure or reported.error()
                return False
        if self._topology.rank == 0:
            self._take_all([item for part, _, _ in answers for item in part])
        # Rank 0 may have failed to take the last items, and reports that in one more meeting.
        return not all(over for _, over, _ in answers) or any(part for part, _, _ in answers)

    def _take_all(self, items: list[Item]) -> None:
        with self._lock:
            try:
                for item in items:
                    self._take(item)
            except Exception as error:
                self._own_failure = error
