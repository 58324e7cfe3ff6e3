"""Writes a model's shape as a Hugging Face config.json in transformers' new format: the inverse of
`read_model_config`.
"""

from typing import Any

from ee_tuning.errors import InputError
from ee_tuning.model_config.config import ModelConfig, RopeConfig
from ee_tuning.model_config.families import ACTIVATIONS, WITH_ATTENTION_BIAS, Family

HUGGINGFACE_CLASSES: dict[Family, str] = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "gpt2": "GPT2LMHeadModel",
    "mixtral": "MixtralForCausalLM",
    "qwen3_moe": "Qwen3MoeForCausalLM",
}


def huggingface_config(config: ModelConfig) -> dict[str, Any]:
    """Returns the content of config.json. Unknown beginning and end tokens are null.

    Raises InputError where the family's config.json can not express the model.
    """
    eos = config.eos_token_ids
    shared = {
        "architectures": [HUGGINGFACE_CLASSES[config.family]],
        "model_type": config.family,
        "dtype": config.stored_dtype,
        "vocab_size": config.vocab_size,
        "tie_word_embeddings": config.ties_embeddings,
        "initializer_range": config.init_std,
        "bos_token_id": config.bos_token_id,
        "eos_token_id": None if not eos else eos[0] if len(eos) == 1 else list(eos),
    }
    if config.family == "gpt2":
        return {
            **shared,
            "n_embd": config.hidden_size,
            "n_layer": config.num_layers,
            "n_head": config.num_attention_heads,
            "n_positions": config.max_position_embeddings,
            "n_inner": config.ffn_hidden_size,
            "layer_norm_epsilon": config.norm_epsilon,
            "activation_function": _activation(config),
        }
    if config.family in WITH_ATTENTION_BIAS:
        shared["attention_bias"] = config.has_proj_bias
    return {
        **shared,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.ffn_hidden_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": config.num_query_groups,
        "head_dim": config.kv_channels,
        "max_position_embeddings": config.max_position_embeddings,
        "rms_norm_eps": config.norm_epsilon,
        "hidden_act": _activation(config),
        "rope_parameters": _rope(config.rope),
        **_windows(config),
        **_experts(config),
    }


def _activation(config: ModelConfig) -> str:
    return {ours: theirs for theirs, ours in reversed(ACTIVATIONS.items())}[config.activation]


def _rope(rope: RopeConfig) -> dict[str, Any]:
    fields: dict[str, Any] = {"rope_type": rope.kind, "rope_theta": rope.theta}
    if rope.kind != "default":
        fields["factor"] = rope.factor
    if rope.kind in ("llama3", "yarn", "longrope"):
        fields["original_max_position_embeddings"] = rope.original_max_position_embeddings
    if rope.kind == "llama3":
        fields.update(low_freq_factor=rope.low_freq_factor, high_freq_factor=rope.high_freq_factor)
    if rope.kind == "yarn":
        fields.update(
            beta_fast=rope.beta_fast,
            beta_slow=rope.beta_slow,
            truncate=rope.truncate,
            attention_factor=rope.attention_factor,
        )
    if rope.kind == "longrope":
        fields.update(
            short_factor=list(rope.short_factor),
            long_factor=list(rope.long_factor),
            attention_factor=rope.attention_factor,
        )
    return fields


def _windows(config: ModelConfig) -> dict[str, Any]:
    """Disables sliding windows: no supported model has a window shorter than its context, but transformers' default is
    one.
    """
    if config.family in ("qwen2", "qwen3", "qwen3_moe"):
        return {"use_sliding_window": False, "sliding_window": None}
    return {"sliding_window": None} if config.family in ("mistral", "mixtral") else {}


def _experts(config: ModelConfig) -> dict[str, Any]:
    if not config.num_experts:
        return {}
    fields: dict[str, Any] = {"num_local_experts": config.num_experts, "num_experts_per_tok": config.moe_router_topk}
    if config.family == "qwen3_moe":
        fields.update(
            moe_intermediate_size=config.moe_ffn_hidden_size,
            norm_topk_prob=config.renormalizes_router,
            decoder_sparse_step=1,
            mlp_only_layers=[layer - 1 for layer in config.dense_layers],
        )
    elif config.dense_layers:
        raise InputError(
            f"the config.json of a {config.family} must have experts in every layer, and layers "
            f"{', '.join(map(str, config.dense_layers))} have none; such a model can be used as it is, but not exported"
        )
    return fields
