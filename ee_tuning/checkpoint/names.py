"""Maps Megatron-core's parameters to Hugging Face's tensors, and says how tensor-parallel ranks cut them.

Pure functions. A shard is a list of slices of Hugging Face tensors, one after the other. Reading it needs no other
bytes of the checkpoint, and the same list in reverse (`merge_shards`) gives the Hugging Face tensors.
"""

from collections.abc import Iterator, Sequence
from functools import cache

import torch
from torch import Tensor

from ee_tuning.checkpoint.hf_names import HF_NAMES, HFNames
from ee_tuning.model_config.config import ModelConfig
from ee_tuning.parallel.vocab import padded_size
from ee_tuning.storage.tensor_slice import Shard, TensorShape, TensorSlice


def embedding_name(config: ModelConfig) -> str:
    """Returns the Hugging Face tensor of the word embedding."""
    return f"{HF_NAMES[config.family].embedding}.weight"


def output_name(config: ModelConfig) -> str:
    """Returns the Hugging Face tensor of the model's own output matrix. Some folders hold it even where it is tied."""
    return f"{HF_NAMES[config.family].output}.weight"


def backbone_tensor_shapes(config: ModelConfig) -> dict[str, TensorShape]:
    """Returns every backbone tensor of the Hugging Face folder and its shape. A tied output matrix is left out."""
    return {
        piece.name: piece.shape
        for name in backbone_parameter_names(config)
        for piece in backbone_shard(name, config, 1, 0).pieces
    }


def backbone_parameter_names(config: ModelConfig) -> list[str]:
    """Returns every Megatron-core parameter of the backbone, `output_layer.weight` included even where it is tied."""
    positions = ["embedding.position_embeddings.weight"] * (config.position == "learned")
    layers = [
        f"decoder.layers.{index}.{name}"
        for index in range(config.num_layers)
        for name in layer_parameter_names(config, index + 1)
    ]
    norm = [f"decoder.final_layernorm.{kind}" for kind in norm_kinds(config)]
    return ["embedding.word_embeddings.weight", *positions, *layers, *norm, "output_layer.weight"]


def backbone_shard(parameter: str, config: ModelConfig, tp: int, tp_rank: int) -> Shard:
    """Returns rank `tp_rank`'s part of a Megatron-core parameter, named as in a stock GPTModel with global 0-based
    layers.

    Raises KeyError on a name that is no backbone parameter of the family.
    """
    hf_names = HF_NAMES[config.family]
    if parameter in ("embedding.word_embeddings.weight", "output_layer.weight"):
        is_output = parameter == "output_layer.weight" and not config.ties_embeddings
        name = output_name(config) if is_output else embedding_name(config)
        return vocabulary_rows(name, (config.vocab_size, config.hidden_size), tp, tp_rank)
    if parameter == "embedding.position_embeddings.weight" and config.position == "learned":
        return uncut(f"{hf_names.positions}.weight", (config.max_position_embeddings, config.hidden_size))
    module, _, kind = parameter.rpartition(".")
    if module == "decoder.final_layernorm" and kind in norm_kinds(config):
        return uncut(f"{hf_names.final_norm}.{kind}", (config.hidden_size,))
    prefix, _, rest = parameter.partition("decoder.layers.")
    layer, _, name = rest.partition(".")
    is_layer = not prefix and layer.isdecimal() and int(layer) < config.num_layers
    if not is_layer or name not in layer_parameter_names(config, int(layer) + 1):
        raise KeyError(
            f"{parameter} is no backbone parameter of a {config.family} model with {config.num_layers} layers"
        )
    return layer_shard(name, f"{hf_names.layers}.{layer}.", config, tp, tp_rank)


def merge_shards(plans: Sequence[Shard], shards: Sequence[Tensor]) -> dict[str, Tensor]:
    """Merges all ranks' shards of one parameter into whole Hugging Face tensors, without padding."""
    merged: dict[str, Tensor] = {}
    for plan, shard in zip(plans, shards, strict=True):
        assert tuple(shard.shape) == plan.shape, (tuple(shard.shape), plan)
        row = 0
        for piece in plan.pieces:
            whole = merged.setdefault(piece.name, torch.empty(piece.shape, dtype=shard.dtype, device=shard.device))
            part = shard if piece.cut_dim == 1 else shard[row : row + piece.size]
            whole.narrow(piece.dim, piece.start, piece.size).copy_(part.t() if piece.is_transposed else part)
            row += piece.size
    return merged


def norm_kinds(config: ModelConfig) -> tuple[str, ...]:
    """Returns the parameters of the family's norms."""
    return ("weight", "bias") if config.norm == "layer" else ("weight",)


def linear_kinds(has_bias: bool) -> tuple[str, ...]:
    """Returns the parameters of a linear map."""
    return ("weight", "bias") if has_bias else ("weight",)


def layer_parameter_names(config: ModelConfig, number: int) -> dict[str, None]:
    """Returns every Megatron-core parameter of layer `number` (1-based), in order."""
    return _parameter_names(config, config.has_experts(number))


@cache
def _parameter_names(config: ModelConfig, has_experts: bool) -> dict[str, None]:
    """Returns a dict, which is fast to search: a layer may have hundreds of experts."""
    norms, linears = norm_kinds(config), linear_kinds(config.has_linear_bias)
    kinds = {
        "input_layernorm": norms,
        "self_attention.linear_qkv": linear_kinds(config.has_linear_bias or config.has_qkv_bias),
        "self_attention.q_layernorm": norms if config.has_qk_norm else (),
        "self_attention.k_layernorm": norms if config.has_qk_norm else (),
        "self_attention.linear_proj": linear_kinds(config.has_linear_bias or config.has_proj_bias),
        "pre_mlp_layernorm": norms,
    }
    if has_experts:
        kinds["mlp.router"] = ("weight",)
    for mlp in (
        (f"mlp.experts.local_experts.{expert}" for expert in range(config.num_experts)) if has_experts else ("mlp",)
    ):
        kinds[f"{mlp}.linear_fc1"] = kinds[f"{mlp}.linear_fc2"] = linears
    return {f"{module}.{kind}": None for module in kinds for kind in kinds[module]}


def layer_shard(name: str, prefix: str, config: ModelConfig, tp: int, tp_rank: int) -> Shard:
    """Returns rank `tp_rank`'s part of a layer's parameter, one of `layer_parameter_names`.

    `prefix` begins the names of its slices.
    """
    hf_names = HF_NAMES[config.family]
    module, _, kind = name.rpartition(".")
    norms = {
        "input_layernorm": (hf_names.input_norm, config.hidden_size),
        "pre_mlp_layernorm": (hf_names.mlp_norm, config.hidden_size),
        "self_attention.q_layernorm": (hf_names.query_norm, config.kv_channels),
        "self_attention.k_layernorm": (hf_names.key_norm, config.kv_channels),
    }
    if module in norms:
        stem, width = norms[module]
        return uncut(f"{prefix}{stem}.{kind}", (width,))
    if module == "self_attention.linear_qkv":
        return Shard(
            tuple(
                _rows(prefix + stem, kind, (out, config.hidden_size), start, stop, hf_names)
                for stem, out, start, stop in _query_key_value(config, tp, tp_rank)
            )
        )
    if module == "self_attention.linear_proj":
        inner = config.num_attention_heads * config.kv_channels
        return _columns(prefix + hf_names.attention_output, kind, (config.hidden_size, inner), hf_names, tp, tp_rank)
    if module == "mlp.router":
        return uncut(f"{prefix}{hf_names.router}.{kind}", (config.num_experts, config.hidden_size))
    mlp, _, matrix = module.rpartition(".linear_")
    expert = mlp.removeprefix("mlp.experts.local_experts.")
    return mlp_shard(matrix, kind, prefix, config, tp, tp_rank, expert=int(expert) if expert != mlp else None)


def mlp_shard(
    matrix: str, kind: str, prefix: str, config: ModelConfig, tp: int, tp_rank: int, *, expert: int | None = None
) -> Shard:
    """Returns the shard of a weight or bias of an MLP's first matrix, fc1, or last one, fc2. The MLP is a layer's or an
    expert's.
    """
    hf_names, inner = HF_NAMES[config.family], config.ffn_hidden_size
    gate, up, down = hf_names.gate, hf_names.up, hf_names.down
    if expert is not None:
        inner = config.moe_ffn_hidden_size
        gate, up, down = (
            stem.format(expert) for stem in (hf_names.expert_gate, hf_names.expert_up, hf_names.expert_down)
        )
    if matrix == "fc2":
        return _columns(prefix + down, kind, (config.hidden_size, inner), hf_names, tp, tp_rank)
    start, stop = tp_rank * inner // tp, (tp_rank + 1) * inner // tp
    return Shard(
        tuple(
            _rows(prefix + stem, kind, (inner, config.hidden_size), start, stop, hf_names)
            for stem in ((gate, up) if config.is_gated else (up,))
        )
    )


def _query_key_value(config: ModelConfig, tp: int, tp_rank: int) -> Iterator[tuple[str, int, int, int]]:
    """Yields (name, rows, first, last) in Megatron-core's order: per query group its query heads, its key head, its
    value head.
    """
    hf_names, groups = HF_NAMES[config.family], config.num_query_groups
    width = groups * config.kv_channels
    sizes = {"query": config.num_attention_heads * config.kv_channels, "key": width, "value": width}
    is_fused = hf_names.query == hf_names.key == hf_names.value
    for group in range(tp_rank * groups // tp, (tp_rank + 1) * groups // tp):
        offset = 0
        for part, size in sizes.items():
            rows = size // groups
            yield (
                getattr(hf_names, part),
                sum(sizes.values()) if is_fused else size,
                offset + group * rows,
                offset + (group + 1) * rows,
            )
            offset += size if is_fused else 0


def _rows(stem: str, kind: str, shape: TensorShape, start: int, stop: int, hf_names: HFNames) -> TensorSlice:
    """Returns outputs `start`..`stop` of a linear map of `shape` [outputs, inputs]."""
    if kind == "bias":
        return TensorSlice(f"{stem}.bias", shape[:1], 0, start, stop)
    if hf_names.is_transposed:
        return TensorSlice(f"{stem}.weight", shape[::-1], 1, start, stop, is_transposed=True)
    return TensorSlice(f"{stem}.weight", shape, 0, start, stop)


def _columns(stem: str, kind: str, shape: TensorShape, hf_names: HFNames, tp: int, tp_rank: int) -> Shard:
    """Returns a rank's part of the inputs of a linear map of `shape` [outputs, inputs].

    Its bias is whole, since it is added after the sum over ranks.
    """
    if kind == "bias":
        return uncut(f"{stem}.bias", shape[:1])
    start, stop = tp_rank * shape[1] // tp, (tp_rank + 1) * shape[1] // tp
    if hf_names.is_transposed:
        return Shard((TensorSlice(f"{stem}.weight", shape[::-1], 0, start, stop, is_transposed=True),))
    return Shard((TensorSlice(f"{stem}.weight", shape, 1, start, stop),))


def uncut(name: str, shape: TensorShape) -> Shard:
    """Returns the shard of a tensor that every rank holds whole."""
    return Shard((TensorSlice(name, shape, 0, 0, shape[0]),))


def vocabulary_rows(name: str, shape: TensorShape, tp: int, tp_rank: int) -> Shard:
    """Returns the shard of a matrix of `shape` with one row per token, padded to the same number of rows on every
    rank.
    """
    size, width = shape
    rows = padded_size(size, tp) // tp
    start, stop = min(size, tp_rank * rows), min(size, (tp_rank + 1) * rows)
    return Shard((TensorSlice(name, (size, width), 0, start, stop),), zero_rows=rows - (stop - start))
