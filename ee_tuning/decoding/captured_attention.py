"""Attention of passes whose shapes are fixed: every token is a row of its own with one query, which sees the first
places of its sequence.

A token's key and value are stored before any token of the pass attends. Then the token at position p sees p + 1 places,
which is causal for several tokens of one sequence, too: masks do not depend on rows, and a few numbers per token
describe a pass.
"""

from abc import ABC, abstractmethod

import torch
import torch.nn.functional as F
from torch import Tensor

from ee_tuning.decoding.eager_attention import BLOCK_SIZE, LayerCache, SlotMapping
from ee_tuning.model import flash

try:
    from torch.nn.attention import current_flash_attention_impl
except ImportError:
    current_flash_attention_impl = None  # type: ignore[assignment]

# t tokens, padded · b blocks of each one's sequence · c places that it may see · g key-value heads · n query heads
# · d width of a head

MOST_GATHERED = 2**28
"""Bytes of keys and values that a layer may copy together."""


class CapturedAttention(ABC):
    """Attention of tokens that see up to `reach` places each, a multiple of BLOCK_SIZE."""

    least_reach = 1024
    """Reaches above this are powers of two: each reach is recorded by itself."""

    def __init__(self, reach: int):
        self.reach = reach

    @property
    def num_blocks(self) -> int:
        """The number of blocks of each sequence that `prepared` needs."""
        return self.reach // BLOCK_SIZE

    @staticmethod
    @abstractmethod
    def is_there(like: Tensor) -> bool:
        """Whether this torch has the kernel for tensors of this device, dtype and last dimension, d."""

    @staticmethod
    @abstractmethod
    def suits(rows: list[SlotMapping], num_seen: int, bytes_per_place: int) -> bool:
        """Whether it supports sequences whose places lie like this. All tokens together may see `num_seen` places,
        padding included.
        """

    @abstractmethod
    def prepared(
        self, positions: Tensor, blocks: Tensor, dtype: torch.dtype
    ) -> tuple[Tensor, ...]:  # [t] int32, [t, b] int32
        """Returns the inputs of `attend` that all layers share."""

    @abstractmethod
    def attend(self, query: Tensor, cache: LayerCache, prepared: tuple[Tensor, ...], scale: float) -> Tensor:
        """[t, g, n/g, d] -> [t, n * d]"""


class PagedAttention(CapturedAttention):
    """The kernel for sequences of any length, which finds their blocks by a table: FlashAttention 3, where the process
    has activated it.
    """

    @staticmethod
    def is_there(like: Tensor) -> bool:
        is_active = current_flash_attention_impl is not None and current_flash_attention_impl() == "FA3"
        return is_active and flash.serves(like, "block_table")

    @staticmethod
    def suits(rows: list[SlotMapping], num_seen: int, bytes_per_place: int) -> bool:
        return True

    def prepared(self, positions: Tensor, blocks: Tensor, dtype: torch.dtype) -> tuple[Tensor, ...]:
        """Returns the first query of each row, the number of places that it sees, and its blocks."""
        return _each(positions), positions + 1, blocks.contiguous()

    def attend(self, query: Tensor, cache: LayerCache, prepared: tuple[Tensor, ...], scale: float) -> Tensor:
        queries, seen, table = prepared
        keys, values = (x.view(-1, BLOCK_SIZE, *x.shape[1:]) for x in (cache.keys, cache.values))
        return flash.varlen_attention(
            query.flatten(1, 2),
            keys,
            values,
            queries,
            None,
            1,
            self.reach,
            scale=scale,
            seqused_k=seen,
            block_table=table,
        ).flatten(1)


class VarlenAttention(CapturedAttention):
    """The same kernel where each sequence's places follow one another: FlashAttention 2, which torch includes."""

    @property
    def num_blocks(self) -> int:
        """One: the first block says where a sequence begins."""
        return 1

    @staticmethod
    def is_there(like: Tensor) -> bool:
        return flash.serves(like, "seqused_k")

    @staticmethod
    def suits(rows: list[SlotMapping], num_seen: int, bytes_per_place: int) -> bool:
        return all([row.first is not None for row in rows])

    def prepared(self, positions: Tensor, blocks: Tensor, dtype: torch.dtype) -> tuple[Tensor, ...]:
        """Returns the first query of each row, its sequence's first place, and the number of places that it sees."""
        # The kernel takes a row's end from what it sees: the beginnings need no order, and the last number means
        # nothing.
        return _each(positions), F.pad(blocks[:, 0] * BLOCK_SIZE, (0, 1)), positions + 1

    def attend(self, query: Tensor, cache: LayerCache, prepared: tuple[Tensor, ...], scale: float) -> Tensor:
        queries, firsts, seen = prepared
        return flash.varlen_attention(
            query.flatten(1, 2), cache.keys, cache.values, queries, firsts, 1, self.reach, scale=scale, seqused_k=seen
        ).flatten(1)


class GatheredAttention(CapturedAttention):
    """Attention of any dtype, and blocks that lie anywhere: each token's keys and values are copied side by side."""

    least_reach = 64

    @staticmethod
    def is_there(like: Tensor) -> bool:
        return True

    @staticmethod
    def suits(rows: list[SlotMapping], num_seen: int, bytes_per_place: int) -> bool:
        return num_seen * bytes_per_place <= MOST_GATHERED

    def prepared(self, positions: Tensor, blocks: Tensor, dtype: torch.dtype) -> tuple[Tensor, ...]:
        """Returns places [t · c], and a mask [t, 1, 1, c] that is added to the scores."""
        within = torch.arange(BLOCK_SIZE, device=blocks.device)
        index = (blocks.long()[:, :, None] * BLOCK_SIZE + within).flatten()
        unseen = torch.arange(self.reach, device=blocks.device) > positions[:, None]
        mask = torch.zeros(unseen.shape, dtype=dtype, device=blocks.device).masked_fill_(unseen, -torch.inf)
        return index, mask[:, None, None]

    def attend(self, query: Tensor, cache: LayerCache, prepared: tuple[Tensor, ...], scale: float) -> Tensor:
        index, mask = prepared
        count, g, _, d = query.shape
        keys, values = (
            x.index_select(0, index).view(count, self.reach, g, d).transpose(1, 2) for x in (cache.keys, cache.values)
        )
        return F.scaled_dot_product_attention(query, keys, values, attn_mask=mask, scale=scale).flatten(1)


BEST_FIRST: tuple[type[CapturedAttention], ...] = (PagedAttention, VarlenAttention, GatheredAttention)


def _each(positions: Tensor) -> Tensor:
    return torch.arange(len(positions) + 1, dtype=torch.int32, device=positions.device)
