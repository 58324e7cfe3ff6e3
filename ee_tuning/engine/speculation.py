"""Chooses the exit that drafts, its threshold, and the number of drafts, from acceptance rates and costs of passes.

Tokens do not depend on it, since the full model checks every draft. All ranks have the same records and decide alike.
"""

import math
from array import array
from bisect import bisect_right
from dataclasses import dataclass, field
from typing import NamedTuple

from ee_tuning.engine.cost_model import Costs
from ee_tuning.engine.prompt_lookup import MatchRecord
from ee_tuning.engine.segments import Segment
from ee_tuning.engine.sequence import Sequence
from ee_tuning.engine.step_plan import Answer

EDGES = (0.0, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.98, 0.995)
"""Lower edges of the bins of confidence in which an exit's answers and right answers are counted."""
PRIOR = 1.0
"""Weight, in tokens, of the prior that a confidence is a probability."""
MEMORY = 0.998
"""The weight of a count after the next one."""
FIRST_INTERVAL, MOST_INTERVAL = 32, 512
"""Rounds before the second plan, which double each time, and their maximum. A plan takes milliseconds."""
LENGTHS = (1, 2, 3, 5, 8, 16)
"""Numbers of drafts that a plan can have."""
SURVEY_EVERY = 7
"""Steps from one in which sequences may ask exits that the plan does not use to the next such step. All sequences that
begin a round then do so: a head that is asked about all of them reads its weights once. An odd number, since groups of
sequences may take turns over pipeline stages.
"""
LEAST_GAIN = 1.05
"""Smallest expected speed-up of a plan over full depth."""
FIRST_CREDIT, MOST_CREDIT, CREDIT_PER_PASS = 1.5, 8.0, 0.02
"""Passes of the full model, for all sequences that decode side by side, that may be spent on trying exits: at first, at
most, and per pass without trying any. A round of one sequence counts as its share of a pass.
"""
NEVER_REACHED = 2.0
"""A threshold that no confidence reaches: the exit is asked, and drafts nothing."""


class DraftPlan(NamedTuple):
    """The drafting exit, or none."""

    exit_layer: int | None = None
    threshold: float = NEVER_REACHED
    most: int = 0
    """Most drafts of a round."""
    rate: float = 0.0
    """Expected tokens per second and sequence."""


@dataclass
class ExitRecord:
    """Counts of an exit's answers, and of right ones, by confidence (EDGES)."""

    seen: list[float] = field(default_factory=lambda: [0.01] * len(EDGES))
    right: list[float] = field(default_factory=lambda: [0.0] * len(EDGES))

    def acceptance(self, threshold: float) -> tuple[float, float]:
        """Returns (share of tokens with at least this confidence, probability that one of them is right)."""
        first, total = bisect_right(EDGES, threshold) - 1, sum(self.seen)
        passed = sum(self.seen[first:])
        right = sum(n * self._acceptance_probability(first + i) for i, n in enumerate(self.seen[first:]))
        return passed / total, right / passed

    def add(self, confidence: float, was_right: bool) -> None:
        """Counts an answer."""
        place = max(bisect_right(EDGES, confidence) - 1, 0)
        self.seen = [MEMORY * count for count in self.seen]
        self.right = [MEMORY * count for count in self.right]
        self.seen[place] += 1
        self.right[place] += was_right

    def _acceptance_probability(self, place: int) -> float:
        middle = (EDGES[place] + (*EDGES[1:], 1.0)[place]) / 2
        return (self.right[place] + PRIOR * middle) / (self.seen[place] + PRIOR)


class Speculation:
    """An engine's records of its exits and of repeated text, shared by all requests."""

    def __init__(self, costs: Costs, segments: tuple[Segment, ...]):
        self.costs, self.segments = costs, segments
        self.records = {s.exit_layer: ExitRecord() for s in segments[:-1] if s.exit_layer is not None}
        self.matches = MatchRecord()
        self.num_rounds = self.num_steps = 0
        self._survey_step = 0
        self.credit = FIRST_CREDIT
        """Passes that may be spent on trying exits."""
        self._interval = self._next_plan = FIRST_INTERVAL
        self._plans: dict[tuple[tuple[int, ...], int], DraftPlan] = {}
        """(exits that a request lets draft, sequences that decode side by side) -> plan."""

    def begin_step(self) -> None:
        """Begins a step of the engine, in which any number of sequences may begin a round."""
        self.num_steps += 1

    def begin_round(self, sequence: Sequence, num_rows: int, most: int) -> None:
        """Plans the drafts of a sequence, at most `most`, while `num_rows` sequences decode side by side."""
        self.num_rounds += 1
        if self.num_rounds >= self._next_plan:
            self._plans.clear()
            self._interval = min(2 * self._interval, MOST_INTERVAL)
            self._next_plan = self.num_rounds + self._interval
        exits, plan = sequence.policy.drafts_at, self._plan(num_rows, sequence.policy.drafts_at)
        thresholds = dict[int, float]()
        if plan.exit_layer is not None and self.credit > 0 and most > 0:
            thresholds[plan.exit_layer] = plan.threshold
        others = [layer for layer in exits if layer not in thresholds]
        if others and self._is_survey_step() and self.credit >= 1 + self._relative_cost_of_asking(others, num_rows):
            thresholds |= dict.fromkeys(others, NEVER_REACHED)
        if not thresholds:
            self.credit = min(MOST_CREDIT, self.credit + CREDIT_PER_PASS / num_rows)
        drafts = min(plan.most, most) if plan.exit_layer in thresholds else 0
        sequence.drafts.begin(thresholds, drafts)

    def thresholds(self, sequence: Sequence) -> "array[float]":
        """Returns [segments]: the confidence from which on the sequence's newest token is drafted."""
        of_round = sequence.drafts.thresholds
        return array("d", [of_round.get(s.exit_layer, math.inf) for s in self.segments])  # type: ignore[arg-type]

    def end_round(self, sequence: Sequence, answers: list[Answer], num_kept: int) -> None:
        """Updates the records by the full model's check. Answers that follow a rejected draft are ignored."""
        drafts = sequence.drafts
        for index, exit_layer, confidence, token in drafts.answers:
            if index <= num_kept:
                self.records[exit_layer].add(confidence, token == answers[index].token_id)
        if drafts.thresholds:
            spent = self._relative_cost_of_round(sequence, len(answers) - 1)
            self.credit = min(MOST_CREDIT, self.credit + (1 + num_kept - spent) / drafts.num_rows)

    def plain_rate(self, num_rows: int) -> float:
        """Returns tokens per second and sequence at full depth."""
        return 1 / self.costs.of_all(num_rows)

    def rate(self, num_rows: int, exits: tuple[int, ...]) -> float:
        """Returns tokens per second and sequence by the plan for `exits`."""
        return self._plan(num_rows, exits).rate

    def _plan(self, num_rows: int, exits: tuple[int, ...]) -> DraftPlan:
        if (exits, num_rows) not in self._plans:
            self._plans[exits, num_rows] = self.best_plan(num_rows, exits)
        return self._plans[exits, num_rows]

    def best_plan(self, num_rows: int, exits: tuple[int, ...]) -> DraftPlan:
        """Returns the fastest plan for `exits` by the current records; the empty plan where full depth is as fast."""
        plain = self.plain_rate(num_rows)
        best = DraftPlan(rate=plain * LEAST_GAIN)
        for layer in exits:
            shallow = self._seconds_to(layer, num_rows)
            for edge in EDGES:
                passes, right = self.records[layer].acceptance(edge)
                for most in LENGTHS:
                    rate = self._rate(layer, passes, right, most, num_rows, shallow)
                    if rate > best.rate:
                        best = DraftPlan(layer, edge, most, rate)
        return best if best.exit_layer is not None else DraftPlan(rate=plain)

    def _rate(self, layer: int, passes: float, right: float, most: int, num_rows: int, shallow: float) -> float:
        """Returns tokens per second and sequence of a plan.

        A draft is made with probability p (`passes`), and right with probability a (`right`): a round makes Σ pᵏ drafts
        and brings 1 + Σ (p a)ᵏ tokens, k = 1 … most (Leviathan et al. 2023, arXiv 2211.17192, §3.1 with p = 1).
        """
        drafts = sum(passes**k for k in range(1, most + 1))
        tokens = 1 + sum((passes * right) ** k for k in range(1, most + 1))
        asked = sum(passes**k for k in range(most))
        return tokens / self._seconds_of_round(layer, drafts, asked, num_rows, shallow)

    def _seconds_to(self, layer: int, num_rows: int) -> float:
        """Returns the seconds of a pass that ends at an exit."""
        segments = range(self._segment_of(layer) + 1)
        return sum(self.costs.of_segment(i, num_rows) for i in segments)

    def _seconds_of_round(
        self, layer: int, num_drafts: float, num_asked: float, num_rows: int, shallow: float
    ) -> float:
        """Returns the seconds of a round of each of `num_rows` sequences, each of which drafts and is checked at its
        own time.
        """
        costs, last = self.costs, self._segment_of(layer)
        num_steps = 1 + num_drafts
        num_checked = max(1.0, num_rows / num_steps)  # sequences whose drafts one pass checks
        checks = min(1.0, num_rows / num_steps)
        num_tokens = num_checked * num_steps
        deep = sum(costs.of_segment(i, num_tokens) for i in range(last + 1, len(self.segments)))
        deep += costs.of_head(None, num_tokens)
        return num_steps * (shallow + checks * deep) + num_asked * costs.of_head(layer, num_rows)

    def _relative_cost_of_round(self, sequence: Sequence, num_drafts: int) -> float:
        """Returns the cost of a finished round, in passes of the full model."""
        drafts, num_rows = sequence.drafts, sequence.drafts.num_rows
        layer = drafts.layers[0] if drafts.layers else min(drafts.thresholds)
        num_asked = sum(1 for answer in drafts.answers if answer[1] == layer)
        others = sum(self.costs.of_head(answer[1], num_rows) for answer in drafts.answers if answer[1] != layer)
        shallow = self._seconds_to(layer, num_rows)
        seconds = self._seconds_of_round(layer, num_drafts, num_asked, num_rows, shallow) + others
        return seconds / self.costs.of_all(num_rows)

    def _is_survey_step(self) -> bool:
        if self.num_steps >= self._survey_step + SURVEY_EVERY:
            self._survey_step = self.num_steps
        return self.num_steps == self._survey_step

    def _relative_cost_of_asking(self, exits: list[int], num_rows: int) -> float:
        return sum(self.costs.of_head(layer, num_rows) for layer in exits) / self.costs.of_all(num_rows)

    def _segment_of(self, layer: int) -> int:
        return next(i for i, segment in enumerate(self.segments) if segment.exit_layer == layer)
