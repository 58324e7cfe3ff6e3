"""LayerSkip's recipe (arXiv 2404.16710, section 4.1): layers are left out at random, and exits are trained in turn."""

import math
import random
from collections.abc import Sequence

from ee_tuning.config import TuningSection
from ee_tuning.model.exit_spec import ExitSpec
from ee_tuning.tuning.microbatch_schedule import Microbatch


def active_exits(step: int, exit_layers: Sequence[int], every: int) -> frozenset[int]:
    """Returns the exits that the 1-based optimizer step trains: each `every`-th one, the next ones at the next step."""
    return frozenset(layer for index, layer in enumerate(exit_layers) if (index + 1 - step) % every == 0)


def dropout_rate(layer: int, num_layers: int, largest: float) -> float:
    """Returns the probability with which `layer` (1-based) is left out: from 0 for the first layer, exponentially, to
    `largest` for the last.
    """
    return largest * (math.exp((layer - 1) * math.log(2) / max(num_layers - 1, 1)) - 1)


def dropped_layers(
    tuning: TuningSection, num_layers: int, exits: Sequence[ExitSpec], replica: int, microbatch: Microbatch
) -> frozenset[int]:
    """Returns the layers that a micro-batch of a replica leaves out, the same on all ranks of all stages.

    A layer with an `mlp` exit, which reads its inner states, is never left out. Validations leave out no layer.
    """
    if not tuning.layer_dropout or not microbatch.is_training:
        return frozenset()
    draw = random.Random(f"{tuning.seed}/{microbatch.position}/{replica}")
    chances = {layer: draw.random() for layer in range(1, num_layers + 1)}
    read = {spec.layer for spec in exits if spec.architecture == "mlp"}
    return frozenset(
        layer
        for layer, chance in chances.items()
        if chance < dropout_rate(layer, num_layers, tuning.layer_dropout) and layer not in read
    )
