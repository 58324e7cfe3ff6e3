"""Estimates the speed-up of decoding at a threshold from the shares of tokens above it at each exit."""

from itertools import accumulate

from ee_tuning.losses.objective import THRESHOLDS
from ee_tuning.model.exit_spec import ExitSpec
from ee_tuning.model.partition import exit_head_cost, final_head_cost, layer_cost
from ee_tuning.model_config.config import ModelConfig
from ee_tuning.training_log.metrics import MetricsRecord


def implied_speed_ups(record: MetricsRecord, config: ModelConfig, exits: tuple[ExitSpec, ...]) -> dict[str, float]:
    """Returns speed-ups by threshold for a validation record: multiply-adds at full depth ÷ mean multiply-adds per
    token.

    Heads that a token asks are included. The records do not say which tokens two exits have in common, so a token is
    assumed to leave at exit i where the most confident exit up to i does; more can not be claimed. The result is a
    lower bound where layers cost as much as their multiply-adds.
    """
    return {str(threshold): _speed_up(record[f"above_{threshold}"], config, exits) for threshold in THRESHOLDS}


def _speed_up(shares: dict[str, float], config: ModelConfig, exits: tuple[ExitSpec, ...]) -> float:
    # Number of layers saved.
    passed = [
        0.0,
        *accumulate(layer_cost(config, layer, 0) for layer in range(1, config.num_layers + 1)),
    ]
    full = passed[-1] + final_head_cost(config)
    cost = asked = left = 0.0
    for spec in sorted(exits, key=lambda each: each.layer):
        asked += exit_head_cost(config, spec, 0, trains=False)
        leaving = max(shares[str(spec.layer)] - left, 0.0)
        cost += leaving * (passed[spec.layer] + asked)
        left += leaving
    return full / (cost + (1 - left) * (full + asked))
