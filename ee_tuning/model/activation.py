"""Activation functions of the families."""

from collections.abc import Callable
from functools import partial

import torch.nn.functional as F
from torch import Tensor

from ee_tuning.model_config.config import ModelConfig


def activation(config: ModelConfig) -> Callable[[Tensor], Tensor]:
    """Returns the activation of the model's MLP."""
    functions: dict[str, Callable[[Tensor], Tensor]] = {
        "silu": F.silu,
        "gelu": F.gelu,
        "gelu_tanh": partial(F.gelu, approximate="tanh"),
        "relu": F.relu,
    }
    return functions[config.activation]
