"""Tensors of known shapes without content, for planning and dry runs."""

import torch
from torch import Tensor

from ee_tuning.errors import InputError
from ee_tuning.storage.tensor_slice import Shard, TensorShape


class ShapesOnly:
    """A source of tensors without content, which otherwise behaves like a checkpoint."""

    def __init__(self, shapes: dict[str, TensorShape], dtype: torch.dtype):
        self._shapes, self._dtype = shapes, dtype

    def shape(self, name: str) -> TensorShape:
        """Returns the shape of the whole tensor."""
        return self._shapes[name]

    def dtype(self, name: str) -> torch.dtype:
        """Returns the stored dtype."""
        return self._dtype

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Returns rows [stop - start, …], uninitialized."""
        return torch.empty(self._shapes[name], dtype=self._dtype)[start:stop]

    def columns(self, name: str, start: int, stop: int) -> Tensor:
        """Returns columns [n, stop - start], uninitialized."""
        return torch.empty(self._shapes[name], dtype=self._dtype)[:, start:stop]

    def shard(self, shard: Shard, dtype: torch.dtype) -> Tensor:
        """Returns the shard, uninitialized: in one operation, where a plan would dispatch four for each of its pieces.
        Raises InputError like `check_shape`.
        """
        for piece in shard.pieces:
            self.check_shape(piece.name, piece.shape)
            assert 0 <= piece.start <= piece.stop <= piece.shape[piece.dim], f"{piece} lies beside the tensor"
        return torch.empty(shard.shape, dtype=dtype)

    def check_shape(self, name: str, shape: TensorShape) -> None:
        """Raises InputError where the model has no such tensor, or one of another shape."""
        if self._shapes.get(name) != shape:
            raise InputError(
                f"the model's config gives {name} the shape {self._shapes.get(name)}, and {shape} is asked for"
            )
