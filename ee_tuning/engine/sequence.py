"""The state of one completion: its tokens, the blocks of its keys and values, and the number of tokens that each
segment of the network has computed.
"""

import itertools
from array import array
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from torch import Tensor

from ee_tuning.decoding.eager_attention import SlotMapping
from ee_tuning.engine.prompt_lookup import PromptLookup
from ee_tuning.sampling.grammar import GrammarState
from ee_tuning.sampling.params import SamplingParams
from ee_tuning.sampling.policy import Policy
from ee_tuning.sampling.sampling import request_key

CachedPart = tuple[str, int]
"""A part of the network that has a KV cache: ("segment", its number), or ("head", its segment) for a head with a layer
of its own.
"""
NOT_KEPT = -1
"""The number of computed tokens of a head's own layer that this request never asks."""

_numbers = itertools.count()


@dataclass(kw_only=True)
class SequenceStatistics:
    """Counts and times of a completion."""

    exit_layers: list[int] = field(default_factory=list)
    """Layer at which each token left; the number of layers where it did not leave early."""
    num_catch_up: int = 0
    """Tokens that left early and were computed deeper later, counted once per segment."""
    num_drafted: int = 0
    """Tokens that exits, repeated text or a drafting head drafted."""
    num_accepted: int = 0
    """Drafts that the full model agreed with."""
    num_accepted_at: list[int] = field(default_factory=list)
    """Accepted drafts by their place among the drafts of one pass; as long as the most that were accepted."""
    num_checks: int = 0
    """Passes of the full model that checked drafts."""
    num_reused: int = 0
    """Tokens of the prompt that the prefix cache had."""
    num_read_again: int = 0
    """Tokens that were computed a second time after preemption."""
    seconds_waiting: float = 0.0
    """Seconds in the queue."""
    seconds_to_first_token: float = 0.0
    """Seconds from the request to the first token."""
    seconds: float = 0.0
    """Seconds from the request to the end."""

    def count_check(self, num_kept: int) -> None:
        """Counts a pass that checked drafts and kept `num_kept` of them."""
        self.num_checks += 1
        self.num_accepted += num_kept
        self.num_accepted_at += [0] * (num_kept - len(self.num_accepted_at))
        for place in range(num_kept):
            self.num_accepted_at[place] += 1


@dataclass
class DraftRound:
    """Tokens drafted one after the other, until one pass of the full model checks them together."""

    thresholds: Mapping[int, float] = field(default_factory=dict)
    """Exits that are asked -> the confidence from which on they draft; empty where the round is plain decoding."""
    most: int = 0
    """Most drafts."""
    num_rows: int = 1
    """Sequences of its newest step, which decode side by side."""
    are_complete: bool = False
    """Whether all drafts were made before the round, so that only their check is left."""
    layers: list[int] = field(default_factory=list)
    """The exit of each draft; the number of layers for a draft that was not made by an exit."""
    answers: list[tuple[int, int, float, int]] = field(default_factory=list)
    """(drafts before it, exit, confidence, token) of each answer of an exit, drafted or not."""

    def begin(self, thresholds: Mapping[int, float], most: int = 0) -> None:
        """Begins a new round."""
        self.thresholds, self.most, self.are_complete = thresholds, most, False
        self.layers.clear()
        self.answers.clear()


@dataclass
class UnreadStates:
    """States of checked tokens that the drafting head has not read."""

    start: int = 0
    """The position of the first one."""
    states: list[Tensor] = field(default_factory=list, repr=False)
    """[tokens, a * h] of each step, for the a layers that the head reads."""

    @property
    def num_tokens(self) -> int:
        """Number of tokens whose states are here."""
        return sum(len(states) for states in self.states)


@dataclass(eq=False)
class Sequence:
    """A prompt and its completion. The tokens at its end may be drafts."""

    tokens: list[int]
    params: SamplingParams
    policy: Policy
    limit: int
    """The number of tokens that it may grow to, prompt included."""
    stop_ids: frozenset[int]
    """Tokens that end the sequence."""
    last_segment: int
    """The deepest segment that its tokens go through."""
    exit_thresholds: "array[float]"
    """[segments] float64: the confidence from which on a token leaves behind a segment; infinite where it is not asked.
    """
    num_computed: "array[int]"
    """[segments] int64: tokens that have their keys and values in each segment."""
    num_own_computed: "array[int]"
    """[segments] int64: the same for the own layer of the head behind a segment; NOT_KEPT where this request never asks
    it.
    """
    completion: int = 0
    """The number of this completion among those of its prompt."""
    priority: int = 0
    """Sequences of a lower number are admitted before others, and keep their memory longer."""
    added_at: float = 0.0
    number: int = field(default_factory=lambda: next(_numbers))
    """A number that is unique to the sequence."""
    drafts: DraftRound = field(default_factory=DraftRound)
    num_scheduled: int = 0
    """Tokens that have entered the network."""
    lookup: PromptLookup | None = None
    """The n-grams of the sequence, for a policy with prompt lookup."""
    slot: int = 0
    """Slot in the boundary ring."""
    blocks: list[int] = field(default_factory=list)
    slot_mapping: SlotMapping | None = None
    block_keys: list[bytes] = field(default_factory=list, repr=False)
    """Prefix-cache keys of the first full blocks, computed as they are needed."""
    num_cached_blocks: int = 0
    """Full blocks that are in the prefix cache."""
    uses_prefix_cache: bool = True
    unread: UnreadStates = field(default_factory=UnreadStates)
    fused_segments: tuple[int, ...] = ()
    """Segments whose exits keep their logits for tokens that the final head is asked about (`exit_fusion.py`)."""
    fused_logits: dict[tuple[int, int], Tensor] = field(default_factory=dict, repr=False)
    """(segment, place of a token) -> logits [v] of the exit behind the segment there, on the CPU."""
    grammar: GrammarState | None = field(default=None, repr=False)
    """Position of the completion in its structured output's grammar."""
    was_preempted: bool = False
    """Whether the sequence was running before, and lost its memory to older sequences."""
    finish_reason: str = ""
    """Empty while it runs; then "stop" (a stop token), "length" (its limit) or "abort"."""
    statistics: SequenceStatistics = field(default_factory=SequenceStatistics)
    num_prompt_tokens: int = field(init=False)
    speculates: bool = field(init=False)
    """Whether exits, repeated text or a drafting head draft for this sequence."""
    own_layers: tuple[int, ...] = field(init=False)
    """Segments whose heads have their own layer and may be asked by this request."""
    key: int = field(init=False)
    """Seed of its sampling."""

    def __post_init__(self) -> None:
        self.num_prompt_tokens = len(self.tokens)
        self.speculates = bool(self.policy.drafts_at) or self.policy.looks_up or self.policy.has_draft_head
        self.own_layers = tuple(n for n in range(len(self.num_own_computed)) if self.keeps_own(n))
        self.key = request_key(self.params.seed, self.tokens, self.completion)

    @property
    def rank(self) -> tuple[int, int]:
        """Key of the order in which sequences get memory, smallest first."""
        return self.priority, self.number

    @property
    def num_to_prefill(self) -> int:
        """Tokens that are computed in chunks: the prompt; after preemption all tokens but the newest."""
        return max(self.num_prompt_tokens, self.num_final - 1)

    @property
    def is_prefilling(self) -> bool:
        """Whether tokens of the prompt have not entered the network yet."""
        return self.num_scheduled < self.num_to_prefill

    @property
    def is_all_scheduled(self) -> bool:
        """Whether its newest token has entered the network."""
        return self.num_scheduled == len(self.tokens)

    @property
    def cached_parts(self) -> frozenset[CachedPart]:
        """Parts of the network in which it needs keys and values."""
        segments = frozenset(("segment", segment) for segment in range(self.last_segment + 1))
        return segments | {("head", segment) for segment in self.own_layers}

    @property
    def num_filled(self) -> int:
        """Number of tokens that have keys and values in all of these parts, drafts excluded."""
        own = [self.num_own_computed[segment] for segment in self.own_layers]
        return min(*self.num_computed[: self.last_segment + 1], *own, self.num_final)

    @property
    def num_drafts(self) -> int:
        """Number of tokens at the end that the full model has not checked."""
        return len(self.drafts.layers)

    @property
    def num_final(self) -> int:
        """Number of tokens that are no drafts, prompt included."""
        return len(self.tokens) - len(self.drafts.layers)

    @property
    def num_output(self) -> int:
        """Number of tokens of the completion so far, drafts excluded."""
        return self.num_final - self.num_prompt_tokens

    @property
    def output(self) -> list[int]:
        """The completion so far, drafts excluded."""
        return self.tokens[self.num_prompt_tokens : self.num_final]

    def takes_likeliest(self, length: int) -> bool:
        """Whether the token after the first `length` is the likeliest by the unchanged logits, and nothing more is
        requested. Once true, it stays true for all further tokens.
        """
        num_said = max(length - self.num_prompt_tokens, 0)  # the prompt itself may be scored
        return self.params.takes_likeliest and num_said >= self.params.min_tokens

    def keeps_own(self, segment: int) -> bool:
        """Whether this request may ask the head behind a segment, and that head has its own layer."""
        return self.num_own_computed[segment] != NOT_KEPT

    def num_arrived(self, segment: int) -> int:
        """Returns the number of tokens that have reached a segment."""
        return self.num_computed[segment - 1] if segment else self.num_scheduled

    def num_pending(self, segment: int) -> int:
        """Returns the number of tokens that have reached a segment and are not computed there; 0 where they never go so
        deep.
        """
        return self.num_arrived(segment) - self.num_computed[segment] if segment <= self.last_segment else 0

    def keep_fused_logits(self, segment: int, stop: int, logits: Tensor) -> None:  # [n, v]
        """Keeps an exit's logits for the n tokens before place `stop`; drops those of tokens that the final head has
        answered.
        """
        self.fused_logits = {key: value for key, value in self.fused_logits.items() if key[1] >= self.num_final - 1}
        for place, said in enumerate(logits, stop - len(logits)):
            self.fused_logits[segment, place] = said

    def add_drafts(self, tokens: Iterable[int], layer: int) -> None:
        """Adds drafts that `layer` made. Nothing is drafted behind a draft that would end the sequence."""
        for token in tokens:
            if self.num_drafts and self.tokens[-1] in self.stop_ids:
                return
            self.tokens.append(token)
            self.drafts.layers.append(layer)
            self.statistics.num_drafted += 1

    def truncate(self, num_tokens: int) -> None:
        """Drops the keys and values of tokens past the first `num_tokens`."""
        self.num_scheduled = min(self.num_scheduled, num_tokens)
        for counts in (self.num_computed, self.num_own_computed):
            for segment, count in enumerate(counts):
                if count > num_tokens:
                    counts[segment] = num_tokens

    def reset(self, num_tokens: int) -> None:
        """Starts over with keys and values of the first `num_tokens` in all segments. Drafts are dropped."""
        del self.tokens[self.num_final :]
        self.drafts.begin({})
        self.num_scheduled = num_tokens
        for segment in range(len(self.num_computed)):
            self.num_computed[segment] = num_tokens
            if self.num_own_computed[segment] != NOT_KEPT:
                self.num_own_computed[segment] = num_tokens
