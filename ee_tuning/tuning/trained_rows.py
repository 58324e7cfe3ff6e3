"""This rank's rows of a trained parameter, as a checkpoint holds them."""

from typing import NamedTuple

from torch import Tensor

from ee_tuning.storage.tensor_slice import Shard


class TrainedRows(NamedTuple):
    """Master weights and moments of some rows."""

    plan: Shard
    """The stored tensors' slices that make up this tensor-parallel rank's part of the parameter."""
    first_row: int
    """The first row of that part that this replica holds."""
    tensors: dict[str, Tensor]
    """`master`, `exp_avg` and `exp_avg_sq`: the rows, as views."""
    replica: int
    """This rank's place among the tensor-parallel ranks, and stages, that hold the same rows; 0 writes them."""
