"""Sampling parameters of a request, and its end."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property

from ee_tuning.errors import InputError
from ee_tuning.sampling.exit_fusion import ExitFusion
from ee_tuning.sampling.structured_output import StructuredOutput, structured_output_of


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """Sampling parameters of one request, and the conditions that end it. Nothing here depends on other requests."""

    max_tokens: int = 100
    """Most tokens of the completion."""
    min_tokens: int = 0
    """Stop tokens have no probability before this many tokens, and stop strings are not searched."""
    temperature: float = 0.0
    """Temperature; 0 takes the likeliest token."""
    top_k: int = 0
    """Sample from this many likeliest tokens; 0 for all."""
    top_p: float = 1.0
    """Sample from the likeliest tokens that together reach this probability."""
    min_p: float = 0.0
    """Sample from tokens at least as likely as this share of the likeliest token's probability."""
    repetition_penalty: float = 1.0
    """Divides positive logits, and multiplies negative ones, of tokens that are in the prompt or the completion."""
    presence_penalty: float = 0.0
    """Subtracted from the logits of tokens that are in the completion."""
    frequency_penalty: float = 0.0
    """Subtracted from a token's logit for each time it is in the completion."""
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    """Token id -> addend of its logit."""
    seed: int = 0
    """Seed: with the same seed, the same prompt gets the same tokens in any batch."""
    n: int = 1
    """Completions of the prompt."""
    logprobs: int | None = None
    """Number of likeliest tokens that are returned with their log-probabilities, beside each chosen token's, in the
    distribution that it was chosen from.
    """
    stop: tuple[str, ...] = ()
    """Strings that end the completion and are left out of it. They may contain the text of special tokens; a string
    that is a single special token also becomes one of `stop_token_ids`.
    """
    stop_token_ids: tuple[int, ...] = ()
    """Tokens that end the completion, beside the model's own end of text."""
    ignore_eos: bool = False
    """Whether generation continues after the model's own end of text."""
    structured_output: StructuredOutput | None = None
    """The required form of the completion, or an object with the same fields. The completion ends where no token may
    follow.
    """
    fusion: ExitFusion = field(default_factory=ExitFusion)
    """Change of the final head's logits by exits; by default none."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "structured_output", structured_output_of(self.structured_output))

    @property
    def is_greedy(self) -> bool:
        """Whether no token is drawn at random."""
        return self.temperature == 0

    @cached_property
    def takes_likeliest(self) -> bool:
        """Whether the likeliest token by the unchanged logits is taken, without log-probabilities, once there are
        `min_tokens`.
        """
        is_changed = self.has_penalties or self.logit_bias or self.structured_output is not None or self.fusion.layers
        return self.is_greedy and self.logprobs is None and not is_changed

    @property
    def has_penalties(self) -> bool:
        """Whether logits depend on earlier tokens."""
        return self.repetition_penalty != 1 or self.presence_penalty != 0 or self.frequency_penalty != 0

    def check(self, vocab_size: int) -> None:
        """Raises InputError on a value that no sampler can use."""
        for name, (holds, rule) in self._rules(vocab_size).items():
            if not holds:
                shown = {"max_tokens": "max_tokens (max_new_tokens)", "min_tokens": "min_tokens (min_new_tokens)"}.get(
                    name, name
                )
                raise InputError(f"{shown} must be {rule}, got {getattr(self, name)!r}")
        if isinstance(self.stop, str) or not all(isinstance(s, str) for s in self.stop):
            raise InputError(f"stop must be a tuple of strings, got {self.stop!r}")
        if "" in self.stop:
            raise InputError("a stop string must not be empty; leave it out to have none")
        for name in ("stop_token_ids", "logit_bias"):
            wrong = [token for token in getattr(self, name) if not _is_whole(token) or not 0 <= token < vocab_size]
            if wrong:
                raise InputError(f"{name} must name token ids below the vocabulary of {vocab_size}, got {wrong[0]!r}")
        for token, bias in self.logit_bias.items():
            if not _is_number(bias) or abs(bias) > 100:
                raise InputError(f"a logit_bias must lie in -100..100, got {bias!r} for token {token}")
        if self.min_tokens and len(set(self.stop_token_ids)) >= vocab_size:
            raise InputError(f"min_tokens must leave a token to choose, got stop_token_ids that name all {vocab_size}")

    def _rules(self, vocab_size: int) -> dict[str, tuple[bool, str]]:
        number, whole = _is_number, _is_whole
        return {
            "max_tokens": (whole(self.max_tokens) and self.max_tokens >= 1, "a whole number of at least 1"),
            "min_tokens": (
                whole(self.min_tokens) and 0 <= self.min_tokens <= self.max_tokens,
                f"in 0..{self.max_tokens} (max_tokens)",
            ),
            "temperature": (number(self.temperature) and 0 <= self.temperature <= 100, "in 0..100"),
            "top_k": (whole(self.top_k) and self.top_k >= 0, "a whole number of at least 0"),
            "top_p": (number(self.top_p) and 0 < self.top_p <= 1, "above 0 and at most 1"),
            "min_p": (number(self.min_p) and 0 <= self.min_p <= 1, "in 0..1"),
            "repetition_penalty": (
                number(self.repetition_penalty) and 0.01 <= self.repetition_penalty <= 100,
                "in 0.01..100",
            ),
            "presence_penalty": (number(self.presence_penalty) and abs(self.presence_penalty) <= 100, "in -100..100"),
            "frequency_penalty": (
                number(self.frequency_penalty) and abs(self.frequency_penalty) <= 100,
                "in -100..100",
            ),
            "seed": (whole(self.seed) and abs(self.seed) < 2**63, "a whole number of at most 63 bits"),
            "n": (whole(self.n) and 1 <= self.n <= 1024, "in 1..1024"),
            "logprobs": (
                self.logprobs is None or (whole(self.logprobs) and 0 <= self.logprobs <= vocab_size),
                f"in 0..{vocab_size}, or left out",
            ),
            "ignore_eos": (isinstance(self.ignore_eos, bool), "true or false"),
        }


def _is_whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: object) -> bool:
    if isinstance(value, float):
        return math.isfinite(value)
    # An integer of hundreds of digits is no float.
    return isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**63
