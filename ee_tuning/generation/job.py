"""A prompt with its sampling parameters and policy."""

import dataclasses

from ee_tuning.sampling.params import SamplingParams
from ee_tuning.sampling.policy import Policy

READ_FOR_ONE_MADE = 8
"""Number of prompt tokens that cost about as much as one completion token, for sharing work."""
CHARACTERS_OF_TOKEN = 4
"""Characters that count as one token in such estimates."""


@dataclasses.dataclass(frozen=True)
class Job:
    """A prompt to complete."""

    prompt: str
    params: SamplingParams
    policy: Policy
    adds_special_tokens: bool = True
    """Whether the tokenizer's beginning tokens are put before the prompt."""
    prompt_ids: tuple[int, ...] = ()
    """Its token ids, if known; otherwise it is tokenized."""
    priority: int = 0
    """Waiting jobs of a lower number begin first."""
