"""The linear map of an exit as a part of its output matrix: W (T z + b) = W′ z′, computed block by block.

z is what the exit's norm makes. Where that is an RMSNorm, W′ is W T, and there is no place for b. A LayerNorm without
scale and shift gives n with Σ nᵢ = 0, so that with z′ = n + 1 the vector of ones carries a constant:
W′ = W (T diag(γ) P + (T β + b) 1ᵀ/h), P = I − 1 1ᵀ/h, and z = γ n + β.
"""

import torch
from torch import Tensor

from ee_tuning.checkpoint.names import TensorShape
from ee_tuning.checkpoint.plain_exit import PlainExit
from ee_tuning.checkpoint.safetensors_reader import TensorSource
from ee_tuning.errors import InputError

# h hidden · v vocabulary


def folded_map(linear: Tensor, bias: Tensor, norm: tuple[Tensor, Tensor] | None) -> Tensor | None:  # -> [h, h] float64
    """W′ = W · this, of T [h, h], b [h] and a LayerNorm's γ and β [h]; None where an RMSNorm leaves no place for b."""
    linear, bias = linear.double(), bias.double()
    if norm is None:
        return None if bias.any() else linear
    scale, shift = (each.double() for each in norm)
    scaled = linear * scale
    return scaled - scaled.mean(1, keepdim=True) + ((linear @ shift + bias) / len(bias))[:, None]


class PlainExitTensors:
    """The tensors of an exit as a plain model, read by slices: a TensorSource."""

    def __init__(self, plain: PlainExit, backbone: TensorSource, exits: TensorSource):
        """Raises InputError where the exit's linear map has a bias that the family's output matrix has no place for."""
        self._plain, self._backbone, self._exits = plain, backbone, exits
        self._map: Tensor | None = None
        if plain.folded:
            self._map = self._read_map()

    def shape(self, name: str) -> TensorShape:
        """The shape of the whole tensor."""
        source, origin = self._origin(name)
        return source.shape(origin)

    def dtype(self, name: str) -> torch.dtype:
        """The stored dtype."""
        source, origin = self._origin(name)
        return source.dtype(origin)

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """[stop - start, …], as stored."""
        source, origin = self._origin(name)
        if name not in self._plain.folded:
            return source.rows(origin, start, stop)
        if len(source.shape(origin)) == 1:  # γ and β have gone into the matrix
            return torch.ones(stop - start, dtype=source.dtype(origin))
        assert self._map is not None
        return (source.rows(origin, start, stop).double() @ self._map).to(source.dtype(origin))

    def columns(self, name: str, start: int, stop: int) -> Tensor:
        """[n, stop - start], as stored."""
        source, origin = self._origin(name)
        assert name not in self._plain.folded
        return source.columns(origin, start, stop)

    def check_shape(self, name: str, shape: TensorShape) -> None:
        """Raises InputError where the tensor is missing or has another shape."""
        source, origin = self._origin(name)
        source.check_shape(origin, shape)

    def _origin(self, name: str) -> tuple[TensorSource, str]:
        origin = self._plain.origins[name]
        return (self._exits if origin.startswith("exits.") else self._backbone), origin

    def _read_map(self) -> Tensor:
        head, exits = self._plain.head, self._exits

        def whole(part: str) -> Tensor:
            name = f"exits.{head.layer}.{part}"
            return exits.rows(name, 0, exits.shape(name)[0])

        norm = (whole("norm.weight"), whole("norm.bias")) if self._plain.config.norm == "layer" else None
        found = folded_map(whole("linear.weight"), whole("linear.bias"), norm)
        if found is None:
            raise InputError(
                f"a {self._plain.config.family} has no bias behind its last norm, and the linear map of the exit after layer "
                f"{head.layer} has one, without which it says other tokens; export an exit that has none: "
                "--exit-output untied folds a fit without one"
            )
        return found
