"""Collectives of Python objects over all ranks: a result or failure of rank 0 for every rank, and gathered lists."""

from collections.abc import Callable
from typing import NamedTuple, TypeVar

import torch.distributed as dist

from ee_tuning.errors import InputError
from ee_tuning.parallel.topology import Topology

Result = TypeVar("Result")


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
