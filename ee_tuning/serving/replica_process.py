"""A replica of `serve --data-parallel-size N`: its own server on a Unix domain socket, in its own processes."""

import dataclasses
import logging
import multiprocessing
import os
import signal
import sys
import threading
from multiprocessing.connection import Connection
from pathlib import Path

from ee_tuning.config import Config
from ee_tuning.errors import InputError
from ee_tuning.parallel.ports import free_port
from ee_tuning.serving.settings import ServeSettings


class ReplicaProcess:
    """The processes of one replica, tensor × pipeline of them; the first one serves."""

    def __init__(self, config: Config, settings: ServeSettings, index: int, folder: Path):
        """Starts the processes. `settings` are the whole server's."""
        self.index = index
        self.path = folder / f"replica-{index}.sock"
        own = dataclasses.replace(
            settings, uds=str(self.path), api_keys=(), allowed_origins=(), ssl_certfile=None, ssl_keyfile=None
        )
        size = num_in_replica(config)
        context = multiprocessing.get_context("spawn")
        self._refusals, sender = context.Pipe(duplex=False)
        self._processes = [
            context.Process(target=_run, args=(config, own, environment, sender), name=f"replica {index}")
            for environment in _environments(index, size, settings.data_parallel_size)
        ]
        for process in self._processes:
            process.start()
        sender.close()

    @property
    def sentinels(self) -> list[int]:
        """File descriptors that are readable once one of the processes has ended."""
        return [process.sentinel for process in self._processes]

    @property
    def exit_code(self) -> int | None:
        """Exit code of a process that has ended, negative for a signal; None while all are alive."""
        ended = [process.exitcode for process in self._processes if process.exitcode is not None]
        return next((code for code in ended if code), ended[0] if ended else None)

    def refusal(self) -> str | None:
        """The user's mistake that ended a process, if any."""
        try:
            return self._refusals.recv() if self._refusals.poll() else None
        except EOFError:
            return None

    def drain(self) -> None:
        """Signals the processes to end after their running requests."""
        if self._processes[0].exitcode is None and self._processes[0].pid is not None:
            os.kill(self._processes[0].pid, signal.SIGTERM)

    def end(self, seconds: float) -> None:
        """Waits for the processes, and kills those that do not end."""
        for process in self._processes:
            process.join(seconds)
            if process.is_alive():
                process.kill()
                process.join()


def num_in_replica(config: Config) -> int:
    """Processes that hold one copy of the model."""
    parallel = config.parallel
    return parallel.tensor_model_parallel_size * parallel.pipeline_model_parallel_size


def check_devices(config: Config, num_replicas: int) -> None:
    """Raises InputError where there are GPUs, but not one for each process."""
    import torch

    needed, there = num_replicas * num_in_replica(config), torch.cuda.device_count()
    if 0 < there < needed:
        raise InputError(
            f"--data-parallel-size {num_replicas} × tensor × pipeline takes {needed} GPUs, one for each process, and this "
            f"machine has {there}; give fewer replicas"
        )


def _environments(index: int, size: int, num_replicas: int) -> list[dict[str, str]]:
    """Returns, for each process of a replica, the environment variables that differ from this process's."""
    import torch

    cores = len(os.sched_getaffinity(0))
    common = {}
    if "OMP_NUM_THREADS" not in os.environ:
        common["OMP_NUM_THREADS"] = str(max(1, cores // (num_replicas * size)))
    if torch.cuda.device_count():
        visible = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
        visible = visible if visible != [""] else [str(device) for device in range(torch.cuda.device_count())]
        common["CUDA_VISIBLE_DEVICES"] = ",".join(visible[index * size : (index + 1) * size])
    if size == 1:
        return [common]
    common |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(size)}
    return [{**common, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(size)]


def _run(config: Config, settings: ServeSettings, environment: dict[str, str], refusals: Connection) -> None:
    os.environ.update(environment)
    os.setsid()  # Ctrl-C at a terminal is handled by the front, which then drains
    threading.Thread(target=_leave_with_parent, daemon=True).start()
    logging.getLogger("ee_tuning.serving").setLevel(logging.WARNING)  # the front logs each request
    from ee_tuning.serving.command import serve

    try:
        serve(config, settings)
    except InputError as error:
        refusals.send(str(error))
        sys.exit(2)


def _leave_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
