"""Names of a transformer's parameters in a checkpoint of Megatron-core's HybridModel (MambaModel before 0.18).

There attention and MLP are layers with indices of their own (`*-*-…`, or `*E*E…` with experts), and the last norm is
`decoder.final_norm`.
"""

import re
from collections.abc import Collection
from pathlib import Path

from ee_tuning.errors import InputError

FINAL_NORM = "decoder.final_norm.weight"
"""The last norm's name, by which such a checkpoint is recognized."""

_LAYER = re.compile(r"decoder\.layers\.(\d+)\.(\w+)")
_HALVES = {"input_layernorm": 0, "self_attention": 0, "pre_mlp_layernorm": 1, "mlp": 1}
"""Parts of a transformer's layer -> 0 where they belong to attention, 1 where they belong to the MLP."""


class HybridLayers:
    """Finds the layers of a transformer's blocks among the keys (without prefix) of a checkpoint.

    Raises InputError, naming `where`, where they are not attention and MLP in turn.
    """

    def __init__(self, keys: Collection[str], where: Path):
        halves: dict[int, int] = {}
        for match in filter(None, map(_LAYER.match, keys)):
            index, part = int(match[1]), match[2]
            if _HALVES.get(part, -1) != halves.setdefault(index, _HALVES.get(part, -1)) or part not in _HALVES:
                raise InputError(
                    f"{where}: layer {index} of the HybridModel holds {part}, which is not supported; a transformer's layers "
                    "are attention and MLP in turn (hybrid_layer_pattern *-*-…, or *E*E… with experts)"
                )
        self._indices = sorted(halves)
        in_turn = [number % 2 for number in range(len(halves))]
        if [halves[index] for index in self._indices] != in_turn or len(in_turn) % 2:
            raise InputError(
                f"{where}: the layers of the HybridModel must be attention and MLP in turn (hybrid_layer_pattern *-*-…, or "
                "*E*E… with experts), and are not; such a model is no transformer that exits can be put on"
            )

    def name(self, parameter: str) -> str:
        """Returns the HybridModel's name of a GPTModel's parameter. A layer beyond the last one gets a name that no
        checkpoint has.
        """
        if parameter.startswith("decoder.final_layernorm."):
            return parameter.replace("final_layernorm", "final_norm")
        if (match := _LAYER.match(parameter)) is None:
            return parameter
        place = 2 * int(match[1]) + _HALVES[match[2]]
        index = self._indices[place] if place < len(self._indices) else place
        return f"decoder.layers.{index}.{parameter[match.start(2) :]}"
