"""Parameters in another dtype or on another device."""

import torch
from torch import nn


def cast_parameters(module: nn.Module, dtype: torch.dtype | None = None, device: torch.device | None = None) -> None:
    """`module.to` with new parameters in place of the old ones: under fake tensors, `to` can not change those that are
    there.

    Parameters that are right already stay the same objects. Buffers follow to the device and keep their dtype.
    """
    for part in module.modules():
        for name, parameter in part.named_parameters(recurse=False):
            cast = parameter.detach().to(device or parameter.device, dtype or parameter.dtype)
            if cast.dtype != parameter.dtype or cast.device != parameter.device:
                setattr(part, name, nn.Parameter(cast, parameter.requires_grad))
        for name, buffer in part.named_buffers(recurse=False):
            setattr(part, name, buffer.to(device or buffer.device))
