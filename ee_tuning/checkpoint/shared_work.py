"""Pieces of work of known sizes, shared out so that processes end at about the same time. Every process comes to the
same answer.
"""

from collections.abc import Mapping
from typing import TypeVar

Piece = TypeVar("Piece")


def own_share(sizes: Mapping[Piece, int], rank: int, world: int) -> list[Piece]:
    """What `rank` of `world` does, in the order given: the largest pieces are given out first, each to whom has
    least.
    """
    loads = [0] * world
    owner: dict[Piece, int] = {}
    for piece in sorted(sizes, key=lambda piece: -sizes[piece]):
        owner[piece] = loads.index(min(loads))
        loads[owner[piece]] += sizes[piece]
    return [piece for piece in sizes if owner[piece] == rank]
