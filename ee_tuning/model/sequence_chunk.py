"""Sequences that go through frozen layers in chunks: a chunk's tokens attend to the keys and values of those before it.

Frozen layers need no gradient, so only keys and values of earlier chunks are kept. All other memory of a layer grows
with the chunk, and not with the sequence.
"""

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from ee_tuning.model.documents import PackedDocuments
from ee_tuning.parallel.fake_tensor import is_fake
from ee_tuning.parallel.pinned_staging import to_device

# b micro-batch · s tokens of a whole row · c tokens of a chunk · e tokens up to the chunk's end · r runs of a document
# within the chunk · g key-value heads · d width of a head


class KeyValueCache:
    """Keys and values of a stage's layers for the micro-batch under way. The next one overwrites them."""

    def __init__(self) -> None:
        self._layers: dict[int, tuple[Tensor, Tensor]] = {}

    def extended(
        self, layer: int, chunk: "SequenceChunk", key: Tensor, value: Tensor
    ) -> tuple[Tensor, Tensor]:  # [c, b, g, d] each -> [b, s, g, d] each
        """Stores the chunk's keys and values of `layer`, and returns those of whole rows, valid up to the chunk's
        end.
        """
        if layer not in self._layers:
            shape = (key.shape[1], chunk.row_length, *key.shape[2:])
            self._layers[layer] = key.new_empty(shape), value.new_empty(shape)
        keys, values = self._layers[layer]
        keys[:, chunk.start : chunk.stop] = key.transpose(0, 1)
        values[:, chunk.start : chunk.stop] = value.transpose(0, 1)
        return keys, values


@dataclass(frozen=True, kw_only=True)
class SequenceChunk(PackedDocuments):
    """Tokens `start` .. `stop` - 1 of every row, for attention over all tokens of the row so far.

    Of the base's fields, `ids` [b, e] are those of all tokens up to the chunk's end, or None; `positions` [1 or b, c],
    `starts` and `longest` are those of the chunk's own tokens, and always present.
    """

    start: int
    stop: int
    row_length: int
    """s."""
    key_starts: Tensor
    """[r + 1] int32: the first token that each run of a document attends to, with whole rows concatenated."""
    key_counts: Tensor
    """[r] int32: tokens from there to the end of the run."""
    longest_keys: int
    """The largest of `key_counts`."""
    cache: KeyValueCache

    @classmethod
    def between(
        cls,
        start: int,
        stop: int,
        ids: Tensor | None,
        positions: Tensor | None,
        *,
        shape: tuple[int, int],
        cache: KeyValueCache,
        device: torch.device,
    ) -> "SequenceChunk":
        """Builds a chunk from the loader's tensors [b, s] on the CPU, of rows of `shape` (b, s)."""
        own_positions = torch.arange(start, stop)[None] if positions is None else positions[:, start:stop]
        starts, key_starts, key_counts = _runs(start, stop, ids, shape)
        longest = stop - start if is_fake(starts) else int(starts.diff().max())
        longest_keys = stop if is_fake(starts) else int(key_counts.max())
        return cls(
            ids=None if ids is None else to_device(ids[:, :stop].contiguous(), device),
            positions=to_device(own_positions.contiguous(), device),
            starts=to_device(starts.int(), device),
            longest=longest,
            start=start,
            stop=stop,
            row_length=shape[1],
            key_starts=to_device(key_starts.int(), device),
            key_counts=to_device(key_counts.int(), device),
            longest_keys=longest_keys,
            cache=cache,
        )

    @cached_property
    def mask(self) -> Tensor | None:
        """[1 or b, 1, c, e] bool: whether a token of the chunk (row) attends to one of its row so far (column). None
        for all earlier tokens in the first chunk.
        """
        if self.ids is None and not self.start:
            return None
        assert self.starts is not None
        place = torch.arange(self.stop, device=self.starts.device)
        seen = (place <= place[self.start :, None])[None]
        if self.ids is not None:
            seen = seen & (self.ids[:, self.start :, None] == self.ids[:, None])
        return seen[:, None]


def _runs(
    start: int, stop: int, ids: Tensor | None, shape: tuple[int, int]
) -> tuple[Tensor, Tensor, Tensor]:  # -> [r + 1], [r + 1], [r]
    """Returns where runs of a document begin in the chunk, with its rows concatenated; where the tokens that they
    attend to begin in whole rows; and how many these are.
    """
    (b, s), c = shape, stop - start
    if ids is None or is_fake(ids):  # one document per row, the most expensive case of attention
        rows = torch.arange(b + 1)
        return rows * c, rows * s, torch.full((b,), stop)
    own = ids[:, start:stop]
    is_begun = torch.ones_like(own, dtype=torch.bool)
    is_begun[:, 1:] = own[:, 1:] != own[:, :-1]
    row, place = is_begun.nonzero(as_tuple=True)
    starts = torch.cat((row * c + place, torch.tensor([b * c])))
    # A document that goes on from an earlier chunk: ids grow along a row.
    goes_on_from = torch.searchsorted(ids.contiguous(), own[:, :1].contiguous())[:, 0]
    first = torch.where(place == 0, goes_on_from[row], start + place)
    ends = start + place + starts.diff()
    return starts, torch.cat((row * s + first, torch.tensor([b * s]))), ends - first
