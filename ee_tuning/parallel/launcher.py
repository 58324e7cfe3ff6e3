"""The place of this process, as its launcher (torchrun, a Slurm script, a notebook) set it in the environment."""

import os
from typing import NamedTuple

from ee_tuning.errors import InputError


class LaunchedRank(NamedTuple):
    """Rank and world size that a launcher assigned to this process."""

    rank: int
    world_size: int


class RendezvousError(InputError):
    """This process could not join the others. Only this rank knows why, so it reports the error itself."""


def launched_rank() -> LaunchedRank | None:
    """Returns what RANK and WORLD_SIZE say, or None where no launcher set them.

    WORLD_SIZE alone does not count: many shells and containers leave it set, and no other process would join. Raises
    InputError where the two contradict each other.
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
    """Returns LOCAL_RANK, or 0 where it is not set. Raises InputError where it is not a number."""
    return _number("LOCAL_RANK", least=0) or 0


def local_world_size() -> int:
    """Returns LOCAL_WORLD_SIZE, or 1 where it is not set. Raises InputError where it is not a number."""
    return _number("LOCAL_WORLD_SIZE", least=1) or 1


def check_address(place: LaunchedRank) -> None:
    """Raises InputError where the environment has no usable MASTER_ADDR and MASTER_PORT for a world of several
    processes.
    """
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
    """Whether this process is rank 0 or alone. True, too, where the environment is invalid."""
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
