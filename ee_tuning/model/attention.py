"""Core attention: causal over whole sequences for tuning, ragged over a KV cache for decoding.

The first goes into Megatron's layer spec, because the stock one wants the CUDA random-number tracker.
"""
import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from ee_tuning.model.config import ModelConfig
from ee_tuning.model.documents import PackedDocuments

try:
    from torch.nn.attention.varlen import varlen_attn
except ImportError:
    varlen_attn = None  # type: ignore[assignment]

# s sequence · b micro-batch · t tokens of a ragged batch · r rows (sequences) of it · g key-value heads · n query heads · d width of a head
# c positions a cache holds

PADDED_BLOCK_LIMIT = 32
"""Blocks of several rows are padded to one shape up to so many tokens a row; longer ones attend row by row."""


def softmax_scale(config: ModelConfig) -> float:
    """1/√d, times YaRN's attention factor once for the queries and once for the keys."""
    return config.rope.attention_factor ** 2 / math.sqrt(config.kv_channels)


class CausalAttention(MegatronModule):
    """q [s, b, n, d], k and v [s, b, g, d] -> [s, b, n * d]. A token sees itself and those before it, in its document where told apart."""

    def __init__(self, config: TransformerConfig, layer_number: int, attn_mask_type: Any, attention_type: str, **_: Any):
        super().__init__(config)
        self.layer_number = layer_number
        self.scale = config.softmax_scale

    def forward(self, query: Tensor, key: Tensor, value: Tensor, attention_mask: PackedDocuments | None = None, **_: Any) -> Tensor:
        """See the class. Megatron's layers hand on what they are given as `attention_mask`."""
        s, b, n, d = query.shape
        is_grouped = key.shape[2] != n
        if attention_mask is not None and attention_mask.starts is not None and _has_varlen(query):
            q, k, v = (x.transpose(0, 1).reshape(b * s, -1, d) for x in (query, key, value))
            starts, longest = attention_mask.starts, attention_mask.longest
            out = varlen_attn(q, k, v, starts, starts, longest, longest, scale=self.scale, window_size=(-1, 0), enable_gqa=is_grouped)
            assert isinstance(out, Tensor)
            return out.view(b, s, n * d).transpose(0, 1)
        mask = None if attention_mask is None else attention_mask.mask
        q, k, v = (x.permute(1, 2, 0, 3) for x in (query, key, value))
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, scale=self.scale, enable_gqa=is_grouped)
        return out.permute(2, 0, 1, 3).reshape(s, b, n * d)


def _has_varlen(query: Tensor) -> bool:
    """Whether the kernel that computes no masked block can take it: it wants a GPU, 16 bits, and heads of a multiple of 8 up to 256."""
    d = query.shape[-1]
    return varlen_attn is not None and query.is_cuda and query.dtype in (torch.bfloat16, torch.float16) and d % 8 == 0 and d <= 256


@dataclass(frozen=True, kw_only=True)
class LayerCache:
    """Keys and values of one layer for every slot: [slots, g, c, d] each."""

    keys: Tensor
    values: Tensor


@dataclass(frozen=True, kw_only=True)
class RaggedBatch:
    """Tokens of several sequences in one pass: row i brings `lengths[i]` tokens at positions `starts[i]`…, stored in cache slot `slots[i]`.

    Everything that all layers share is built once: the masks, and where each token goes.
    """

    slots: tuple[int, ...]
    starts: tuple[int, ...]
    lengths: tuple[int, ...]
    positions: Tensor
    """[t] int64"""
    token_slots: Tensor
    """[t] int64: the cache slot of each token."""
    cos: Tensor
    """[t, 1, 1, d]"""
    sin: Tensor
    """[t, 1, 1, d], negated in its first half: rotation is x · cos + swap(x) · sin."""
    mask: Tensor | None
    """[r, 1, longest · n/g, c'] bool where rows are padded to one shape, [1, 1, t · n/g, c'] for one row; None where all is seen."""
    slot_index: Tensor | slice | None
    """The rows' slots as an index of a cache; None for one row."""
    gather: Tensor | None
    """[r · longest] int64: token of each padded place; None where nothing is padded."""
    scatter: Tensor | None
    """[t] int64: padded place of each token."""

    @property
    def last_tokens(self) -> list[int]:
        """Index of each row's last token."""
        ends, total = [], 0
        for length in self.lengths:
            total += length
            ends.append(total - 1)
        return ends


def ragged_batch(slots: list[int], starts: list[int], lengths: list[int], cos: Tensor, sin: Tensor,
                 queries_per_group: int) -> RaggedBatch:
    """Describes a pass. `cos`, `sin` [positions, d] are the tables of `rotation_tables`, on the device that computes."""
    device, rows, longest = cos.device, len(slots), max(lengths)
    positions = torch.tensor([p for start, n in zip(starts, lengths, strict=True) for p in range(start, start + n)], device=device)
    token_slots = torch.tensor([slot for slot, n in zip(slots, lengths, strict=True) for _ in range(n)], device=device)
    mask = slot_index = gather = scatter = None
    if rows == 1:
        if longest > 1 and starts[0] > 0:
            seen = torch.arange(starts[0] + longest, device=device)[None] <= positions[:, None]
            mask = seen.repeat_interleave(queries_per_group, dim=0)[None, None]
    elif longest <= PADDED_BLOCK_LIMIT:
        end = max(start + n for start, n in zip(starts, lengths, strict=True))
        place = torch.arange(longest, device=device)[None]                       # [1, longest]
        counts = torch.tensor(lengths, device=device)[:, None]
        # Padding repeats the row's last token, so that no row of the softmax is empty.
        within = torch.minimum(place, counts - 1)                                # [r, longest]
        seen = torch.arange(end, device=device) <= (torch.tensor(starts, device=device)[:, None] + within)[..., None]
        mask = seen.repeat_interleave(queries_per_group, dim=1)[:, None]
        contiguous = slots == list(range(slots[0], slots[0] + rows))
        slot_index = slice(slots[0], slots[0] + rows) if contiguous else torch.tensor(slots, device=device)
        if longest > 1:
            firsts = (counts.cumsum(0) - counts)
            gather = (firsts + within).flatten()
            scatter = (place < counts).flatten().nonzero().flatten()
    return RaggedBatch(slots=tuple(slots), starts=tuple(starts), lengths=tuple(lengths), positions=positions, token_slots=token_slots,
                       cos=cos[positions][:, None, None], sin=sin[positions][:, None, None], mask=mask, slot_index=slot_index,
                       gather=gather, scatter=scatter)


def rotation_tables(angles: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(cos, sin) [positions, d] of `angles` [positions, d], the first half of sin negated, for `rotate`."""
    cos, sin = angles.cos(), angles.sin()
    half = angles.shape[-1] // 2
    return cos.to(dtype), torch.cat((-sin[:, :half], sin[:, half:]), dim=-1).to(dtype)


def rotate(x: Tensor, batch: RaggedBatch) -> Tensor:
    """Rotary positions on x [t, g, k, d]."""
    first, second = x.chunk(2, dim=-1)
    return torch.cat((second, first), dim=-1).mul_(batch.sin).addcmul_(x, batch.cos)


def ragged_attention(query: Tensor, key: Tensor, value: Tensor,  # [t, g, n/g, d], [t, g, d], [t, g, d]
                     cache: LayerCache, batch: RaggedBatch, scale: float) -> Tensor:  # [t, n * d]
    """Stores the batch's keys and values, then attends each token to its own sequence up to itself.

    A group's query heads are laid beside its tokens, so grouped queries need no copies of keys.
    """
    if len(batch.slots) == 1:
        return _one_row(query, key, value, cache, batch.slots[0], batch.starts[0], batch.mask, scale)
    if batch.mask is None:
        parts = zip(query.split(batch.lengths), key.split(batch.lengths), value.split(batch.lengths), batch.slots, batch.starts,
                    strict=True)
        return torch.cat([_one_row(q, k, v, cache, slot, start, None, scale) for q, k, v, slot, start in parts])
    _, g, per_group, d = query.shape
    cache.keys[batch.token_slots, :, batch.positions] = key
    cache.values[batch.token_slots, :, batch.positions] = value
    end, rows = batch.mask.shape[-1], len(batch.slots)
    keys, values = cache.keys[batch.slot_index, :, :end], cache.values[batch.slot_index, :, :end]
    padded = query if batch.gather is None else query[batch.gather]
    grouped = padded.view(rows, -1, g, per_group, d).transpose(1, 2).reshape(rows, g, -1, d)
    out = F.scaled_dot_product_attention(grouped, keys, values, attn_mask=batch.mask, scale=scale)
    out = out.view(rows, g, -1, per_group, d).transpose(1, 2).reshape(-1, g * per_group * d)
    return out if batch.scatter is None else out[batch.scatter]


def _one_row(query: Tensor, key: Tensor, value: Tensor, cache: LayerCache, slot: int, start: int, mask: Tensor | None,
             scale: float) -> Tensor:
    t, g, per_group, d = query.shape
    end = start + t
    cache.keys[slot, :, start:end] = key.transpose(0, 1)
    cache.values[slot, :, start:end] = value.transpose(0, 1)
    keys, values = cache.keys[slot, None, :, :end], cache.values[slot, None, :, :end]
    if t == 1:
        return F.scaled_dot_product_attention(query.transpose(0, 1).view(1, g, per_group, d), keys, values, scale=scale).reshape(1, -1)
    if start == 0:
        heads = query.reshape(t, g * per_group, d).transpose(0, 1)[None]
        out = F.scaled_dot_product_attention(heads, keys, values, is_causal=True, scale=scale, enable_gqa=per_group > 1)
        return out[0].transpose(0, 1).reshape(t, -1)
    if mask is None:  # a long block behind cached tokens, among other rows
        seen = torch.arange(end, device=query.device)[None] <= torch.arange(start, end, device=query.device)[:, None]
        mask = seen.repeat_interleave(per_group, dim=0)[None, None]
    grouped = query.transpose(0, 1).reshape(1, g, t * per_group, d)
    out = F.scaled_dot_product_attention(grouped, keys, values, attn_mask=mask, scale=scale)
    return out.view(g, t, per_group, d).transpose(0, 1).reshape(t, -1)
