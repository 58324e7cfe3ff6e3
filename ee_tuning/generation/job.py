"""What one prompt is to become."""

import dataclasses

from ee_tuning.engine.params import SamplingParams
from ee_tuning.engine.policy import Policy

READ_FOR_ONE_MADE = 8
"""Tokens of a prompt that cost about as much as one token of a completion, where work is shared out."""
CHARACTERS_OF_TOKEN = 4
"""Characters of a text that count as a token there."""


@dataclasses.dataclass(frozen=True)
class Job:
    """A prompt and what is asked of its completions."""

    prompt: str
    params: SamplingParams
    policy: Policy
    adds_special_tokens: bool = True
    """Whether the tokenizer puts those before the prompt that it puts before any text."""
    prompt_ids: tuple[int, ...] = ()
    """Its token ids, where they are made already, as they are; by default the tokenizer makes them."""
    priority: int = 0
    """Jobs of a lower number are begun before others that wait."""
