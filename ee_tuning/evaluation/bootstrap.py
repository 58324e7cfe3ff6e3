"""Intervals of figures over prompts, by the bootstrap (Efron 1979): prompts are drawn with replacement, as many as
there are, many times, and an interval holds the middle 95% of what the figure is over those draws.

A figure is a function of sums over prompts (a ratio of two, most often). All figures of one `Resampled` see the same
draws: a ratio of two ways to decode is of the same prompts for both, so that what is hard for both does not widen it.
"""

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

# n units (prompts) · b draws

DRAWS, LEVEL = 2000, 0.95
_UNITS_AT_A_TIME = 2_000_000

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Estimate:
    """A figure with its interval; NaN where there is none, such as a ratio to nothing."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.4g} ({self.low:.4g} to {self.high:.4g})"


class Resampled:
    """Sums of columns over units: as measured, and over draws of the units."""

    def __init__(self, columns: Mapping[str, Sequence[float]], *, draws: int = DRAWS, seed: int = 0):
        """Columns of n values each, n at least 1. The same seed and n give the same draws."""
        table = np.stack([np.asarray(values, dtype=np.float64) for values in columns.values()], axis=1)  # [n, columns]
        n, random = len(table), np.random.default_rng(seed)
        size = max(1, _UNITS_AT_A_TIME // n)
        drawn = [
            random.multinomial(n, np.full(n, 1 / n), size=min(size, draws - at)) @ table for at in range(0, draws, size)
        ]
        sums = np.concatenate([table.sum(0, keepdims=True), *drawn])
        self._sums: dict[str, Floats] = {name: sums[:, place] for place, name in enumerate(columns)}

    def estimate(self, figure: Callable[[Mapping[str, Floats]], Floats]) -> Estimate:
        """`figure` of the sums by column, [1 + b] each: the first is as measured."""
        with np.errstate(all="ignore"):
            values = figure(self._sums)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of draws without any number
            low, high = np.nanquantile(values[1:], [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
        value = float(values[0])
        return (
            Estimate(value, float(low), float(high)) if math.isfinite(value) else Estimate(math.nan, math.nan, math.nan)
        )
