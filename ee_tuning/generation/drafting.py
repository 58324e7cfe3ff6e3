"""Drafts of sequences that speculate: where they are made, and what a check leaves of them."""

from collections.abc import Callable

from ee_tuning.generation.costs import measure_costs
from ee_tuning.generation.judge import Answer, Left
from ee_tuning.generation.lone_round import LoneRounds
from ee_tuning.generation.runner import Runner
from ee_tuning.generation.sequence import Sequence
from ee_tuning.generation.speculation import NEVER, Speculation
from ee_tuning.generation.speculation_memory import SpeculationMemory


class Drafting:
    """The drafting of an engine whose sequences may have `max_pending` drafts each."""

    def __init__(self, runner: Runner, max_pending: int, reserve: Callable[[Sequence, int], None]):
        """`reserve` gives a sequence memory for so many tokens, where there is some."""
        self.runner, self.pieces, self.max_pending, self._reserve = runner, runner.pieces, max_pending, reserve
        self.lone_rounds = LoneRounds(runner)
        self.speculation: Speculation | None = None
        """The learner, made by the first request that speculates."""
        self.memory: SpeculationMemory | None = None
        """Where to look first for what is known, and where to leave it."""
        self.seconds_in_heads = 0.0
        """The time in heads of rounds that were made in one call."""

    def begin(self, sequence: Sequence, num_rows: int) -> None:
        """Makes ready a sequence that speculates for a step: a plan where a round begins."""
        self.speculation = self.speculation or self._begun()
        if sequence.num_output and not sequence.num_drafts and sequence.has_all_fed:
            self.speculation.begin_round(sequence, num_rows)

    def _begun(self) -> Speculation:
        if self.memory is not None:
            return self.memory.recall(self.pieces, lambda: measure_costs(self.runner))
        return Speculation(measure_costs(self.runner), self.pieces)

    def keep(self) -> None:
        """Leaves what was learnt for later processes."""
        if self.memory is not None and self.speculation is not None:
            self.memory.keep(self.speculation)

    def threshold(self, sequence: Sequence, exit_layer: int, num_rows: int) -> float | None:
        """The confidence from which on the newest token is drafted at an exit; None where it is not asked."""
        if self._room(sequence) <= 0 or (sequence.num_drafts and sequence.tokens[-1] in sequence.stop_ids):
            return None  # nothing is drafted behind an end
        return self._known.threshold(sequence, exit_layer, num_rows)

    def note(self, sequence: Sequence, answer: Answer, exit_layer: int, leaves: bool) -> None:
        """What an exit said of the newest token; it is the next one for now if the sequence `leaves` there."""
        self._known.note(sequence, exit_layer, answer, leaves)
        if leaves:
            sequence.tokens.append(answer.token_id)
            sequence.statistics.num_drafted += 1

    def lone_round(self, sequence: Sequence) -> list[Left] | None:
        """Drafts and their check, as `check` returns them, of a sequence that runs alone, its newest token at the
        entrance; None where that can not be had in one call.
        """
        plan, room = sequence.drafts.plan, self._room(sequence)
        if not sequence.num_output or len(plan) > 1 or room < 0:
            return None
        exits = plan or sequence.policy.drafts_at
        index = next(i for i, piece in enumerate(self.pieces) if piece.exit_layer in exits)
        if not self.lone_rounds.serves(sequence, index):
            return None
        self._reserve(sequence, len(sequence.tokens) + room)
        layer = self.pieces[index].last_layer
        run = self.lone_rounds.run(sequence, index, plan.get(layer, NEVER), room if plan else 0, self._known)
        self.seconds_in_heads += run.seconds_in_heads
        for i, answer in enumerate(run.said):
            self.note(sequence, answer, layer, i < run.num_drafted)
        return self.check(sequence, run.checked)

    def check(self, sequence: Sequence, answers: list[Answer]) -> list[Left]:
        """Keeps the drafts that are what the full model says, and its own token behind them, each with the exit that
        drafted it; forgets the others, and what was made of them.

        The full model's token is chosen as it would be without any draft, drawn with the same key: so the tokens are
        exactly those of full depth. An exit's draw with that key is mostly the same (see `draw`).
        """
        drafts, layers = sequence.tokens[sequence.num_final :], list(sequence.drafts.layers)
        num_kept = next((i for i, draft in enumerate(drafts) if answers[i].token_id != draft), len(drafts))
        self._known.end_round(sequence, answers, num_kept)
        sequence.statistics.num_accepted += num_kept
        del sequence.tokens[sequence.num_final :]
        sequence.crop(len(sequence.tokens) + num_kept)
        sequence.drafts.begin({})
        layers = [*layers[:num_kept], self.runner.config.num_layers]
        return [Left(sequence, *each) for each in zip(answers[: num_kept + 1], layers, strict=True)]

    @property
    def _known(self) -> Speculation:
        assert self.speculation is not None
        return self.speculation

    def _room(self, sequence: Sequence) -> int:
        """Drafts that there is room for, and for the token that their check brings."""
        return min(self.max_pending, sequence.limit - sequence.num_final - 1) - sequence.num_drafts
