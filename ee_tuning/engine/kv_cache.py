"""The KV cache: keys and values in blocks of places, allocated to sequences.

A block is the same one in every layer and segment. Blocks one after the other are views that attention reads without
copying, so a sequence gets a run of them where there is one, at equal distances from its neighbours where there is room
for that too; scattered blocks serve where there is not.
"""

import itertools

import torch

from ee_tuning.decoding import graphs
from ee_tuning.decoding.eager_attention import BLOCK_SIZE, LayerCache, SlotMapping
from ee_tuning.engine.block_pool import BlockPool, blocks_for
from ee_tuning.errors import InputError
from ee_tuning.model_config.config import ModelConfig
from ee_tuning.parallel.device import zeros_on_demand
from ee_tuning.parallel.topology import Topology


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
        self._dtype, self._device = dtype, topology.device
        self._layers: dict[tuple[str, int], LayerCache] = {}

    @property
    def bytes_per_token(self) -> int:
        """Bytes of one token in one layer of this rank: keys and values of its heads."""
        _, groups, width = self._shape
        return 2 * groups * width * self._dtype.itemsize

    @property
    def num_bytes(self) -> int:
        """Bytes of all layers of this rank that have run."""
        return len(self._layers) * self.bytes_per_token * self._shape[0]

    def layer(self, number: int) -> LayerCache:
        """Returns the cache of layer `number`. Layers that a fixed exit never reaches take no memory. Raises InputError
        where memory does not suffice.
        """
        return self._of(("layer", number))

    def exit_head(self, number: int) -> LayerCache:
        """Returns the cache of the own layer of the exit head after layer `number`."""
        return self._of(("exit head", number))

    def slot_mapping(self, blocks: list[int]) -> SlotMapping:
        """Returns the places of a sequence's tokens, in their order."""
        index = torch.tensor(blocks)[:, None] * BLOCK_SIZE + torch.arange(BLOCK_SIZE)
        follows = all(b == a + 1 for a, b in itertools.pairwise(blocks))
        return SlotMapping(index=index.flatten(), first=blocks[0] * BLOCK_SIZE if follows else None)

    def _of(self, owner: tuple[str, int]) -> LayerCache:
        if owner not in self._layers:
            # Zeros, not empty: a masked place is multiplied by weight 0, and a stray NaN would survive that.
            try:
                keys, values = (zeros_on_demand(self._shape, self._dtype, self._device) for _ in range(2))
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
