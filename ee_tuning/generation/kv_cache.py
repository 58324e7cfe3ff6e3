"""Keys and values of one stage's layers: a slot per sequence, preallocated."""
from typing import Any

import torch

from ee_tuning.model.attention import LayerCache
from ee_tuning.model.config import ModelConfig
from ee_tuning.parallel.topology import Topology


class KVCache:
    """[slots, g, positions, d] keys and values for each layer of a stage; slots are lent to sequences and taken back."""

    def __init__(self, config: ModelConfig, topology: Topology, layers: range, *, num_slots: int, max_length: int, dtype: torch.dtype):
        shape = (num_slots, config.num_query_groups // topology.tp, max_length, config.kv_channels)
        tensor: dict[str, Any] = {"dtype": dtype, "device": topology.device}
        # Zeros, not empty: a masked place is multiplied by weight 0, which a stray NaN would survive.
        self.layers = {layer: LayerCache(keys=torch.zeros(shape, **tensor), values=torch.zeros(shape, **tensor)) for layer in layers}
        self.max_length = max_length
        self.free = list(range(num_slots))[::-1]

    @property
    def num_bytes(self) -> int:
        """Memory held."""
        return sum(c.keys.nbytes + c.values.nbytes for c in self.layers.values())
