"""`ee-tuning serve --data-parallel-size N`: N replicas, each its own server, behind one port."""

import asyncio
import contextlib
import logging
import os
import signal
import socket
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import aiohttp

from ee_tuning.config import Config
from ee_tuning.errors import InputError
from ee_tuning.parallel.launcher import launched_rank
from ee_tuning.serving.front import build_front
from ee_tuning.serving.replica_process import ReplicaProcess, check_devices
from ee_tuning.serving.replica_set import Replica, ReplicaSet
from ee_tuning.serving.server import address_of, bind, make_server, set_up_logs
from ee_tuning.serving.settings import ServeSettings, model_names

log = logging.getLogger("ee_tuning.serving")
_LONGEST_SOCKET, _LONGEST_NAME = 107, len("/ee_tuning-12345678/replica-1023.sock")
"""Bytes of a socket's path on Linux, and of its part within the folder for temporary files."""
_SECONDS_TO_END = 10.0
"""Seconds that replicas without requests have to end."""


def serve_replicas(config: Config, settings: ServeSettings) -> int:
    """Starts the replicas, and passes requests on to them until a signal; returns 1 where all replicas have failed.

    Raises InputError like `serve`; a mistake that a replica finds is reported once.
    """
    settings.check()
    if launched_rank() is not None:
        raise InputError(
            f"serve --data-parallel-size {settings.data_parallel_size} starts its own processes, and was itself started as one "
            "of several; start it without torchrun"
        )
    if config.generation.budget is not None:
        raise InputError(
            "generation.budget is measured by each replica, and they may come to different exits; start one, and give the exit "
            "that it prints by --policy fixed --exit-layer N"
        )
    check_devices(config, settings.data_parallel_size)
    listening = bind(settings)
    set_up_logs()
    try:
        # Private to this user, as its sockets are.
        place = tempfile.TemporaryDirectory(prefix="ee_tuning-", dir=socket_place())
        with place as folder, _processes(config, settings, Path(folder)) as processes:
            return asyncio.run(_serve(config, settings, processes, listening))
    finally:
        listening.close()
        if settings.uds is not None:
            Path(settings.uds).unlink(missing_ok=True)


def socket_place() -> str:
    """Returns the folder for temporary files, or /tmp where its path is too long for sockets, as on some clusters."""
    place = tempfile.gettempdir()
    return place if len(os.fsencode(place)) + _LONGEST_NAME <= _LONGEST_SOCKET else "/tmp"


@contextmanager
def _processes(config: Config, settings: ServeSettings, folder: Path) -> Iterator[list[ReplicaProcess]]:
    """Starts the processes, and ends them."""
    started: list[ReplicaProcess] = []
    try:
        for index in range(settings.data_parallel_size):
            started.append(ReplicaProcess(config, settings, index, folder))
        yield started
    finally:
        for process in started:
            process.drain()
        for process in started:
            process.end(_SECONDS_TO_END)


async def _serve(
    config: Config, settings: ServeSettings, processes: list[ReplicaProcess], listening: socket.socket
) -> int:
    replicas = ReplicaSet([Replica(process.index, str(process.path)) for process in processes])
    try:
        await asyncio.gather(*map(_until_ready, replicas.replicas, processes))
        for process in processes:
            _watch(process, replicas)
        server = make_server(build_front(replicas, settings), replicas, settings)
        name = model_names(config, settings)[0]
        log.info("%s serves %s by %d replicas", address_of(listening, settings), name, len(processes))
        await server.serve(sockets=[listening])
        return 0 if replicas.is_alive or replicas.is_draining else 1
    finally:
        for replica in replicas.replicas:
            await replica.close()


async def _until_ready(replica: Replica, process: ReplicaProcess) -> None:
    """Waits until a replica has its model. Raises InputError, or RuntimeError, where it ends instead."""
    while process.exit_code is None:
        with contextlib.suppress(aiohttp.ClientError):
            async with replica.session.get("http://replica/health") as answer:
                if answer.status == 200:
                    return
        await asyncio.sleep(0.1)
    if (refusal := process.refusal()) is not None:
        raise InputError(refusal)
    raise RuntimeError(f"replica {replica.index} {_ended_by(process.exit_code)} before it served")


def _watch(process: ReplicaProcess, replicas: ReplicaSet) -> None:
    """Excludes a replica from new requests when its process ends."""
    loop = asyncio.get_running_loop()

    def ended() -> None:
        for sentinel in process.sentinels:
            loop.remove_reader(sentinel)
        replica = replicas.replicas[process.index]
        replica.why_dead = _ended_by(process.exit_code)
        if not replicas.is_draining:
            log.error("replica %d %s; %d are left", process.index, replica.why_dead, len(replicas.alive))

    for sentinel in process.sentinels:
        loop.add_reader(sentinel, ended)


def _ended_by(code: int | None) -> str:
    if code is not None and code < 0:
        return f"was ended by {signal.Signals(-code).name}"
    return f"ended with exit code {code}"
