"""Pieces of work of known sizes, shared out so that processes end at about the same time. Every process comes to the
same answer.
"""

from collections.abc import Mapping
from typing import TypeVar

Item = TypeVar("Item")


def share_of(sizes: Mapping[Item, int], rank: int, world: int) -> list[Item]:
    """What `rank` of `world` does, in the order given: the largest pieces are given out first, each to whom has
    least.
    """
    loads = [0] * world
    owner: dict[Item, int] = {}
    for piece in sorted(sizes, key=lambda piece: -sizes[piece]):
        owner[piece] = loads.index(min(loads))
        loads[owner[piece]] += sizes[piece]
    return [piece for piece in sizes if owner[piece] == rank]
