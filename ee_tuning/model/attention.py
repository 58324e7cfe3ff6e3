"""Causal attention over whole sequences, for tuning. Decoding uses ragged attention over a KV cache.

It replaces the core attention of Megatron's layer spec, because the stock one needs the CUDA random-number tracker.
"""

import math
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from ee_tuning.model import flash
from ee_tuning.model.documents import PackedDocuments
from ee_tuning.model.sequence_chunk import SequenceChunk
from ee_tuning.model_config.config import ModelConfig
from ee_tuning.parallel.fake_tensor import is_fake
from ee_tuning.parallel.megatron_import import importing_megatron

with importing_megatron():
    from megatron.core.transformer.module import MegatronModule
    from megatron.core.transformer.transformer_config import TransformerConfig

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
        if isinstance(attention_mask, SequenceChunk):
            keys, values = attention_mask.cache.extended(self.layer_number, attention_mask, key, value)
            return _over_chunks(query, keys, values, attention_mask, self.scale)
        if attention_mask is not None and attention_mask.starts is not None and _has_varlen(query):
            q, k, v = (x.transpose(0, 1).reshape(b * s, -1, d) for x in (query, key, value))
            starts, longest = attention_mask.starts, attention_mask.longest
            out = flash.varlen_attention(q, k, v, starts, starts, longest, longest, scale=self.scale, is_causal=True)
            return out.view(b, s, n * d).transpose(0, 1)
        mask = None if attention_mask is None else attention_mask.mask
        q, k, v = (x.permute(1, 2, 0, 3) for x in (query, key, value))
        return _dense(q, k, v, mask, self.scale)


def _over_chunks(query: Tensor, keys: Tensor, values: Tensor, chunk: SequenceChunk, scale: float) -> Tensor:
    """[c, b, n, d], [b, rows, g, d] -> [c, b, n * d]. `keys` and `values` are of whole rows, valid up to the chunk's
    end.
    """
    c, b, n, d = query.shape
    if _has_varlen(query, "seqused_k"):
        assert chunk.starts is not None
        q, k, v = query.transpose(0, 1).reshape(b * c, n, d), keys.flatten(0, 1), values.flatten(0, 1)
        bounds = chunk.starts, chunk.key_starts, chunk.longest, chunk.longest_keys
        out = flash.varlen_attention(q, k, v, *bounds, scale=scale, is_causal=True, seqused_k=chunk.key_counts)
        return out.view(b, c, n * d).transpose(0, 1)
    k, v = (x[:, : chunk.stop].transpose(1, 2) for x in (keys, values))
    return _dense(query.permute(1, 2, 0, 3), k, v, chunk.mask, scale)


def _dense(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """[b, n, s, d], [b, g, keys, d] -> [s, b, n * d]. Causal without a mask."""
    b, n, s, d = query.shape
    out = F.scaled_dot_product_attention(
        query, key, value, attn_mask=mask, is_causal=mask is None, scale=scale, enable_gqa=key.shape[1] != n
    )
    return out.permute(2, 0, 1, 3).reshape(s, b, n * d)


def _has_varlen(query: Tensor, parameter: str | None = None) -> bool:
    """Whether a varlen kernel, which skips masked blocks, supports this input and `parameter`. A dry run assumes a GPU
    with such a kernel.
    """
    return flash.takes(query.dtype, query.shape[-1]) if is_fake(query) else flash.serves(query, parameter)
