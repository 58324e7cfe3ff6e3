"""Copies between host and device that hold up nobody."""

from collections.abc import Sequence

import torch
from torch import Tensor


def to_device(x: Tensor, device: torch.device) -> Tensor:
    """A tensor of the host on `device`. On a GPU by way of pinned memory: from any other the host would wait for all
    that is queued.
    """
    return x.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else x.to(device)


class PinnedStaging:
    """Copies of tensors in host memory, so that what changes on the device can be written as it was while work on it
    goes on.

    Room for tensors of some shapes, taken once: pinned where they are on a GPU, so that to copy them holds up nobody.

    Pinning and freeing pinned memory may wait for all that the device has to do, a receive that is posted ahead
    included: make it before the relay starts, and keep it as long.
    """

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self._room = [torch.empty(each.shape, dtype=each.dtype, pin_memory=each.is_cuda) for each in tensors]
        self._copied = torch.cuda.Event() if any(each.is_cuda for each in tensors) else None

    def copy_from(self, tensors: Sequence[Tensor]) -> None:
        """Copies `tensors`, which may change afterwards. On a GPU it returns at once, and what is queued after it waits
        for it.
        """
        for room, tensor in zip(self._room, tensors, strict=True):
            room.copy_(tensor.detach(), non_blocking=True)
        if self._copied is not None:
            self._copied.record()

    def tensors(self) -> list[Tensor]:
        """What was taken last, once it is here; good until the next `copy_from`. From any thread."""
        if self._copied is not None:
            self._copied.synchronize()
        return self._room
