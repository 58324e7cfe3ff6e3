"""Converts Megatron's saved arguments, or a file of such arguments, to a backbone's shape, and back."""

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch

from ee_tuning.errors import InputError
from ee_tuning.json_file import read_json
from ee_tuning.model_config.config import STORED_DTYPES, ModelConfig, RopeConfig, model_config_from_hf
from ee_tuning.model_config.families import Family, check_count, fixed_fields
from ee_tuning.yaml_file import parse_yaml

_REQUIRED = ("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "max_position_embeddings")
_LLAMA: dict[str, Any] = {
    "normalization": "RMSNorm",
    "swiglu": True,
    "add_bias_linear": False,
    "add_qkv_bias": False,
    "qk_layernorm": False,
    "position_embedding_type": "rope",
}
_FAMILIES: dict[Family, dict[str, Any]] = {
    "llama": _LLAMA,
    "qwen2": {**_LLAMA, "add_qkv_bias": True},
    "qwen3": {**_LLAMA, "qk_layernorm": True},
    "gpt2": {
        **_LLAMA,
        "normalization": "LayerNorm",
        "swiglu": False,
        "add_bias_linear": True,
        "position_embedding_type": "learned_absolute",
    },
}
"""Megatron's arguments of each family; missing ones are Llama's. To Megatron a Mistral is a Llama; a config.json
distinguishes them.
"""
_WITH_EXPERTS: dict[Family, Family] = {"llama": "mixtral", "qwen3": "qwen3_moe"}
"""Families with experts, by the family without."""
_ALLOWED: dict[str, tuple[Any, ...]] = {
    "rotary_percent": (1.0,),
    "rotary_interleaved": (False,),
    "multi_latent_attention": (False,),
    "apply_layernorm_1p": (False,),
    "apply_residual_connection_post_layernorm": (False,),
    "squared_relu": (False,),
    "quick_geglu": (False,),
    "window_size": (None,),
    "softmax_type": ("vanilla",),
    "attention_output_gate": (False,),
    "linear_attention_freq": (None,),
    "no_rope_freq": (None,),
    "qk_l2_norm": (False,),
    "heterogeneous_layers_config_path": (None,),
}
"""Arguments that change what the layers compute, and the supported values; a missing argument is supported."""
_OPTIONAL = (
    "num_query_groups",
    "group_query_attention",
    "kv_channels",
    "vocab_size",
    "padded_vocab_size",
    "norm_epsilon",
    "layernorm_epsilon",
    "rotary_base",
    "rotary_seq_len_interpolation_factor",
    "use_rope_scaling",
    "rope_scaling_factor",
    "untie_embeddings_and_output_weights",
    "init_method_std",
    "params_dtype",
    "use_rotary_position_embeddings",
    "openai_gelu",
    "bias_gelu_fusion",
    "num_experts",
    "moe_router_topk",
    "moe_ffn_hidden_size",
    "moe_router_pre_softmax",
    "moe_layer_freq",
)
_ALLOWED_OF_EXPERTS: dict[str, tuple[Any, ...]] = {
    "moe_router_score_function": ("softmax",),
    "moe_router_num_groups": (None,),
    "moe_router_group_topk": (None,),
    "moe_router_topk_limited_devices": (None,),
    "moe_router_topk_scaling_factor": (None, 1.0),
    "moe_router_enable_expert_bias": (False,),
    "moe_shared_expert_intermediate_size": (None,),
    "moe_expert_capacity_factor": (None,),
    "moe_apply_probs_on_input": (False,),
    "moe_latent_size": (None,),
    "moe_use_legacy_grouped_gemm": (False,),
}
"""More of _ALLOWED, for experts. Noise, losses and dispatchers affect training only."""


def read_megatron_config(saved: Mapping[str, Any] | None, shape: Path | None, where: Path) -> ModelConfig:
    """Returns the shape of a Megatron model from the arguments `saved` with it (or None), overridden by the file
    `shape`.

    `shape` is JSON or YAML with Megatron's names, or a Hugging Face config.json (a file with a model_type), which then
    replaces everything. `where` is named in errors. Raises InputError on missing or unsupported arguments.
    """
    if shape is None:
        if saved is None:
            raise InputError(
                f"{where} holds no saved arguments, so the model's shape must be given: --config FILE, a Hugging Face "
                "config.json, or YAML with Megatron's names (num_layers, hidden_size, …)"
            )
        return model_config_from_megatron(saved, where)
    fields = _read(shape)
    if "model_type" in fields:
        return model_config_from_hf(fields, shape)
    known = {*_REQUIRED, *_OPTIONAL, *_LLAMA, *_ALLOWED, *_ALLOWED_OF_EXPERTS}
    for key in fields:
        if key not in known:
            raise InputError(f"{shape}: unknown key {key}; known keys: {', '.join(sorted(known))}")
    return model_config_from_megatron({**(saved or {}), **fields}, shape)


def model_config_from_megatron(arguments: Mapping[str, Any], path: Path) -> ModelConfig:
    """Does the work of `read_megatron_config` on parsed arguments. `path` is named in errors."""
    arguments = _of_blocks(arguments, path)
    _refuse_what_would_be_ignored(arguments, path)
    family = _family(arguments, path)
    numbers: dict[str, Any] = {key: _number(arguments, key, path) for key in _REQUIRED}
    heads = numbers["num_attention_heads"]
    has_groups = arguments.get("group_query_attention", "num_query_groups" in arguments)
    vocabulary = "vocab_size" if arguments.get("vocab_size") is not None else "padded_vocab_size"
    dtype = str(arguments.get("params_dtype") or "float32").removeprefix("torch.")
    epsilon = arguments.get("norm_epsilon", arguments.get("layernorm_epsilon", 1e-5))
    if arguments.get("num_experts"):
        numbers = {**numbers, **_expert_fields(arguments, family, numbers, path)}
        family = _WITH_EXPERTS.get(family, family)
    config = ModelConfig(
        family=family,
        activation=_activation(arguments),
        **fixed_fields(family),
        **numbers,
        num_query_groups=_number(arguments, "num_query_groups", path) if has_groups else heads,
        kv_channels=_number(arguments, "kv_channels", path)
        if arguments.get("kv_channels")
        else numbers["hidden_size"] // heads,
        vocab_size=_number(arguments, vocabulary, path),
        norm_epsilon=_real(epsilon, "norm_epsilon", path),
        rope=_rope(arguments, path),
        ties_embeddings=not arguments.get("untie_embeddings_and_output_weights", False),
        init_std=_real(arguments.get("init_method_std", 0.02), "init_method_std", path),
        stored_dtype=dtype if dtype in STORED_DTYPES else "float32",
    )
    if family == "gpt2" and (config.num_query_groups != heads or config.kv_channels * heads != config.hidden_size):
        raise InputError(
            f"{path}: a model with learned positions must have num_query_groups = num_attention_heads and heads as wide as "
            "hidden_size / num_attention_heads (GPT-2's), and has not; others are not supported"
        )
    return config


def megatron_arguments(config: ModelConfig) -> dict[str, Any]:
    """Returns the shape as arguments of Megatron-LM, as its checkpoints hold them: the inverse of
    `model_config_from_megatron`.
    """
    plain = {with_experts: without for without, with_experts in _WITH_EXPERTS.items()}.get(config.family, config.family)
    return {
        **_FAMILIES["llama" if plain == "mistral" else plain],
        **_expert_arguments(config),
        "add_qkv_bias": config.has_qkv_bias,
        "num_layers": config.num_layers,
        "hidden_size": config.hidden_size,
        "ffn_hidden_size": config.ffn_hidden_size,
        "num_attention_heads": config.num_attention_heads,
        "group_query_attention": config.num_query_groups < config.num_attention_heads,
        "num_query_groups": config.num_query_groups,
        "kv_channels": config.kv_channels,
        "max_position_embeddings": config.max_position_embeddings,
        "seq_length": config.max_position_embeddings,
        "norm_epsilon": config.norm_epsilon,
        "untie_embeddings_and_output_weights": not config.ties_embeddings,
        "rotary_base": round(config.rope.theta),
        "rotary_percent": 1.0,
        "rotary_seq_len_interpolation_factor": round(config.rope.factor) if config.rope.kind == "linear" else None,
        "use_rope_scaling": config.rope.kind == "llama3",
        "rope_scaling_factor": config.rope.factor,
        "openai_gelu": config.activation == "gelu_tanh",
        "bias_gelu_fusion": False,
        "init_method_std": config.init_std,
        "vocab_size": config.vocab_size,
        "padded_vocab_size": config.vocab_size,
        "params_dtype": getattr(torch, config.stored_dtype),
    }


def missing_from_megatron_args(config: ModelConfig) -> list[str]:
    """Returns the properties of a model that Megatron-LM has no argument for, so that the user of its weights must add
    them.
    """
    rope = config.rope
    megatron_rope = RopeConfig(
        kind="llama3",
        theta=rope.theta,
        factor=rope.factor,
        original_max_position_embeddings=8192,
        low_freq_factor=1.0,
        high_freq_factor=4.0,
    )
    missing = []
    is_whole = rope.kind != "linear" or rope.factor == round(rope.factor)
    if (
        rope.kind in ("yarn", "dynamic", "longrope")
        or (rope.kind == "llama3" and rope != megatron_rope)
        or not is_whole
    ):
        missing.append(f"rope scaling {rope.kind} with these numbers")
    if rope.theta != round(rope.theta):
        missing.append(f"a rope_theta of {rope.theta}")
    if config.has_proj_bias:
        missing.append("a bias of the attention only")
    if config.activation == "relu":
        missing.append("the activation relu")
    return missing


def _read(shape: Path) -> dict[str, Any]:
    try:
        fields = read_json(shape) if shape.suffix == ".json" else parse_yaml(shape.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"model.config must be a file, but {shape} can not be read: {error.strerror}") from error
    except ValueError as error:
        raise InputError(f"{shape} is neither YAML nor JSON: {error}") from error
    if not isinstance(fields, dict):
        raise InputError(f"{shape} must hold keys such as num_layers, got {type(fields).__name__}")
    return fields


def _of_blocks(arguments: Mapping[str, Any], path: Path) -> Mapping[str, Any]:
    """Returns a HybridModel's arguments, which count attention and MLP as layers of their own, as a GPTModel's, which
    count blocks of both.
    """
    pattern = arguments.get("hybrid_layer_pattern") or arguments.get("hybrid_override_pattern")
    if not pattern:
        return arguments
    layers = re.sub(r"[|\[\]]", "", str(pattern).partition("/")[0])  # cuts into stages, groups; of further tokens
    if not re.fullmatch(r"(\*[-E])+", layers):
        raise InputError(
            f"{path}: hybrid_layer_pattern = {pattern} is not supported (must be attention and MLP in turn, *-*-…, or *E*E… "
            "with experts)"
        )
    mlps = layers[1::2]
    frequency = [int(kind == "E") for kind in mlps]
    experts = {"moe_layer_freq": frequency if "-" in mlps else 1} if "E" in mlps else {"num_experts": None}
    return {**arguments, "num_layers": len(mlps), **experts}


def _refuse_what_would_be_ignored(arguments: Mapping[str, Any], path: Path) -> None:
    for key, allowed in {**_ALLOWED, **(_ALLOWED_OF_EXPERTS if arguments.get("num_experts") else {})}.items():
        value = arguments.get(key, allowed[0])
        if value not in allowed:
            raise InputError(f"{path}: {key} = {value} is not supported (must be {allowed[0]})")
    if arguments.get("swiglu", True) and arguments.get("openai_gelu"):
        raise InputError(f"{path}: openai_gelu = True is not supported beside swiglu (must be False)")


def _family(arguments: Mapping[str, Any], path: Path) -> Family:
    ways = {key: arguments.get(key, value) for key, value in _LLAMA.items()}
    if arguments.get("use_rotary_position_embeddings"):
        ways["position_embedding_type"] = "rope"
    ways["add_qkv_bias"] = ways["add_qkv_bias"] and not ways["add_bias_linear"]  # which includes such a bias
    differing = {family: [key for key in ways if ways[key] != wanted[key]] for family, wanted in _FAMILIES.items()}
    nearest = min(differing, key=lambda family: len(differing[family]))
    for key in differing[nearest]:
        raise InputError(
            f"{path}: {key} = {ways[key]} is not supported (must be {_FAMILIES[nearest][key]} in a {nearest}, the nearest "
            "family)"
        )
    return nearest


def _expert_fields(arguments: Mapping[str, Any], family: Family, numbers: dict[str, Any], path: Path) -> dict[str, Any]:
    experts = _number(arguments, "num_experts", path)
    topk = _number({"moe_router_topk": 2, **arguments}, "moe_router_topk", path)
    shares = bool(arguments.get("moe_router_pre_softmax", False))
    if family not in _WITH_EXPERTS or (family == "llama" and shares):
        raise InputError(
            f"{path}: num_experts = {experts} is not supported in a {family}{' with moe_router_pre_softmax' * shares}; layers "
            "with experts must be Mixtral's, or, with qk_layernorm, Qwen3-MoE's"
        )
    if topk > experts or (topk == 1 and not shares):
        raise InputError(
            f"{path}: moe_router_topk must be at most num_experts = {experts}, and at least 2 without moe_router_pre_softmax, "
            f"got {topk}"
        )
    frequency, num_layers = arguments.get("moe_layer_freq", 1), numbers["num_layers"]
    if isinstance(frequency, int) and frequency >= 1:
        frequency = [int(index % frequency == 0) for index in range(num_layers)]
    if not isinstance(frequency, list) or len(frequency) != num_layers or not set(frequency) <= {0, 1}:
        raise InputError(
            f"{path}: moe_layer_freq must be at least 1, or a 0 or a 1 for each of the {num_layers} layers, got {frequency}"
        )
    dense = tuple(layer for layer, has_experts in enumerate(frequency, 1) if not has_experts)
    width = _number(
        arguments, "moe_ffn_hidden_size" if arguments.get("moe_ffn_hidden_size") else "ffn_hidden_size", path
    )
    return {
        "num_experts": experts,
        "moe_router_topk": topk,
        "moe_ffn_hidden_size": width,
        "renormalizes_router": not shares,
        "dense_layers": dense,
        "ffn_hidden_size": numbers["ffn_hidden_size"] if dense else width,
    }


def moe_layer_freq(config: ModelConfig) -> int | list[int]:
    """Returns 1 where every layer has experts (Megatron's checkpoints stack them then), else a 1 or 0 per layer."""
    return [int(config.has_experts(layer)) for layer in range(1, config.num_layers + 1)] if config.dense_layers else 1


def _expert_arguments(config: ModelConfig) -> dict[str, Any]:
    if not config.num_experts:
        return {"num_experts": None}
    return {
        "num_experts": config.num_experts,
        "moe_router_topk": config.moe_router_topk,
        "moe_ffn_hidden_size": config.moe_ffn_hidden_size,
        "moe_router_pre_softmax": not config.renormalizes_router,
        "moe_router_load_balancing_type": "none",
        "moe_layer_freq": moe_layer_freq(config),
        "moe_grouped_gemm": False,
    }


def _activation(arguments: Mapping[str, Any]) -> Literal["silu", "gelu", "gelu_tanh"]:
    if arguments.get("swiglu", True):
        return "silu"
    # Megatron's fusion of bias and GELU computes the tanh approximation.
    return "gelu_tanh" if arguments.get("openai_gelu") or arguments.get("bias_gelu_fusion") else "gelu"


def _number(arguments: Mapping[str, Any], key: str, path: Path) -> int:
    value = arguments.get(key)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise InputError(
            f"{path}: {key} must be a positive whole number, got {value!r}; spell it out in a file given by --config"
        )
    check_count(key, value, path)
    return value


def _real(value: Any, key: str, path: Path) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise InputError(f"{path}: {key} must be a number, got {value!r}; spell it out in a file given by --config")
    return float(value)


def _rope(arguments: Mapping[str, Any], path: Path) -> RopeConfig:
    theta = _real(arguments.get("rotary_base", 10000), "rotary_base", path)
    interpolation = arguments.get("rotary_seq_len_interpolation_factor")
    if arguments.get("use_rope_scaling"):  # Megatron fixes the other three numbers of Llama 3.1's scaling
        return RopeConfig(
            kind="llama3",
            theta=theta,
            factor=_real(arguments.get("rope_scaling_factor", 8.0), "rope_scaling_factor", path),
            original_max_position_embeddings=8192,
            low_freq_factor=1.0,
            high_freq_factor=4.0,
        )
    if interpolation is not None and interpolation != 1:
        return RopeConfig(
            kind="linear", theta=theta, factor=_real(interpolation, "rotary_seq_len_interpolation_factor", path)
        )
    return RopeConfig(theta=theta)
