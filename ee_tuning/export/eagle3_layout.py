"""Published EAGLE-3 heads: config.json and tensor names in two layouts, for reading and writing. Pure functions.

The layouts are that of LlamaForCausalLMEagle3 in vLLM and SGLang, and that of speculators. Layers are counted as in
vLLM: layer n is the output of the first n layers. SGLang reads `eagle_config`, whose numbers are one less.
"""

from pathlib import Path
from typing import Any, Literal

from ee_tuning.artifact.eagle3_names import LAYER
from ee_tuning.errors import InputError
from ee_tuning.model.draft_spec import DraftSpec, check_aux_layers, default_aux_layers
from ee_tuning.model_config.config import ModelConfig, model_config_from_hf
from ee_tuning.model_config.huggingface_config import huggingface_config

Layout = Literal["eagle3", "speculators"]

D2T, T2D, EMBEDDING, OUTPUT = "d2t", "t2d", "embed_tokens.weight", "lm_head.weight"
"""Tensors of both layouts. d2t: offset from a draft token's id to the model's id; t2d: which of the model's tokens are
draft tokens, unused by engines.
"""
_CLASSES = {"llama": "LlamaForCausalLMEagle3", "qwen3": "Eagle3Qwen3ForCausalLM"}
_VARIANTS = ("norm_before_residual", "norm_before_fc", "fc_norm", "norm_output")
_SPECULATORS_VERSION = "0.9.0"
_SPECULATORS_LAYER = "layers.0."
_TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
_IDS = "eagle_aux_hidden_state_layer_ids"


def published_name(part: str, layout: Layout) -> str:
    """Returns the published name of the artifact's tensor `exits.{l}.{part}`."""
    if part == "output.weight":
        return OUTPUT
    return part.replace(LAYER, _SPECULATORS_LAYER, 1) if layout == "speculators" and part.startswith(LAYER) else part


def artifact_part(name: str) -> str:
    """Returns the artifact's name, without `exits.{l}.`, of a published tensor of either layout."""
    if name == OUTPUT:
        return "output.weight"
    return LAYER + name.removeprefix(_SPECULATORS_LAYER) if name.startswith(_SPECULATORS_LAYER) else name


def published_config(
    draft: DraftSpec, model: ModelConfig, layout: Layout, *, draft_vocab_size: int, verifier: str, num_steps: int
) -> dict[str, Any]:
    """Returns config.json. `draft_vocab_size` 0 stands for the whole vocabulary. `verifier` is the path or name of the
    model, which speculators' layout alone tells.
    """
    layer = {**huggingface_config(draft.layer_config(model)), "tie_word_embeddings": False}
    shared = {_IDS: list(draft.aux_layers), **{name: getattr(draft, name) for name in _VARIANTS}}
    if layout == "eagle3":
        return {
            **layer,
            "architectures": [_CLASSES[draft.family]],
            "draft_vocab_size": draft_vocab_size or None,
            "target_hidden_size": model.hidden_size,
            **shared,
            "eagle_config": {"use_aux_hidden_state": True, _IDS: [layer - 1 for layer in draft.aux_layers]},
        }
    return {
        "architectures": ["Eagle3Speculator"],
        "dtype": layer["dtype"],
        "speculators_model_type": "eagle3",
        "speculators_version": _SPECULATORS_VERSION,
        "speculators_config": {
            "algorithm": "eagle3",
            "default_proposal_method": "greedy",
            "proposal_methods": [{"proposal_type": "greedy", "speculative_tokens": num_steps}],
            "verifier": {"name_or_path": verifier, "architectures": huggingface_config(model)["architectures"]},
        },
        # vLLM reads the number of states for a llama's head here, and takes it for three where it is missing.
        "transformer_layer_config": {**layer, "num_aux_hidden_states": len(draft.aux_layers)},
        "draft_vocab_size": draft_vocab_size or model.vocab_size,
        **shared,
    }


def read_published_config(raw: Any, path: Path, model: ModelConfig) -> DraftSpec:
    """Parses the config.json of either layout.

    Raises InputError where it is invalid, has an unsupported layer, or belongs to another model.
    """
    if not isinstance(raw, dict) or not (_is_speculators(raw) or _is_eagle3(raw)):
        raise InputError(
            f"{path} must describe a head of EAGLE-3 (architectures with Eagle3, or speculators_model_type eagle3), and does "
            "not; give the folder of a published head"
        )
    layer = raw["transformer_layer_config"] if _is_speculators(raw) else raw
    if not isinstance(layer, dict):
        raise _refusal(path, "transformer_layer_config", "an object", layer)
    # a head does not end texts
    layer = {"model_type": "llama", **{key: value for key, value in layer.items() if key not in _TOKEN_IDS}}
    own = model_config_from_hf(layer, path)
    if own.family not in _CLASSES or own.has_qkv_bias or own.num_layers != 1:
        raise InputError(
            f"{path}: the head must have one layer of a llama or qwen3 without biases, got {own.num_layers} of a {own.family}"
            f"{' with biases' if own.has_qkv_bias else ''}; such heads are not supported"
        )
    for key, theirs, ours in (
        ("hidden_size", own.hidden_size, model.hidden_size),
        ("target_hidden_size", raw.get("target_hidden_size"), model.hidden_size),
        ("vocab_size", own.vocab_size, model.vocab_size),
    ):
        if theirs is not None and theirs != ours:
            raise InputError(
                f"{path}: {key} must be the model's {ours}, got {theirs!r:.60}; the head was made for another model, give that one"
            )
    return DraftSpec(
        family="qwen3" if own.family == "qwen3" else "llama",
        aux_layers=_aux_layers(raw, path, model.num_layers),
        ffn_hidden_size=own.ffn_hidden_size,
        num_attention_heads=own.num_attention_heads,
        num_query_groups=own.num_query_groups,
        kv_channels=own.kv_channels,
        norm_epsilon=own.norm_epsilon,
        rope=own.rope,
        **{name: _variant(raw, path, name) for name in _VARIANTS},
    )


def check_vocab_size(raw: dict[str, Any], path: Path, num_tokens: int) -> None:
    """Raises InputError where a published config.json tells another number of draft tokens than the head has:
    `num_tokens`. Engines size the output matrix by it.
    """
    told = raw.get("draft_vocab_size")
    if told is not None and (type(told) is not int or told != num_tokens):
        raise InputError(
            f"{path}: draft_vocab_size must be {num_tokens}, the number of tokens that the head's {D2T} or, without one, the "
            f"model has, got {told!r:.60}; fetch the head's files again"
        )


def _is_speculators(raw: dict[str, Any]) -> bool:
    return raw.get("speculators_model_type") == "eagle3" and "transformer_layer_config" in raw


def _is_eagle3(raw: dict[str, Any]) -> bool:
    names = raw.get("architectures")
    return isinstance(names, list) and any("eagle3" in str(name).lower() for name in names)


def _variant(raw: dict[str, Any], path: Path, name: str) -> bool:
    # A missing norm_before_residual of speculators means true to vLLM, and false to speculators itself.
    found = _truth(_eagle_config(raw, path), path, name)
    return bool(_truth(raw, path, name) if found is None else found)


def _aux_layers(raw: dict[str, Any], path: Path, num_layers: int) -> tuple[int, ...]:
    config = _eagle_config(raw, path)
    if _truth(config, path, "use_aux_hidden_state") is False:
        raise InputError(f"{path}: use_aux_hidden_state must be true, got false; such heads are not supported")
    layers = (
        _whole_numbers(raw, path)
        or tuple(layer + 1 for layer in _whole_numbers(config, path))
        or default_aux_layers(num_layers)
    )
    try:
        check_aux_layers(layers, num_layers)
    except InputError as error:
        raise InputError(
            f"{path}: {_IDS} must be layers of the model, which has {num_layers}, in increasing order, got "
            f"{list(layers)!r:.60}; the head was made for another model"
        ) from error
    return layers


def _eagle_config(raw: dict[str, Any], path: Path) -> dict[str, Any]:
    found = raw.get("eagle_config")
    if found is not None and not isinstance(found, dict):
        raise _refusal(path, "eagle_config", "an object", found)
    return found or {}


def _truth(tree: dict[str, Any], path: Path, key: str) -> bool | None:
    value = tree.get(key)
    if value is not None and not isinstance(value, bool):
        raise _refusal(path, key, "true or false", value)
    return value


def _whole_numbers(tree: dict[str, Any], path: Path) -> tuple[int, ...]:
    value = tree.get(_IDS)
    if value is None:
        return ()
    if not isinstance(value, list) or not all(type(layer) is int for layer in value):
        raise _refusal(path, _IDS, "a list of layer numbers", value)
    return tuple(value)


def _refusal(path: Path, key: str, rule: str, value: object) -> InputError:
    return InputError(
        f"{path}: {key} must be {rule}, got {value!r:.60}; fetch the head's config.json again, or mend it"
    )
