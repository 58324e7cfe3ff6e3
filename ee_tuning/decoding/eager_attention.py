"""Attention over a ragged batch: tokens of several sequences in one pass, each seeing its own sequence in the KV cache
up to itself.

A layer's cache is one long row of places. A sequence's tokens lie in blocks of it. Most blocks lie one after the other:
the keys are then a view of the cache, and nothing is copied. Scattered blocks are gathered.
"""

import itertools
from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

from ee_tuning.parallel.time_parts import part

# t tokens of a ragged batch · r rows (sequences) of it · g key-value heads · n query heads · d width of a head
# p places of a cache · c places that a row sees

BLOCK_SIZE = 16
"""Number of places in a block of a cache: a sequence holds whole blocks."""
PADDED_BLOCK_LIMIT = 32
"""Rows of at most this many tokens are padded to one shape and attend together; longer ones attend one after the
other."""


@dataclass(frozen=True, kw_only=True)
class LayerCache:
    """Keys and values of one layer: [p, g, d] each."""

    keys: Tensor
    values: Tensor


@dataclass(frozen=True, kw_only=True)
class SlotMapping:
    """The places of a sequence's tokens in every layer's cache."""

    index: Tensor
    """[tokens] int64: the place of each token. On the CPU: it is read there, or copied to the device with other numbers
    of a pass.
    """
    first: int | None
    """The first token's place where the others follow it one by one; None where blocks lie apart."""

    @cached_property
    def blocks(self) -> list[int]:
        """The block of each BLOCK_SIZE tokens."""
        return (self.index[::BLOCK_SIZE] // BLOCK_SIZE).tolist()

    def span(self, start: int, stop: int, device: torch.device) -> slice | Tensor:
        """Returns the places of tokens `start` to `stop`: a slice where they lie one after the other, else an index."""
        if self.first is not None:
            return slice(self.first + start, self.first + stop)
        return self.index[start:stop].to(device)

    @cached_property
    def address(self) -> int:
        """The address of the index, in memory."""
        return self.index.data_ptr()


@dataclass(frozen=True, kw_only=True)
class _SingleRow:
    """A row that attends alone."""

    first: int | None
    index: Tensor
    """[c], on the device where `first` is None"""
    end: int
    mask: Tensor | None
    """[1, 1, length · n/g, c], added to the scores; None for a single token, and for the beginning of a sequence, which
    is causal.
    """


@dataclass(frozen=True, kw_only=True)
class _PaddedRows:
    """Rows that attend together, padded to one shape."""

    first: int
    stride: int
    """Row i begins at place first + i · stride …"""
    index: Tensor | None
    """… or, where rows do not lie so, [r · c] places are gathered."""
    end: int
    mask: Tensor
    """[r, 1, longest · n/g, c], added to the scores."""
    gather: Tensor | None
    """[r · longest] int64: token of each padded place; None where nothing is padded."""
    scatter: Tensor | None
    """[t] int64: padded place of each token."""


@dataclass(frozen=True, kw_only=True)
class EagerBatch:
    """Tokens of several sequences in one pass: row i brings `lengths[i]` tokens.

    Everything that all layers share is built once: the masks, and where each token goes.
    """

    lengths: tuple[int, ...]
    places: Tensor
    """[t] int64: where each token's key and value are stored."""
    cos: Tensor
    """[t, 1, 1, d]"""
    sin: Tensor
    """[t, 1, 1, d], negated in its first half: rotation is x · cos + swap(x) · sin."""
    rows: tuple[_SingleRow, ...]
    together: _PaddedRows | None
    """None where rows attend one by one."""

    @part("attention")
    def attend(self, query: Tensor, cache: LayerCache, scale: float) -> Tensor:  # [t, g, n/g, d] -> [t, n * d]
        """Lets each token attend to its own sequence up to itself; the pass's keys and values are in the cache.

        A group's query heads are laid beside its tokens, so grouped queries need no copies of keys.
        """
        if self.together is not None:
            return _attend_together(query, cache, self.together, len(self.lengths), scale)
        if len(self.rows) == 1:
            return _attend_alone(query, cache, self.rows[0], scale)
        return torch.cat(
            [_attend_alone(q, cache, row, scale) for q, row in zip(query.split(self.lengths), self.rows, strict=True)]
        )


def eager_batch(
    rows: list[SlotMapping],
    starts: list[int],
    lengths: list[int],
    cos: Tensor,
    sin: Tensor,
    *,
    queries_per_group: int,
    num_places: int,
) -> EagerBatch:
    """Describes a pass. `cos`, `sin` [positions, d] are the tables of `rotation_tables`, on the device that
    computes.
    """
    device = cos.device
    positions = torch.tensor(
        [p for start, n in zip(starts, lengths, strict=True) for p in range(start, start + n)], device=device
    )
    places = torch.cat([row.index[start : start + n] for row, start, n in zip(rows, starts, lengths, strict=True)]).to(
        device
    )
    alone: tuple[_SingleRow, ...] = ()
    together = None
    if len(rows) > 1 and max(lengths) <= PADDED_BLOCK_LIMIT:
        together = _together(rows, starts, lengths, queries_per_group, num_places, cos)
    else:
        alone = tuple(
            _row(row, start, n, queries_per_group, cos) for row, start, n in zip(rows, starts, lengths, strict=True)
        )
    return EagerBatch(
        lengths=tuple(lengths),
        places=places,
        cos=cos[positions][:, None, None],
        sin=sin[positions][:, None, None],
        rows=alone,
        together=together,
    )


def rotation_tables(angles: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Returns (cos, sin) [positions, d] of `angles` [positions, d], the first half of sin negated, for `rotate`."""
    cos, sin = angles.cos(), angles.sin()
    half = angles.shape[-1] // 2
    return cos.to(dtype), torch.cat((-sin[:, :half], sin[:, half:]), dim=-1).to(dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Applies rotary positions to x [t, g, k, d], by a pass's cos and sin."""
    first, second = x.chunk(2, dim=-1)
    return torch.cat((second, first), dim=-1).mul_(sin).addcmul_(x, cos)


def _row(row: SlotMapping, start: int, length: int, queries_per_group: int, like: Tensor) -> _SingleRow:
    end, mask = start + length, None
    if length > 1 and start > 0:
        position = torch.arange(start, end, device=like.device)
        unseen = torch.arange(end, device=like.device)[None] > position[:, None]
        mask = _added(unseen.repeat_interleave(queries_per_group, dim=0)[None, None], like.dtype)
    index = row.index[:end] if row.first is not None else row.index[:end].to(like.device)
    return _SingleRow(first=row.first, index=index, end=end, mask=mask)


def _together(
    rows: list[SlotMapping],
    starts: list[int],
    lengths: list[int],
    queries_per_group: int,
    num_places: int,
    like: Tensor,
) -> _PaddedRows:
    device, longest = like.device, max(lengths)
    end = max(start + n for start, n in zip(starts, lengths, strict=True))
    place = torch.arange(longest, device=device)[None]  # [1, longest]
    counts = torch.tensor(lengths, device=device)[:, None]
    # Padding repeats the row's last token, so that no row of the softmax is empty.
    within = torch.minimum(place, counts - 1)  # [r, longest]
    unseen = torch.arange(end, device=device) > (torch.tensor(starts, device=device)[:, None] + within)[..., None]
    mask = _added(unseen.repeat_interleave(queries_per_group, dim=1)[:, None], like.dtype)
    gather = scatter = None
    if longest > 1:
        gather = (counts.cumsum(0) - counts + within).flatten()
        scatter = (place < counts).flatten().nonzero().flatten()
    first, stride, index = _stride(rows, end, num_places) or (0, 0, _padded_index(rows, end).to(device))
    return _PaddedRows(first=first, stride=stride, index=index, end=end, mask=mask, gather=gather, scatter=scatter)


def _added(unseen: Tensor, dtype: torch.dtype) -> Tensor:
    # As numbers: attention would convert booleans to numbers in every layer.
    return torch.zeros(unseen.shape, dtype=dtype, device=unseen.device).masked_fill_(unseen, -torch.inf)


def _stride(rows: list[SlotMapping], end: int, num_places: int) -> tuple[int, int, None] | None:
    """Returns (first place, distance, None) where rows lie at equal distances, so that one view covers them all."""
    firsts = [row.first for row in rows if row.first is not None]
    if len(firsts) < len(rows):
        return None
    stride = firsts[1] - firsts[0]
    even = stride > 0 and all(b - a == stride for a, b in itertools.pairwise(firsts))
    return (firsts[0], stride, None) if even and firsts[-1] + end <= num_places else None


def _padded_index(rows: list[SlotMapping], end: int) -> Tensor:  # [r · c]
    # A shorter row is filled up with its first place, which its mask hides.
    return torch.cat(
        [part for row in rows for part in (row.index[:end], row.index[:1].expand(max(0, end - len(row.index))))]
    )


def _attend_together(query: Tensor, cache: LayerCache, rows: _PaddedRows, num_rows: int, scale: float) -> Tensor:
    _, g, per_group, d = query.shape
    keys, values = (_rows_of(x, rows, num_rows) for x in (cache.keys, cache.values))
    padded = query if rows.gather is None else query[rows.gather]
    grouped = padded.view(num_rows, -1, g, per_group, d).transpose(1, 2).reshape(num_rows, g, -1, d)
    out = F.scaled_dot_product_attention(grouped, keys, values, attn_mask=rows.mask, scale=scale)
    out = out.view(num_rows, g, -1, per_group, d).transpose(1, 2).reshape(-1, g * per_group * d)
    return out if rows.scatter is None else out[rows.scatter]


def _rows_of(cached: Tensor, rows: _PaddedRows, num_rows: int) -> Tensor:  # [p, g, d] -> [r, g, c, d]
    _, g, d = cached.shape
    if rows.index is not None:
        return cached.index_select(0, rows.index).view(num_rows, rows.end, g, d).transpose(1, 2)
    offset = cached.storage_offset() + rows.first * g * d
    return cached.as_strided((num_rows, g, rows.end, d), (rows.stride * g * d, d, g * d, 1), offset)


def _attend_alone(query: Tensor, cache: LayerCache, row: _SingleRow, scale: float) -> Tensor:
    t, g, per_group, d = query.shape
    if row.first is None:
        keys, values = cache.keys.index_select(0, row.index), cache.values.index_select(0, row.index)
    else:
        keys, values = cache.keys[row.first : row.first + row.end], cache.values[row.first : row.first + row.end]
    keys, values = keys.transpose(0, 1)[None], values.transpose(0, 1)[None]  # [1, g, c, d]
    if t == 1:
        return F.scaled_dot_product_attention(
            query.transpose(0, 1).view(1, g, per_group, d), keys, values, scale=scale
        ).reshape(1, -1)
    if row.mask is None:
        heads = query.reshape(t, g * per_group, d).transpose(0, 1)[None]
        out = F.scaled_dot_product_attention(heads, keys, values, is_causal=True, scale=scale, enable_gqa=per_group > 1)
        return out[0].transpose(0, 1).reshape(t, -1)
    grouped = query.transpose(0, 1).reshape(1, g, t * per_group, d)
    out = F.scaled_dot_product_attention(grouped, keys, values, attn_mask=row.mask, scale=scale)
    return out.view(g, t, per_group, d).transpose(0, 1).reshape(t, -1)
