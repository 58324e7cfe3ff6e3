"""Memory layout of matrices during decoding."""

from torch import Tensor


def column_major(weight: Tensor) -> Tensor:
    """Lays a matrix [tall, wide] out column by column, in place.

    On a CPU, torch multiplies a tall matrix by a row of activations up to twice as fast in this layout; wide matrices
    gain nothing.
    """
    if weight.device.type == "cpu" and weight.is_contiguous():
        weight.data = weight.data.t().contiguous().t()
    return weight


def row_major(weight: Tensor) -> Tensor:
    """Lays a matrix out row by row, in place: as it is stored, and as the kernels read it."""
    if not weight.is_contiguous():
        weight.data = weight.data.contiguous()
    return weight
