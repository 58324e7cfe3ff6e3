"""How matrices lie in memory while decoding."""
from torch import Tensor


def column_major(weight: Tensor) -> Tensor:
    """The same matrix [tall, wide], its columns laid one after the other, in place.

    On a CPU a row of activations times a tall matrix reads it up to twice as fast so (benchmarks/decoding.py); wide ones gain nothing.
    """
    if weight.device.type == "cpu" and weight.is_contiguous():
        weight.data = weight.data.t().contiguous().t()
    return weight
