"""Collectives of Python objects over all ranks: work of one rank whose result or failure all ranks share, and gathered
lists.
"""

from collections.abc import Callable
from typing import TypeVar

import torch.distributed as dist

from ee_tuning.errors import InputError
from ee_tuning.parallel.topology import Topology

Result = TypeVar("Result")


def on_first_rank(topology: Topology | None, action: Callable[[], Result]) -> Result:
    """What `action` returns on rank 0, on every rank. Where it fails all ranks raise, as with `run_with_heartbeat`: its
    InputError, or else its own exception on rank 0 and a RuntimeError on the others. None is a world of one.
    """
    if topology is None:
        return action()
    result, failure = None, None
    if topology.rank == 0:
        try:
            result = action()
        except Exception as error:  # of any kind: the others wait for an answer
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
    """Every rank's items, on every rank, and a barrier with it."""
    if topology is None:
        return items
    parts: list[list[Result]] = [[] for _ in range(topology.world_size)]
    dist.all_gather_object(parts, items, group=topology.world_control)
    return [item for part in parts for item in part]
