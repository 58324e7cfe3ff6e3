"""The KV cache: keys and values in blocks of places, allocated to sequences.

A block is the same one in every layer and segment. Blocks one after the other are views that attention reads without
copying, so a sequence gets a run of them where there is one, at equal distances from its neighbours where there is room
for that too; scattered blocks serve where there is not.
"""

import hashlib
import itertools
from array import array
from typing import NamedTuple

import torch

from ee_tuning.decoding import graphs
from ee_tuning.decoding.eager_attention import BLOCK_SIZE, LayerCache, SlotMapping
from ee_tuning.engine.sequence import CachedPart
from ee_tuning.errors import InputError
from ee_tuning.model_config.config import ModelConfig
from ee_tuning.parallel.device import zeros_on_demand
from ee_tuning.parallel.topology import Topology

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
    """The state of `num_blocks` blocks: allocated to sequences, shared by sequences that begin alike, and cached after
    them until the memory is needed. Sequences begin `run` blocks apart while there is room.

    A full block is cached once every part of the network that its request uses has computed its tokens. Its key is the
    hash of its tokens and of all tokens before them. A later request that begins so references the block instead of
    computing it. Cached blocks are never written. Unreferenced ones are evicted when memory is needed, the least
    recently used first (as in vLLM, arXiv 2309.06180).
    """

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


class KVCache:
    """Keys and values [places, g, d] of each layer of a stage, made when the layer first runs.

    Where passes are padded (`GraphCache`), a spare block lies behind the places that sequences may have.
    """

    def __init__(
        self, config: ModelConfig, topology: Topology, *, num_tokens: int, max_length: int, dtype: torch.dtype
    ):
        """Raises InputError where the number of tokens is too large to be counted; `layer` raises where memory does not
        suffice.
        """
        try:
            self.pool = BlockPool(blocks_for(num_tokens), blocks_for(max_length))
        except (MemoryError, OverflowError, RuntimeError) as error:
            raise _too_large(num_tokens) from error
        self.max_length = max_length
        self.num_places = self.pool.num_blocks * BLOCK_SIZE
        spare = BLOCK_SIZE if graphs.is_supported(topology) else 0
        self._shape = (self.num_places + spare, config.num_query_groups // topology.tp, config.kv_channels)
        self._dtype, self._device, self._tp = dtype, topology.device, topology.tp
        self._layers: dict[tuple[str, int], LayerCache] = {}

    @property
    def bytes_per_token(self) -> int:
        """Bytes of one token in one layer of this rank: keys and values of its heads."""
        _, groups, width = self._shape
        return 2 * groups * width * self._dtype.itemsize

    @property
    def num_bytes(self) -> int:
        """Bytes of all layers of this rank that have run."""
        return sum(cache.keys.nbytes + cache.values.nbytes for cache in self._layers.values())

    def layer(self, number: int) -> LayerCache:
        """Returns the cache of layer `number`. Layers that a fixed exit never reaches take no memory. Raises InputError
        where memory does not suffice.
        """
        return self._of(("layer", number))

    def exit_head(self, number: int) -> LayerCache:
        """Returns the cache of the own layer of the exit head after layer `number`."""
        return self._of(("exit head", number))

    def draft_head(self, config: ModelConfig) -> LayerCache:
        """Returns the cache of the layer of a drafting head, whose keys and values may have another shape."""
        shape = (self._shape[0], config.num_query_groups // self._tp, config.kv_channels)
        return self._of(("draft head", 0), shape)

    def slot_mapping(self, blocks: list[int]) -> SlotMapping:
        """Returns the places of a sequence's tokens, in their order."""
        index = torch.tensor(blocks)[:, None] * BLOCK_SIZE + torch.arange(BLOCK_SIZE)
        follows = all(b == a + 1 for a, b in itertools.pairwise(blocks))
        return SlotMapping(index=index.flatten(), first=blocks[0] * BLOCK_SIZE if follows else None)

    def _of(self, owner: tuple[str, int], shape: tuple[int, int, int] | None = None) -> LayerCache:
        if owner not in self._layers:
            # Zeros, not empty: a masked place is multiplied by weight 0, and a stray NaN would survive that.
            try:
                keys, values = (zeros_on_demand(shape or self._shape, self._dtype, self._device) for _ in range(2))
            except (RuntimeError, OSError, OverflowError) as error:  # out of memory, as torch or the system reports it
                raise _too_large(
                    self.num_places, f", {self.bytes_per_token * self.num_places / 1e9:,.1f} GB in each layer"
                ) from error
            self._layers[owner] = LayerCache(keys=keys, values=values)
        return self._layers[owner]


def _too_large(num_tokens: int, size: str = "") -> InputError:
    return InputError(
        f"a KV cache of {num_tokens:,} tokens{size} does not fit the memory; lower generation.cache_tokens, or "
        "--max-batch-size and --max-new-tokens, which it follows by default"
    )
