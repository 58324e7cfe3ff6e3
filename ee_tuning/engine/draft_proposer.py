"""Speculative decoding with a model's own exits and with repeated text: the plan of each round, its drafts, and their
check. Drafts of any kind are made to fit a form: tokens that it determines are drafted, and drafts that it forbids are
dropped. The full model's check would drop them, too.
"""

from collections.abc import Callable

from ee_tuning.engine.cost_model import expected_costs
from ee_tuning.engine.prompt_lookup import MOST_DRAFTS, PromptLookup
from ee_tuning.engine.sequence import Sequence
from ee_tuning.engine.speculation import Speculation
from ee_tuning.engine.speculation_memory import SpeculationMemory
from ee_tuning.engine.stage_model import StageModel
from ee_tuning.engine.step_plan import Answer, RowOutput, RowPlan, plan_of_check
from ee_tuning.kernel import calls

MOST_FORCED = 15
"""Most tokens without a choice that are drafted at once."""


class DraftProposer:
    """Plans the drafts of an engine's sequences, each of which may have `max_pending`."""

    def __init__(self, stage: StageModel, max_pending: int):
        self.stage, self.max_pending = stage, max_pending
        self.speculation: Speculation | None = None
        """Created by the first request that speculates."""
        self.memory: SpeculationMemory | None = None
        """The file with the records of earlier processes."""

    def begin_step(self) -> None:
        """Begins a step of the engine."""
        if self.speculation is not None:
            self.speculation.begin_step()

    def plan(self, sequence: Sequence) -> RowPlan:
        """Returns the row of a sequence whose newest token is scheduled."""
        if sequence.drafts.are_complete:
            return plan_of_check(sequence)
        known, num_rows = self._known(), sequence.drafts.num_rows
        room = min(self.max_pending, sequence.limit - sequence.num_final - 1)
        if not sequence.num_drafts:
            known.begin_round(sequence, num_rows, room)
        row = RowPlan(sequence, known.thresholds(sequence), num_asked=sequence.num_drafts + 1, rides=False)
        left = min(sequence.drafts.most, room) - sequence.num_drafts
        is_survey = not sequence.num_drafts and sequence.drafts.thresholds
        is_behind_end = sequence.num_drafts and sequence.tokens[-1] in sequence.stop_ids
        if (left <= 0 and not is_survey) or is_behind_end:
            row.thresholds = sequence.exit_thresholds
        elif num_rows == 1 and row.is_plain_greedy and self.stage.drafts_at_once:
            row.most_drafts = left
        return row

    def update(self, row: RowPlan, output: RowOutput) -> list[tuple[Answer, int]]:
        """Adds drafts to a sequence, or checks them: final tokens, each with the layer that it left at."""
        sequence, segments = row.sequence, self.stage.segments
        for segment, likeliest, confidence in output.asked:
            layer = segments[segment].exit_layer
            assert layer is not None
            # The answer has the sampled token, where tokens are sampled.
            token = output.answers[0].token_id if segment == output.segment else likeliest
            sequence.drafts.answers.append((sequence.num_drafts, layer, confidence, token))
            if confidence >= row.thresholds[segment]:
                sequence.add_drafts([token], layer)
        return self._check(sequence, output.answers) if output.segment == row.last_segment else []

    def look_up(
        self,
        sequences: list[Sequence],
        room_of: Callable[[Sequence, int], int],
        rate_of: Callable[[Sequence], float] | None = None,
    ) -> None:
        """Reads the tokens of sequences, all of which are final, and adds drafts where text repeats itself, if they are
        expected to give more tokens per second than drafts of exits or than `rate_of` returns. `room_of` returns the
        number of further tokens that there is memory for, up to a limit.
        """
        for sequence in sequences:
            lookup = sequence.lookup = sequence.lookup or PromptLookup()
            stop = min(sequence.num_scheduled + 1, len(sequence.tokens))  # a prompt is read along with its chunks
            lookup.read(sequence.tokens, stop, sequence.num_prompt_tokens, self._known().matches)
            if not sequence.num_output or not lookup.length:
                continue
            count = self._num_looked_up(sequence, lookup, rate_of)
            count = max(0, min(count, room_of(sequence, count))) if count else 0
            sequence.add_drafts(lookup.drafts(sequence.tokens, count), self.stage.config.num_layers)
            sequence.drafts.are_complete = sequence.num_drafts > 0

    def keep(self) -> None:
        """Stores the records for later processes."""
        if self.memory is not None and self.speculation is not None:
            self.memory.keep(self.speculation)

    def _num_looked_up(
        self, sequence: Sequence, lookup: PromptLookup, rate_of: Callable[[Sequence], float] | None
    ) -> int:
        known, num_rows = self._known(), sequence.drafts.num_rows
        rate = rate_of(sequence) if rate_of else known.rate(num_rows, sequence.policy.drafts_at)
        most = min(MOST_DRAFTS, self.max_pending, sequence.limit - len(sequence.tokens) - 1)
        if self.stage.drafts_at_once:  # the kernels do not serve a pass of more tokens
            most = min(most, calls.MOST_TOKENS // num_rows - 1)
        return known.matches.best_count(
            lookup.length,
            most,
            lambda count: known.costs.of_all(num_rows * (count + 1)),
            rate,
        )

    def _check(self, sequence: Sequence, answers: list[Answer]) -> list[tuple[Answer, int]]:
        layers = list(sequence.drafts.layers)
        self._known().end_round(sequence, answers, num_agreed(sequence, answers))
        num_kept = keep_agreed(sequence, answers)
        layers = [*layers[:num_kept], self.stage.config.num_layers]
        return list(zip(answers[: num_kept + 1], layers, strict=True))

    def _known(self) -> Speculation:
        if self.speculation is None:
            self.speculation = Speculation(expected_costs(self.stage), self.stage.segments)
            if self.memory is not None:
                self.memory.recall(self.speculation)
        return self.speculation


def num_agreed(sequence: Sequence, answers: list[Answer]) -> int:
    """Returns the number of drafts, from the first one on, that equal the full model's tokens."""
    drafts = sequence.tokens[sequence.num_final :]
    return next((i for i, draft in enumerate(drafts) if answers[i].token_id != draft), len(drafts))


def keep_agreed(sequence: Sequence, answers: list[Answer]) -> int:
    """Keeps the keys and values of drafts that equal the full model's tokens; drops all drafts from the sequence, since
    the answers hold them.

    The full model's token is chosen as it would be without drafts, drawn with the same key: so the tokens are exactly
    those of full depth. An exit's draw with that key is mostly the same (see `draw`). Returns the number of drafts
    kept.
    """
    num_kept = num_agreed(sequence, answers)
    if sequence.num_drafts:
        sequence.statistics.count_check(num_kept)
    del sequence.tokens[sequence.num_final :]
    sequence.truncate(len(sequence.tokens) + num_kept)
    sequence.drafts.begin({})
    return num_kept


def fit_drafts(sequence: Sequence, max_pending: int, num_layers: int, room_of: Callable[[Sequence, int], int]) -> None:
    """Makes the drafts behind the final tokens of a sequence fit its form, unless exits draft at the moment. The
    sequence may have `max_pending`; `room_of` returns the number of further tokens that there is memory for, up to a
    limit.
    """
    grammar, drafts = sequence.grammar, sequence.drafts
    if grammar is None or not sequence.num_output:
        return
    by_head = sequence.policy.has_draft_head
    if sequence.num_drafts and not (by_head or drafts.are_complete):
        return  # exits draft within the form
    kept = max(grammar.num_allowed(sequence.tokens), sequence.num_final)
    _drop_from(sequence, kept)
    if by_head:
        return
    most = min(MOST_FORCED, max_pending - sequence.num_drafts, sequence.limit - len(sequence.tokens) - 1)
    if forced := grammar.forced(sequence.tokens)[: max(0, most)]:
        sequence.add_drafts(forced[: max(0, room_of(sequence, len(forced)))], num_layers)
    drafts.are_complete = sequence.num_drafts > 0


def _drop_from(sequence: Sequence, length: int) -> None:
    count = len(sequence.tokens) - length
    if count > 0:
        del sequence.tokens[length:], sequence.drafts.layers[len(sequence.drafts.layers) - count :]
        sequence.statistics.num_drafted -= count
