"""A low-rank linear map beside the identity, which a fit adds to an exit head whose size must stay small."""

from typing import Any

import torch
from torch import Tensor, nn

# … any leading dimensions · h hidden · r rank


class LowRankMap(nn.Module):
    """z + B A z + b. Replicated on every tensor-parallel rank."""

    def __init__(self, width: int, rank: int, **tensor: Any):
        super().__init__()
        self.down = nn.Linear(width, rank, bias=False, **tensor)
        self.up = nn.Linear(rank, width, bias=False, **tensor)
        self.bias = nn.Parameter(torch.empty(width, **tensor))

    def forward(self, z: Tensor) -> Tensor:  # […, h] -> […, h]
        out: Tensor = z + self.up(self.down(z)) + self.bias
        return out
