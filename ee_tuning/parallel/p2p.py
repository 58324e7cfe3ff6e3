"""Point-to-point messages, and those that other ranks have not taken yet. gloo moves host memory only, so tensors on a
GPU go through pinned host memory on both sides.

This serves several processes on one GPU, which NCCL refuses. It costs a copy over PCIe on each side, and the sender
waits until the GPU has computed the tensor.
"""

import time
from collections import deque
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from ee_tuning.parallel.process_groups import Group
from ee_tuning.parallel.time_parts import part
from ee_tuning.parallel.topology import Topology
from ee_tuning.parallel.watchdog import hang_watchdog

MAX_IN_FLIGHT = 2
"""Most unfinished sends of micro-batches to one receiver."""


def isend(tensor: Tensor, peer: int, group: Group) -> Any:
    """Like `torch.distributed.isend`. Keep `tensor` until `wait` of the returned handle has returned."""
    if not _is_staged(tensor, group):
        return dist.isend(tensor, peer, group=group)
    return _StagedTransfer(host := tensor.cpu(), None, dist.isend(host, peer, group=group))


def irecv(tensor: Tensor, peer: int, group: Group) -> Any:
    """Like `torch.distributed.irecv`. After `wait` of the returned handle, work on the current stream sees the received
    data.
    """
    if not _is_staged(tensor, group):
        return dist.irecv(tensor, peer, group=group)
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
    return _StagedTransfer(host, tensor, dist.irecv(host, peer, group=group))


class _StagedTransfer:
    """A transfer in flight, its host buffer, and the device tensor that it fills."""

    def __init__(self, host: Tensor, target: Tensor | None, work: Any) -> None:
        self._host, self._target, self._work = host, target, work

    def wait(self) -> None:
        self._work.wait()
        if self._target is not None:
            # torch keeps pinned memory until copies from it have finished
            self._target.copy_(self._host, non_blocking=True)


def _is_staged(tensor: Tensor, group: Group) -> bool:
    return tensor.is_cuda and dist.get_backend(group) == "gloo"


class _Send(NamedTuple):
    tensors: tuple[Tensor, ...]
    """The tensors must live until the send has finished."""
    works: tuple[Any, ...]
    waits_for: str


class PendingSends:
    """A queue of at most `max_in_flight` unfinished sends. They finish in the order in which they were added."""

    def __init__(self, topology: Topology, max_in_flight: int) -> None:
        assert max_in_flight >= 1, f"max_in_flight must be at least 1, got {max_in_flight}"
        self._topology, self._max_in_flight = topology, max_in_flight
        self._sends: deque[_Send] = deque()

    def __len__(self) -> int:
        return len(self._sends)

    def add(self, tensors: Iterable[Tensor], works: Iterable[Any], waits_for: str) -> float:
        """Adds a send with its handles `works`, and waits for the oldest ones where too many are unfinished.

        `waits_for` describes the wait in reports of a hang. Returns the seconds waited.
        """
        self._sends.append(_Send(tuple(tensors), tuple(works), waits_for))
        return self.wait(self._max_in_flight)

    @part("waiting")
    def wait(self, max_in_flight: int = 0) -> float:
        """Waits until at most `max_in_flight` sends are unfinished. Returns the seconds waited."""
        began = time.perf_counter()
        while len(self._sends) > max_in_flight:
            send = self._sends.popleft()
            with hang_watchdog(self._topology, send.waits_for):
                for work in send.works:
                    work.wait()
        return time.perf_counter() - began
