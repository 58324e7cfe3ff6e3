"""Drafts of sequences that speculate: where they are made, and what a check leaves of them."""
from ee_tuning.generation.costs import measure_costs
from ee_tuning.generation.draft_run import Drafter
from ee_tuning.generation.judge import Answer
from ee_tuning.generation.runner import Runner
from ee_tuning.generation.sequence import Sequence
from ee_tuning.generation.speculation import Speculation


class Drafting:
    """Of an engine whose sequences may have `max_pending` drafts each."""

    def __init__(self, runner: Runner, max_pending: int):
        self.runner, self.pieces, self.max_pending = runner, runner.pieces, max_pending
        self.drafter = Drafter(runner)
        self.speculation: Speculation | None = None
        """From the first request that speculates on."""
        self.seconds_in_heads = 0.0
        """Of drafts that were made ahead."""

    def begin(self, sequence: Sequence, num_rows: int) -> None:
        """Before a sequence that speculates takes part in a step: a plan where a round begins."""
        self.speculation = self.speculation or Speculation(measure_costs(self.runner), self.pieces)
        if sequence.num_output and not sequence.num_drafts and sequence.has_all_fed:
            self.speculation.begin_round(sequence, num_rows)

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

    def ahead(self, sequence: Sequence) -> tuple[int, bool]:
        """Lets a sequence that runs alone, its newest token at the entrance, draft as long as it is sure, where one call can do that.

        Returns the index of the piece that it is in front of then, and whether it goes on into it.
        """
        index = next((i for i, piece in enumerate(self.pieces) if piece.exit_layer in sequence.drafts.plan), None)
        sure = None if index is None else self.threshold(sequence, self.pieces[index].last_layer, 1)
        if index is None or sure is None:
            return 0, True
        run = self.drafter.run(sequence, index, sure, self._room(sequence), self._known)
        if run is None:
            return 0, True
        self.seconds_in_heads += run.seconds_in_head
        for i, answer in enumerate(run.answers):
            self.note(sequence, answer, run.exit_layer, i < run.num_drafted)
        return index + 1, run.num_drafted < len(run.answers)

    def check(self, sequence: Sequence, answers: list[Answer]) -> list[tuple[Answer, int | None]]:
        """Keeps the drafts that are what the full model says, and its own token behind them, each with the exit that drafted it; forgets
        the others, and what was made of them.

        The full model's token is chosen as it would be without any draft, drawn with the same key: so the tokens are exactly those of
        full depth. An exit's draw with that key is mostly the same (see `draw`).
        """
        drafts, layers = sequence.tokens[sequence.num_final:], list(sequence.drafts.layers)
        num_kept = next((i for i, draft in enumerate(drafts) if answers[i].token_id != draft), len(drafts))
        self._known.end_round(sequence, answers, num_kept)
        sequence.statistics.num_accepted += num_kept
        del sequence.tokens[sequence.num_final:]
        sequence.crop(len(sequence.tokens) + num_kept)
        sequence.drafts.begin({})
        return [*zip(answers, layers[:num_kept], strict=False), (answers[num_kept], None)]

    @property
    def _known(self) -> Speculation:
        assert self.speculation is not None
        return self.speculation

    def _room(self, sequence: Sequence) -> int:
        """Drafts that there is room for, and for the token that their check brings."""
        return min(self.max_pending, sequence.limit - sequence.num_final - 1) - sequence.num_drafts
