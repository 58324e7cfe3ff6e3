"""The place of this process, as its launcher (torchrun, srun, a notebook) set it in the environment."""

import os
import re
from typing import NamedTuple

from ee_tuning.errors import InputError


class LaunchedRank(NamedTuple):
    """Rank and world size that a launcher assigned to this process."""

    rank: int
    world_size: int


class RendezvousError(InputError):
    """Failure of this process to join the others. Only this rank knows the cause, so it reports the error itself."""


def adopt_slurm_step() -> None:
    """Sets the variables that torchrun would set, where `srun` started this process directly as one of several.

    Variables that are set already stay. Only a step of several tasks counts: a batch script and an interactive shell
    are steps of one task, and start a single process.
    """
    tasks = _value("SLURM_STEP_NUM_TASKS")
    if _value("RANK") or not _value("SLURM_PROCID") or not tasks.isdigit() or int(tasks) < 2:
        return
    job = _value("SLURM_JOB_ID")
    described = {
        "RANK": _value("SLURM_PROCID"),
        "WORLD_SIZE": tasks,
        "LOCAL_RANK": _value("SLURM_LOCALID"),
        "MASTER_ADDR": first_host(_value("SLURM_STEP_NODELIST")),
        # Equal for all ranks, different for jobs that share a node, and below the ports that Linux assigns by itself.
        "MASTER_PORT": str(15000 + (int(job) if job.isdigit() else 0) % 15000),
    }
    # LOCAL_WORLD_SIZE stays unset: with --gpus-per-task each process sees its own GPU alone, and a count of processes
    # above the count of visible GPUs would be read as sharing one.
    os.environ.pop("WORLD_SIZE", None)  # alone, of a shell
    for name, value in described.items():
        if value and not _value(name):
            os.environ[name] = value


def first_host(nodes: str) -> str:
    """Returns the first host of Slurm's short form of a list: `gpu007` of `gpu[007-009,12],login`."""
    each_first = re.sub(r"\[(\d+)[^\]]*\]", r"\1", nodes)
    return each_first.partition(",")[0]


def launched_rank() -> LaunchedRank | None:
    """Returns the values of RANK and WORLD_SIZE, or None where no launcher set them. WORLD_SIZE alone does not count:
    many shells and containers leave it set, and no other process would join. Raises InputError where the two contradict
    each other.
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
