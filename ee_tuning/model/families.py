"""What a Hugging Face family fixes about its models, and what of a config.json would be ignored and is therefore refused.

A family is data here: the keys of its config.json in Llama's spelling, its defaults, and the fields of ModelConfig that it sets.
"""
from pathlib import Path
from typing import Any, Literal

from ee_tuning.errors import InputError

Family = Literal["llama", "mistral", "qwen2", "qwen3", "gpt2"]

_FIELDS: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {},
    "qwen2": {"has_qkv_bias": True},
    "qwen3": {"has_qk_norm": True},
    "gpt2": {"norm": "layer", "position": "learned", "is_gated": False, "has_linear_bias": True},
}
"""Fields of ModelConfig in which a family differs from Llama."""

_DEFAULTS: dict[str, dict[str, Any]] = {
    "mistral": {"num_key_value_heads": 8, "sliding_window": 4096},
    "qwen2": {"num_key_value_heads": 32, "sliding_window": 4096, "max_window_layers": 28},
    "qwen3": {"num_key_value_heads": 32, "head_dim": 128, "sliding_window": 4096, "max_window_layers": 28},
    "gpt2": {"tie_word_embeddings": True, "layer_norm_epsilon": 1e-5, "activation_function": "gelu_new"},
}
"""What transformers takes where config.json is silent, as far as it is not what it takes for Llama."""

_GPT2_NAMES = {"hidden_size": "n_embd", "num_hidden_layers": "n_layer", "num_attention_heads": "n_head",
               "max_position_embeddings": "n_positions"}

_LLAMA_SHAPED: dict[str, tuple[Any, ...]] = {
    "mlp_bias": (False, None), "hidden_act": ("silu", None), "partial_rotary_factor": (1, 1.0, None)}
_ALLOWED: dict[str, dict[str, tuple[Any, ...]]] = {
    "llama": {**_LLAMA_SHAPED, "attention_bias": (False, None)},
    "mistral": _LLAMA_SHAPED,
    "qwen2": _LLAMA_SHAPED,
    "qwen3": {**_LLAMA_SHAPED, "attention_bias": (False, None)},
    "gpt2": {"scale_attn_weights": (True, None), "scale_attn_by_inverse_layer_idx": (False, None), "add_cross_attention": (False, None)},
}
"""Keys that change what a model computes, and the values that this project computes."""

ACTIVATIONS = {"silu": "silu", "gelu": "gelu", "relu": "relu", "gelu_new": "gelu_tanh", "gelu_fast": "gelu_tanh",
                "gelu_pytorch_tanh": "gelu_tanh"}


def in_llama_spelling(raw: dict[str, Any], path: Path) -> dict[str, Any]:
    """A parsed config.json with its family's defaults, under the keys of Llama's. `path` is named in errors.

    Raises InputError where the family is not supported, or a key asks for something that would be ignored.
    """
    family = raw.get("model_type")
    if not isinstance(family, str) or family not in _FIELDS:
        raise InputError(f"{path}: model_type must be one of {', '.join(_FIELDS)}, got {family}; other families are not supported yet")
    full = {**_DEFAULTS.get(family, {}), **raw}
    for key, allowed in _ALLOWED[family].items():
        value = (full.get("rope_parameters") or {}).get(key, full.get(key))
        if value not in allowed:
            raise InputError(f"{path}: {key} = {value} is not supported for model_type {family} (must be {allowed[0]})")
    if family == "gpt2":
        full.update({ours: positive_number(full, theirs, path) for ours, theirs in _GPT2_NAMES.items()})
        full.update(rms_norm_eps=full["layer_norm_epsilon"], intermediate_size=full.get("n_inner") or 4 * full["n_embd"],
                    hidden_act=full["activation_function"])
    _refuse_active_window(full, path)
    return full


def family_fields(spelled: dict[str, Any], path: Path) -> dict[str, Any]:
    """The fields of ModelConfig that the family sets. Raises InputError where its activation is none of ours."""
    activation = spelled.get("hidden_act") or "silu"
    if activation not in ACTIVATIONS:
        raise InputError(f"{path}: the activation must be one of {', '.join(ACTIVATIONS)}, got {activation}")
    return {"family": spelled["model_type"], "activation": ACTIVATIONS[activation], **_FIELDS[spelled["model_type"]]}


def fixed_fields(family: Family) -> dict[str, Any]:
    """The fields of ModelConfig in which all models of the family differ from Llama, but for the family itself."""
    return _FIELDS[family]


def positive_number(raw: dict[str, Any], key: str, path: Path) -> int:
    """`raw[key]`. Raises InputError where it is missing or no positive whole number."""
    value = raw.get(key)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise InputError(f"{path}: {key} must be a positive whole number, got {value!r}")
    return value


def _refuse_active_window(full: dict[str, Any], path: Path) -> None:
    """A sliding window is harmless where no position lies behind it."""
    family, layer_types = full["model_type"], full.get("layer_types")
    if family == "mistral":
        slides = full["sliding_window"] is not None
    elif family in ("qwen2", "qwen3"):
        strange = set(layer_types or ()) - {"full_attention", "sliding_attention"}
        if strange:
            raise InputError(f"{path}: layer_types must name full_attention and sliding_attention only, got {sorted(strange)[0]}")
        slides = ("sliding_attention" in layer_types if layer_types is not None else
                  bool(full.get("use_sliding_window")) and full["max_window_layers"] < positive_number(full, "num_hidden_layers", path))
    else:
        slides = False
    positions = positive_number(full, "max_position_embeddings", path)
    if slides and (full["sliding_window"] is None or full["sliding_window"] < positions):
        raise InputError(f"{path}: sliding_window = {full['sliding_window']} is shorter than max_position_embeddings = {positions}, and "
                         "windows are not supported; lower max_position_embeddings to the window to use the model within it")
