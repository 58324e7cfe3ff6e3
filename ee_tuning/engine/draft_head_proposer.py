"""Speculative decoding with a drafting head: it drafts behind each check, and one pass of the model checks all
drafts.
"""

import torch

from ee_tuning.engine.cost_model import Costs, head_cost
from ee_tuning.engine.draft_head import DraftHead
from ee_tuning.engine.draft_proposer import keep_agreed
from ee_tuning.engine.sequence import Sequence
from ee_tuning.engine.stage_model import StageModel
from ee_tuning.engine.step_plan import Answer, RowOutput, RowPlan, plan_of_check
from ee_tuning.kernel import calls
from ee_tuning.parallel.stage_link import StageLink

MOST_DRAFTS = 8
"""Most drafts of a round."""
MEMORY, PRIOR = 0.98, 0.7
"""Weight of a count after the next one; prior probability of the first draft."""
TRY_EVERY = 17
"""Steps after which one token is drafted for each sequence even though no draft seems to pay, to see whether the text
has become easier: the head reads its weights once for all of them. An odd number, since groups of sequences may take
turns over pipeline stages.
"""
MOST_UNREAD = 256
"""Tokens whose states wait for the head to read them, at most, while it drafts nothing."""


class DraftHeadProposer:
    """Plans the drafts of an engine's sequences, each of which may have `max_pending`. All ranks plan the same; those
    of the last stage have the `head`, and send its drafts to the others over `link`.
    """

    def __init__(self, head: DraftHead | None, link: StageLink, costs: Costs, stage: StageModel):
        self._head, self._link, self._costs = head, link, costs
        self._num_layers, self._max_pending = stage.config.num_layers, stage.max_pending
        self._is_native = stage.is_native
        self._last_stage = stage.topology.pp - 1
        self._seen, self._right = [1.0] * MOST_DRAFTS, [PRIOR] * MOST_DRAFTS
        self._num_steps = 0

    def plan(self, sequence: Sequence) -> RowPlan:
        """Returns the row of a sequence whose newest token and its drafts are scheduled."""
        return plan_of_check(sequence)

    def update(self, row: RowPlan, output: RowOutput) -> list[tuple[Answer, int]]:
        """Checks the drafts of a sequence: final tokens, each with the layer that it left at."""
        were_looked_up = row.sequence.drafts.are_complete
        num_kept = keep_agreed(row.sequence, output.answers)
        for place in range(0 if were_looked_up else min(num_kept + 1, len(output.answers) - 1)):
            self._seen[place] = MEMORY * self._seen[place] + 1
            self._right[place] = MEMORY * self._right[place] + (place < num_kept)
        return [(answer, self._num_layers) for answer in output.answers[: num_kept + 1]]

    def propose(self, finished: list[tuple[Sequence, RowOutput]]) -> None:
        """Adds drafts to sequences that decode and whose newest tokens are final. The head reads the states that steps
        left of a sequence before it drafts for it.
        """
        self._num_steps += 1
        counts = [self._length(sequence) if _decodes(sequence) else 0 for sequence, _ in finished]
        tokens = torch.empty(sum(counts), dtype=torch.int64)
        if self._head is not None:
            for sequence, output in finished:
                self._head.keep(sequence, output.read_states)
            drafting = [
                (sequence, count)
                for (sequence, _), count in zip(finished, counts, strict=True)
                if count or sequence.unread.num_tokens > MOST_UNREAD
            ]
            drafts = self._head.draft(drafting) if drafting else []
            tokens = torch.tensor([token for each in drafts for token in each], dtype=torch.int64)
        if len(tokens) and self._last_stage > 0:
            self._link.broadcast(tokens, self._last_stage)
        drafted = iter(tokens.tolist())
        for (sequence, _), count in zip(finished, counts, strict=True):
            sequence.add_drafts([next(drafted) for _ in range(count)], self._num_layers)

    def rate(self, sequence: Sequence) -> float:
        """Returns tokens per second and sequence with the head's drafts."""
        return self._best(sequence)[1]

    def _length(self, sequence: Sequence) -> int:
        """Returns the number of drafts; sometimes one, even if no draft seems to pay."""
        best, _, most = self._best(sequence)
        return best or max(0, min(most, int(self._num_steps % TRY_EVERY == 0)))

    def _best(self, sequence: Sequence) -> tuple[int, float, int]:
        """Returns the number of drafts with most tokens per second by past acceptance, that rate, and the number of
        drafts that there is room for.
        """
        assert sequence.slot_mapping is not None
        room = len(sequence.slot_mapping.index) - len(sequence.tokens)
        most = min(MOST_DRAFTS, self._max_pending, sequence.limit - len(sequence.tokens) - 1, room)
        num_rows, costs = sequence.drafts.num_rows, self._costs
        if self._is_native:  # the kernels do not serve a pass of more tokens
            most = min(most, calls.MOST_TOKENS // num_rows - 1)
        best, best_rate, expected, share = 0, 1 / costs.of_all(num_rows), 1.0, 1.0
        for count in range(1, most + 1):
            share *= self._right[count - 1] / self._seen[count - 1]
            expected += share
            rate = expected / (costs.of_all(num_rows * (count + 1)) + count * head_cost(costs, num_rows))
            if rate > best_rate:
                best, best_rate = count, rate
        return best, best_rate, most


def _decodes(sequence: Sequence) -> bool:
    """Whether all tokens but the newest are computed."""
    return sequence.num_output > 0 and sequence.num_computed[-1] == len(sequence.tokens) - 1
