"""Partitions work of known sizes so that processes finish at about the same time. All processes compute the same
partition.
"""

from collections.abc import Mapping
from typing import TypeVar

Item = TypeVar("Item")


def share_of(sizes: Mapping[Item, int], rank: int, world: int) -> list[Item]:
    """Returns the share of `rank` of `world`, in the given order. The largest items go first, each to the least loaded
    rank.
    """
    loads = [0] * world
    owner: dict[Item, int] = {}
    for piece in sorted(sizes, key=lambda piece: -sizes[piece]):
        owner[piece] = loads.index(min(loads))
        loads[owner[piece]] += sizes[piece]
    return [piece for piece in sizes if owner[piece] == rank]
