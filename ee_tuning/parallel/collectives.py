"""Collectives of Python objects over all ranks: a result or failure of rank 0 for every rank, and gathered lists."""

from collections.abc import Callable
from typing import TypeVar

import torch.distributed as dist

from ee_tuning.errors import InputError
from ee_tuning.parallel.topology import Topology

Result = TypeVar("Result")


def on_first_rank(topology: Topology | None, action: Callable[[], Result]) -> Result:
    """Runs `action` on rank 0 and returns its result on every rank.

    If `action` fails, all ranks raise, as in `run_with_heartbeat`: its InputError, or else its own exception on rank 0
    and a RuntimeError on the others. Without a topology the world has one rank.
    """
    if topology is None:
        return action()
    result, failure = None, None
    if topology.rank == 0:
        try:
            result = action()
        except Exception as error:  # any exception: the other ranks wait for an answer
            failure = error
    refusal = str(failure) if isinstance(failure, InputError) else None
    crash = None if failure is None or refusal is not None else f"rank 0 failed: {type(failure).__name__}: {failure}"
    result, refusal, crash = topology.broadcast_object((result, refusal, crash))
    if failure is not None:
        raise failure
    if refusal is not None:
        raise InputError(refusal)
    if crash is not None:
        raise RuntimeError(crash)
    return result


def gather_lists(items: list[Result], topology: Topology | None) -> list[Result]:
    """Returns the items of all ranks, in the order of ranks, on every rank. This is a barrier, too."""
    if topology is None:
        return items
    parts: list[list[Result]] = [[] for _ in range(topology.world_size)]
    dist.all_gather_object(parts, items, group=topology.world_control)
    return [item for part in parts for item in part]
