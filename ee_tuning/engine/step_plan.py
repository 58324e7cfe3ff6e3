"""The plan of a step, as numbers: thresholds and depth of each row, so that any mixture of policies is one case."""

import math
from array import array
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from ee_tuning.engine.boundary_ring import PassStates
from ee_tuning.engine.sequence import Sequence

NOT_EXITED = -1
"""The exit segment of a token that has not left the network."""


@dataclass(eq=False)
class RowPlan:
    """The part of one sequence in a step.

    Threshold, fixed and full decoding, prefill, drafting and catching up differ in these numbers alone.
    """

    sequence: Sequence
    thresholds: "array[float]"
    """[segments] float64: the confidence from which on the newest token leaves; infinite where no head is asked."""
    num_asked: int = 1
    """Number of newest tokens that the head behind the last segment is asked about: 1, plus 1 for each draft that it
    checks, or 0 while the prompt is being read.
    """
    num_new: int = 1
    """Tokens that enter the network in this step."""
    rides: bool = True
    """Whether its pending tokens go along as deep as other rows go, even where it leaves earlier."""
    most_drafts: int = 0
    """Most drafts that the step may make and continue with by itself."""

    @property
    def last_segment(self) -> int:
        """The deepest segment that its tokens go through."""
        return self.sequence.last_segment

    @property
    def is_read(self) -> bool:
        """Whether a drafting head reads the states of its tokens."""
        return self.sequence.policy.has_draft_head

    @property
    def is_plain_greedy(self) -> bool:
        """Whether the likeliest token is taken wherever the row leaves, and nothing more is requested."""
        return self.sequence.takes_likeliest(len(self.sequence.tokens) + 1 - max(self.num_asked, 1))

    def is_fused_at(self, segment: int) -> bool:
        """Whether the final head's answer depends on the exit behind a segment."""
        return self.num_asked > 0 and segment in self.sequence.fused_segments

    def is_asked(self, segment: int) -> bool:
        """Whether the head behind a segment is asked, if the row reaches it."""
        return self.num_asked > 0 if segment == self.last_segment else self.thresholds[segment] < math.inf


def plan_of_check(sequence: Sequence) -> RowPlan:
    """Returns the row of a sequence whose drafts, made beforehand, are all scheduled with its newest token."""
    num_new = sequence.num_scheduled - sequence.num_computed[0]
    return RowPlan(sequence, sequence.exit_thresholds, num_asked=sequence.num_drafts + 1, num_new=num_new, rides=False)


class Answer(NamedTuple):
    """The answer of a head about one state."""

    confidence: float
    token_id: int
    """The next token, chosen as if all tokens before it were final."""
    logprob: float | None = None
    top_logprobs: dict[int, float] | None = None
    """The likeliest tokens, where the request asks for them."""


class ExitAnswer(NamedTuple):
    """The answer of an exit that may draft, whether the token left there or not."""

    segment: int
    token_id: int
    confidence: float


@dataclass(eq=False)
class RowOutput:
    """The outcome of one stage, or of all of them, for one row."""

    segment: int = NOT_EXITED
    """The segment behind which the newest token left."""
    answers: list[Answer] = field(default_factory=list)
    """Answers about the newest tokens: `num_asked` of them behind the last segment, else one."""
    asked: list[ExitAnswer] = field(default_factory=list)
    """Answers of exits before the last segment, in the order in which they came, for rows that speculate."""
    read_states: Mapping[int, PassStates] = field(default_factory=dict)
    """The step's states behind the layers that a drafting head reads, on the stage of the head; 0 is the embedding."""
