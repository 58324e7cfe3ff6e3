"""Causal attention over whole sequences, for tuning. Decoding uses ragged attention over a KV cache.

It replaces the core attention of Megatron's layer spec, because the stock one needs the CUDA random-number tracker.
"""

import math
from typing import Any

import torch.nn.functional as F
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from ee_tuning.model import flash
from ee_tuning.model.config import ModelConfig
from ee_tuning.model.documents import PackedDocuments
from ee_tuning.parallel.fake_tensor import is_fake

# s sequence · b micro-batch · g key-value heads · n query heads · d width of a head


def softmax_scale(config: ModelConfig) -> float:
    """Returns 1/√d, times YaRN's attention factor once for the queries and once for the keys."""
    return config.rope.attention_factor**2 / math.sqrt(config.kv_channels)


class CausalAttention(MegatronModule):
    """q [s, b, n, d], k and v [s, b, g, d] -> [s, b, n * d]. A token attends to itself and to earlier tokens of its
    document.
    """

    def __init__(
        self, config: TransformerConfig, layer_number: int, attn_mask_type: Any, attention_type: str, **_: Any
    ):
        super().__init__(config)
        self.layer_number = layer_number
        self.scale = config.softmax_scale

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, attention_mask: PackedDocuments | None = None, **_: Any
    ) -> Tensor:
        """See the class. Megatron's layers pass the documents on as `attention_mask`."""
        s, b, n, d = query.shape
        if attention_mask is not None and attention_mask.starts is not None and _has_varlen(query):
            q, k, v = (x.transpose(0, 1).reshape(b * s, -1, d) for x in (query, key, value))
            starts, longest = attention_mask.starts, attention_mask.longest
            out = flash.varlen_attention(q, k, v, starts, starts, longest, longest, scale=self.scale, is_causal=True)
            return out.view(b, s, n * d).transpose(0, 1)
        mask = None if attention_mask is None else attention_mask.mask
        q, k, v = (x.permute(1, 2, 0, 3) for x in (query, key, value))
        out = F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=mask is None, scale=self.scale, enable_gqa=k.shape[1] != n
        )
        return out.permute(2, 0, 1, 3).reshape(s, b, n * d)


def _has_varlen(query: Tensor) -> bool:
    """Whether a varlen kernel, which skips masked blocks, supports this input. A dry run assumes a GPU with such a
    kernel.
    """
    return flash.takes(query.dtype, query.shape[-1]) if is_fake(query) else flash.serves(query)
