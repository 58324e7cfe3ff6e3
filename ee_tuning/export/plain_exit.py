"""Describes an exit as a plain model: its layers and tensors, and their names.

A `norm` or `linear` exit after layer l is the first l layers, an `mlp` exit the same with the last layer's MLP
replaced, and a `layer` exit is l + 1 layers. Pure functions.
"""

import dataclasses
from dataclasses import dataclass

from ee_tuning.artifact.exit_names import exit_copy_source, exit_tensor_shapes
from ee_tuning.checkpoint.hf_names import HF_NAMES
from ee_tuning.checkpoint.names import backbone_tensor_shapes, embedding_name, norm_kinds, output_name
from ee_tuning.errors import InputError
from ee_tuning.model.exit_spec import ExitSpec
from ee_tuning.model_config.config import ModelConfig

_NO_PLACE = {
    "embedding": "it has no norm before its output matrix, and every plain model has one",
    "adapter": "its bottleneck beside the last layer has no place in a plain model",
}
_REMEDY = "choose an exit of architecture norm, linear, mlp or layer"


@dataclass(frozen=True)
class PlainExit:
    """An exit as a model of the backbone's family."""

    head: ExitSpec
    config: ModelConfig
    """The shape of that model."""
    origins: dict[str, str]
    """Hugging Face's name of each tensor -> the backbone's tensor or, beginning with `exits.`, the artifact's."""

    @property
    def folded(self) -> tuple[str, ...]:
        """Tensors that change when a linear map before the output matrix is folded into it: that matrix and, with
        LayerNorm, the norm.
        """
        if not self.head.has_linear:
            return ()
        norm = HF_NAMES[self.config.family].final_norm
        kinds = norm_kinds(self.config) if self.config.norm == "layer" else ()
        return (output_name(self.config), *(f"{norm}.{kind}" for kind in kinds))


def plain_exit(head: ExitSpec, model: ModelConfig) -> PlainExit:
    """Describes the exit `head` of a backbone of shape `model`. Raises InputError where no plain model computes it."""
    if head.architecture in _NO_PLACE:
        raise InputError(
            f"an exit of architecture {head.architecture} is no plain model ({_NO_PLACE[head.architecture]}), and the exit "
            f"after layer {head.layer} is one; {_REMEDY}"
        )
    if head.output_vocab:
        raise InputError(
            f"a draft must say the whole vocabulary of {model.vocab_size} tokens, and the exit after layer {head.layer} says "
            f"{head.output_vocab}: engines map a shorter vocabulary back (d2t) for EAGLE-3 heads alone; convert exits "
            "without --output-vocab"
        )
    config = _shape(head, model)
    own = {exit_copy_source(name, config): name for name in exit_tensor_shapes((head,), model)}
    if head.ties_output and model.ties_embeddings:
        own[output_name(config)] = embedding_name(config)
    return PlainExit(head, config, {name: own.get(name, name) for name in backbone_tensor_shapes(config)})


def _shape(head: ExitSpec, model: ModelConfig) -> ModelConfig:
    adds_layer = head.architecture == "layer"
    dense = tuple(layer for layer in model.dense_layers if layer <= head.layer)
    if adds_layer and model.num_layers in model.dense_layers:
        dense += (head.layer + 1,)
    return dataclasses.replace(
        model,
        num_layers=head.layer + adds_layer,
        dense_layers=dense,
        ties_embeddings=model.ties_embeddings and head.ties_output and not head.has_linear,
    )
