"""Some tensors of a source under other names."""

from collections.abc import Mapping

import torch
from torch import Tensor

from ee_tuning.storage.safetensors_reader import TensorSource
from ee_tuning.storage.tensor_slice import TensorShape


class RenamedTensors:
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
