"""Confidence intervals by the bootstrap over prompts (Efron 1979).

Prompts are drawn with replacement, as many as there are, many times; an interval holds the middle 95% of a figure's
values over those draws. A figure is a function of sums over prompts, most often a ratio of two. All figures of one
`Resampled` use the same draws: a ratio of two policies is then over the same prompts, and prompts that are hard for
both do not widen it.
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
    """A figure with its interval; NaN where it is undefined, such as a ratio to zero."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.4g} ({self.low:.4g} to {self.high:.4g})"


class Resampled:
    """Sums of columns over units: as measured, and over draws of the units."""

    def __init__(self, columns: Mapping[str, Sequence[float]], *, draws: int = DRAWS, seed: int = 0):
        """Columns have n >= 1 values each. The same seed and n give the same draws."""
        table = np.stack([np.asarray(values, dtype=np.float64) for values in columns.values()], axis=1)  # [n, columns]
        n, random = len(table), np.random.default_rng(seed)
        size = max(1, _UNITS_AT_A_TIME // n)
        drawn = [
            random.multinomial(n, np.full(n, 1 / n), size=min(size, draws - at)) @ table for at in range(0, draws, size)
        ]
        sums = np.concatenate([table.sum(0, keepdims=True), *drawn])
        self._sums: dict[str, Floats] = {name: sums[:, place] for place, name in enumerate(columns)}

    def estimate(self, figure: Callable[[Mapping[str, Floats]], Floats]) -> Estimate:
        """Estimates `figure`, a function of sums by column, [1 + b] each, of which the first is as measured."""
        with np.errstate(all="ignore"):
            values = figure(self._sums)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # draws whose values are all NaN
            low, high = np.nanquantile(values[1:], [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
        value = float(values[0])
        return (
            Estimate(value, float(low), float(high)) if math.isfinite(value) else Estimate(math.nan, math.nan, math.nan)
        )
