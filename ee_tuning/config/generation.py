"""Section `generation`: the decoder."""
from dataclasses import dataclass, field
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class GenerationSection:
    """The decoder."""

    policy: Literal["full", "threshold", "fixed"] = "threshold"
    """full: never exits. threshold: leaves at the first exit that is confident enough. fixed: always at exit_layer."""
    threshold: float = 0.8
    """Confidence (largest probability) at which a token leaves. Above 1 never."""
    exit_layer: int | None = None
    """The exit of the policy `fixed`."""
    max_new_tokens: int = 100
    """A completion ends after so many tokens."""
    temperature: float = 0.0
    """0 is greedy."""
    top_k: int = 0
    """Sample among so many likeliest tokens; 0 for all."""
    top_p: float = 1.0
    """Sample among the likeliest tokens that reach this probability together."""
    seed: int = 0
    """Of sampling, per prompt: the same seed gives a prompt the same tokens in any batch."""
    stop: tuple[str, ...] = field(default=(), metadata={"verbatim": True})
    """Strings that end a completion; they are left out of it."""
    ignore_eos: bool = False
    """Go on past the end-of-text token."""
    max_pending: int = 16
    """Tokens that may wait for their deeper keys and values before the deep layers run for all of them."""
