"""Processes of a world on this machine, for benchmarks that tune on several."""

import multiprocessing
import os
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from ee_tuning.parallel.ports import free_port


def run_ranks(world_size: int, work: Callable[..., Any], *args: Any) -> list[Any]:
    """Returns the result of `work(*args)` on each of `world_size` new processes with one thread each, by rank. `work`
    sets up the parallelism.
    """
    port = free_port()
    spawn = multiprocessing.get_context("spawn")
    answers = spawn.Queue()
    ranks = [
        spawn.Process(target=_run, args=(rank, world_size, port, answers, work, args)) for rank in range(world_size)
    ]
    for each in ranks:
        each.start()
    results = dict(answers.get(timeout=900) for _ in ranks)
    for each in ranks:
        each.join()
    return [results[rank] for rank in range(world_size)]


def _run(rank: int, world_size: int, port: int, answers: Any, work: Callable[..., Any], args: tuple[Any, ...]) -> None:
    cores = sorted(os.sched_getaffinity(0))
    if world_size <= len(
        cores
    ):  # else a message's receiver is woken on the sender's core, and computes there while another core idles
        os.sched_setaffinity(0, cores[rank * len(cores) // world_size : (rank + 1) * len(cores) // world_size])
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)
    )
    torch.set_num_threads(1)
    answers.put((rank, work(*args)))
    answers.close()
    answers.join_thread()
    dist.barrier()
    os._exit(0)  # an orderly end of the process groups takes seconds
