"""Parameters of exit heads and tensors of the artifact: how they map to each other, are cut, and are initialized.

Pure functions, with the slices of `names.py`. The tensors of a `layer` head have the names of the family's own layers,
after `exits.{l}.layer.`.
"""

from collections.abc import Iterable

from ee_tuning.artifact.eagle3_names import draft_copy_source, draft_parameter_names, draft_shard
from ee_tuning.checkpoint.hf_names import HF_NAMES
from ee_tuning.checkpoint.names import (
    embedding_name,
    layer_parameter_names,
    layer_shard,
    linear_kinds,
    mlp_shard,
    norm_kinds,
    output_name,
    uncut,
    vocabulary_rows,
)
from ee_tuning.model.draft_spec import DraftSpec
from ee_tuning.model.exit_spec import ExitSpec
from ee_tuning.model_config.config import ModelConfig
from ee_tuning.storage.tensor_slice import Shard, TensorShape


def exit_parameter_names(head: ExitSpec, config: ModelConfig) -> list[str]:
    """Returns all parameters of an exit head."""
    if head.draft is not None:
        return draft_parameter_names(head.draft) + ["output.weight"] * (not head.ties_output)
    kind = head.architecture
    names = [f"norm.{each}" for each in norm_kinds(config)] if kind != "embedding" else []
    if kind == "mlp":
        names += [f"mlp.{matrix}.{each}" for matrix in ("fc1", "fc2") for each in linear_kinds(config.has_linear_bias)]
    elif kind == "layer":
        names += [f"layer.{name}" for name in layer_parameter_names(config, config.num_layers)]
    elif kind == "adapter":
        names += [f"adapter.norm.{each}" for each in norm_kinds(config)] + ["adapter.down.weight", "adapter.up.weight"]
    matrices = ["linear.down.weight", "linear.up.weight"] if head.linear_rank else ["linear.weight"]
    return names + [*matrices, "linear.bias"] * head.has_linear + ["output.weight"] * (not head.ties_output)


def exit_shard(head: ExitSpec, parameter: str, config: ModelConfig, tp: int, tp_rank: int) -> Shard:
    """Returns rank `tp_rank`'s part of a parameter of an exit head, one of `exit_parameter_names`.

    Its slices have the names of the exit-heads artifact. Raises KeyError on another name.
    """
    if parameter not in exit_parameter_names(head, config):
        raise KeyError(f"{parameter} is no parameter of an exit head `{head.architecture}` of a {config.family} model")
    prefix, (part, _, rest) = f"exits.{head.layer}.", parameter.partition(".")
    if part == "output":
        return vocabulary_rows(
            f"{prefix}output.weight", (head.output_rows(config.vocab_size), config.hidden_size), tp, tp_rank
        )
    if head.draft is not None:
        return draft_shard(head.draft, parameter, prefix, config, tp, tp_rank)
    if part == "layer":
        return layer_shard(rest, f"{prefix}layer.", config, tp, tp_rank)
    if part == "mlp":
        matrix, _, kind = rest.partition(".")
        return mlp_shard(matrix, kind, prefix, config, tp, tp_rank)
    width = config.hidden_size
    shapes = {
        "linear.weight": (width, width),
        **{f"{part}.down.weight": (head.adapter_rank, width) for part in ("adapter", "linear")},
        **{f"{part}.up.weight": (width, head.adapter_rank) for part in ("adapter", "linear")},
    }
    return uncut(prefix + parameter, shapes.get(parameter, (width,)))


def is_replicated(head: ExitSpec, parameter: str, config: ModelConfig, tp: int) -> bool:
    """Whether all tensor-parallel ranks hold the same copy of a parameter."""
    return exit_shard(head, parameter, config, tp, 0) == exit_shard(head, parameter, config, tp, tp - 1)


def exit_tensor_shapes(heads: Iterable[ExitSpec], config: ModelConfig) -> dict[str, TensorShape]:
    """Returns every tensor of the exit-heads artifact and its whole shape, in the artifact's order."""
    return {
        piece.name: piece.shape
        for head in heads
        for name in exit_parameter_names(head, config)
        for piece in exit_shard(head, name, config, 1, 0).pieces
    }


def exit_copy_source(name: str, config: ModelConfig, draft: DraftSpec | None = None) -> str | None:
    """Returns the backbone tensor that copy initialization copies to the artifact's tensor `name`, or None.

    None stands for the matrices of an adapter, the linear map before the output matrix, and most of a drafting head,
    which `draft` describes. Of a shortlisted output matrix, all rows but the last are some of the copied tensor's rows.
    """
    hf_names = HF_NAMES[config.family]
    _, layer, part = name.split(".", 2)
    if part in ("adapter.down.weight", "adapter.up.weight") or part.startswith("linear."):
        return None
    if part.startswith(("norm.", "adapter.norm.")):
        return f"{hf_names.final_norm}.{part.rpartition('.')[2]}"
    if part == "output.weight":
        return embedding_name(config) if config.ties_embeddings else output_name(config)
    if draft is not None:
        return draft_copy_source(part, draft, config)
    if part.startswith("layer."):
        return f"{hf_names.layers}.{config.num_layers - 1}.{part.removeprefix('layer.')}"
    return f"{hf_names.layers}.{int(layer) - 1}.{part}"


def is_residual_projection(name: str, config: ModelConfig) -> bool:
    """Whether the output of the artifact's matrix `name` is added to the residual."""
    hf_names = HF_NAMES[config.family]
    matrices = (hf_names.down, hf_names.expert_down.rpartition(".")[2], hf_names.attention_output, "adapter.up")
    return name.endswith(tuple(f".{matrix}.weight" for matrix in matrices))
