"""The specification of an EAGLE-3 drafting head (arXiv 2503.01840): the layers it reads, and the shape of its layer.
Data only.

Its variants have the names of vLLM's and speculators' config.json.
"""

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal

from ee_tuning.errors import InputError
from ee_tuning.model_config.config import ModelConfig, RopeConfig

FEWEST_LAYERS = 7
"""Fewest layers of a model whose default layers (`default_aux_layers`) increase without repeats."""


@dataclass(frozen=True, kw_only=True)
class DraftSpec:
    """The head's layer is a Llama's or, with norms of queries and keys, a Qwen3's, for any backbone."""

    family: Literal["llama", "qwen3"] = "llama"
    """The kind of its layer, by which engines choose their class."""
    aux_layers: tuple[int, ...]
    """Backbone layers (1-based, increasing) whose outputs it reads; 0 is the word embedding."""
    ffn_hidden_size: int
    num_attention_heads: int
    num_query_groups: int
    kv_channels: int
    norm_epsilon: float
    rope: RopeConfig
    norm_before_residual: bool = False
    """Whether the residual stream begins with the normed states, instead of the states themselves."""
    norm_before_fc: bool = False
    """Whether the states it reads are normed together before they are fused (`input_norm`)."""
    fc_norm: bool = False
    """Whether each of them is normed on its own (EAGLE-3.1)."""
    norm_output: bool = False
    """Whether a step passes the normed states to the next one (EAGLE-3.1)."""

    def layer_config(self, model: ModelConfig) -> ModelConfig:
        """Returns the shape of a model of such layers, with the backbone's hidden size and vocabulary."""
        return dataclasses.replace(
            model,
            family=self.family,
            num_layers=1,
            ffn_hidden_size=self.ffn_hidden_size,
            num_attention_heads=self.num_attention_heads,
            num_query_groups=self.num_query_groups,
            kv_channels=self.kv_channels,
            norm_epsilon=self.norm_epsilon,
            rope=self.rope,
            norm="rms",
            position="rope",
            activation="silu",
            is_gated=True,
            has_linear_bias=False,
            has_qkv_bias=False,
            has_proj_bias=False,
            has_qk_norm=self.family == "qwen3",
            num_experts=0,
            moe_router_topk=0,
            moe_ffn_hidden_size=0,
            dense_layers=(),
        )


def default_aux_layers(num_layers: int) -> tuple[int, ...]:
    """Returns a low, a middle and a high layer, as vLLM's and SGLang's models choose them: 2, half, all but three.

    Models of fewer than FEWEST_LAYERS layers have no such three.
    """
    return (2, num_layers // 2, num_layers - 3)


def can_draft(model: ModelConfig) -> bool:
    """Whether engines have a drafting layer that fits the model's own."""
    return model.position == "rope" and model.norm == "rms" and model.activation == "silu"


def draft_spec(model: ModelConfig, aux_layers: tuple[int, ...]) -> DraftSpec:
    """Returns the head for `model`, with a layer as wide as the model's; `aux_layers` () selects the default ones.

    Raises InputError where the model can have none.
    """
    if not can_draft(model):
        raise InputError(
            f"exits.architecture = eagle3 needs a backbone with rotary positions, RMSNorm and SiLU, and a {model.family} has "
            "others; engines have no such drafting layer; use another architecture"
        )
    if not aux_layers and model.num_layers < FEWEST_LAYERS:
        raise InputError(
            f"the model's {model.num_layers} layers are too few for the usual low, middle and high one (2, half, all but "
            f"three), which take {FEWEST_LAYERS}; name them with {_example(model.num_layers)}"
        )
    layers = aux_layers or default_aux_layers(model.num_layers)
    check_aux_layers(layers, model.num_layers)
    return DraftSpec(
        family="qwen3" if model.has_qk_norm else "llama",
        aux_layers=layers,
        ffn_hidden_size=model.ffn_hidden_size,
        num_attention_heads=model.num_attention_heads,
        num_query_groups=model.num_query_groups,
        kv_channels=model.kv_channels,
        norm_epsilon=model.norm_epsilon,
        rope=model.rope,
    )


def check_aux_layers(layers: tuple[int, ...], num_layers: int) -> None:
    """Raises InputError where the layers lie outside of the model, repeat, or are not sorted."""
    outside = [layer for layer in layers if not 0 <= layer <= num_layers]
    if outside or not layers:
        raise InputError(
            f"exits.aux_layers must lie in 0..{num_layers} (0 is the word embedding), got "
            f"{outside[0] if outside else 'none'}; for example {_example(num_layers)}"
        )
    if list(layers) != sorted(set(layers)):
        raise InputError(
            f"exits.aux_layers must increase without repeats, got {','.join(map(str, layers))}; write "
            f"{','.join(map(str, sorted(set(layers))))}"
        )


def _example(num_layers: int) -> str:
    """Returns a flag that a model of so many layers takes."""
    usual = default_aux_layers(num_layers) if num_layers >= FEWEST_LAYERS else {1, num_layers // 2, num_layers - 1}
    return f"--aux-layers {','.join(map(str, sorted(usual)))}"


def draft_tree(spec: DraftSpec) -> dict[str, Any]:
    """Returns `spec` as plain data for JSON."""
    return dataclasses.asdict(spec)


def read_draft_tree(tree: Any) -> DraftSpec:
    """The inverse of `draft_tree`. Raises ValueError, TypeError or KeyError on invalid data."""
    rope: dict[str, Any] = {
        key: tuple(value) if isinstance(value, list) else value for key, value in tree["rope"].items()
    }
    spec = DraftSpec(**{**tree, "aux_layers": tuple(tree["aux_layers"]), "rope": RopeConfig(**rope)})
    if spec.family not in ("llama", "qwen3") or not all(type(layer) is int for layer in spec.aux_layers):
        raise ValueError(f"draft must tell a layer of a llama or qwen3 and whole numbers as aux_layers, got {tree!r}")
    sizes = (spec.ffn_hidden_size, spec.num_attention_heads, spec.num_query_groups, spec.kv_channels)
    if not all(type(size) is int and size > 0 for size in sizes):
        raise ValueError(f"draft must tell sizes above 0, got {tree!r}")
    return spec
