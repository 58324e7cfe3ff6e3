"""How matrices lie in memory while decoding."""

from torch import Tensor


def column_major(weight: Tensor) -> Tensor:
    """The same matrix [tall, wide], its columns laid one after the other, in place.

    On a CPU torch reads a tall matrix up to twice as fast so for a row of activations; wide ones gain nothing.
    """
    if weight.device.type == "cpu" and weight.is_contiguous():
        weight.data = weight.data.t().contiguous().t()
    return weight


def row_major(weight: Tensor) -> Tensor:
    """The same matrix, its rows laid one after the other, in place: as it is stored, and as the kernels read it."""
    if not weight.is_contiguous():
        weight.data = weight.data.contiguous()
    return weight
