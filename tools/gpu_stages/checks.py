"""Checks, their findings, and the order in which they run: each one only within the time left, and independently of the
others.
"""

import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import redirect_stdout
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple

from gpu_stages.bench import Bench


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One figure or fact."""

    what: str
    value: float | str
    unit: str = ""
    goal: str = ""
    """The goal in words; empty without a goal."""
    is_met: bool | None = None
    """Whether the goal is met; None without a goal."""
    is_must: bool = False
    """Whether a missed goal fails the check: for correctness, not for speed."""


def at_least(what: str, value: float, goal: float, unit: str = "", **more: bool) -> Finding:
    """Returns a figure that should be no less than `goal`."""
    return Finding(what=what, value=value, unit=unit, goal=f"≥ {goal:g}", is_met=value >= goal, **more)


def at_most(what: str, value: float, goal: float, unit: str = "", **more: bool) -> Finding:
    """Returns a figure that should be no more than `goal`."""
    return Finding(what=what, value=value, unit=unit, goal=f"≤ {goal:g}", is_met=value <= goal, **more)


class Check(NamedTuple):
    """A part of a stage."""

    name: str
    seconds: float
    """Approximate duration on an H100, as far as known: the check is skipped if less time is left."""
    run: Callable[[Bench], Iterator[Finding]]


@dataclass
class Outcome:
    """The outcome of a check."""

    stage: int
    name: str
    state: str = "running"
    """passed, failed, no time (skipped), or cut off (still running when the time was over)."""
    began: float = field(default_factory=time.time)
    seconds: float = 0.0
    findings: list[Finding] = field(default_factory=list)
    error: str = ""
    """The traceback, if there is one."""

    @property
    def line(self) -> str:
        """One line for the user."""
        missed = [finding.what for finding in self.findings if finding.is_met is False]
        reason = (
            self.error.strip().rpartition("\n")[2][:160]
            if self.error
            else f"not met: {', '.join(missed)[:160]}"
            if missed
            else ""
        )
        return f"{self.stage}. {self.name}: {self.state}, {self.seconds:.1f} s{'; ' + reason if reason else ''}"

    def tree(self) -> dict[str, Any]:
        """Returns plain data for JSON."""
        return asdict(self)


def run_checks(
    stages: dict[int, Sequence[Check]],
    bench: Bench,
    outcomes: list[Outcome],
    *,
    seconds_left: Callable[[], float],
    changed: Callable[[], None],
) -> None:
    """Runs all checks in order, and appends to `outcomes`; `changed` is called after every change of them."""
    for stage, checks in stages.items():
        for check in checks:
            outcome = Outcome(stage, check.name)
            outcomes.append(outcome)
            if not bench.is_tiny and seconds_left() < check.seconds:
                outcome.state = "no time"
                outcome.error = f"takes some {check.seconds:.0f} s, and {max(seconds_left(), 0):.0f} s are left"
            else:
                _run(check, bench, outcome, changed)
            print(outcome.line, flush=True)
            changed()


def _run(check: Check, bench: Bench, outcome: Outcome, changed: Callable[[], None]) -> None:
    began = time.perf_counter()
    try:
        with redirect_stdout(sys.stderr):  # the output of commands does not belong in the table
            for finding in check.run(bench):
                outcome.findings.append(finding)
                changed()
        outcome.state = (
            "failed" if any(each.is_must and each.is_met is False for each in outcome.findings) else "passed"
        )
    except Exception:  # the other checks run all the same
        outcome.state, outcome.error = "failed", traceback.format_exc()
    outcome.seconds = time.perf_counter() - began
    bench.tidy()
