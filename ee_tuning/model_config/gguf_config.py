"""Converts a GGUF file's metadata to the Hugging Face config.json of the same model, which other code reads.

Keys of GGUF are documented in ggml's docs/gguf.md; those of a model begin with its architecture, such as
`llama.block_count`.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ee_tuning.errors import InputError

_CLASSES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}
"""Architecture in GGUF, which is also the family's model_type -> its class. Mistral's files say llama, since its layers
are the same.
"""
_NUMBERS = {
    "hidden_size": "embedding_length",
    "intermediate_size": "feed_forward_length",
    "num_hidden_layers": "block_count",
    "num_attention_heads": "attention.head_count",
    "max_position_embeddings": "context_length",
}
_LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
"""Fields of every published Llama 3.1 and later, beside its own factor."""
_END_IDS = ("eos_token_id", "eot_token_id", "eom_token_id")


def config_of_gguf(
    fields: Mapping[str, Any],
    *,
    vocab_size: int,
    has_output: bool,
    rope_factors: NDArray | None,
    path: Path,
) -> dict[str, Any]:
    """Returns the config.json of the model that `fields` describe.

    `rope_factors` [kv_channels / 2] is the tensor `rope_freqs.weight`, by which each frequency is divided, or None.
    Raises InputError, naming `path`, where the architecture is not supported or a field is missing.
    """
    architecture = fields.get("general.architecture")
    if architecture not in _CLASSES:
        raise InputError(
            f"{path} holds a model of architecture {architecture!r}, and GGUF is read for {', '.join(_CLASSES)}; give the "
            "model as a Hugging Face folder"
        )
    own = {
        key.removeprefix(f"{architecture}."): value
        for key, value in fields.items()
        if key.startswith(f"{architecture}.")
    }
    if missing := [key for key in _NUMBERS.values() if not isinstance(own.get(key), int)]:
        raise InputError(
            f"{path} must say {architecture}.{missing[0]}, a whole number, and says {own.get(missing[0])!r}; convert the model again"
        )
    _refuse_unsupported(own, architecture, path)
    heads = own["attention.head_count"]
    width = own.get("attention.key_length") or own["embedding_length"] // max(heads, 1)
    ends = [fields[key] for name in _END_IDS if (key := f"tokenizer.ggml.{name}") in fields]
    return {
        "architectures": [_CLASSES[architecture]],
        "model_type": architecture,
        "vocab_size": vocab_size,
        **{name: own[key] for name, key in _NUMBERS.items()},
        "num_key_value_heads": own.get("attention.head_count_kv") or heads,
        "head_dim": width,
        "rms_norm_eps": float(own.get("attention.layer_norm_rms_epsilon", 1e-5)),
        "hidden_act": "silu",
        "tie_word_embeddings": not has_output,
        "bos_token_id": fields.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": ends[0] if len(ends) == 1 else ends or None,
        "rope_theta": float(own.get("rope.freq_base", 10000.0)),
        "rope_scaling": _rope_scaling(own, rope_factors, width, path),
    }


def _refuse_unsupported(own: Mapping[str, Any], architecture: str, path: Path) -> None:
    if own.get("expert_count"):
        raise InputError(
            f"{path} holds a {architecture} model with {own['expert_count']} experts, which is not read from GGUF; give it as "
            "a Hugging Face folder"
        )
    window = own.get("attention.sliding_window")
    if window and window < own["context_length"]:
        raise InputError(
            f"{path} holds a model whose attention sees the last {window} tokens of {own['context_length']}, which is not "
            "supported; give it as a Hugging Face folder with max_position_embeddings lowered to that"
        )


def _rope_scaling(own: Mapping[str, Any], factors: NDArray | None, width: int, path: Path) -> dict[str, Any] | None:
    kind = own.get("rope.scaling.type", "none")
    if kind in ("linear", "yarn"):
        original = {"original_max_position_embeddings": own.get("rope.scaling.original_context_length")}
        found = {"rope_type": kind, "factor": own.get("rope.scaling.factor"), **(original if kind == "yarn" else {})}
        return {key: value for key, value in found.items() if value is not None}
    if kind != "none":
        raise InputError(
            f"{path}: rope scaling {kind!r} is not read from GGUF; give the model as a Hugging Face folder"
        )
    if factors is None or np.allclose(factors, 1.0):
        return None
    scaling = {"rope_type": "llama3", "factor": float(np.max(factors)), **_LLAMA3}
    wanted = llama3_factors(scaling, float(own.get("rope.freq_base", 10000.0)), width)
    if wanted.shape != factors.shape or not np.allclose(wanted, factors, rtol=1e-4):
        raise InputError(
            f"{path}: the frequencies in rope_freqs.weight are scaled in another way than Llama 3.1's, which is not read from "
            "GGUF; give the model as a Hugging Face folder"
        )
    return scaling


def llama3_factors(scaling: Mapping[str, Any], theta: float, width: int) -> NDArray:  # [width / 2] float64
    """Returns the divisors of rotary frequencies for Llama 3.1's scaling, as llama.cpp's conversion writes them."""
    wavelengths = 2 * np.pi * theta ** (np.arange(0, width, 2) / width)
    original = scaling["original_max_position_embeddings"]
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    smooth = np.clip((original / wavelengths - low) / (high - low), 0.0, 1.0)
    return 1.0 / ((1.0 - smooth) / scaling["factor"] + smooth)
