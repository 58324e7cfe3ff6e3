"""Policies that are compared with full depth: the points of a curve of quality against speed."""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ee_tuning.config.generation import Measure
from ee_tuning.errors import InputError
from ee_tuning.generation.depth_budget import check_budget, exits_within_budgets
from ee_tuning.generation.llm import EarlyExitLLM
from ee_tuning.generation.options import with_options
from ee_tuning.notices import say
from ee_tuning.sampling.policy import FULL, Policy

THRESHOLDS = (1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2)
"""Default thresholds of a sweep: those of EE-Tuning's figures (arXiv 2402.00518)."""

PointKind = Literal["full", "threshold", "fixed", "speculative", "calibration", "all_layers"]
"""all_layers: the model itself, where full depth is another model's (`--against`)."""


@dataclass(frozen=True, kw_only=True)
class Point:
    """One policy."""

    name: str
    kind: PointKind
    policy: Policy
    value: float | None = None
    """The threshold, or the layer of the fixed exit."""
    budgets: tuple[float, ...] = ()
    """Those that chose the exit."""

    def description(self) -> str:
        """Returns everything that its tokens depend on, in few words."""
        if self.policy.thresholds:
            exits = ", ".join(
                f"{threshold:g} at {layer}" for layer, threshold in sorted(self.policy.thresholds.items())
            )
            return f"leaves from {exits} by {self.policy.measure}"
        if self.policy.drafts_at:
            return f"drafts at {', '.join(map(str, self.policy.drafts_at))}"
        return "never leaves" if self.policy.fixed_exit is None else f"leaves at {self.policy.fixed_exit}"


FULL_DEPTH = Point(name="full depth", kind="full", policy=FULL)


@dataclass(frozen=True, kw_only=True)
class PolicySweep:
    """The policies that are compared with full depth, known before a model is loaded."""

    thresholds: tuple[float, ...] = THRESHOLDS
    """Each is the same for all exits."""
    fixed: tuple[int, ...] = ()
    """Exit layers."""
    budgets: tuple[float, ...] = ()
    """Shares of full depth's time per token, each for the deepest exit within it."""
    speculative: bool = False
    calibrations: tuple[Path, ...] = ()
    """Files that `calibrate` wrote."""

    def check(self) -> None:
        """Raises InputError where a threshold or a budget is out of range."""
        check_thresholds(self.thresholds)
        for budget in self.budgets:
            check_budget(budget)
            if self.budgets.count(budget) > 1:
                raise InputError(f"each budget must be given once, got {budget:g} twice")


def points_of(
    llm: EarlyExitLLM,
    sweep: PolicySweep,
    *,
    measure: Measure | None = None,
    own_name: str | None = None,
    chosen: Mapping[float, int] | None = None,
) -> list[Point]:
    """Returns full depth and a point for each policy of `sweep`, one for all budgets that choose the same exit.
    `measure` is the confidence that is compared with thresholds.

    Where full depth is another model's, `own_name` is the name of a point of all layers of `llm`. The exits that were
    `chosen` by budgets before, for an output that goes on, are kept; others are measured, by all ranks together.

    Raises InputError where an exit does not exist, a value is out of range or given twice, or a file does not fit.
    """
    sweep.check()
    if sweep.thresholds and not any(layer < llm.num_layers for layer in llm.exit_layers):
        raise InputError(
            "--thresholds need exits before the last layer, got none; give --exits FOLDER, or --thresholds none"
        )
    measured = {} if measure is None else {"measure": measure}
    points = [FULL_DEPTH]
    if own_name is not None:
        points.append(Point(name=own_name, kind="all_layers", policy=FULL))
    points += [
        _point(
            llm, f"threshold {each:g}", "threshold", float(each), policy="threshold", threshold=float(each), **measured
        )
        for each in sorted(sweep.thresholds, reverse=True)
    ]
    points += _fixed_points(llm, sweep, chosen or {})
    points += [
        _point(llm, Path(file).stem, "calibration", None, policy="threshold", calibration=str(file))
        for file in sweep.calibrations
    ]
    if sweep.speculative:
        points.append(_point(llm, "speculative", "speculative", None, policy="speculative"))
    names = [point.name for point in points]
    if double := next((name for name in names if names.count(name) > 1), None):
        raise InputError(f"each policy must be given once, got {double!r} twice; leave one out, or rename its file")
    return points


def chosen_by_budgets(points: Sequence[Point]) -> dict[float, int]:
    """Returns the exit of each budget among `points`."""
    layers = {budget: point.policy.fixed_exit for point in points for budget in point.budgets}
    return {budget: layer for budget, layer in layers.items() if layer is not None}


def check_thresholds(thresholds: Sequence[float]) -> None:
    """Raises InputError where a threshold is out of range."""
    for threshold in thresholds:
        if not 0 <= threshold <= 1:
            raise InputError(
                f"--thresholds must lie in 0..1, got {threshold:g}; full depth, which never leaves, is measured anyway"
            )


def _fixed_points(llm: EarlyExitLLM, sweep: PolicySweep, chosen: Mapping[float, int]) -> list[Point]:
    """Returns a point for each exit that is named, or chosen by budgets, shallow to deep. Prints which are the same."""
    found = exits_within_budgets(llm.model, llm.stages, sweep.budgets, chosen)
    points = []
    for layer in sorted([*sweep.fixed, *(set(found.values()) - set(sweep.fixed))]):
        budgets = tuple(budget for budget in sweep.budgets if found[budget] == layer)
        asked = [f"--fixed {layer}"] if layer in sweep.fixed else []
        asked += [f"--budget {budget:g}" for budget in budgets]
        if len(asked) > 1 and llm.model.topology.is_logging_rank:
            say(f"ee-tuning: {' and '.join(asked)} are one policy, exit {layer}, which is measured once")
        point = _point(llm, f"exit {layer}", "fixed", float(layer), policy="fixed", exit_layer=layer)
        points.append(dataclasses.replace(point, budgets=budgets))
    return points


def _point(llm: EarlyExitLLM, name: str, kind: PointKind, value: float | None, **options: Any) -> Point:
    plain = dataclasses.replace(llm.defaults, calibration=None)
    return Point(name=name, kind=kind, value=value, policy=llm.policy(with_options(plain, options)))
