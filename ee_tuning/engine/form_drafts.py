"""Drafts and a form: tokens that the form determines are drafted, and drafts that it forbids are dropped.

The full model's check would drop them, too, and the tokens do not depend on either.
"""

from collections.abc import Callable

from ee_tuning.engine.sequence import Sequence

MOST_FORCED = 15
"""Most tokens without a choice that are drafted at once."""


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
