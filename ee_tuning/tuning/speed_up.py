"""How much faster decoding would be at a threshold, told by the shares of tokens that each exit is sure of."""

from itertools import accumulate

from ee_tuning.model.config import ModelConfig
from ee_tuning.model.exit_spec import ExitSpec
from ee_tuning.model.partition import exit_head_cost, final_head_cost, layer_cost
from ee_tuning.tuning.metrics import MetricsRecord
from ee_tuning.tuning.objective import THRESHOLDS


def implied_speed_ups(record: MetricsRecord, config: ModelConfig, exits: tuple[ExitSpec, ...]) -> dict[str, float]:
    """Speed-ups by threshold of a validation's `above_…`: multiply-adds of full depth ÷ those of a token on average,
    heads asked included.

    Which tokens two exits are sure of is not known, so it is taken that a token left by exit i where the surest exit up
    to i is: more can not be claimed. A lower bound, where layers cost what their multiply-adds do.
    """
    return {str(threshold): _speed_up(record[f"above_{threshold}"], config, exits) for threshold in THRESHOLDS}


def _speed_up(shares: dict[str, float], config: ModelConfig, exits: tuple[ExitSpec, ...]) -> float:
    passed = [
        0.0,
        *accumulate(layer_cost(config, layer, 0) for layer in range(1, config.num_layers + 1)),
    ]  # by how many layers
    full = passed[-1] + final_head_cost(config)
    cost = asked = left = 0.0
    for spec in sorted(exits, key=lambda each: each.layer):
        asked += exit_head_cost(config, spec, 0, trains=False)
        leaving = max(shares[str(spec.layer)] - left, 0.0)
        cost += leaving * (passed[spec.layer] + asked)
        left += leaving
    return full / (cost + (1 - left) * (full + asked))
