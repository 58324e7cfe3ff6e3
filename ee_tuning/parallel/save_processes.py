"""The process that Megatron-core's `dist_checkpointing.save` starts beside each rank and keeps, made to end with the rank.

It is a multiprocessing manager (for a queue of results), which outlives a parent that was killed: 200 MB per rank and kill, for ever.
"""
import ctypes
import multiprocessing
import os
import signal
import sys
import warnings
from multiprocessing.managers import SyncManager

_PR_SET_PDEATHSIG = 1


def bind_save_processes() -> None:
    """Call it before a save, any number of times. Does nothing where Megatron-core keeps no such process, or this is no Linux."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of optional libraries that are not installed
        from megatron.core.dist_checkpointing.strategies import filesystem_async
    if getattr(filesystem_async, "_results_queue", ...) is not None or sys.platform != "linux":
        return
    manager = SyncManager(ctx=multiprocessing.get_context("spawn"))
    manager.start(_end_with, (os.getpid(),))
    filesystem_async._results_queue = manager.Queue()  # it holds its manager


def _end_with(parent: int) -> None:
    """In the manager: it is killed when its parent ends, however that ends."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # gone already
        os._exit(1)
