"""Blocks of the KV cache: allocated to sequences, shared by sequences that begin alike, and cached after them until the
memory is needed.

A full block is cached once every part of the network that its request uses has computed its tokens. Its key is the hash
of its tokens and of all tokens before them. A later request that begins so references the block instead of computing
it. Cached blocks are never written. Unreferenced ones are evicted when memory is needed, the least recently used first
(as in vLLM, arXiv 2309.06180).
"""

import hashlib
from array import array
from typing import NamedTuple

import torch

from ee_tuning.decoding.eager_attention import BLOCK_SIZE
from ee_tuning.engine.sequence import CachedPart

_HELD = 2**62


def blocks_for(num_tokens: int) -> int:
    """Returns the number of blocks that hold this many tokens."""
    return -(-num_tokens // BLOCK_SIZE)


def block_key(before: bytes, tokens: list[int]) -> bytes:
    """Returns the key of a full block: its tokens and, through the key of the block `before` it, all tokens before
    them.
    """
    return hashlib.blake2b(before + array("q", tokens).tobytes(), digest_size=16).digest()


class _Content(NamedTuple):
    key: bytes
    parts: frozenset[CachedPart]


class BlockPool:
    """The state of `num_blocks` blocks. Sequences begin `run` blocks apart while there is room."""

    def __init__(self, num_blocks: int, run: int):
        self.num_blocks, self.run = num_blocks, run
        self.num_free = num_blocks
        """Blocks without a reference, cached ones included."""
        self._holders = [0] * num_blocks
        self._age = torch.zeros(num_blocks, dtype=torch.int64)
        """0 for an empty block, _HELD for a referenced one, else the time of its last release."""
        self._blocks: dict[bytes, int] = {}
        self._contents: dict[int, _Content] = {}
        self._clock = 0

    def allocate(self, count: int, after: int | None = None) -> list[int] | None:
        """Allocates `count` blocks, one after the other where possible, preferably right behind block `after`. Returns
        None where too few are free. Their cached content is evicted.
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

    def incref(self, blocks: list[int]) -> None:
        """Adds a reference to each of these cached blocks."""
        for block in blocks:
            self.num_free -= not self._holders[block]
            self._holders[block] += 1
            self._age[block] = _HELD

    def free(self, blocks: list[int]) -> None:
        """Removes a reference from each of these blocks."""
        for block in reversed(blocks):  # a beginning is useful without its end, but not the other way round
            assert self._holders[block], f"block {block} was free already"
            self._holders[block] -= 1
            if not self._holders[block]:
                self.num_free += 1
                self._clock += 1
                self._age[block] = self._clock if block in self._contents else 0

    def find(self, key: bytes, parts: frozenset[CachedPart]) -> int | None:
        """Returns the cached block with this key that at least these parts of the network have filled, or None."""
        block = self._blocks.get(key)
        return block if block is not None and self._contents[block].parts >= parts else None

    def cache(self, block: int, key: bytes, parts: frozenset[CachedPart]) -> None:
        """Caches a referenced block that these parts of the network have filled. A cached duplicate stays where it has
        the same parts, and is replaced otherwise.
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
        """Returns the least recently used free run of blocks, among runs that begin `distance` apart."""
        age, index = runs.amax(1).min(0)
        first = int(index) * distance
        return None if int(age) == _HELD else list(range(first, first + count))

    def _scattered(self, count: int) -> list[int]:
        return self._age.sort(stable=True)[1][:count].tolist()
