"""Hugging Face's tensors and Megatron-core's parameters: which is made of which, and how a tensor-parallel rank's shard is cut.

Pure functions. A shard is a list of pieces of Hugging Face tensors laid one after the other; read so, it needs no other bytes of the
checkpoint, and the same list read backwards (`merge_shards`) gives the Hugging Face tensors.
"""
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ee_tuning.config import Architecture
from ee_tuning.model.config import ModelConfig

Shape = tuple[int, ...]

EMBEDDING, FINAL_NORM, LM_HEAD = "model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"


@dataclass(frozen=True)
class Piece:
    """Rows (`dim` 0) or columns (`dim` 1) `start`..`stop` of the Hugging Face tensor `name`."""

    name: str
    shape: Shape
    """Of the whole tensor."""
    dim: int
    start: int
    stop: int


@dataclass(frozen=True)
class Shard:
    """A rank's part of a Megatron-core parameter: `pieces` laid one below the other, then `zero_rows` of padding."""

    pieces: tuple[Piece, ...]
    zero_rows: int = 0

    @property
    def shape(self) -> Shape:
        """Of this rank's parameter."""
        first = self.pieces[0]
        if first.dim == 1:
            return (first.shape[0], first.stop - first.start)
        return (sum(p.stop - p.start for p in self.pieces) + self.zero_rows, *first.shape[1:])


def backbone_tensor_shapes(config: ModelConfig) -> dict[str, Shape]:
    """Every backbone tensor of the Hugging Face folder and its shape. The output matrix is absent where it is tied."""
    shapes = {EMBEDDING: (config.vocab_size, config.hidden_size), FINAL_NORM: (config.hidden_size,)}
    if not config.ties_embeddings:
        shapes[LM_HEAD] = (config.vocab_size, config.hidden_size)
    for layer in range(config.num_layers):
        shapes.update({f"model.layers.{layer}.{name}": shape for name, shape in _layer_shapes(config).items()})
    return shapes


def backbone_parameter_names(config: ModelConfig) -> list[str]:
    """Every Megatron-core parameter of the backbone; `output_layer.weight` stands among them even where it is tied."""
    layers = [f"decoder.layers.{layer}.{name}" for layer in range(config.num_layers) for name in _LAYER_PARAMETERS]
    return ["embedding.word_embeddings.weight", *layers, "decoder.final_layernorm.weight", "output_layer.weight"]


def backbone_shard(parameter: str, config: ModelConfig, tp: int, tp_rank: int) -> Shard:
    """Rank `tp_rank`'s part of a Megatron-core parameter, named as in a stock GPTModel with global 0-based layer indices.

    Raises KeyError on a name that is no backbone parameter of the family.
    """
    if parameter in ("embedding.word_embeddings.weight", "output_layer.weight"):
        is_output = parameter == "output_layer.weight" and not config.ties_embeddings
        return _vocabulary_rows(LM_HEAD if is_output else EMBEDDING, config, tp, tp_rank)
    if parameter == "decoder.final_layernorm.weight":
        return _whole(FINAL_NORM, (config.hidden_size,))
    prefix, _, rest = parameter.partition("decoder.layers.")
    layer, _, name = rest.partition(".")
    if prefix or name not in _LAYER_PARAMETERS or not layer.isdecimal() or int(layer) >= config.num_layers:
        raise KeyError(f"{parameter} is no backbone parameter of a {config.family} model with {config.num_layers} layers")
    return _LAYER_PARAMETERS[name](f"model.layers.{layer}.", config, tp, tp_rank)


def exit_shard(layer: int, parameter: str, config: ModelConfig, tp: int, tp_rank: int) -> Shard:
    """Rank `tp_rank`'s part of a parameter of the exit head after `layer` (1-based): norm.weight, mlp.fc1.weight, mlp.fc2.weight or
    output.weight. Its pieces are named as in the exit-heads artifact. Raises KeyError on another name.
    """
    if parameter == "output.weight":
        return _vocabulary_rows(f"exits.{layer}.output.weight", config, tp, tp_rank)
    return _EXIT_PARAMETERS[parameter](f"exits.{layer}.", config, tp, tp_rank)


def exit_tensor_shapes(exit_layers: tuple[int, ...], architecture: Architecture, ties_output: bool,
                       config: ModelConfig) -> dict[str, Shape]:
    """Every tensor of the exit-heads artifact and its whole shape, in the artifact's order."""
    shapes: dict[str, Shape] = {}
    for layer in exit_layers:
        shapes[f"exits.{layer}.norm.weight"] = (config.hidden_size,)
        if architecture == "mlp":
            for name, shape in _layer_shapes(config).items():
                if name.startswith("mlp."):
                    shapes[f"exits.{layer}.{name}"] = shape
        if not ties_output:
            shapes[f"exits.{layer}.output.weight"] = (config.vocab_size, config.hidden_size)
    return shapes


def exit_copy_source(name: str, config: ModelConfig) -> str:
    """The backbone tensor that the artifact's tensor `name` is a copy of at copy initialization."""
    _, layer, part = name.split(".", 2)
    if part == "norm.weight":
        return FINAL_NORM
    if part == "output.weight":
        return EMBEDDING if config.ties_embeddings else LM_HEAD
    return f"model.layers.{int(layer) - 1}.{part}"


def merge_shards(plans: Sequence[Shard], shards: Sequence[Tensor]) -> dict[str, Tensor]:
    """The whole Hugging Face tensors that all ranks' shards of one parameter are cut from; the padding is left out."""
    merged: dict[str, Tensor] = {}
    for plan, shard in zip(plans, shards, strict=True):
        assert tuple(shard.shape) == plan.shape, (tuple(shard.shape), plan)
        row = 0
        for piece in plan.pieces:
            size = piece.stop - piece.start
            whole = merged.setdefault(piece.name, torch.empty(piece.shape, dtype=shard.dtype, device=shard.device))
            part = shard if piece.dim == 1 else shard[row:row + size]
            whole.narrow(piece.dim, piece.start, size).copy_(part)
            row += size
    return merged


def _layer_shapes(config: ModelConfig) -> dict[str, Shape]:
    h, f = config.hidden_size, config.ffn_hidden_size
    q, kv = config.num_attention_heads * config.kv_channels, config.num_query_groups * config.kv_channels
    return {
        "input_layernorm.weight": (h,), "self_attn.q_proj.weight": (q, h), "self_attn.k_proj.weight": (kv, h),
        "self_attn.v_proj.weight": (kv, h), "self_attn.o_proj.weight": (h, q), "post_attention_layernorm.weight": (h,),
        "mlp.gate_proj.weight": (f, h), "mlp.up_proj.weight": (f, h), "mlp.down_proj.weight": (h, f)}


def _whole(name: str, shape: Shape) -> Shard:
    return Shard((Piece(name, shape, 0, 0, shape[0]),))


def _vocabulary_rows(name: str, config: ModelConfig, tp: int, tp_rank: int) -> Shard:
    v = config.vocab_size
    rows = config.padded_vocab_size(tp) // tp
    start, stop = min(v, tp_rank * rows), min(v, (tp_rank + 1) * rows)
    return Shard((Piece(name, (v, config.hidden_size), 0, start, stop),), zero_rows=rows - (stop - start))


def _replicated(tail: str) -> Callable[[str, ModelConfig, int, int], Shard]:
    return lambda prefix, config, tp, tp_rank: _whole(prefix + tail, (config.hidden_size,))


def _columns(tail: str) -> Callable[[str, ModelConfig, int, int], Shard]:
    def cut(prefix: str, config: ModelConfig, tp: int, tp_rank: int) -> Shard:
        shape = _layer_shapes(config)[tail]
        width = shape[1] // tp
        return Shard((Piece(prefix + tail, shape, 1, tp_rank * width, (tp_rank + 1) * width),))
    return cut


def _gate_and_up(prefix: str, config: ModelConfig, tp: int, tp_rank: int) -> Shard:
    rows = config.ffn_hidden_size // tp
    return Shard(tuple(Piece(f"{prefix}mlp.{part}_proj.weight", (config.ffn_hidden_size, config.hidden_size), 0,
                             tp_rank * rows, (tp_rank + 1) * rows) for part in ("gate", "up")))


def _query_key_value(prefix: str, config: ModelConfig, tp: int, tp_rank: int) -> Shard:
    """Megatron-core fuses by query group: the group's query heads, its key head, its value head."""
    groups = config.num_query_groups // tp
    pieces = []
    for group in range(tp_rank * groups, (tp_rank + 1) * groups):
        for part in ("q", "k", "v"):
            shape = _layer_shapes(config)[f"self_attn.{part}_proj.weight"]
            rows = shape[0] // config.num_query_groups
            pieces.append(Piece(f"{prefix}self_attn.{part}_proj.weight", shape, 0, group * rows, (group + 1) * rows))
    return Shard(tuple(pieces))


_LAYER_PARAMETERS = {
    "input_layernorm.weight": _replicated("input_layernorm.weight"),
    "self_attention.linear_qkv.weight": _query_key_value,
    "self_attention.linear_proj.weight": _columns("self_attn.o_proj.weight"),
    "pre_mlp_layernorm.weight": _replicated("post_attention_layernorm.weight"),
    "mlp.linear_fc1.weight": _gate_and_up,
    "mlp.linear_fc2.weight": _columns("mlp.down_proj.weight"),
}
_EXIT_PARAMETERS = {
    "norm.weight": _replicated("norm.weight"),
    "mlp.fc1.weight": _gate_and_up,
    "mlp.fc2.weight": _columns("mlp.down_proj.weight"),
}
