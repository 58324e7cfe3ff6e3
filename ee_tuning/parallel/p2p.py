"""Point-to-point messages. gloo moves host memory only, so tensors on a GPU go through pinned host memory on both
sides.

This serves several processes on one GPU, which NCCL refuses. It costs a copy over PCIe on each side, and the sender
waits until the GPU has computed the tensor.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ee_tuning.parallel.process_groups import Group


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
