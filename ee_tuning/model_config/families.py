"""The properties of each Hugging Face family, and config.json keys that are refused because they would be ignored.

A family is data: its config.json keys under Llama's names, its defaults, and the fields of ModelConfig that it sets.
"""

import math
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

from ee_tuning.errors import InputError

Family = Literal["llama", "mistral", "qwen2", "qwen3", "gpt2", "mixtral", "qwen3_moe"]

_FIELDS: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {},
    "qwen2": {"has_qkv_bias": True},
    "qwen3": {"has_qk_norm": True},
    "gpt2": {"norm": "layer", "position": "learned", "is_gated": False, "has_linear_bias": True},
    "mixtral": {},
    "qwen3_moe": {"has_qk_norm": True},
}
"""Fields of ModelConfig in which a family differs from Llama."""

_DEFAULTS: dict[str, dict[str, Any]] = {
    "mistral": {"num_key_value_heads": 8, "sliding_window": 4096},
    "qwen2": {"num_key_value_heads": 32, "sliding_window": 4096, "max_window_layers": 28},
    "qwen3": {"num_key_value_heads": 32, "head_dim": 128, "sliding_window": 4096, "max_window_layers": 28},
    "gpt2": {"tie_word_embeddings": True, "layer_norm_epsilon": 1e-5, "activation_function": "gelu_new"},
    "mixtral": {
        "num_key_value_heads": 8,
        "rms_norm_eps": 1e-5,
        "rope_theta": 1e6,
        "sliding_window": None,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
    },
    "qwen3_moe": {
        "num_key_value_heads": 4,
        "sliding_window": 4096,
        "num_local_experts": 128,
        "num_experts_per_tok": 8,
        "moe_intermediate_size": 768,
        "norm_topk_prob": False,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
    },
}
"""Defaults of transformers for missing keys, where they differ from Llama's."""

_GPT2_NAMES = {
    "hidden_size": "n_embd",
    "num_hidden_layers": "n_layer",
    "num_attention_heads": "n_head",
    "max_position_embeddings": "n_positions",
}

_LLAMA_SHAPED: dict[str, tuple[Any, ...]] = {
    "mlp_bias": (False, None),
    "hidden_act": ("silu", None),
    "partial_rotary_factor": (1, 1.0, None),
}
_NO_SHARED_EXPERTS: dict[str, tuple[Any, ...]] = dict.fromkeys(
    ("num_shared_experts", "n_shared_experts", "shared_expert_intermediate_size"), (0, None)
)
_ALLOWED: dict[str, dict[str, tuple[Any, ...]]] = {
    "llama": _LLAMA_SHAPED,
    "mistral": _LLAMA_SHAPED,
    "qwen2": _LLAMA_SHAPED,
    "qwen3": _LLAMA_SHAPED,
    "gpt2": {
        "scale_attn_weights": (True, None),
        "scale_attn_by_inverse_layer_idx": (False, None),
        "add_cross_attention": (False, None),
    },
    "mixtral": {**_LLAMA_SHAPED, **_NO_SHARED_EXPERTS, "attention_bias": (False, None)},
    "qwen3_moe": {**_LLAMA_SHAPED, **_NO_SHARED_EXPERTS},
}
"""Keys that change what a model computes, and the values that this project supports."""

WITH_ATTENTION_BIAS = ("llama", "qwen3", "qwen3_moe")
"""Families whose `attention_bias` decides about the biases of queries, keys, values and the attention's output."""

ACTIVATIONS = {
    "silu": "silu",
    "gelu": "gelu",
    "relu": "relu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
}


def with_llama_keys(raw: dict[str, Any], path: Path) -> dict[str, Any]:
    """Returns a parsed config.json with its family's defaults, under Llama's keys. `path` is named in errors.

    Raises InputError where the family is not supported, or a key asks for something that would be ignored.
    """
    family = raw.get("model_type")
    if not isinstance(family, str) or family not in _FIELDS:
        raise InputError(
            f"{path}: model_type must be one of {', '.join(_FIELDS)}, got {family}; other families are not supported yet"
        )
    full = {**_DEFAULTS.get(family, {}), **raw}
    if "num_local_experts" in full:  # older versions write num_experts for some families
        full["num_local_experts"] = raw.get("num_experts", full["num_local_experts"])
        if raw.get("num_local_experts", full["num_local_experts"]) != full["num_local_experts"]:
            raise InputError(
                f"{path}: num_experts = {raw['num_experts']} and num_local_experts = {raw['num_local_experts']} must be the "
                "same; leave one of them out"
            )
    for key in ("rope_parameters", "rope_scaling"):
        if full.get(key) is not None and not isinstance(full[key], dict):
            raise InputError(f"{path}: {key} must be an object, got {full[key]!r:.60}; fetch the model's own file")
    for key, allowed in _ALLOWED[family].items():
        value = (full.get("rope_parameters") or {}).get(key, full.get(key))
        if value not in allowed:
            raise InputError(f"{path}: {key} = {value} is not supported for model_type {family} (must be {allowed[0]})")
    if family == "gpt2":
        full.update({ours: positive_number(full, theirs, path) for ours, theirs in _GPT2_NAMES.items()})
        full.update(
            rms_norm_eps=full["layer_norm_epsilon"],
            intermediate_size=full.get("n_inner") or 4 * full["n_embd"],
            hidden_act=full["activation_function"],
        )
    _refuse_active_window(full, path)
    return full


def family_fields(spelled: dict[str, Any], path: Path) -> dict[str, Any]:
    """Returns the fields of ModelConfig that the family sets. Raises InputError where its activation is not
    supported.
    """
    activation = spelled.get("hidden_act") or "silu"
    if activation not in ACTIVATIONS:
        raise InputError(f"{path}: the activation must be one of {', '.join(ACTIVATIONS)}, got {activation}")
    fields = {"family": spelled["model_type"], "activation": ACTIVATIONS[activation], **_FIELDS[spelled["model_type"]]}
    if spelled["model_type"] in WITH_ATTENTION_BIAS and truth_value(spelled, "attention_bias", path):
        fields.update(has_qkv_bias=True, has_proj_bias=True)
    if "num_local_experts" in spelled:
        return {**fields, **_expert_fields(spelled, path)}
    return {**fields, "ffn_hidden_size": positive_number(spelled, "intermediate_size", path)}


def _expert_fields(spelled: dict[str, Any], path: Path) -> dict[str, Any]:
    """Returns the fields of experts.

    The router's noise and the balancing losses apply to training the model only, so they are ignored here.
    """
    experts, topk = (positive_number(spelled, key, path) for key in ("num_local_experts", "num_experts_per_tok"))
    asked = _DEFAULTS[spelled["model_type"]]  # transformers does not read other keys of experts for this family
    width = positive_number(
        spelled, "moe_intermediate_size" if "moe_intermediate_size" in asked else "intermediate_size", path
    )
    renormalizes = "norm_topk_prob" not in asked or truth_value(spelled, "norm_topk_prob", path)
    if topk > experts or (topk == 1 and renormalizes):
        raise InputError(
            f"{path}: num_experts_per_tok must be at most num_experts = {experts}"
            f"{', and at least 2 where their weights are renormalized' if renormalizes else ''}, got {topk}"
        )
    dense = _dense_layers(spelled, path) if "mlp_only_layers" in asked else ()
    return {
        "num_experts": experts,
        "moe_router_topk": topk,
        "moe_ffn_hidden_size": width,
        "renormalizes_router": renormalizes,
        "dense_layers": dense,
        "ffn_hidden_size": positive_number(spelled, "intermediate_size", path) if dense else width,
    }


def _dense_layers(spelled: dict[str, Any], path: Path) -> tuple[int, ...]:
    """Returns the layers without experts, counted from 1."""
    num_layers, step = (positive_number(spelled, key, path) for key in ("num_hidden_layers", "decoder_sparse_step"))
    listed = spelled["mlp_only_layers"]
    listed = [] if listed is None else listed
    if not isinstance(listed, list) or any(type(each) is not int or not 0 <= each < num_layers for each in listed):
        raise InputError(
            f"{path}: mlp_only_layers must be a list of whole numbers in 0..{num_layers - 1}, got {listed!r}"
        )
    return tuple(layer for layer in range(1, num_layers + 1) if layer - 1 in listed or layer % step)


_COUNTED = ("num_hidden_layers", "num_layers", "num_local_experts", "num_experts")
MOST_COUNTED = 100_000
"""Most layers, and experts of a layer."""
_MOST = 1 << 40
"""More than any other size of a model: numbers of bytes made of it are still ones that files and tensors can have."""


def fixed_fields(family: Family) -> dict[str, Any]:
    """Returns the fields of ModelConfig in which all models of the family differ from Llama, except the family."""
    return _FIELDS[family]


def positive_number(raw: dict[str, Any], key: str, path: Path) -> int:
    """Returns `raw[key]`. Raises InputError where it is missing, no positive integer, or above what a model has."""
    value = raw.get(key)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise InputError(f"{path}: {key} must be a positive whole number, got {value!r:.60}")
    if value > _MOST:
        raise InputError(f"{path}: {key} must be at most {_MOST:,}, got {value!r:.60}; fetch the model's own file")
    check_count(key, value, path)
    return value


def optional_number(raw: dict[str, Any], key: str, path: Path) -> int | None:
    """Returns `raw[key]`, or None where it is missing or null. Raises like `positive_number`."""
    return None if raw.get(key) is None else positive_number(raw, key, path)


def real_number(value: Any, key: str, path: Path, *, is_positive: bool = False) -> float:
    """Returns the value of `key` as a float. Raises InputError where it is none from 0 on, or above 0."""
    number = math.nan
    if isinstance(value, int | float | str) and not isinstance(value, bool):
        with suppress(ValueError, OverflowError):
            number = float(value)  # YAML reads 1e-5 as a text
    if not 0 <= number < math.inf or (is_positive and not number):
        rule = "above 0" if is_positive else "from 0 on"
        raise InputError(f"{path}: {key} must be a number {rule}, got {value!r:.60}; fetch the model's own file")
    return number


def truth_value(raw: dict[str, Any], key: str, path: Path, *, default: bool = False) -> bool:
    """Returns `raw[key]`, or `default` where it is missing or null. Raises InputError where it is neither true nor
    false: the text "false" would count as true.
    """
    value = raw.get(key)
    if value is not None and not isinstance(value, bool):
        raise InputError(f"{path}: {key} must be true or false, got {value!r:.60}; fetch the model's own file")
    return default if value is None else value


def check_count(key: str, value: int, path: Path) -> None:
    """Raises InputError on numbers of layers and experts that no model has: each of them is walked through."""
    if key in _COUNTED and value > MOST_COUNTED:
        raise InputError(
            f"{path}: {key} must be at most {MOST_COUNTED:,}, got {value!r:.60}; fetch the model's own file"
        )


def _refuse_active_window(full: dict[str, Any], path: Path) -> None:
    """Raises InputError on a sliding window shorter than the context. A longer one has no effect."""
    family, layer_types = full["model_type"], full.get("layer_types")
    if family in ("mistral", "mixtral"):
        slides = full["sliding_window"] is not None
    elif family in ("qwen2", "qwen3"):
        strange = set(layer_types or ()) - {"full_attention", "sliding_attention"}
        if strange:
            raise InputError(
                f"{path}: layer_types must name full_attention and sliding_attention only, got {sorted(strange)[0]}"
            )
        slides = (
            "sliding_attention" in layer_types
            if layer_types is not None
            else truth_value(full, "use_sliding_window", path)
            and full["max_window_layers"] < positive_number(full, "num_hidden_layers", path)
        )
    else:
        slides = family == "qwen3_moe" and truth_value(full, "use_sliding_window", path)
    positions = positive_number(full, "max_position_embeddings", path)
    if slides and (full["sliding_window"] is None or full["sliding_window"] < positions):
        raise InputError(
            f"{path}: sliding_window = {full['sliding_window']} is shorter than max_position_embeddings = {positions}, and "
            "windows are not supported; lower max_position_embeddings to the window to use the model within it"
        )
