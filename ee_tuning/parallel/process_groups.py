"""Few process groups, and none left: each of gloo's keeps threads and sockets, each of NCCL's memory on the device."""

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from ee_tuning.parallel.device import control_backend

Group = Any  # torch.distributed.ProcessGroup
Ranks = tuple[int, ...]

_PERSISTENT: dict[Ranks, Group] = {}
"""The groups of the world at hand, alike on all ranks."""


@contextmanager
def one_group_for_same_ranks(parallel_state: Any, kept: list[list[int]]) -> Iterator[None]:
    """Inside it, Megatron's `parallel_state` makes one group for all purposes that have the same ranks, in place of
    dozens for each rank. Its layers use them one after the other, in the same order on every rank.

    The groups `kept`, those of replicas, outlive the layout: torch remembers device meshes by their ranks, and with
    them the group of the first one. A later layout gets them again.
    """
    create, made = parallel_state.create_group, dict(_PERSISTENT)

    def create_once(ranks: list[int], *args: Any, **options: Any) -> Group:
        assert options.get("backend") is None, options
        key = tuple(ranks)
        if key not in made:
            made[key] = create(ranks, *args, **options)
        return made[key]

    parallel_state.create_group = create_once
    try:
        yield
    finally:
        parallel_state.create_group = create
    _PERSISTENT.update({tuple(ranks): made[tuple(ranks)] for ranks in kept})


def own_group(partition: list[list[int]], *, rank: int, timeout: timedelta, backend: str | None = None) -> Group:
    """A group for each part, one of control unless `backend` is given; this rank's own. Every rank makes every group,
    in order.
    """
    own = None
    for ranks in partition:
        group = dist.new_group(ranks, timeout=timeout, backend=backend or control_backend())
        if rank in ranks:
            own = group
    assert own is not None
    return own


def destroy_groups() -> None:
    """Ends those of a layout that are not kept. All ranks call it."""
    dist.barrier()
    for group in list(dist.distributed_c10d._world.pg_map):
        if not any(group is each for each in (dist.group.WORLD, *_PERSISTENT.values())):
            dist.destroy_process_group(group)


def destroy_world() -> None:
    """Ends them all."""
    _PERSISTENT.clear()
    if dist.is_initialized():
        dist.destroy_process_group()
