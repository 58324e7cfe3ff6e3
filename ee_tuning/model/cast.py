"""Casts parameters to another dtype or device."""

import torch
from torch import nn


def cast_parameters(module: nn.Module, dtype: torch.dtype | None = None, device: torch.device | None = None) -> None:
    """Like `module.to`, but replaces parameters by new ones, since `to` can not change them in place under fake
    tensors.

    Parameters that already match stay the same objects. Buffers move to the device and keep their dtype.
    """
    for part in module.modules():
        for name, parameter in part.named_parameters(recurse=False):
            cast = parameter.detach().to(device or parameter.device, dtype or parameter.dtype)
            if cast.dtype != parameter.dtype or cast.device != parameter.device:
                setattr(part, name, nn.Parameter(cast, parameter.requires_grad))
        for name, buffer in part.named_buffers(recurse=False):
            setattr(part, name, buffer.to(device or buffer.device))
