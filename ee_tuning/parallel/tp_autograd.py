"""Differentiable sums over tensor-parallel ranks, before and after operations that are cut over them.

Megatron-core has the same two functions, but where a gradient is not contiguous they reduce a copy and return the
partial one.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ee_tuning.parallel.topology import Group


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: object, partial: Tensor, group: Group) -> Tensor:
        return _reduced(partial, group)

    @staticmethod
    def backward(ctx: object, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0], None


class _SumOfGradients(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return _reduced(gradients[0], ctx.group), None


def reduce_from_tp(partial: Tensor, group: Group) -> Tensor:
    """Returns the sum of the ranks' `partial`, which may be overwritten. Each rank's part gets the sum's gradient."""
    return _Sum.apply(partial, group)


def copy_to_tp(x: Tensor, group: Group) -> Tensor:
    """Returns `x`, which is the same on all ranks. Its gradient is the sum of the ranks' gradients."""
    return _SumOfGradients.apply(x, group)


def _reduced(partial: Tensor, group: Group) -> Tensor:
    partial = partial.contiguous()
    dist.all_reduce(partial, group=group)
    return partial
