"""Section `generation`: the decoder."""

from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any, Literal

from ee_tuning.config.paths import PATH

Measure = Literal["max_probability", "margin", "entropy"]


def without_overruled(keys: dict[str, Any], given: Collection[str]) -> dict[str, Any]:
    """Returns the section's `keys` without a calibration, if the `given` keys name a threshold or a measure."""
    return {
        key: value for key, value in keys.items() if key != "calibration" or not {"threshold", "measure"} & set(given)
    }


@dataclass(frozen=True, kw_only=True)
class GenerationSection:
    """The decoder."""

    policy: Literal["full", "threshold", "fixed", "speculative"] = "threshold"
    """full: never exits. threshold: exits at the first exit that is confident enough. fixed: always exits at
    exit_layer. speculative: exits draft and the full model checks, so the tokens are the full model's.
    """
    threshold: tuple[float, ...] = (0.8,)
    """Confidence from which a token exits: one for all exits, or one for each, shallow to deep. Above 1 never."""
    measure: Measure = "max_probability"
    """Measure of confidence in the plain softmax: the largest probability, its margin over the second, or 1 - entropy /
    ln(vocabulary).
    """
    calibration: str | None = field(default=None, metadata=PATH)
    """File written by `ee-tuning calibrate`, whose thresholds and measure replace threshold and measure. Either of
    these on the command line overrules a file that the job names.
    """
    exit_layer: int | None = None
    """The exit of the policy `fixed`."""
    budget: float | None = None
    """Instead of exit_layer: a share of the time per token at full depth, such as 0.5. The policy is then `fixed`, at
    the deepest exit that takes at most this, measured when the model is loaded. An interrupted output goes on with the
    exit that it began with.
    """
    prompt_lookup: bool = True
    """Whether the policy `speculative` also drafts what followed the newest tokens earlier in the text, where it
    repeats itself. Exits draft elsewhere.
    """
    max_new_tokens: int = 100
    """Most tokens of a completion."""
    min_new_tokens: int = 0
    """Fewest tokens of a completion."""
    n: int = 1
    """Completions of each prompt."""
    temperature: float = 0.0
    """0 is greedy."""
    top_k: int = 0
    """Sample from this many likeliest tokens; 0 for all."""
    top_p: float = 1.0
    """Sample from the likeliest tokens that together reach this probability."""
    min_p: float = 0.0
    """Sample from tokens at least as likely as this share of the likeliest token's probability."""
    repetition_penalty: float = 1.0
    """Divides positive logits, and multiplies negative ones, of tokens that occurred before; 0.01 to 100."""
    presence_penalty: float = 0.0
    """Subtracted from the logits of tokens that are in the completion."""
    frequency_penalty: float = 0.0
    """Subtracted from a token's logit for each time it is in the completion."""
    contrast_layers: tuple[int, ...] = ()
    """Exits that the final head's logits are contrasted with (DoLa, arXiv 2309.03883): a token is chosen by how much
    likelier the final head finds it than the exit. Of several, the exit that differs most at the token. Tokens that
    leave early are their exit's.
    """
    contrast_alpha: float = 0.1
    """Share of the likeliest token's probability that the final head has to give a token for contrast_layers to choose
    it.
    """
    fuse_layer: int | None = None
    """Exit whose log-probabilities are mixed with the final head's, with the weight fuse_weight. Tokens that leave
    early are their exit's.
    """
    fuse_weight: float = 0.5
    """Weight of fuse_layer's log-probabilities, 0 to 1; the final head's have the rest."""
    logprobs: int | None = None
    """Return this many likeliest tokens with their log-probabilities, and each chosen token's, in the distribution it
    was chosen from.
    """
    seed: int = 0
    """Seed of sampling, per prompt: a prompt with the same seed gets the same tokens in any batch."""
    stop: tuple[str, ...] = field(default=(), metadata={"verbatim": True})
    """Strings that end a completion and are left out of it. A special token such as <|eot_id|> also becomes one of
    stop_token_ids.
    """
    stop_token_ids: tuple[int, ...] = ()
    """Tokens that end a completion, beside the model's end of text."""
    ignore_eos: bool = False
    """Continue after the end-of-text token."""
    max_pending: int = 16
    """Most tokens that wait for their deeper keys and values before the deep layers run for all of them."""
    prefill_chunk: int = 512
    """Most tokens of prompts that one step reads, so that a long prompt does not delay the others."""
    max_batch_size: int = 32
    """Completions decoded at a time; others wait."""
    reuse_prefixes: bool = True
    """Whether a prompt that begins like an earlier one reuses the keys and values that are still cached."""
    cache_tokens: int | None = None
    """Tokens in the KV cache, for all completions together; requests wait for space. The default is the need of the
    current prompts, for up to max_batch_size of them.
    """
