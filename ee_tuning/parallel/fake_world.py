"""A world of any size that is imagined: this process is one of its ranks, and the others do not exist.

Collectives and messages return at once and move nothing. Under fake tensors, which have shapes and no numbers, nothing
is missed.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch.distributed as dist
import torch.testing._internal.distributed.fake_pg  # noqa: F401 -- registers torch's own backend of process groups that do nothing

from ee_tuning.config import ParallelSection
from ee_tuning.parallel.device import prepare_device
from ee_tuning.parallel.topology import Topology, build_topology, check_world_size, destroy_parallel


@contextmanager
def fake_world(parallel: ParallelSection, world_size: int, rank: int) -> Iterator[Topology]:
    """This process as `rank` of `world_size`, while it lasts. No other world may have been joined.

    Raises InputError where TP × PP does not divide `world_size`.
    """
    check_world_size(parallel, world_size)
    assert not dist.is_initialized(), "leave the world that is there before imagining one"
    device = prepare_device()
    dist.init_process_group("fake", store=dist.HashStore(), rank=rank, world_size=world_size)
    try:
        yield build_topology(parallel, device)
    finally:
        destroy_parallel()
