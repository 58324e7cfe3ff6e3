"""Section `generation`: the decoder."""

from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any, Literal

from ee_tuning.config.paths import PATH

Measure = Literal["max_probability", "margin", "entropy"]


def without_overruled(keys: dict[str, Any], given: Collection[str]) -> dict[str, Any]:
    """The section's `keys`, but for a calibration where those `given` over them name a threshold or measure of their
    own.
    """
    return {
        key: value for key, value in keys.items() if key != "calibration" or not {"threshold", "measure"} & set(given)
    }


@dataclass(frozen=True, kw_only=True)
class GenerationSection:
    """The decoder."""

    policy: Literal["full", "threshold", "fixed", "speculative"] = "threshold"
    """full: never exits. threshold: leaves at the first exit that is confident enough. fixed: always at exit_layer.
    speculative: exits draft and the full model checks, so the tokens are the full model's.
    """
    threshold: tuple[float, ...] = (0.8,)
    """Confidence at which a token leaves: one for all exits, or one for each, shallow to deep. Above 1 never."""
    measure: Measure = "max_probability"
    """Measure of confidence, in the plain softmax: the largest probability, its margin over the second, or 1 - entropy
    / ln(vocabulary).
    """
    calibration: str | None = field(default=None, metadata=PATH)
    """File that `ee-tuning calibrate` wrote: its thresholds and its measure, in place of threshold and measure. One of
    these given on the command line overrules a file that the job names.
    """
    exit_layer: int | None = None
    """The exit of the policy `fixed`."""
    max_new_tokens: int = 100
    """A completion ends after so many tokens."""
    min_new_tokens: int = 0
    """A completion does not end before so many tokens."""
    n: int = 1
    """Completions of each prompt."""
    temperature: float = 0.0
    """0 is greedy."""
    top_k: int = 0
    """Sample among so many likeliest tokens; 0 for all."""
    top_p: float = 1.0
    """Sample among the likeliest tokens that reach this probability together."""
    min_p: float = 0.0
    """Sample among tokens at least so likely as this share of the likeliest one's probability."""
    repetition_penalty: float = 1.0
    """Divides positive logits, and multiplies negative ones, of tokens that were there before; 0.01 to 100."""
    presence_penalty: float = 0.0
    """Taken from the logits of tokens that are in the completion."""
    frequency_penalty: float = 0.0
    """Taken from a token's logit for each time it is in the completion."""
    logprobs: int | None = None
    """So many likeliest tokens with their log-probabilities, and each chosen one's, in the distribution it was chosen
    from.
    """
    seed: int = 0
    """Seed of sampling, per prompt: the same seed gives a prompt the same tokens in any batch."""
    stop: tuple[str, ...] = field(default=(), metadata={"verbatim": True})
    """Strings that end a completion; they are left out of it. One that is a special token, such as <|eot_id|>, is that
    token's id among stop_token_ids, too.
    """
    stop_token_ids: tuple[int, ...] = ()
    """Tokens that end a completion, beside the model's end of text."""
    ignore_eos: bool = False
    """Go on past the end-of-text token."""
    max_pending: int = 16
    """Tokens that may wait for their deeper keys and values before the deep layers run for all of them."""
    prefill_chunk: int = 512
    """Tokens of prompts that one step reads at most, so that a long prompt does not hold up the others."""
    max_batch_size: int = 32
    """Completions that are made at a time; others wait."""
    reuse_prefixes: bool = True
    """A prompt that begins as an earlier one did takes the keys and values that are still there, instead of computing
    them.
    """
    cache_tokens: int | None = None
    """Tokens that the KV cache holds, all completions together; requests wait for room. By default what the prompts at
    hand need, up to max_batch_size of them.
    """
