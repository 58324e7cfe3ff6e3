"""Creates as few process groups as possible and destroys them all: each costs threads and sockets, or GPU memory."""

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from ee_tuning.parallel.device import control_backend

Group = Any  # torch.distributed.ProcessGroup
Ranks = tuple[int, ...]

_PERSISTENT: dict[Ranks, Group] = {}
"""Groups that outlive a layout, by their ranks. The same on all ranks."""


@contextmanager
def one_group_for_same_ranks(parallel_state: Any, kept: list[list[int]]) -> Iterator[None]:
    """Makes Megatron's `parallel_state` create one group per set of ranks, shared by all purposes, instead of dozens.

    This is safe because its layers use them one after the other, in the same order on every rank. The groups in `kept`,
    those of replicas, outlive the layout, and a later layout gets them again: torch caches device meshes by their
    ranks, and with them the first group.
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
    """Creates a group for each part of `partition` and returns this rank's. All ranks create all groups, in the same
    order.

    The backend is that of control messages unless `backend` is given.
    """
    own = None
    for ranks in partition:
        group = dist.new_group(ranks, timeout=timeout, backend=backend or control_backend())
        if rank in ranks:
            own = group
    assert own is not None
    return own


def destroy_groups() -> None:
    """Destroys the groups of a layout, except persistent ones. All ranks call it."""
    dist.barrier()
    for group in list(dist.distributed_c10d._world.pg_map):
        if not any(group is each for each in (dist.group.WORLD, *_PERSISTENT.values())):
            dist.destroy_process_group(group)


def destroy_world() -> None:
    """Destroys all groups and leaves the world."""
    _PERSISTENT.clear()
    if dist.is_initialized():
        dist.destroy_process_group()
