"""Size of a model by part, from its shape alone: only its config.json is needed."""

import math
import re

from ee_tuning.checkpoint.names import backbone_parameter_names, backbone_shard, backbone_tensor_shapes
from ee_tuning.model_config.config import ModelConfig

_PARTS = ("embedding", "attention", "mlp", "norms", "output")
_LAYER = re.compile(r"decoder\.layers\.(\d+)\.")

Parts = dict[str, int]
"""Number of parameters by part, and `all`."""


def tensor_parts(config: ModelConfig) -> dict[str, tuple[str, int | None]]:
    """Returns, per Hugging Face tensor, its part of the model and its layer (1-based), if any."""
    parts: dict[str, tuple[str, int | None]] = {}
    for parameter in backbone_parameter_names(config):
        match = _LAYER.match(parameter)
        for piece in backbone_shard(parameter, config, 1, 0).pieces:
            parts.setdefault(piece.name, (_part(parameter), int(match[1]) + 1 if match else None))
    return parts


def parameters_by_part(config: ModelConfig) -> Parts:
    """Returns the number of parameters by part. A tied output matrix counts as embedding."""
    return _summed(config, list(_PARTS), tensor_parts(config))


def parameters_per_layer(config: ModelConfig) -> dict[str, Parts]:
    """Returns the number of parameters of one layer, or of the first layer of each kind, by name."""
    parts = tensor_parts(config)
    by_layer: dict[int, dict[str, tuple[str, int | None]]] = {}
    for name, (part, layer) in parts.items():
        if layer is not None:
            by_layer.setdefault(layer, {})[name] = (part, layer)
    kinds: dict[tuple[int, ...], tuple[int, Parts]] = {}
    for layer, own in sorted(by_layer.items()):
        sums = _summed(config, ["attention", "mlp", "norms"], own)
        kinds.setdefault(tuple(sums.values()), (layer, sums))
    return {"each layer" if len(kinds) == 1 else f"layer {layer} and its like": sums for layer, sums in kinds.values()}


def cached_per_token(config: ModelConfig, num_layers: int) -> int:
    """Returns the elements of keys and values that `num_layers` layers of that shape hold for each token of context."""
    return 2 * num_layers * config.num_query_groups * config.kv_channels


def largest_group_parameters(config: ModelConfig) -> int:
    """Returns the size of the largest group of tensors used together: a layer, the embedding, or the output matrix."""
    whole = parameters_by_part(config)
    return max(whole["embedding"], whole["output"], *(layer["all"] for layer in parameters_per_layer(config).values()))


def _summed(config: ModelConfig, parts: list[str], tensors: dict[str, tuple[str, int | None]]) -> Parts:
    shapes = backbone_tensor_shapes(config)
    sums = dict.fromkeys(parts, 0)
    for name, (part, _) in tensors.items():
        sums[part] += math.prod(shapes[name])
    return {**sums, "all": sum(sums.values())}


def _part(parameter: str) -> str:
    if parameter.startswith("embedding."):
        return "embedding"
    if parameter.startswith("output_layer."):
        return "output"
    if "layernorm" in parameter:
        return "norms"
    return "attention" if ".self_attention." in parameter else "mlp"
