"""Tensors of known shapes without content, for planning and dry runs."""

import torch
from torch import Tensor

from ee_tuning.errors import InputError
from ee_tuning.storage.tensor_slice import Shard, TensorShape
from ee_tuning.storage.tensor_source import ShardSource


class ShapesOnly(ShardSource):
    """A source of shards without content, which checks shapes as a checkpoint does."""

    def __init__(self, shapes: dict[str, TensorShape]):
        self._shapes = shapes

    def shard(self, shard: Shard, dtype: torch.dtype) -> Tensor:
        """Returns the shard, uninitialized: in one operation, where a plan would dispatch four for each of its pieces.
        Raises InputError where the model has no such tensor, or one of another shape.
        """
        for piece in shard.pieces:
            if self._shapes.get(piece.name) != piece.shape:
                raise InputError(
                    f"the model's config gives {piece.name} the shape {self._shapes.get(piece.name)}, and {piece.shape} is asked for"
                )
            assert 0 <= piece.start <= piece.stop <= piece.shape[piece.dim], f"{piece} lies beside the tensor"
        return torch.empty(shard.shape, dtype=dtype)
