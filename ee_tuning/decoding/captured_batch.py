"""Batches padded to few shapes, so that layers can be captured as CUDA graphs (`graphs.py`) and replayed for other
tokens.

One small copy to the device describes a batch; the inputs that all layers share are computed there, once for all
segments of a step.
"""

from bisect import bisect_left

import torch
from torch import Tensor

from ee_tuning.decoding import graphs
from ee_tuning.decoding.captured_attention import BEST_FIRST, CapturedAttention
from ee_tuning.decoding.eager_attention import BLOCK_SIZE, LayerCache, SlotMapping

# t tokens, padded · b blocks of each one's sequence · h hidden · d width of a head

COUNTS = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256)
"""Tokens of a padded pass. Larger ones, prompts for the most part, keep a GPU busy without graphs."""
MOST_REREAD = 2**29
"""Bytes of a layer's keys and values that a pass may read more than once, since each token of a sequence reads them by
itself. They come from a GPU's second-level cache in about the time that the calls for a layer take without a graph.
"""


def padded_count(num_tokens: int) -> int | None:
    """Returns the least of COUNTS that is at least this large; None where none is."""
    place = bisect_left(COUNTS, num_tokens)
    return COUNTS[place] if place < len(COUNTS) else None


class CapturedBatch:
    """A batch of `count` tokens. Padding tokens write to a spare block that no sequence has, and attend to its first
    slot.
    """

    def __init__(
        self, count: int, attention: CapturedAttention, tables: tuple[Tensor, Tensor], width: int, spare_block: int
    ):
        """`tables` as AttentionMetadata has them; `width` is h."""
        cos, _ = tables
        self.count, self._attention, self._tables, self._spare_block = count, attention, tables, spare_block
        self.hidden = cos.new_zeros(count, width)
        """[t, h]: the input of the layers."""
        self._table = torch.zeros(count, 2 + attention.num_blocks, dtype=torch.int32, device=cos.device)
        """[t, 2 + b]: position, place, blocks."""
        self._owner: object = None
        self._graph = graphs.Graph(self._derived, cos.device)
        self.places, self.cos, self.sin, *self._prepared = self._graph.outputs

    @torch.inference_mode()
    def load(self, rows: list[SlotMapping], starts: list[int], lengths: list[int], owner: object) -> None:
        """Loads the batch of `owner`, an AttentionMetadata with these numbers, unless it is loaded already."""
        if self._owner is owner:
            return
        is_cuda = self._table.is_cuda
        # New memory each time: the copy of the previous pass may still be queued on the device.
        host = torch.empty(self._table.shape, dtype=torch.int32, pin_memory=is_cuda)
        table, positions, places = host.numpy(), list[int](), list[int]()
        first = 0
        for row, start, length in zip(rows, starts, lengths, strict=True):
            blocks, end = row.blocks, first + length
            positions += range(start, start + length)
            places += [blocks[p // BLOCK_SIZE] * BLOCK_SIZE + p % BLOCK_SIZE for p in range(start, start + length)]
            shown = blocks[: self._attention.num_blocks]
            table[first:end, 2 : 2 + len(shown)] = shown
            table[first:end, 2 + len(shown) :] = blocks[0]  # hidden by the mask, and part of no other sequence
            first = end
        table[:first, 0], table[:first, 1] = positions, places
        table[first:, 0], table[first:, 1], table[first:, 2:] = 0, self._spare_block * BLOCK_SIZE, self._spare_block
        self._table.copy_(host, non_blocking=is_cuda)
        self._graph.replay()
        self._owner = owner

    def attend(self, query: Tensor, cache: LayerCache, scale: float) -> Tensor:  # [t, g, n/g, d] -> [t, n * d]
        """Lets each token attend to its own sequence up to itself; the pass's keys and values are in the cache."""
        return self._attention.attend(query, cache, tuple(self._prepared), scale)

    def _derived(self) -> tuple[Tensor, ...]:
        positions, blocks = self._table[:, 0], self._table[:, 2:]
        cos, sin = (table[positions.long()][:, None, None] for table in self._tables)
        return self._table[:, 1].long(), cos, sin, *self._attention.prepared(positions, blocks, cos.dtype)


class GraphCache:
    """The captured batches over a cache of `num_places` and a spare block: one for each padded count, attention and
    reach.
    """

    def __init__(self, tables: tuple[Tensor, Tensor], *, width: int, num_places: int, bytes_per_place: int):
        """`tables` as AttentionMetadata has them; `width` is h."""
        self._tables = tables
        self._width = width
        self._spare_block = num_places // BLOCK_SIZE
        self._bytes_per_place = bytes_per_place
        self._longest = -(-len(tables[0]) // BLOCK_SIZE) * BLOCK_SIZE
        self._ways = [way for way in BEST_FIRST if way.is_there(tables[0])]
        self._made: dict[tuple[int, type[CapturedAttention], int], CapturedBatch] = {}

    @torch.inference_mode()
    def fitting(self, rows: list[SlotMapping], starts: list[int], lengths: list[int]) -> CapturedBatch | None:
        """Returns the captured batch for these tokens; None where they are too many, or no attention supports their
        places.
        """
        count = padded_count(sum(lengths))
        ends = [start + length for start, length in zip(starts, lengths, strict=True)]
        num_reread = sum([(length - 1) * end for length, end in zip(lengths, ends, strict=True)])
        if count is None or num_reread * self._bytes_per_place > MOST_REREAD:
            return None
        end = max(ends)
        for way in self._ways:
            reach = min(max(way.least_reach, 1 << (end - 1).bit_length()), self._longest)
            if way.suits(rows, count * reach, self._bytes_per_place):
                if (count, way, reach) not in self._made:
                    made = CapturedBatch(count, way(reach), self._tables, self._width, self._spare_block)
                    self._made[count, way, reach] = made
                return self._made[count, way, reach]
        return None
