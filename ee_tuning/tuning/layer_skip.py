"""Layers that a micro-batch leaves out: at random, as LayerSkip does (arXiv 2404.16710, section 4.1), and those behind
the depths that it trains.
"""

import math
import random
from collections.abc import Sequence

from ee_tuning.config import TuningSection
from ee_tuning.model.exit_spec import ExitSpec
from ee_tuning.tuning.microbatch_schedule import Microbatch
from ee_tuning.tuning.settings import loss_weights


def trained_depths(
    tuning: TuningSection, num_layers: int, exit_layers: tuple[int, ...], replica: int, microbatch: Microbatch
) -> frozenset[int]:
    """Returns the depths whose losses a training micro-batch of a replica computes: exits, and the number of layers for
    the final head. The same on all ranks of all stages.
    """
    sampling, weights = tuning.depths, loss_weights(tuning, exit_layers)
    depths = [layer for layer in sorted(sampling.exits(microbatch.step, exit_layers)) if weights[layer]]
    if tuning.trained.has_backbone and (sampling.kind != "random" or tuning.final_loss_weight):
        depths.append(num_layers)
    return sampling.drawn(depths, f"{tuning.seed}/{microbatch.position}/{replica}/depth")


def dropout_rate(layer: int, num_layers: int, largest: float) -> float:
    """Returns the probability with which `layer` (1-based) is left out: from 0 for the first layer, exponentially, to
    `largest` for the last.
    """
    return largest * (math.exp((layer - 1) * math.log(2) / max(num_layers - 1, 1)) - 1)


def dropped_layers(
    tuning: TuningSection, num_layers: int, exits: Sequence[ExitSpec], replica: int, microbatch: Microbatch
) -> frozenset[int]:
    """Returns the layers that a micro-batch of a replica leaves out, the same on all ranks of all stages: those that
    `layer_dropout` draws, and those behind the one depth that it trains, unless the final head teaches.

    A layer whose inside an `mlp` exit reads is never among the drawn ones. Validations leave out none.
    """
    if not microbatch.is_training:
        return frozenset()
    behind, teacher = frozenset[int](), tuning.teacher_plan(ties_output=True)
    if tuning.depths.kind == "random" and not (teacher is not None and teacher.in_training):
        depths = trained_depths(tuning, num_layers, tuple(spec.layer for spec in exits), replica, microbatch)
        behind = frozenset(range(max(depths, default=num_layers) + 1, num_layers + 1))
    return behind | _drawn_layers(tuning, num_layers, exits, replica, microbatch)


def _drawn_layers(
    tuning: TuningSection, num_layers: int, exits: Sequence[ExitSpec], replica: int, microbatch: Microbatch
) -> frozenset[int]:
    if not tuning.layer_dropout:
        return frozenset()
    draw = random.Random(f"{tuning.seed}/{microbatch.position}/{replica}")
    chances = {layer: draw.random() for layer in range(1, num_layers + 1)}
    read = {spec.layer for spec in exits if spec.architecture == "mlp"}
    return frozenset(
        layer
        for layer, chance in chances.items()
        if chance < dropout_rate(layer, num_layers, tuning.layer_dropout) and layer not in read
    )
