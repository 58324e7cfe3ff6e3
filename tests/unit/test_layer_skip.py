"""Layers left out at random and exits trained in turn, as LayerSkip does (arXiv 2404.16710)."""

from types import SimpleNamespace

import pytest

from ee_tuning.config import DepthSampling, TuningSection
from ee_tuning.errors import InputError
from ee_tuning.model.exit_spec import ExitSpec
from ee_tuning.tuning.layer_skip import dropout_rate, dropped_layers, trained_depths
from ee_tuning.tuning.settings import check_settings, loss_weights


def test_exits_take_turns() -> None:
    """An exit that no step trains, or a first step without one."""
    turns = [DepthSampling.of("rotate:3").exits(step, (2, 4, 6, 8, 10)) for step in (1, 2, 3, 4)]
    assert turns == [{2, 8}, {4, 10}, {6}, {2, 8}]
    assert DepthSampling.of("all").exits(7, (2, 4)) == {2, 4}


def test_one_depth_is_drawn_as_often_as_another_and_no_deeper_layer_runs() -> None:
    """Replicas that draw alike, a depth without weight or the end of the model left out, layers run in vain."""
    tuning = TuningSection(trainable="all", depth_sampling="random", loss_weights=(1.0, 0.0, 2.0))
    exits = [ExitSpec(layer=layer, architecture="norm", ties_output=True) for layer in (2, 4, 5)]

    def draw(position: int, replica: int = 0) -> int:
        microbatch = SimpleNamespace(position=position, step=1, is_training=True)
        (depth,) = trained_depths(tuning, 6, (2, 4, 5), replica, microbatch)  # type: ignore[arg-type]
        behind = dropped_layers(tuning, 6, exits, replica, microbatch)  # type: ignore[arg-type]
        assert behind == set(range(depth + 1, 7))
        return depth

    drawn = [draw(position) for position in range(1500)]
    assert drawn != [draw(position, 1) for position in range(1500)]
    assert {depth: drawn.count(depth) for depth in drawn} == pytest.approx({2: 500, 5: 500, 6: 500}, abs=60)


def test_rates_rise_from_none_to_the_largest() -> None:
    """A first layer that is missed, or a rate that counts the layers from 1."""
    rates = [dropout_rate(layer, 5, 0.2) for layer in range(1, 6)]
    assert rates == pytest.approx([0, 0.2 * (2**0.25 - 1), 0.2 * (2**0.5 - 1), 0.2 * (2**0.75 - 1), 0.2])


def test_layers_are_left_out_as_often_as_their_rate_says() -> None:
    """Replicas or micro-batches that leave out the same layers, a validation that does, a layer that an exit reads."""
    tuning = TuningSection(trainable="backbone", layer_dropout=0.8)
    exits = [
        ExitSpec(layer=layer, architecture=kind, ties_output=True)
        for layer, kind in ((4, "mlp"), (5, "norm"))  # type: ignore[arg-type]
    ]

    def draw(position: int, replica: int = 0, is_training: bool = True) -> frozenset[int]:
        microbatch = SimpleNamespace(position=position, is_training=is_training)
        return dropped_layers(tuning, 6, exits, replica, microbatch)  # type: ignore[arg-type]

    drawn = [draw(position) for position in range(2000)]
    assert drawn == [draw(position) for position in range(2000)] != [draw(position, 1) for position in range(2000)]
    for layer in range(1, 7):
        share = sum(layer in each for each in drawn) / 2000
        assert share == pytest.approx(0 if layer == 4 else dropout_rate(layer, 6, 0.8), abs=0.04)
    assert not draw(3, is_training=False)


@pytest.mark.parametrize(
    "keys", [{"layer_dropout": 1.5, "trainable": "mlp"}, {"layer_dropout": 0.1}, {"depth_sampling": "rotate:0"}]
)
def test_values_that_make_no_sense_are_refused(keys: dict[str, object]) -> None:
    """A dropout of frozen layers, which would be noise for the exits alone."""
    with pytest.raises(InputError):
        check_settings(TuningSection(**keys))  # type: ignore[arg-type]
    with pytest.raises(InputError, match="rotate:3"):
        loss_weights(TuningSection(depth_sampling="rotate:3"), (2, 4))
