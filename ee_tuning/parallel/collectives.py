"""Collectives of Python objects over all ranks: a result or failure of rank 0 for every rank, gathered lists, and long
work on some ranks while others wait.
"""

import time
from collections.abc import Callable, Generator, Iterator
from typing import NamedTuple, TypeVar

import torch.distributed as dist

from ee_tuning.errors import InputError
from ee_tuning.parallel.topology import Topology

Result = TypeVar("Result")
_HEARTBEAT_SECONDS = 20.0


class RankFailure(NamedTuple):
    """The failure of one rank, as a message to the others: its InputError, or the rank and its exception."""

    message: str
    is_refusal: bool

    @classmethod
    def of(cls, failure: Exception | None, rank: int) -> "RankFailure | None":
        """Describes what failed on `rank`; None for no failure."""
        if failure is None:
            return None
        if isinstance(failure, InputError):
            return cls(str(failure), True)
        return cls(f"rank {rank} failed: {type(failure).__name__}: {failure}", False)

    def error(self) -> Exception:
        """Returns the exception that other ranks raise."""
        return InputError(self.message) if self.is_refusal else RuntimeError(self.message)


def on_first_rank(topology: Topology | None, action: Callable[[], Result]) -> Result:
    """Runs `action` on rank 0 and returns its result on every rank.

    If `action` fails, all ranks raise: its InputError, or else its own exception on rank 0 and a RuntimeError on the
    others. Without a topology the world has one rank.
    """
    if topology is None:
        return action()
    result, own = None, None
    if topology.rank == 0:
        try:
            result = action()
        except Exception as error:  # any exception: the other ranks wait for an answer
            own = error
    result, failure = topology.broadcast_object((result, RankFailure.of(own, 0)))
    if failure is not None:
        raise failure.error() if own is None else own
    return result


def gather_lists(items: list[Result], topology: Topology | None) -> list[Result]:
    """Returns the items of all ranks, in the order of ranks, on every rank. This is a barrier, too."""
    if topology is None:
        return items
    parts: list[list[Result]] = [[] for _ in range(topology.world_size)]
    dist.all_gather_object(parts, items, group=topology.world_control)
    return [item for part in parts for item in part]


def run_with_heartbeat(steps: Iterator[None], topology: Topology) -> None:
    """Runs this rank's `steps`, each much shorter than a minute, while other ranks run theirs or wait. All ranks call
    it.

    If a step fails on one rank, all ranks raise: the same InputError, or else that rank's own exception and a
    RuntimeError on the others.
    """
    is_done, failure = False, None
    while True:
        until = time.monotonic() + _HEARTBEAT_SECONDS
        while not is_done:
            try:
                next(steps)
            except StopIteration:
                is_done = True
            except Exception as error:  # reported to the other ranks before it is raised, since they wait for this one
                is_done, failure = True, error
            if time.monotonic() >= until:
                break
        answers: list[tuple[bool, RankFailure | None]] = [(False, None)] * topology.world_size
        dist.all_gather_object(answers, (is_done, RankFailure.of(failure, topology.rank)), group=topology.world_control)
        if failures := [each for _, each in answers if each is not None]:
            if isinstance(steps, Generator):
                steps.close()  # removes partial outputs
            crash = next((each for each in failures if not each.is_refusal), None)
            if crash is not None and failure is not None and not isinstance(failure, InputError):
                raise failure
            raise (crash or failures[0]).error()
        if all(done for done, _ in answers):
            return
