"""Detection of fake tensors, which a dry run uses: they have shapes and no values."""

from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor


def is_fake(x: Tensor) -> bool:
    """Whether `x` is a fake tensor. Code that depends on values must then assume something."""
    return isinstance(x, FakeTensor)
