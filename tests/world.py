"""Four gloo processes that live as long as the test session and run one job after another.

A job is a module-level function of a test module, called with the same arguments on every rank; it lays its own
TP x PP x DP over the world with `init_parallel`. The process that runs pytest is none of the four.
"""

import gc
import multiprocessing
import os
import pickle
import sys
import threading
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from typing import Any, NoReturn

from warm_parent import forked

from ee_tuning.parallel.ports import free_port

SIZE = 4
_GRACE = 3.0  # seconds for the other ranks to end once one has failed


class World:
    """Starts its processes with the first job, and anew with the first job after a failure."""

    def __init__(self) -> None:
        self._workers: list[tuple[multiprocessing.process.BaseProcess, Connection]] = []

    def run(self, function: Callable[..., Any], *args: Any, timeout: float = 180.0) -> list[Any]:
        """`function(*args)` of every rank, by rank.

        Raises AssertionError with the traceback of the rank that failed first, or naming the ranks that hang after
        `timeout` seconds.
        """
        if not self._workers:
            self._start()
        job = pickle.dumps((sys.path, pickle.dumps((function, args))))
        for _, connection in self._workers:
            connection.send_bytes(job)
        results: dict[int, Any] = {}
        failures: list[str] = []
        deadline = time.monotonic() + timeout
        pending = {connection: rank for rank, (_, connection) in enumerate(self._workers)}
        while pending and (remaining := deadline - time.monotonic()) > 0:
            for ready in wait(list(pending), remaining):
                rank = pending.pop(ready)
                succeeded, outcome = _read_outcome(ready)
                if succeeded:
                    results[rank] = outcome
                else:
                    failures.append(f"rank {rank} of {SIZE} failed:\n{outcome}")
                    deadline = min(deadline, time.monotonic() + _GRACE)
        if pending and not failures:
            failures.append(f"ranks {sorted(pending.values())} of {SIZE} hang in {function.__name__} after {timeout} s")
        if failures:
            self.stop()  # what the ranks still expect of each other is unknown
            raise AssertionError("\n".join(failures))
        return [results[rank] for rank in range(SIZE)]

    def stop(self) -> None:
        """Ends the processes; one that does not follow is killed."""
        for _, connection in self._workers:
            connection.close()  # a worker between two jobs reads the end of its input and leaves
        for process, _ in self._workers:
            process.join(_GRACE)
            if process.is_alive():
                process.kill()
                process.join()
        self._workers = []

    def _start(self) -> None:
        port = free_port()
        context = forked()
        for rank in range(SIZE):
            ours, theirs = context.Pipe()
            # Not a daemon: stock Megatron's checkpoint writers are processes of their own.
            process = context.Process(target=_work, args=(rank, port, theirs), name=f"rank {rank}")
            process.start()
            theirs.close()
            self._workers.append((process, ours))


def _read_outcome(connection: Connection) -> tuple[bool, Any]:
    try:
        return pickle.loads(connection.recv_bytes())
    except EOFError:
        return False, "the process ended without an answer"


def _work(rank: int, port: int, connection: Connection) -> None:
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(SIZE),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        OMP_NUM_THREADS="1",
        CUDA_VISIBLE_DEVICES="",
    )
    threading.Thread(target=_leave_with_parent, daemon=True).start()
    import torch

    torch.set_num_threads(1)
    while True:
        try:
            path, job = pickle.loads(connection.recv_bytes())
        except EOFError:
            _leave(0)
        sys.path[:] = path
        try:
            function, args = pickle.loads(job)
            outcome = True, function(*args)
            answer = pickle.dumps(outcome)
        except BaseException:
            answer = pickle.dumps((False, traceback.format_exc()))
        connection.send_bytes(answer)
        outcome = answer = job = function = args = None
        # process groups that only cycles still hold keep threads, each of which wakes a hundred times a
        # second
        gc.collect()
        gc.freeze()


def _leave_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    _leave(1)


def _leave(code: int) -> NoReturn:
    """At once: an orderly end of the process groups would wait for ranks that may be gone. Megatron's writers would
    stay behind.
    """
    for child in multiprocessing.active_children():
        child.kill()
    os._exit(code)
