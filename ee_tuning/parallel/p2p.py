"""Messages between two ranks. gloo sends and receives host memory alone: what is on a GPU goes through pinned memory on
either side.

That is what several processes on one GPU have, for NCCL refuses them. It costs a copy over PCIe on each side, and the
sender waits for the GPU to have computed what it sends.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ee_tuning.parallel.process_groups import Group


def isend(tensor: Tensor, peer: int, group: Group) -> Any:
    """As torch's; `wait` of what is returned means that `tensor`, which must be kept until then, has been taken."""
    if not _is_staged(tensor, group):
        return dist.isend(tensor, peer, group=group)
    return _StagedTransfer(host := tensor.cpu(), None, dist.isend(host, peer, group=group))


def irecv(tensor: Tensor, peer: int, group: Group) -> Any:
    """As torch's; after `wait` of what is returned, `tensor` holds what was sent, for all that is done on the current
    stream.
    """
    if not _is_staged(tensor, group):
        return dist.irecv(tensor, peer, group=group)
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
    return _StagedTransfer(host, tensor, dist.irecv(host, peer, group=group))


class _StagedTransfer:
    """A message under way, its host memory, and where that goes in the end."""

    def __init__(self, host: Tensor, target: Tensor | None, work: Any) -> None:
        self._host, self._target, self._work = host, target, work

    def wait(self) -> None:
        self._work.wait()
        if self._target is not None:
            self._target.copy_(self._host, non_blocking=True)  # torch keeps pinned memory until copies from it are done


def _is_staged(tensor: Tensor, group: Group) -> bool:
    return tensor.is_cuda and dist.get_backend(group) == "gloo"
