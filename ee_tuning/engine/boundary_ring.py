"""Hidden states of pending tokens, at fixed addresses: a ring for each boundary between two segments and each slot.

A token that left the network early is *pending* in front of the next segment. Its state lies at its position modulo the
ring's capacity, so that kernels and CUDA graphs read it where it is, and `num_computed` alone says what is pending. An
exit head with a layer of its own reads the same states.
"""

from collections.abc import Sequence as Many
from typing import NamedTuple

import torch
from torch import Tensor

from ee_tuning.engine.sequence import Sequence
from ee_tuning.parallel.pinned_staging import to_device

# t tokens · h hidden


class PassStates(NamedTuple):
    """Hidden states [t, h] of a pass, row after row, which may be more than a ring holds."""

    rows: list[Sequence]
    starts: list[int]
    """The position of each row's first token."""
    lengths: list[int]
    hidden: Tensor


class BoundaryRing:
    """The rings in front of segments, created when first written. A rank has some of them only."""

    def __init__(self, num_slots: int, capacity: int, width: int, dtype: torch.dtype, device: torch.device):
        self.num_slots, self.capacity = num_slots, capacity
        self._width, self._dtype, self._device = width, dtype, device
        self._rings: dict[int, Tensor] = {}

    def ring(self, boundary: int) -> Tensor:  # [slots · capacity, h]
        """Returns the states in front of segment `boundary`."""
        if boundary not in self._rings:
            size = self.num_slots * self.capacity
            self._rings[boundary] = torch.zeros(size, self._width, dtype=self._dtype, device=self._device)
        return self._rings[boundary]

    def write(self, boundary: int, states: PassStates, rows: Many[Sequence]) -> None:
        """Stores the newest states of the `rows` that are in a pass, as many as a ring holds."""
        wanted, places, sources, first = {id(row) for row in rows}, list[int](), list[int](), 0
        for row, start, length in zip(states.rows, states.starts, states.lengths, strict=True):
            if id(row) in wanted:
                kept = min(length, self.capacity)
                places += self._places(row, start + length - kept, start + length)
                sources += range(first + length - kept, first + length)
            first += length
        if places:
            chosen = states.hidden if len(sources) == first else states.hidden[self._index(sources)]
            self.ring(boundary).index_copy_(0, self._index(places), chosen)

    def read(
        self, boundary: int, rows: list[Sequence], starts: list[int], stops: list[int], states: PassStates | None
    ) -> Tensor:  # [t, h]
        """Returns states of tokens `starts` to `stops` of each row: from the newest pass if it has them, else from the
        ring.
        """
        lengths = [stop - start for start, stop in zip(starts, stops, strict=True)]
        if states is not None and (rows, starts, lengths) == (states.rows, states.starts, states.lengths):
            return states.hidden
        parts, places = list[Tensor](), list[int]()
        fresh = {} if states is None else _slices(states)
        for row, start, stop in zip(rows, starts, stops, strict=True):
            first, hidden = fresh.get(id(row), (stop, None))
            places += self._places(row, start, min(first, stop))
            if hidden is not None and first < stop:
                if places:
                    parts.append(self.ring(boundary)[self._index(places)])
                    places = []
                parts.append(hidden[max(start - first, 0) : stop - first])
        if places:
            parts.append(self.ring(boundary)[self._index(places)])
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _places(self, row: Sequence, start: int, stop: int) -> list[int]:
        assert stop - start <= self.capacity, "a token's state was not kept"
        return [row.slot * self.capacity + position % self.capacity for position in range(start, stop)]

    def _index(self, numbers: list[int]) -> Tensor:
        return to_device(torch.tensor(numbers), self._device)


def _slices(states: PassStates) -> dict[int, tuple[int, Tensor]]:
    """Returns each row's first position and states, by the row's `id`."""
    parts = states.hidden.split(states.lengths)
    return {id(row): (start, part) for row, start, part in zip(states.rows, states.starts, parts, strict=True)}
