"""Keys and values of one stage's layers: a slot per sequence, preallocated when a layer first runs."""
from typing import Any

import torch

from ee_tuning.model.attention import LayerCache
from ee_tuning.model.config import ModelConfig
from ee_tuning.parallel.topology import Topology


class KVCache:
    """[slots, g, positions, d] keys and values for each layer of a stage; slots are lent to sequences and taken back."""

    def __init__(self, config: ModelConfig, topology: Topology, *, num_slots: int, max_length: int, dtype: torch.dtype):
        self._shape = (num_slots, config.num_query_groups // topology.tp, max_length, config.kv_channels)
        self._tensor: dict[str, Any] = {"dtype": dtype, "device": topology.device}
        self._layers: dict[tuple[str, int], LayerCache] = {}
        self.max_length = max_length
        self.free = list(range(num_slots))[::-1]

    def layer(self, number: int) -> LayerCache:
        """Of layer `number`. Layers that a fixed exit never reaches take no memory."""
        return self._of(("layer", number))

    def exit_head(self, number: int) -> LayerCache:
        """Of the layer that the exit head after layer `number` has of its own."""
        return self._of(("exit head", number))

    def _of(self, owner: tuple[str, int]) -> LayerCache:
        if owner not in self._layers:
            # Zeros, not empty: a masked place is multiplied by weight 0, which a stray NaN would survive.
            keys, values = torch.zeros(self._shape, **self._tensor), torch.zeros(self._shape, **self._tensor)
            self._layers[owner] = LayerCache(keys=keys, values=values)
        return self._layers[owner]
