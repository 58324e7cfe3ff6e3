"""Tensors of a dry run: they have shapes and no numbers. What depends on numbers asks here, and assumes."""

from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor


def is_fake(x: Tensor) -> bool:
    """Whether `x` is a tensor of a dry run, which imagines a GPU."""
    return isinstance(x, FakeTensor)
