"""The shape of a backbone, from a Hugging Face config.json in its old or new format."""

import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ee_tuning.errors import InputError
from ee_tuning.json_file import read_json
from ee_tuning.model_config.families import (
    Family,
    family_fields,
    optional_number,
    positive_number,
    real_number,
    truth_value,
    with_llama_keys,
)
from ee_tuning.model_config.quantized_checkpoint import refuse_quantized
from ee_tuning.model_config.token_ids import end_token_ids, single_token_id
from ee_tuning.notices import warn_once
from ee_tuning.parallel.vocab import padded_size

STORED_DTYPES = ("float32", "bfloat16", "float16", "float64")


@dataclass(frozen=True, kw_only=True)
class RopeConfig:
    """Rotary position embeddings. Fields that a kind does not use keep their defaults."""

    kind: Literal["default", "linear", "llama3", "yarn", "dynamic", "longrope"] = "default"
    """dynamic: like default up to max_position_embeddings, which is the limit here."""
    theta: float = 10000.0
    """Base of the geometric series of wavelengths."""
    factor: float = 1.0
    """Factor by which the context was extended."""
    original_max_position_embeddings: int = 0
    """Context before scaling (llama3, yarn, longrope)."""
    low_freq_factor: float = 1.0
    """llama3: wavelengths longer than original ÷ this are divided by factor."""
    high_freq_factor: float = 4.0
    """llama3: wavelengths shorter than original ÷ this are unchanged."""
    beta_fast: float = 32.0
    """yarn: rotations over the original context above which a dimension is unchanged."""
    beta_slow: float = 1.0
    """yarn: rotations below which a dimension is fully interpolated."""
    truncate: bool = True
    """yarn: whether to round the ends of the ramp to whole dimensions."""
    attention_factor: float = 1.0
    """yarn, longrope: scale of both queries and keys."""
    short_factor: tuple[float, ...] = ()
    """longrope: factor of each pair of dimensions' wavelength, in texts within the original context."""
    long_factor: tuple[float, ...] = ()
    """longrope: the same for longer texts. Unused, because `read_model_config` limits the context."""


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """A decoder-only transformer. Defaults are Llama's."""

    family: Family = "llama"
    """Determines the names of its tensors in a Hugging Face folder."""
    num_layers: int
    hidden_size: int
    ffn_hidden_size: int
    """Inner width of a layer's MLP; if every layer has experts, that of an expert."""
    num_attention_heads: int
    num_query_groups: int
    """Number of key and value heads."""
    kv_channels: int
    """Width of one head."""
    vocab_size: int
    """Number of tokens, without padding."""
    max_position_embeddings: int
    norm_epsilon: float
    rope: RopeConfig
    ties_embeddings: bool
    """Whether the output matrix is the word embedding."""
    norm: Literal["rms", "layer"] = "rms"
    """layer: LayerNorm with a bias."""
    position: Literal["rope", "learned"] = "rope"
    """learned: an embedding per position, added to the word's."""
    activation: Literal["silu", "gelu", "gelu_tanh", "relu"] = "silu"
    is_gated: bool = True
    """MLP: down (activation(gate x) · up x) if gated, else down activation(up x)."""
    has_linear_bias: bool = False
    """Whether every linear map of a layer has a bias."""
    has_qkv_bias: bool = False
    """Whether the maps of queries, keys and values have a bias."""
    has_proj_bias: bool = False
    """Whether the attention's output projection has a bias."""
    has_qk_norm: bool = False
    """Whether each head's query and key are normed before rotation."""
    num_experts: int = 0
    """Experts (MLPs) of a layer, among which a router chooses for each token; 0 for a single MLP."""
    moe_router_topk: int = 0
    """Experts per token."""
    moe_ffn_hidden_size: int = 0
    """Inner width of an expert."""
    renormalizes_router: bool = True
    """Whether the weights of the chosen experts are normalized to a sum of 1, or remain shares of a softmax over all
    experts.
    """
    dense_layers: tuple[int, ...] = ()
    """Layers (1-based) with one MLP in a model with experts."""
    init_std: float = 0.02
    stored_dtype: str = "float32"
    """dtype of the stored weights."""
    eos_token_ids: tuple[int, ...] = ()
    bos_token_id: int | None = None

    def has_experts(self, layer: int) -> bool:
        """Whether `layer` (1-based) has experts."""
        return self.num_experts > 0 and layer not in self.dense_layers

    def padded_vocab_size(self, tp: int) -> int:
        """Returns the vocabulary size, rounded up so that every tensor-parallel rank has the same number of rows."""
        return padded_size(self.vocab_size, tp)

    def check_layout(self, tp: int, num_stages: int) -> None:
        """Raises InputError where the model can not be cut tp × num_stages ways."""
        if tp < 1 or num_stages < 1:
            raise InputError(f"tensor and pipeline_model_parallel_size must be at least 1, got {tp} and {num_stages}")
        for name, size in (
            ("num_attention_heads", self.num_attention_heads),
            ("num_key_value_heads", self.num_query_groups),
            ("intermediate_size", self.ffn_hidden_size),
            ("moe_intermediate_size", self.moe_ffn_hidden_size),
        ):
            if size % tp:
                widths = (
                    self.num_attention_heads,
                    self.num_query_groups,
                    self.ffn_hidden_size,
                    self.moe_ffn_hidden_size,
                )
                raise InputError(
                    f"tensor_model_parallel_size must divide the model's {name} = {size}, got {tp}; use a divisor of "
                    f"{math.gcd(*widths)}"
                )
        if num_stages > self.num_layers:
            raise InputError(
                f"pipeline_model_parallel_size must be at most the model's {self.num_layers} layers, got {num_stages}"
            )

    def check_exit_layers(self, exit_layers: tuple[int, ...]) -> None:
        """Raises InputError where there are none, or they lie outside of the model, repeat, or are not sorted."""
        if not exit_layers:
            raise InputError(
                f"exits.exit_layers must name at least one layer in 1..{self.num_layers}, got none; "
                f"for example --exit-layers {max(1, self.num_layers // 4)},{max(1, self.num_layers // 2)}"
            )
        outside = [layer for layer in exit_layers if not 1 <= layer <= self.num_layers]
        if outside:
            raise InputError(f"exit_layers must lie in 1..{self.num_layers} (the model's layers), got {outside[0]}")
        if list(exit_layers) != sorted(set(exit_layers)):
            wanted = ",".join(map(str, sorted(set(exit_layers))))
            raise InputError(
                f"exit_layers must increase without repeats, got {','.join(map(str, exit_layers))}; write {wanted}"
            )


def read_model_config(folder: Path) -> ModelConfig:
    """Reads the shape of the model in a Hugging Face folder. Raises InputError on missing or unsupported fields."""
    path = folder / "config.json"
    if not folder.is_dir():
        raise InputError(
            f"--model must be a Hugging Face folder with config.json and safetensors, but there is no folder {folder}"
        )
    try:
        raw = read_json(path)
    except OSError as error:
        raise InputError(
            f"the model folder must hold config.json, but {path} can not be read: {error.strerror}"
        ) from error
    except ValueError as error:
        raise InputError(f"{path} is not JSON: {error}") from error
    return model_config_from_hf(raw, path)


def model_config_from_hf(raw: Any, path: Path) -> ModelConfig:
    """Does the work of `read_model_config` on a parsed config.json. `path` is named in errors."""
    if not isinstance(raw, dict):
        raise InputError(f"{path} must hold a JSON object, got {type(raw).__name__}; fetch the model's own config.json")
    refuse_quantized(raw, path)
    try:
        config = _from_object(raw, path)
    except InputError:
        raise
    except (TypeError, ValueError, AttributeError, KeyError, OverflowError) as error:
        raise InputError(
            f"{path} has a value of a wrong type ({error!r}); fetch the model's own config.json"
        ) from error
    if config.num_attention_heads % config.num_query_groups:
        raise InputError(
            f"{path}: num_attention_heads = {config.num_attention_heads} must be a multiple of num_key_value_heads = "
            f"{config.num_query_groups}"
        )
    if config.position == "rope" and config.kv_channels % 2:
        raise InputError(f"{path}: the width of a head must be even to be rotated, got {config.kv_channels}")
    return _within_short_context(config, path) if config.rope.kind == "longrope" else config


def _within_short_context(config: ModelConfig, path: Path) -> ModelConfig:
    """Limits a longrope model to its original context.

    Longer texts have other frequencies from their first token on: all earlier keys would have to be recomputed when a
    text grows past it.
    """
    rope, positions, pairs = config.rope, config.rope.original_max_position_embeddings, config.kv_channels // 2
    if len(rope.short_factor) != pairs or any(factor <= 0 for factor in rope.short_factor):
        raise InputError(
            f"{path}: short_factor of rope scaling longrope must be {pairs} positive numbers, one for each pair of a head's "
            f"dimensions, got {len(rope.short_factor)}"
        )
    if config.max_position_embeddings <= positions:
        return config
    warn_once(
        f"{path}: of longrope's context of {config.max_position_embeddings} tokens the first {positions} are used "
        "(original_max_position_embeddings), where positions are rotated by short_factor; texts must not be longer"
    )
    return dataclasses.replace(config, max_position_embeddings=positions)


def _from_object(raw: dict[str, Any], path: Path) -> ModelConfig:
    raw = with_llama_keys(raw, path)
    heads = positive_number(raw, "num_attention_heads", path)
    hidden = positive_number(raw, "hidden_size", path)
    max_positions = positive_number(raw, "max_position_embeddings", path)
    dtype = str(raw.get("dtype") or raw.get("torch_dtype") or "float32")
    if dtype not in STORED_DTYPES:
        raise InputError(f"{path}: dtype must be one of {', '.join(STORED_DTYPES)}, got {dtype}")
    vocabulary = positive_number(raw, "vocab_size", path)
    single_token_id(raw, "pad_token_id", vocabulary, path)
    return ModelConfig(
        **family_fields(raw, path),
        num_layers=positive_number(raw, "num_hidden_layers", path),
        hidden_size=hidden,
        num_attention_heads=heads,
        num_query_groups=optional_number(raw, "num_key_value_heads", path) or heads,
        kv_channels=optional_number(raw, "head_dim", path) or hidden // heads,
        vocab_size=vocabulary,
        max_position_embeddings=max_positions,
        norm_epsilon=real_number(raw.get("rms_norm_eps", 1e-6), "rms_norm_eps", path),
        rope=_rope(raw, max_positions, path),
        ties_embeddings=truth_value(raw, "tie_word_embeddings", path),
        init_std=real_number(raw.get("initializer_range", 0.02), "initializer_range", path),
        stored_dtype=dtype,
        eos_token_ids=end_token_ids(raw, vocabulary, path),
        bos_token_id=single_token_id(raw, "bos_token_id", vocabulary, path),
    )


def _rope(raw: dict[str, Any], max_positions: int, path: Path) -> RopeConfig:
    """Reads the rotary embedding: transformers 5 writes rope_parameters, older versions rope_theta and rope_scaling."""
    fields = {**(raw.get("rope_scaling") or {}), **(raw.get("rope_parameters") or {})}
    kind: Any = fields.get("rope_type") or fields.get("type") or "default"
    kind = "longrope" if kind == "su" else kind  # its former name
    if kind not in ("default", "linear", "llama3", "yarn", "dynamic", "longrope"):
        raise InputError(f"{path}: rope scaling must be default, linear, llama3, yarn, dynamic or longrope, got {kind}")
    theta = fields.get("rope_theta") or raw.get("rope_theta") or 10000.0
    theta = real_number(theta, "rope_theta", path, is_positive=True)
    if kind == "default":
        return RopeConfig(theta=theta)
    missing = [
        key
        for key in {
            "linear": ["factor"],
            "llama3": ["factor", "low_freq_factor", "high_freq_factor"],
            "dynamic": ["factor"],
            "yarn": ["factor"],
            "longrope": ["short_factor", "long_factor"],
        }[kind]
        if key not in fields
    ]
    if missing:
        raise InputError(f"{path}: rope scaling {kind} needs {', '.join(missing)}")
    key = "original_max_position_embeddings"
    original = positive_number({key: fields.get(key) or raw.get(key) or max_positions}, key, path)
    has_factor = kind not in ("yarn", "longrope") or fields.get("factor") is not None
    factor = real_number(fields["factor"], "factor", path, is_positive=True) if has_factor else max_positions / original
    return RopeConfig(
        kind=kind,
        theta=theta,
        factor=factor,
        original_max_position_embeddings=original,
        low_freq_factor=real_number(fields.get("low_freq_factor", 1.0), "low_freq_factor", path),
        high_freq_factor=real_number(fields.get("high_freq_factor", 4.0), "high_freq_factor", path),
        beta_fast=real_number(fields.get("beta_fast") or 32.0, "beta_fast", path),
        beta_slow=real_number(fields.get("beta_slow") or 1.0, "beta_slow", path),
        truncate=truth_value(fields, "truncate", path, default=True),
        attention_factor={"yarn": _yarn_attention_factor, "longrope": _longrope_attention_factor}[kind](
            fields, factor, original, path
        )
        if kind in ("yarn", "longrope")
        else 1.0,
        short_factor=_factors(fields, "short_factor", path) if kind == "longrope" else (),
        long_factor=_factors(fields, "long_factor", path) if kind == "longrope" else (),
    )


def _factors(fields: dict[str, Any], key: str, path: Path) -> tuple[float, ...]:
    values = fields[key]
    if not isinstance(values, list):
        raise InputError(f"{path}: {key} must be a list of numbers, got {values!r:.60}; fetch the model's own file")
    return tuple(real_number(value, key, path) for value in values)


def _longrope_attention_factor(fields: dict[str, Any], factor: float, original: int, path: Path) -> float:
    """Returns the factor of section 4.2 of arXiv 2402.13753."""
    if fields.get("attention_factor") is not None:
        return real_number(fields["attention_factor"], "attention_factor", path)
    return math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 and original > 1 else 1.0


def _yarn_attention_factor(fields: dict[str, Any], factor: float, _: int, path: Path) -> float:
    """Returns the factor of section 3.4 of arXiv 2309.00071, in DeepSeek's two-sided form where a config has it."""

    def scale(mscale: float) -> float:
        return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0

    if fields.get("attention_factor") is not None:
        return real_number(fields["attention_factor"], "attention_factor", path)
    if fields.get("mscale") and fields.get("mscale_all_dim"):
        first, second = (scale(real_number(fields[key], key, path)) for key in ("mscale", "mscale_all_dim"))
        return first / second
    return scale(1.0)
