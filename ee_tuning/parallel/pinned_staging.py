"""Copies between host and device that block neither of them."""

from collections.abc import Sequence

import torch
from torch import Tensor


def to_device(x: Tensor, device: torch.device) -> Tensor:
    """Copies a host tensor to `device`, through pinned memory on a GPU.

    From other memory, the host would wait for all queued work.
    """
    return x.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else x.to(device)


class PinnedStaging:
    """Buffers in host memory for copies of device tensors: training goes on while the copy is written to disk.

    The buffers are allocated once, pinned for tensors on a GPU, so that copying does not block. Allocating and freeing
    pinned memory may wait for all work of the device, posted receives included: create this before the relay starts,
    and keep it as long.
    """

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self._room = [torch.empty(each.shape, dtype=each.dtype, pin_memory=each.is_cuda) for each in tensors]
        self._copied = torch.cuda.Event() if any(each.is_cuda for each in tensors) else None

    def copy_from(self, tensors: Sequence[Tensor]) -> None:
        """Copies `tensors`, which may change afterwards. On a GPU the copy is queued, and later work waits for it."""
        for room, tensor in zip(self._room, tensors, strict=True):
            room.copy_(tensor.detach(), non_blocking=True)
        if self._copied is not None:
            self._copied.record()

    def tensors(self) -> list[Tensor]:
        """Waits for the last copy and returns it, valid until the next `copy_from`. May be called from any thread."""
        if self._copied is not None:
            self._copied.synchronize()
        return self._room
