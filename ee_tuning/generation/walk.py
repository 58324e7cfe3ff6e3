"""The walk through the pieces of the network, one by one, each sequence until it leaves: any mixture of requests, at
any layout.

What can be had in fewer calls takes another way (`whole_step.py`, `lone_round.py`), to the same end.
"""

import time

from ee_tuning.generation.drafting import Drafting
from ee_tuning.generation.judge import Answer, Judge, Left, Question
from ee_tuning.generation.runner import PieceOutput, Runner
from ee_tuning.generation.sequence import Sequence


class PieceWalk:
    """The walk of an engine."""

    def __init__(self, runner: Runner, judge: Judge, drafting: Drafting):
        self.runner, self.judge, self.drafting = runner, judge, drafting
        self.pieces, self.num_layers = runner.pieces, runner.config.num_layers
        self.seconds_in_heads = 0.0
        """Time on this rank, waiting for the rank that has the head included."""

    def take(self, going: list[Sequence], running: list[Sequence]) -> list[Left]:
        """Takes `going` of those that run through the pieces. Pieces between which nothing is decided are one pass."""
        left: list[Left] = []
        index = 0
        while going and index < len(self.pieces):
            # Rows that left earlier wait here with their states: they ride along, for the weights are read anyway.
            # Drafts wait for their check, which brings tokens and so is a step of their own.
            rows = [s for s in running if s.num_pending(index) and (s in going or not s.speculates)]
            last, asked = index, self._asked_behind(index, going)
            while not asked and self.runs_on(last, rows, running):
                last += 1
                asked = self._asked_behind(last, going)
            output = self.runner.run(index, rows, through=last)
            if sum(output.lengths) > len(going):
                self._count_riders(going, rows, output.lengths, last - index + 1)
            stays = [s for s in going if last < s.last_piece]
            going = self._leave(last, stays, asked, rows, output, left) if asked else stays
            index = last + 1
        self.runner.settle()
        return left

    def _asked_behind(self, index: int, going: list[Sequence]) -> list[tuple[Sequence, float]]:
        """Who is asked behind a piece, and how confident it has to be to leave there."""
        asked = []
        for sequence in going:
            if sequence.num_fed == len(sequence.tokens):
                threshold = self._threshold(index, sequence, len(going))
                if threshold is not None:
                    asked.append((sequence, threshold))
        return asked

    def runs_on(self, index: int, rows: list[Sequence], running: list[Sequence]) -> bool:
        """Whether `rows` of those that run, none of them asked, go on into the piece behind `index` as they are: nobody
        ends there, and nobody waits there.
        """
        if index + 1 == len(self.pieces) or self.pieces[index].stage != self.pieces[index + 1].stage:
            return False
        layer = self.pieces[index].last_layer
        return not any(s.last_piece == index or layer in s.head_watermarks for s in rows) and not any(
            s.num_pending(index + 1) for s in running
        )

    def _count_riders(
        self, going: list[Sequence], rows: list[Sequence], lengths: tuple[int, ...], num_pieces: int
    ) -> None:
        for sequence, length in zip(rows, lengths, strict=True):
            is_read = sequence in going and not sequence.has_all_fed
            if sequence.num_output and not sequence.speculates and not is_read:
                sequence.statistics.num_catch_up += (length - (sequence in going)) * num_pieces

    def _leave(
        self,
        index: int,
        stays: list[Sequence],
        wanted: list[tuple[Sequence, float]],
        rows: list[Sequence],
        output: PieceOutput,
        left: list[Left],
    ) -> list[Sequence]:
        """Asks the heads behind a piece about the rows that want it, adds who leaves to `left`, and returns who of
        `stays` goes on.
        """
        piece = self.pieces[index]
        questions: dict[int | None, list[Question]] = {}
        for sequence, threshold in wanted:
            place = rows.index(sequence)
            end = output.firsts[place] + output.lengths[place]
            # The check of drafts asks about the token before them and all of them; the others about their newest token.
            num_asked = sequence.num_drafts + 1 if index == sequence.last_piece else 1
            head = (
                None if piece.last_layer == self.num_layers and sequence.policy.fixed_exit is None else piece.exit_layer
            )
            question = Question(
                sequence, list(range(end - num_asked, end)), len(sequence.tokens) + 1 - num_asked, threshold
            )
            questions.setdefault(head, []).append(question)
        for head, asked in questions.items():
            for question, answers in zip(asked, self.ask(index, head, asked, output), strict=True):
                sequence = question.sequence
                # A broken model's NaN passes no threshold, but its sequences must end.
                if index == sequence.last_piece:
                    left += (
                        self.drafting.check(sequence, answers)
                        if sequence.speculates
                        else [Left(sequence, answers[0], piece.last_layer)]
                    )
                    continue
                leaves = answers[0].confidence >= question.threshold
                if leaves:
                    stays.remove(sequence)
                if sequence.speculates:
                    self.drafting.note(sequence, answers[0], piece.last_layer, leaves)
                elif leaves:
                    left.append(Left(sequence, answers[0], piece.last_layer))
        return stays

    def _threshold(self, index: int, sequence: Sequence, num_rows: int) -> float | None:
        """The confidence at which a sequence's newest token leaves behind a piece; None where its head is not asked."""
        if index == sequence.last_piece:
            return -1.0
        if len(sequence.tokens) == sequence.num_prompt_tokens:
            return None  # reading the prompt fills every piece, so the final head's answer is paid for
        exit_layer = self.pieces[index].exit_layer
        if exit_layer is None or not sequence.speculates:
            return None if exit_layer is None else sequence.policy.thresholds.get(exit_layer)
        return self.drafting.threshold(sequence, exit_layer, num_rows)

    def ask(self, index: int, head: int | None, questions: list[Question], output: PieceOutput) -> list[list[Answer]]:
        """Answers about states of the pass that left `output` behind piece `index`; `head` None is the model's own."""
        began = time.perf_counter()
        states = [state for question in questions for state in question.states]
        inputs = self.runner.asked_states(index, head, [question.sequence for question in questions], states, output)
        answers = self.judge.ask(head, questions, inputs, self.pieces[index].stage)
        self.seconds_in_heads += time.perf_counter() - began
        return answers
