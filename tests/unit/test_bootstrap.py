"""Intervals over prompts."""

import math

import numpy as np
import pytest

from ee_tuning.evaluation.bootstrap import Resampled


def test_the_interval_of_a_mean_is_that_of_its_normal_law():
    """Intervals of a fixed width, of another level, or of single prompts in place of their mean."""
    values = np.random.default_rng(0).exponential(2.0, 400)
    found = Resampled({"x": values, "one": np.ones(400)}).estimate(lambda sums: sums["x"] / sums["one"])
    half = 1.96 * values.std() / math.sqrt(400)
    assert found.value == pytest.approx(values.mean())
    assert (found.low, found.high) == (
        pytest.approx(found.value - half, rel=0.03),
        pytest.approx(found.value + half, rel=0.03),
    )


def test_it_covers_the_truth_as_often_as_it_says():
    """95% intervals that hold the truth half of the time. 300 experiments, 3 binomial sigmas, and a little for 60
    prompts being few.
    """
    random = np.random.default_rng(1)
    hits = 0
    for _ in range(300):
        values = (random.random(60) < 0.7).astype(float)
        found = Resampled({"x": values, "one": np.ones(60)}, draws=300).estimate(lambda sums: sums["x"] / sums["one"])
        hits += found.low <= 0.7 <= found.high
    assert 0.89 <= hits / 300 <= 0.985


def test_ratios_are_of_the_same_prompts():
    """Two ways of which one takes half the other's time on every prompt, hard or easy, whose ratio is said to be
    unsure.
    """
    full = np.random.default_rng(2).lognormal(0, 1, 30)
    sums = Resampled({"full": full, "early": full / 2, "nothing": np.zeros(30)})
    ratio = sums.estimate(lambda each: each["full"] / each["early"])
    assert (ratio.low, ratio.value, ratio.high) == (pytest.approx(2), pytest.approx(2), pytest.approx(2))
    assert math.isnan(sums.estimate(lambda each: each["full"] / each["nothing"]).value)
