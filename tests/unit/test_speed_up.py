"""The speed-up that the exits' confidence implies."""

from pathlib import Path

import torch

from ee_tuning.losses.objective import THRESHOLDS
from ee_tuning.model.exit_spec import ExitSpec
from ee_tuning.model.partition import exit_head_cost, final_head_cost, layer_cost
from ee_tuning.model_config.config import read_model_config
from ee_tuning.training_log.speed_up import implied_speed_ups

MODEL = read_model_config(Path(__file__).parents[2] / "examples" / "tiny-python-llama")
LAYER = layer_cost(MODEL, 1, 0)  # all alike
EXITS = tuple(ExitSpec(layer=layer, architecture="mlp", ties_output=False) for layer in (3, 6, 9))


def decoded(confidences: torch.Tensor, threshold: float) -> float:
    """By walking every token, [tokens, exits], through the exits, one after the other."""
    full, total = MODEL.num_layers * LAYER + final_head_cost(MODEL), 0.0
    for token in confidences:
        for spec, confidence in zip(EXITS, token, strict=True):
            total += exit_head_cost(MODEL, spec, 0, trains=False)
            if confidence >= threshold:
                total += spec.layer * LAYER
                break
        else:
            total += full
    return full * len(confidences) / total


def test_it_is_that_of_tokens_that_stay_sure_and_a_lower_bound_of_others() -> None:
    """A speed-up that counts the tokens of two exits twice, or forgets what asking costs."""
    draw = torch.Generator().manual_seed(0)
    confidences = torch.rand(500, 3, generator=draw)
    for nested in (True, False):
        confidences = confidences.cummax(1).values if nested else torch.rand(500, 3, generator=draw)
        record = {
            f"above_{each}": {
                str(spec.layer): (confidences[:, i] >= each).double().mean().item() for i, spec in enumerate(EXITS)
            }
            for each in THRESHOLDS
        }
        for threshold, implied in implied_speed_ups(record, MODEL, EXITS).items():
            walked = decoded(confidences, float(threshold))
            assert abs(implied - walked) < 1e-9 if nested else implied <= walked
