"""One completion in the making: its tokens, where its keys and values lie, and how far each piece of the network has
come with it.
"""

import itertools
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ee_tuning.generation.params import SamplingParams
from ee_tuning.generation.policy import Policy
from ee_tuning.generation.sampling import request_key
from ee_tuning.model.ragged_attention import CachePlaces

Part = tuple[str, int]
"""A part of the network: a piece by its index."""

_numbers = itertools.count()


@dataclass(kw_only=True)
class SequenceStatistics:
    """What a completion took."""

    exit_layers: list[int] = field(default_factory=list)
    """Per token the layer it left at; the number of layers where it did not leave early."""
    num_catch_up: int = 0
    """Tokens that left early and were taken deeper later, counted once for each piece of the network."""
    num_drafted: int = 0
    """Tokens that exits drafted."""
    num_accepted: int = 0
    """Drafts that the full model agreed with."""
    num_reused: int = 0
    """Tokens at its beginning that were not computed: another request's keys and values served."""
    num_read_again: int = 0
    """Tokens that had to be read a second time, for memory ran out and it had to wait."""
    seconds_waiting: float = 0.0
    """The time until there was room for it."""
    seconds_to_first_token: float = 0.0
    """The time from when it was added."""
    seconds: float = 0.0
    """The time from when it was added until its end."""


@dataclass
class Drafts:
    """A round of speculation: tokens drafted one after the other, until they are checked together."""

    plan: Mapping[int, float] = field(default_factory=dict)
    """Exits that are asked -> confidence from which on they draft."""
    rate: float = 0.0
    """Tokens per second that it should bring."""
    layers: list[int] = field(default_factory=list)
    """Per draft the exit it came from."""
    said: list[tuple[int, int, int, int]] = field(default_factory=list)
    """(drafts before it, exit, bin of its confidence, token) of whatever an exit said, drafted or not."""
    odds: float = 1.0
    """That all drafts are right, as far as is known."""

    def begin(self, plan: Mapping[int, float], rate: float = 0.0) -> None:
        """A new round."""
        self.plan, self.rate, self.odds = plan, rate, 1.0
        self.layers.clear()
        self.said.clear()


@dataclass(eq=False)
class Sequence:
    """A prompt and what is made of it. The tokens at its end may be drafts."""

    tokens: list[int]
    params: SamplingParams
    policy: Policy
    limit: int
    """Tokens that it may grow to, prompt included."""
    stop_ids: frozenset[int]
    """Tokens that end it."""
    last_piece: int
    """The deepest piece that its tokens go through."""
    completion: int = 0
    """Which of the prompt's completions it is."""
    added_at: float = 0.0
    number: int = field(default_factory=lambda: next(_numbers))
    """No other sequence's."""
    drafts: Drafts = field(default_factory=Drafts)
    num_fed: int = 0
    """Tokens that have entered the first piece."""
    watermarks: list[int] = field(default_factory=list)
    """Per piece, how many tokens have their keys and values there."""
    boundary: list[list[Tensor]] = field(default_factory=list, repr=False)
    """Per piece, the hidden states [k, h] of its pending tokens, on the stage that made them."""
    head_watermarks: dict[int, int] = field(default_factory=dict)
    """Tokens that have keys and values at each head that has a layer of its own and may be asked about this sequence.
    """
    head_states: dict[int, list[Tensor]] = field(default_factory=dict, repr=False)
    """Per such head, the states [k, h] of the tokens that lack them there, on the stage that has the head."""
    blocks: list[int] = field(default_factory=list)
    places: CachePlaces | None = None
    block_keys: list[bytes] = field(default_factory=list, repr=False)
    """What its first full blocks are known by, as far as anybody asked."""
    num_known_blocks: int = 0
    """Blocks that others may share."""
    shares: bool = True
    """Whether it takes what others have computed, and they what it has."""
    was_put_back: bool = False
    """Whether it ran, and lost its memory to older ones."""
    finish_reason: str = ""
    """Empty while it runs. stop: a stop token. length: its limit. abort: the caller's wish."""
    statistics: SequenceStatistics = field(default_factory=SequenceStatistics)
    num_prompt_tokens: int = field(init=False)
    key: int = field(init=False)
    """The key of its draws."""

    def __post_init__(self) -> None:
        self.num_prompt_tokens = len(self.tokens)
        self.key = request_key(self.params.seed, self.tokens, self.completion)

    @property
    def num_to_read(self) -> int:
        """Tokens that are read by chunks: its prompt; all but the newest where it was put back."""
        return max(self.num_prompt_tokens, len(self.tokens) - 1)

    @property
    def is_reading(self) -> bool:
        """Whether tokens that it has to read have not entered the network yet."""
        return self.num_fed < self.num_to_read

    @property
    def has_all_fed(self) -> bool:
        """Whether its newest token has entered the network."""
        return self.num_fed == len(self.tokens)

    @property
    def parts(self) -> frozenset[Part]:
        """Parts of the network that it needs keys and values in."""
        pieces = frozenset(("piece", index) for index in range(self.last_piece + 1))
        return pieces | {("head", layer) for layer in self.head_watermarks}

    @property
    def num_filled(self) -> int:
        """Tokens that have them in all of these parts, drafts left out."""
        return min(*self.watermarks[: self.last_piece + 1], *self.head_watermarks.values(), self.num_final)

    @property
    def num_drafts(self) -> int:
        """Tokens at the end that the full model has not checked."""
        return len(self.drafts.layers)

    @property
    def speculates(self) -> bool:
        """Whether exits draft for it."""
        return bool(self.policy.drafts_at)

    @property
    def num_final(self) -> int:
        """Tokens that are no drafts, prompt included."""
        return len(self.tokens) - self.num_drafts

    @property
    def num_output(self) -> int:
        """Tokens of the completion so far."""
        return self.num_final - self.num_prompt_tokens

    @property
    def output(self) -> list[int]:
        """The completion so far."""
        return self.tokens[self.num_prompt_tokens : self.num_final]

    def num_arrived(self, piece: int) -> int:
        """Tokens that have reached the entrance of a piece."""
        return self.num_fed if piece == 0 else self.watermarks[piece - 1]

    def num_pending(self, piece: int) -> int:
        """Tokens that wait at the entrance of a piece, if they ever go there."""
        return self.num_arrived(piece) - self.watermarks[piece] if piece <= self.last_piece else 0

    def crop(self, num_tokens: int) -> None:
        """Forgets the keys and values of tokens past the first `num_tokens`. No token may be waiting between two
        pieces.
        """
        assert not any(self.boundary[piece] for piece in range(1, self.last_piece + 1)), (
            "states of tokens that may be gone"
        )
        self.num_fed = min(self.num_fed, num_tokens)
        self.watermarks = [min(mark, num_tokens) for mark in self.watermarks]
        for layer, mark in self.head_watermarks.items():
            self.head_watermarks[layer] = min(mark, num_tokens)
            if self.head_states[layer]:
                self.head_states[layer] = [torch.cat(self.head_states[layer])[: max(0, num_tokens - mark)]]

    def begin_at(self, num_tokens: int) -> None:
        """The first tokens have keys and values in all of its parts, and nothing else was computed. Drafts are
        forgotten.
        """
        del self.tokens[self.num_final :]
        self.drafts.begin({})
        self.num_fed = num_tokens
        self.watermarks = [num_tokens] * len(self.watermarks)
        self.boundary = [[] for _ in self.boundary]
        self.head_watermarks = dict.fromkeys(self.head_watermarks, num_tokens)
        self.head_states = {layer: [] for layer in self.head_watermarks}
