"""The exits at which tokens are drafted, from which confidence on, and when to check: chosen from what was right and
what things cost.

Tokens never depend on it: they are the full model's (see `Engine`). It decides alike on every rank, for all it knows is
the same there.
"""

from bisect import bisect_right
from collections.abc import Mapping
from dataclasses import dataclass, field

from ee_tuning.generation.costs import Costs
from ee_tuning.generation.judge import Answer
from ee_tuning.generation.pieces import Piece
from ee_tuning.generation.sequence import Sequence

EDGES = (0.0, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.98, 0.995)
"""Lower edges of the bins of confidence in which it is counted how often an exit was right."""
PRIOR = 1.0
"""Tokens' worth of the belief that a confidence is a probability."""
MEMORY = 0.998
"""What a count is worth after the next one."""
FIRST_ROUNDS = 40
"""Rounds that ask every exit, before any is given up."""
SURVEY = 8
"""Rounds after each plan that ask every exit, too."""
LATEST = 512
"""Rounds after which the plan is made anew, at most; it comes half as often each time. Then every exit is asked again
for a while.
"""
NEVER = 2.0
"""A confidence that no token has."""

Plan = Mapping[int, float]
"""Exits that are asked, shallow to deep -> confidence from which on they draft."""


@dataclass
class _Record:
    """How sure an exit was of tokens that came to it, and how often it was right."""

    seen: list[float] = field(default_factory=lambda: [0.01] * len(EDGES))
    right: list[float] = field(default_factory=lambda: [0.0] * len(EDGES))

    def odds(self, place: int) -> float:
        middle = (EDGES[place] + (*EDGES[1:], 1.0)[place]) / 2
        return (self.right[place] + PRIOR * middle) / (self.seen[place] + PRIOR)

    def add(self, place: int, was_right: bool) -> None:
        self.seen = [MEMORY * count for count in self.seen]
        self.right = [MEMORY * count for count in self.right]
        self.seen[place] += 1
        self.right[place] += was_right


class Speculation:
    """Shared by all requests of an engine: what one learns, all know."""

    def __init__(self, costs: Costs, pieces: tuple[Piece, ...]):
        self.costs, self.pieces = costs, pieces
        self.records = {piece.exit_layer: _Record() for piece in pieces[:-1] if piece.exit_layer is not None}
        self.num_rounds = 0
        self._plans: dict[tuple[int, ...], tuple[Plan, float]] = {}
        """Made since the last look: exits that a request lets draft -> plan, and its tokens per second and sequence."""
        self._next_plan, self._interval, self._planned_rows = FIRST_ROUNDS, FIRST_ROUNDS, 0
        self._survey_end = FIRST_ROUNDS
        self._known_costs: dict[tuple[int, int], float] = {}

    def recall(self, records: Mapping[int, tuple[list[float], list[float]]]) -> None:
        """Begins with what is known of exits, (seen, right) of each by bins of confidence: no round asks all of them to
        learn it.
        """
        for layer, (seen, right) in records.items():
            self.records[layer] = _Record(seen, right)
        self.num_rounds, self._interval = FIRST_ROUNDS, LATEST // 4
        self._next_plan = FIRST_ROUNDS + self._interval

    def begin_round(self, sequence: Sequence, num_rows: int) -> None:
        """Says where the sequence's next tokens are drafted, `num_rows` sequences decoding beside each other; nowhere
        if it would lose.
        """
        self.num_rounds += 1
        if self.num_rounds > self._next_plan or (num_rows != self._planned_rows and self.num_rounds > FIRST_ROUNDS):
            if self.num_rounds > self._next_plan:
                self._survey_end = self.num_rounds + SURVEY - 1
            self._interval = min(LATEST, 2 * self._interval)
            self._next_plan, self._planned_rows = self.num_rounds + self._interval, num_rows
            self._plans.clear()
        exits = sequence.policy.drafts_at
        if exits not in self._plans:
            learns = self.num_rounds <= FIRST_ROUNDS
            self._plans[exits] = (dict.fromkeys(exits, 0.7), 0.0) if learns else self._best_plan(num_rows, exits)
        plan, rate = self._plans[exits]
        is_survey = self.num_rounds <= self._survey_end
        sequence.drafts.begin({layer: plan.get(layer, NEVER) for layer in exits if is_survey or layer in plan}, rate)

    def plain_rate(self, num_rows: int) -> float:
        """Tokens per second and sequence at full depth."""
        return 1 / self.costs.of_all(num_rows)

    def threshold(self, sequence: Sequence, exit_layer: int, num_rows: int) -> float | None:
        """The confidence from which on the newest token is drafted at an exit; None where it is not asked."""
        wanted = sequence.drafts.plan.get(exit_layer)
        if wanted is None or not sequence.num_drafts:
            return wanted
        record, worth = self.records[exit_layer], self.worth(sequence, exit_layer, num_rows)
        enough = [edge for place, edge in enumerate(EDGES) if sequence.drafts.odds * record.odds(place) >= worth]
        return max(wanted, enough[0]) if enough and sequence.drafts.odds >= worth else None

    def worth(self, sequence: Sequence, exit_layer: int, num_rows: int) -> float:
        """How likely right a further draft has to be, those before it included: it brings a token then, and costs the
        way to the exit once more, and a place in the check.
        """
        return sequence.drafts.rate * self._cost_of_one_more(exit_layer, num_rows)

    def note(self, sequence: Sequence, exit_layer: int, answer: Answer, drafts: bool) -> None:
        """Keeps what an exit said of the newest token."""
        place = max(bisect_right(EDGES, answer.confidence) - 1, 0)
        sequence.drafts.said.append((len(sequence.drafts.layers), exit_layer, place, answer.token_id))
        if drafts:
            sequence.drafts.layers.append(exit_layer)
            sequence.drafts.odds *= self.records[exit_layer].odds(place)

    def end_round(self, sequence: Sequence, answers: list[Answer], num_kept: int) -> None:
        """Learns from a check. What follows a rejected draft tells nothing."""
        for index, exit_layer, place, token in sequence.drafts.said:
            if index <= num_kept:
                self.records[exit_layer].add(place, token == answers[index].token_id)

    def _cost_of_one_more(self, exit_layer: int, num_rows: int) -> float:
        key = (exit_layer, num_rows)
        if key not in self._known_costs:
            last = next(i for i, piece in enumerate(self.pieces) if piece.exit_layer == exit_layer)
            passes = sum(self._costs(i, num_rows)[i <= last] for i in range(len(self.pieces)))
            self._known_costs[key] = (
                passes + (self.costs.of_head(exit_layer, num_rows) + self.costs.overhead) / num_rows
            )
        return self._known_costs[key]

    def _costs(self, index: int, num_rows: int) -> tuple[float, float]:
        """Seconds of a piece for a sequence: (one more token in a pass that is made anyway, a pass for its newest
        token).
        """
        one = self.costs.of_piece(index, num_rows) / num_rows
        return (self.costs.of_piece(index, num_rows + 4) - self.costs.of_piece(index, num_rows)) / 4, one

    def _best_plan(self, num_rows: int, exits: tuple[int, ...]) -> tuple[Plan, float]:
        """The plan with the highest rate that asks none but `exits`, by moving one exit's threshold at a time; the
        empty one where none is better than full depth.
        """
        rates = _Rates(self, num_rows)
        best: Plan = {}
        rate = self.plain_rate(num_rows)
        for plan in ({}, dict.fromkeys(exits, 0.8)):
            for _ in range(2):
                for layer in exits:
                    others = {other: edge for other, edge in plan.items() if other != layer}
                    plan = max([others, *({**others, layer: edge} for edge in EDGES)], key=rates.of)
            if (reached := rates.of(plan)) > rate * 1.02:  # no change of mind for what is noise
                best, rate = plan, reached
        return best, rate


class _Rates:
    """Tokens per second and sequence that plans would bring, if tokens came to exits as they did so far, each for
    itself.
    """

    def __init__(self, speculation: Speculation, num_rows: int):
        self._costs, self._num_rows = speculation.costs, num_rows
        self._pieces = [
            (piece.exit_layer, speculation._costs(index, num_rows)[0]) for index, piece in enumerate(speculation.pieces)
        ]
        self._passed = {layer: _passed(record) for layer, record in speculation.records.items()}

    def of(self, plan: Plan) -> float:
        """A round drafts with probability r each time, so it takes L = 1 / (1 - r) tokens to its check, and brings 1 /
        (1 - r a) of them where drafts are right with probability a.

        Sequences draft each for itself: a pass is made where any of them goes on, and costs less the fewer do, but not
        in proportion.
        """
        n = self._num_rows
        reaches, leaves, right, per_token = 1.0, 0.0, 0.0, self._costs.overhead / n
        for index, (layer, in_block) in enumerate(self._pieces):
            is_made = 1 - (1 - reaches) ** n
            num_together = n * reaches / is_made
            per_token += is_made * self._costs.of_piece(index, num_together) / n + (1 - reaches) * in_block
            if layer is not None and layer in plan:
                share, hits = self._passed[layer][plan[layer]]
                per_token += is_made * self._costs.of_head(layer, num_together) / n
                leaves, right, reaches = (
                    leaves + reaches * share,
                    right + reaches * hits,
                    max(reaches * (1 - share), 1e-6),
                )
        length = 1 / max(1 - leaves, 1 / 16)  # as many as may wait
        return (1 / max(1 - right, 1 / 16)) / (
            length * per_token + self._costs.of_head(None, num_together) / num_together
        )


def _passed(record: _Record) -> dict[float, tuple[float, float]]:
    """Two shares by threshold: that of tokens that pass it, and of those that pass it and are right."""
    share, hits, total, passed = 0.0, 0.0, sum(record.seen), {}
    for place in reversed(range(len(EDGES))):
        share += record.seen[place] / total
        hits += record.seen[place] / total * record.odds(place)
        passed[EDGES[place]] = (share, hits)
    return passed
