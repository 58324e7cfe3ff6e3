"""Blocks of the cache: lent to sequences, shared by those that begin alike, and kept behind them as long as nobody
wants the memory.

A full block whose tokens have gone through every part of the network that its request uses is known by its tokens and
all before them, and by these parts; later requests that begin so hold it too, instead of computing it. Nobody writes to
a known block. One that nobody holds is taken for something else when memory is wanted, the one unused for longest first
(as vLLM does, arXiv 2309.06180).
"""

import hashlib
from array import array
from typing import NamedTuple

import torch

from ee_tuning.generation.sequence import Part
from ee_tuning.model.ragged_attention import BLOCK_SIZE

_HELD = 2**62


def blocks_for(num_tokens: int) -> int:
    """Blocks that hold so many tokens."""
    return -(-num_tokens // BLOCK_SIZE)


def block_key(before: bytes, tokens: list[int]) -> bytes:
    """What a full block is known by: its tokens and, through the key of the block `before` it, all that they follow."""
    return hashlib.blake2b(before + array("q", tokens).tobytes(), digest_size=16).digest()


class _Content(NamedTuple):
    key: bytes
    parts: frozenset[Part]


class BlockPool:
    """Which of `num_blocks` blocks are free, and what is in them. `run` is how far apart sequences are put while there
    is room.
    """

    def __init__(self, num_blocks: int, run: int):
        self.num_blocks, self.run = num_blocks, run
        self.num_free = num_blocks
        """Blocks that nobody holds, known ones included."""
        self._holders = [0] * num_blocks
        self._age = torch.zeros(num_blocks, dtype=torch.int64)
        """0 for an empty block, _HELD for a held one, else when the last holder left it."""
        self._blocks: dict[bytes, int] = {}
        self._contents: dict[int, _Content] = {}
        self._clock = 0

    def take(self, count: int, after: int | None = None) -> list[int] | None:
        """`count` blocks, one after the other where that can be had, best right behind block `after`; None where there
        are not so many.

        What was known of them is forgotten.
        """
        if count > self.num_free:
            return None
        if count == 0:
            return []
        blocks = self._behind(after, count) or self._even_run(count) or self._any_run(count) or self._scattered(count)
        for block in blocks:
            self._forget(block)
            self._holders[block] = 1
            self._age[block] = _HELD
        self.num_free -= count
        return blocks

    def hold(self, blocks: list[int]) -> None:
        """One more sequence reads these known blocks."""
        for block in blocks:
            self.num_free -= not self._holders[block]
            self._holders[block] += 1
            self._age[block] = _HELD

    def give_back(self, blocks: list[int]) -> None:
        """A sequence lets go of its blocks."""
        for block in reversed(blocks):  # a beginning is of use without its end, not the other way round
            assert self._holders[block], f"block {block} was free already"
            self._holders[block] -= 1
            if not self._holders[block]:
                self.num_free += 1
                self._clock += 1
                self._age[block] = self._clock if block in self._contents else 0

    def find(self, key: bytes, parts: frozenset[Part]) -> int | None:
        """The block known by `key`, if at least these parts of the network have filled it."""
        block = self._blocks.get(key)
        return block if block is not None and self._contents[block].parts >= parts else None

    def make_known(self, block: int, key: bytes, parts: frozenset[Part]) -> None:
        """These parts of the network have filled a held block. Of two alike one alone is known, which keeps its place
        where it has all.
        """
        other = self._blocks.get(key)
        if other is not None:
            if self._contents[other].parts >= parts:
                return
            self._forget(other)
        self._blocks[key], self._contents[block] = block, _Content(key, parts)

    def _forget(self, block: int) -> None:
        content = self._contents.pop(block, None)
        if content is not None:
            del self._blocks[content.key]
            if not self._holders[block]:
                self._age[block] = 0

    def _behind(self, after: int | None, count: int) -> list[int] | None:
        if after is None or after + 1 + count > self.num_blocks or any(self._holders[after + 1 : after + 1 + count]):
            return None
        return list(range(after + 1, after + 1 + count))

    def _even_run(self, count: int) -> list[int] | None:
        runs = self._age[: self.num_blocks // self.run * self.run].view(-1, self.run)
        return self._oldest(runs, self.run, count) if count <= self.run and len(runs) else None

    def _any_run(self, count: int) -> list[int] | None:
        return self._oldest(self._age.unfold(0, count, 1), 1, count)

    def _oldest(self, runs: torch.Tensor, distance: int, count: int) -> list[int] | None:
        """Among runs of blocks that begin `distance` apart, the beginning of the one that nobody holds, and that was
        left first.
        """
        age, index = runs.amax(1).min(0)
        first = int(index) * distance
        return None if int(age) == _HELD else list(range(first, first + count))

    def _scattered(self, count: int) -> list[int]:
        return self._age.sort(stable=True)[1][:count].tolist()
