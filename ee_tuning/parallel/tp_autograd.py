"""Sums over tensor-parallel ranks that gradients pass through: before and behind what is cut over them.

Megatron-core has the same two; where a gradient is not contiguous, its own reduce a copy and return the part.
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
    """The sum of the ranks' parts, which may be overwritten; each rank's part gets the sum's gradient."""
    return _Sum.apply(partial, group)


def copy_to_tp(x: Tensor, group: Group) -> Tensor:
    """`x`, which every rank holds and uses for its own part: its gradient is the sum of theirs."""
    return _SumOfGradients.apply(x, group)


def _reduced(partial: Tensor, group: Group) -> Tensor:
    partial = partial.contiguous()
    dist.all_reduce(partial, group=group)
    return partial
