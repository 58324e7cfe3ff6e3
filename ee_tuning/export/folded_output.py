"""Folds the linear map of an exit into its output matrix, W (T z + b) = W′ z′, block by block.

z is the output of the exit's norm. For an RMSNorm, W′ is W T, and b can be folded only approximately: with u, from a
text, such that uᵀz is close to 1, W′ is W (T + b uᵀ). A LayerNorm without scale and shift returns n with Σ nᵢ = 0, so
that with z′ = n + 1 the vector of ones carries a constant: W′ = W (T diag(γ) P + (T β + b) 1ᵀ/h), P = I − 1 1ᵀ/h, for z
= γ n + β.
"""

import torch
from torch import Tensor

from ee_tuning.errors import InputError
from ee_tuning.export.plain_exit import PlainExit
from ee_tuning.storage.tensor_slice import TensorShape
from ee_tuning.storage.tensor_source import TensorSource

# h hidden · v vocabulary


def folded_map(
    linear: Tensor, bias: Tensor, norm: tuple[Tensor, Tensor] | None, constant: Tensor | None = None
) -> Tensor | None:  # -> [h, h] float64
    """Returns the factor of W, from T [h, h], b [h] and a LayerNorm's γ and β [h] or, for an RMSNorm, u [h].

    None where an RMSNorm does not allow to fold b and u is not given.
    """
    linear, bias = linear.double(), bias.double()
    if norm is None and bias.any():
        return None if constant is None else linear + torch.outer(bias, constant.double())
    if norm is None:
        return linear
    scale, shift = (each.double() for each in norm)
    scaled = linear * scale
    return scaled - scaled.mean(1, keepdim=True) + ((linear @ shift + bias) / len(bias))[:, None]


class PlainExitTensors(TensorSource):
    """The tensors of an exit as a plain model, read by slices."""

    def __init__(
        self, plain: PlainExit, backbone: TensorSource, exits: TensorSource, constant: Tensor | None = None
    ) -> None:
        """`constant` is u, for an RMSNorm. Raises InputError where it is missing and the linear map has a bias."""
        self._plain, self._backbone, self._exits = plain, backbone, exits
        self._map: Tensor | None = None
        if plain.folded:
            self._map = self._read_map(constant)

    def shape(self, name: str) -> TensorShape:
        """Returns the shape of the whole tensor."""
        source, origin = self._origin(name)
        return source.shape(origin)

    def dtype(self, name: str) -> torch.dtype:
        """Returns the stored dtype."""
        source, origin = self._origin(name)
        return source.dtype(origin)

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Returns rows [stop - start, …], as stored."""
        source, origin = self._origin(name)
        if name not in self._plain.folded:
            return source.rows(origin, start, stop)
        if len(source.shape(origin)) == 1:  # γ and β are folded into the matrix
            return torch.ones(stop - start, dtype=source.dtype(origin))
        assert self._map is not None
        return (source.rows(origin, start, stop).double() @ self._map).to(source.dtype(origin))

    def columns(self, name: str, start: int, stop: int) -> Tensor:
        """Returns columns [n, stop - start], as stored."""
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

    def _read_map(self, constant: Tensor | None) -> Tensor:
        head, exits = self._plain.head, self._exits

        def whole(part: str) -> Tensor:
            name = f"exits.{head.layer}.{part}"
            return exits.rows(name, 0, exits.shape(name)[0])

        norm = (whole("norm.weight"), whole("norm.bias")) if self._plain.config.norm == "layer" else None
        found = folded_map(whole("linear.weight"), whole("linear.bias"), norm, constant)
        if found is None:
            raise InputError(
                f"a {self._plain.config.family} has no bias behind its last norm, and the linear map of the exit after layer "
                f"{head.layer} has one, without which it says other tokens; give --fold-bias to fold it nearly, or convert with "
                "--exit-output untied, where a fit has none"
            )
        return found
