"""The norms of the families, as a Megatron layer spec builds them and as exit heads do."""

from typing import Any

import torch
from torch import nn

from ee_tuning.model_config.config import ModelConfig
from ee_tuning.parallel.megatron_import import importing_megatron

with importing_megatron():
    from megatron.core.transformer.transformer_config import TransformerConfig


class RMSNorm(nn.RMSNorm):
    """RMSNorm with the constructor of a layer spec."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_: object):
        super().__init__(hidden_size, eps=eps, **_tensor(config))


class LayerNorm(nn.LayerNorm):
    """LayerNorm with a bias and the constructor of a layer spec."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_: object):
        super().__init__(hidden_size, eps=eps, **_tensor(config))


def backbone_norm(config: ModelConfig) -> type[RMSNorm] | type[LayerNorm]:
    """Returns the family's norm for a layer spec."""
    return RMSNorm if config.norm == "rms" else LayerNorm


def exit_norm(config: ModelConfig, **tensor: Any) -> nn.RMSNorm | nn.LayerNorm:
    """Builds the family's norm over hidden states for an exit head. `tensor` holds dtype and device."""
    kind = nn.RMSNorm if config.norm == "rms" else nn.LayerNorm
    return kind(config.hidden_size, eps=config.norm_epsilon, **tensor)


def _tensor(config: TransformerConfig) -> dict[str, Any]:
    return {
        "dtype": config.params_dtype,
        "device": "cpu" if config.use_cpu_initialization else torch.cuda.current_device(),
    }
