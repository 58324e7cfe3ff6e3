"""What a request may ask of sampling, and when it ends."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property

from ee_tuning.errors import InputError
from ee_tuning.sampling.exit_fusion import ExitFusion
from ee_tuning.sampling.structured_output import StructuredOutput, structured_output_of


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How the tokens of one request are chosen, and when it ends. Nothing here depends on other requests."""

    max_tokens: int = 100
    """The completion ends after so many tokens."""
    min_tokens: int = 0
    """Stop tokens have no probability before so many; stop strings are not looked for."""
    temperature: float = 0.0
    """0 takes the likeliest."""
    top_k: int = 0
    """Among so many likeliest tokens; 0 for all."""
    top_p: float = 1.0
    """Among the likeliest tokens that reach this probability together."""
    min_p: float = 0.0
    """Among tokens at least so likely as this share of the likeliest one's probability."""
    repetition_penalty: float = 1.0
    """Divides positive logits, and multiplies negative ones, of tokens that are in the prompt or the completion."""
    presence_penalty: float = 0.0
    """Taken from the logits of tokens that are in the completion."""
    frequency_penalty: float = 0.0
    """Taken from a token's logit for each time it is in the completion."""
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    """Token id -> what is added to its logit."""
    seed: int = 0
    """The same seed gives the same prompt the same tokens, whatever else is decoded beside it."""
    n: int = 1
    """Completions of the prompt."""
    logprobs: int | None = None
    """So many likeliest tokens with their log-probabilities, and each chosen one's, in the distribution it was chosen
    from.
    """
    stop: tuple[str, ...] = ()
    """Strings that end the completion; they are left out of it. Special tokens may be written out in them: one alone
    counts as its id in `stop_token_ids`, too.
    """
    stop_token_ids: tuple[int, ...] = ()
    """Tokens that end the completion, beside the model's own end of text."""
    ignore_eos: bool = False
    """Whether the model's own end of text ends nothing."""
    structured_output: StructuredOutput | None = None
    """The form that the completion has; an object with its fields will do, too. It ends where nothing may follow."""
    fusion: ExitFusion = field(default_factory=ExitFusion)
    """How exits change the logits of the final head; by default not at all."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "structured_output", structured_output_of(self.structured_output))

    @property
    def is_greedy(self) -> bool:
        """Whether nothing is drawn."""
        return self.temperature == 0

    @cached_property
    def takes_likeliest(self) -> bool:
        """Whether the likeliest token by the logits as they are is taken, and no log-probability wanted, once
        `min_tokens` are there.
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
    return (
        isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**63
    )  # one of hundreds of digits is no float
