"""What a launcher (torchrun, Slurm scripts, notebooks) says of this process in its environment. Needs no torch."""

import os
from typing import NamedTuple

from ee_tuning.errors import InputError


class LaunchedRank(NamedTuple):
    """This process among those that were launched together."""

    rank: int
    world_size: int


class RendezvousError(InputError):
    """This process could not join the others, so it alone knows why."""


def launched_rank() -> LaunchedRank | None:
    """Where RANK and WORLD_SIZE put this process; None where no launcher did.

    WORLD_SIZE alone is none: it is left in many a shell and container, and nothing else would come to that world.
    Raises InputError where the two make no sense.
    """
    rank, world_size = _number("RANK", least=0), _number("WORLD_SIZE", least=1)
    if rank is None:
        return None
    if world_size is None:
        raise InputError(
            f"RANK and WORLD_SIZE are set together, and the environment has RANK={rank} alone; unset RANK, or launch with "
            "torchrun, which sets both"
        )
    if rank >= world_size:
        raise InputError(
            f"RANK must be below WORLD_SIZE, and the environment has RANK={rank} and WORLD_SIZE={world_size}; ranks count "
            "from 0; unset both for a single process"
        )
    return LaunchedRank(rank, world_size)


def local_rank() -> int:
    """Which of its machine's processes this one is; 0 where nothing says so. Raises InputError on what is no number."""
    return _number("LOCAL_RANK", least=0) or 0


def local_world_size() -> int:
    """How many processes were launched on this machine; 1 where nothing says so. Raises InputError on what is no
    number.
    """
    return _number("LOCAL_WORLD_SIZE", least=1) or 1


def check_address(place: LaunchedRank) -> None:
    """Raises InputError where the environment does not say where a world of several processes meets."""
    if not _value("MASTER_ADDR"):
        raise InputError(
            f"{place.world_size} processes meet at MASTER_ADDR, and the environment has none; launch with torchrun, or unset "
            "RANK and WORLD_SIZE for a single process"
        )
    port = _number("MASTER_PORT", least=1)
    if port is None or port > 65535:
        raise InputError(
            f"{place.world_size} processes meet at MASTER_PORT, a number in 1..65535, and the environment has "
            f"{'none' if port is None else port}; launch with torchrun, or set it alike for all of them"
        )


def is_first() -> bool:
    """Whether this process is rank 0, or alone, as far as its environment makes sense."""
    try:
        place = launched_rank()
    except InputError:
        return True
    return place is None or place.rank == 0


def _value(name: str) -> str:
    return os.environ.get(name, "").strip()


def _number(name: str, least: int) -> int | None:
    if not (value := _value(name)):
        return None
    if not value.isascii() or not value.isdigit() or len(value) > 9 or int(value) < least:
        raise InputError(
            f"{name} in the environment must be a whole number of at least {least}, got {value!r}; torchrun sets it; for a "
            "single process unset it"
        )
    return int(value)
