"""Checks of a request, before it enters the engine."""

from ee_tuning.engine.kv_cache import KVCache
from ee_tuning.errors import InputError
from ee_tuning.model.early_exit import StagePlan
from ee_tuning.model_config.config import ModelConfig
from ee_tuning.sampling.params import SamplingParams
from ee_tuning.sampling.policy import Policy


def check_request(
    prompt: list[int],
    params: SamplingParams,
    policy: Policy,
    config: ModelConfig,
    plan: StagePlan,
    cache: KVCache,
) -> None:
    """Raises InputError on values that no sampler can use, exits that do not exist, and a prompt that can never fit."""
    params.check(config.vocab_size)
    params.fusion.check(plan.exits, policy)
    if not prompt:
        raise InputError("a prompt must hold at least one token, got an empty one")
    wrong = [token for token in prompt if not 0 <= token < config.vocab_size]
    if wrong:
        raise InputError(
            f"token ids must lie in 0..{config.vocab_size - 1}, the model's vocabulary, got {wrong[0]}; use the tokenizer "
            "that the model was trained with"
        )
    if len(prompt) >= cache.max_length:
        raise InputError(
            f"a prompt must be shorter than the context of {cache.max_length} tokens, got {len(prompt)}; shorten it"
        )
    if min(len(prompt) + params.max_tokens, cache.max_length) > cache.num_places:
        raise InputError(
            f"prompt and max_tokens together must fit the cache of {cache.num_places} tokens, got {len(prompt)} + "
            f"{params.max_tokens}; at most {max(0, cache.num_places - len(prompt))} new tokens fit behind this prompt"
        )
    if unknown := policy.asked - set(plan.exit_layers):
        raise InputError(f"exits must be among {', '.join(map(str, plan.exit_layers)) or 'none'}, got {min(unknown)}")
