"""Sources of whole tensors under the names of a checkpoint, which are read by slices or as shards of parameters."""

from collections.abc import Mapping
from typing import Protocol

import torch
from torch import Tensor

from ee_tuning.storage.tensor_slice import Shard, TensorShape, TensorSlice


class ShardSource(Protocol):
    """Whole tensors, of which shards of parameters can be read."""

    def shard(self, shard: Shard, dtype: torch.dtype) -> Tensor:
        """Returns the shard as one contiguous tensor of `dtype`. Raises InputError where a tensor is missing or has a
        wrong shape.
        """


class TensorSource(ShardSource, Protocol):
    """Whole tensors that can be read by slices."""

    def shape(self, name: str) -> TensorShape:
        """Returns the shape of the whole tensor."""

    def dtype(self, name: str) -> torch.dtype:
        """Returns the stored dtype."""

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Returns rows [stop - start, …], as stored."""

    def columns(self, name: str, start: int, stop: int) -> Tensor:
        """Returns columns [n, stop - start], as stored."""

    def check_shape(self, name: str, shape: TensorShape) -> None:
        """Raises InputError where the tensor is missing or has another shape."""

    def shard(self, shard: Shard, dtype: torch.dtype) -> Tensor:
        """Reads the shard's slices."""
        out = torch.empty(shard.shape, dtype=dtype)
        row = 0
        for piece in shard.pieces:
            self.check_shape(piece.name, piece.shape)
            if piece.cut_dim == 1:
                out.copy_(_read_piece(self, piece))
                return out
            if piece.size:
                out[row : row + piece.size].copy_(_read_piece(self, piece))
            row += piece.size
        out[row:].zero_()
        return out


def _read_piece(source: TensorSource, piece: TensorSlice) -> Tensor:
    part = (source.columns if piece.dim == 1 else source.rows)(piece.name, piece.start, piece.stop)
    return part.t() if piece.is_transposed else part


class RenamedTensors(TensorSource):
    """A TensorSource that reads each name's tensor under its name in `origins`."""

    def __init__(self, source: TensorSource, origins: Mapping[str, str]):
        self._source, self._origins = source, origins

    def shape(self, name: str) -> TensorShape:
        """Returns the shape of the whole tensor."""
        return self._source.shape(self._origins[name])

    def dtype(self, name: str) -> torch.dtype:
        """Returns the stored dtype."""
        return self._source.dtype(self._origins[name])

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Returns rows [stop - start, …], as stored."""
        return self._source.rows(self._origins[name], start, stop)

    def columns(self, name: str, start: int, stop: int) -> Tensor:
        """Returns columns [n, stop - start], as stored."""
        return self._source.columns(self._origins[name], start, stop)

    def check_shape(self, name: str, shape: TensorShape) -> None:
        """Raises InputError where the tensor is missing or has another shape."""
        self._source.check_shape(self._origins[name], shape)
