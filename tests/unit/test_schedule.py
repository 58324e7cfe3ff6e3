"""The learning rate, and the settings that the tuner refuses."""

from typing import Any

import pytest

from ee_tuning.config import TeacherPlan, TuningSection
from ee_tuning.errors import InputError
from ee_tuning.losses.objective import Objective
from ee_tuning.tuning.schedule import learning_rate, loss_weight_ramp
from ee_tuning.tuning.settings import check_settings, loss_weights, objective


def section(**keys: Any) -> TuningSection:
    return TuningSection(**{"train_iters": 100, "lr": 1.0, "min_lr": 0.1, "lr_warmup_fraction": 0.1, **keys})


def test_the_rate_rises_from_zero_in_equal_parts_and_meets_its_top() -> None:
    """A first step at rate 0 does nothing; a warm-up one step too long never reaches lr."""
    rates = [learning_rate(step, section()) for step in range(1, 11)]
    assert rates == pytest.approx([step / 10 for step in range(1, 11)])


@pytest.mark.parametrize(
    ("style", "middle", "last"), [("cosine", 0.55, 0.1), ("linear", 0.55, 0.1), ("constant", 1.0, 1.0)]
)
def test_the_decay_ends_at_min_lr_with_the_last_step(style: Any, middle: float, last: float) -> None:
    """A decay measured over all steps and not over those after the warm-up ends too high."""
    tuning = section(lr_decay_style=style)
    assert learning_rate(55, tuning) == pytest.approx(middle)
    assert learning_rate(100, tuning) == pytest.approx(last)


@pytest.mark.parametrize("fraction", [0.0, 1.0])
def test_no_warm_up_and_nothing_else_have_a_rate_at_every_step(fraction: float) -> None:
    """A division by no steps."""
    assert all(0 < learning_rate(step, section(lr_warmup_fraction=fraction, train_iters=3)) <= 1 for step in (1, 2, 3))


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"train_iters": 0}, "train_iters must be at least 1, got 0"),
        ({"lr": 0.0}, "lr must be in 1e-30"),
        ({"min_lr": 2.0}, "min_lr must be at most"),
        ({"lr_warmup_fraction": 1.5}, "lr_warmup_fraction must lie in 0..1, got 1.5"),
        ({"adam_beta2": 1.0}, "adam_beta2 must be at least 0 and below 1, got 1.0"),
        ({"keep_checkpoints": 0}, "keep_checkpoints must be at least 1"),
        ({"loss": ("cross_entropy=0",)}, "a number above 0, got 'cross_entropy=0'"),
        ({"stop_exit_code": 999}, r"stop_exit_code must be in 0\.\.255"),
    ],
)
def test_settings_out_of_range_are_named(keys: dict[str, Any], message: str) -> None:
    """A run that fails, or learns nothing, hours after it began."""
    with pytest.raises(InputError, match=message):
        check_settings(section(**keys))


@pytest.mark.parametrize(
    ("weights", "message"),
    [((1.0,), "one weight per exit, 2"), ((1.0, -1.0), "at least 0"), ((0.0, 0.0), "leave an exit")],
)
def test_loss_weights_must_fit_the_exits(weights: tuple[float, ...], message: str) -> None:
    """A weight that silently belongs to another exit."""
    with pytest.raises(InputError, match=message):
        loss_weights(section(loss_weights=weights), (2, 4))
    assert loss_weights(section(loss_weights=(0.5, 0.0)), (2, 4)) == {2: 0.5, 4: 0.0}
    assert loss_weights(section(loss_weight_preset="depth"), (2, 4)) == {2: 0.5, 4: 1.0}


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        (("kl",), "made of cross_entropy, forward_kl, total_variation, lk, got 'kl'"),
        (("forward_kl=x",), "a number above 0, got 'forward_kl=x'"),
        (("forward_kl=0",), "a number above 0"),
        (("forward_kl", "forward_kl=2"), "forward_kl twice"),
        ((), "must name a loss"),
    ],
)
def test_losses_that_can_not_be_read_are_named(loss: tuple[str, ...], message: str) -> None:
    """A misspelt loss that is left out, and trains to something else for a night."""
    with pytest.raises(InputError, match=message):
        objective(section(loss=loss))


def test_losses_are_read_with_their_weights() -> None:
    """A cross-entropy nobody asked for in a pure distillation; a final head that is not built for the loss that needs
    it.
    """
    assert objective(section()) == Objective() and section().teacher_plan(ties_output=True) is None
    mixed = section(loss=("cross_entropy=0.3", " total_variation = 2"), token_weights="confidence")
    assert objective(mixed) == Objective(cross_entropy=0.3, total_variation=2.0, weighs_by_confidence=True)
    for loss in (("forward_kl",), ("cross_entropy", "total_variation=0.1")):
        plan = section(loss=loss).teacher_plan(ties_output=False)
        assert plan == TeacherPlan(in_training=True, sends_hidden=False) and objective(section(loss=loss)).wants_teacher
    compared = section(compare_final=True)
    assert compared.teacher_plan(ties_output=True) == TeacherPlan(in_training=False, sends_hidden=True)
    assert compared.teacher_plan(ties_output=False) == TeacherPlan(in_training=False, sends_hidden=False)
    assert compared.teacher_plan(ties_output=False, drafts=True) == TeacherPlan(in_training=False, sends_hidden=True)
    assert objective(section(loss=("forward_kl",))).cross_entropy == 0


@pytest.mark.parametrize(("style", "middle"), [("linear", 0.3), ("cosine", 0.20610737)])
def test_loss_weights_rise_over_their_warm_up_and_stay(style: Any, middle: float) -> None:
    """A rise over all steps; a first step of weight 0, which Adam turns into nothing learned."""
    tuning = section(loss_weight_style=style)
    ramps = [loss_weight_ramp(step, tuning) for step in range(1, 101)]
    assert 0 < ramps[0] < ramps[1] and ramps[2] == pytest.approx(middle) and ramps[9:] == [1.0] * 91
    assert loss_weight_ramp(1, section()) == 1.0
