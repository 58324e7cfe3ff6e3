"""A fake world of any size: this process acts as one of its ranks, and the others do not exist.

Collectives and messages return at once and move nothing. Fake tensors have no values that could be missed.
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
    """Makes this process `rank` of a fake world of `world_size` while the context is open.

    The process must not have joined another world. Raises InputError where TP × PP does not divide `world_size`.
    """
    check_world_size(parallel, world_size)
    assert not dist.is_initialized(), "leave the world that is there before imagining one"
    device = prepare_device()
    dist.init_process_group("fake", store=dist.HashStore(), rank=rank, world_size=world_size)
    try:
        yield build_topology(parallel, device)
    finally:
        destroy_parallel()
