"""Slices of stored tensors, and the parts of parameters that they make up. Numbers alone; nothing is read here."""

from dataclasses import dataclass

TensorShape = tuple[int, ...]


@dataclass(frozen=True)
class TensorSlice:
    """Rows (`dim` 0) or columns (`dim` 1) `start`..`stop` of the Hugging Face tensor `name`."""

    name: str
    shape: TensorShape
    """The shape of the whole tensor."""
    dim: int
    start: int
    stop: int
    is_transposed: bool = False
    """Whether the parameter holds the slice transposed: columns are its rows."""

    @property
    def size(self) -> int:
        """Number of rows or columns."""
        return self.stop - self.start

    @property
    def cut_dim(self) -> int:
        """The parameter's dimension along `start`..`stop`."""
        return 1 - self.dim if self.is_transposed else self.dim

    @property
    def parameter_shape(self) -> TensorShape:
        """The shape of the whole tensor in the parameter's orientation."""
        return self.shape[::-1] if self.is_transposed else self.shape


@dataclass(frozen=True)
class Shard:
    """A rank's part of a Megatron-core parameter: `pieces` one below the other, then `zero_rows` of padding."""

    pieces: tuple[TensorSlice, ...]
    zero_rows: int = 0

    @property
    def shape(self) -> TensorShape:
        """The shape of this rank's parameter."""
        first = self.pieces[0]
        if first.cut_dim == 1:
            return (first.parameter_shape[0], first.size)
        return (sum(p.size for p in self.pieces) + self.zero_rows, *first.parameter_shape[1:])
