"""Builds this stage of an early-exit model from a job's configuration, and loads its weights.

The backbone is read in place, in any format, and the heads from their artifact. One data-parallel replica reads each
tensor and broadcasts it to the others.
"""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ee_tuning.artifact.convert import initial_exits_config
from ee_tuning.artifact.exit_heads import ExitHeadsConfig, ExitHeadsReader, check_bound_to, read_exit_tensor
from ee_tuning.artifact.exit_init import InitialExits
from ee_tuning.artifact.stage_plans import plan_fitting, plan_generation, plan_tuning
from ee_tuning.checkpoint.fingerprint import fingerprint
from ee_tuning.checkpoint.formats import BackboneSource, check_model, open_model
from ee_tuning.checkpoint.huggingface import read_backbone_tensor
from ee_tuning.config import Config
from ee_tuning.model.early_exit import EarlyExitModel, StagePlan
from ee_tuning.model.exit_spec import ListedTokens
from ee_tuning.model.fit import Fit
from ee_tuning.model.quantized_linear import QuantizedLinear, quantized_weights
from ee_tuning.model_config.config import ModelConfig
from ee_tuning.parallel.collectives import on_first_rank
from ee_tuning.parallel.topology import Topology
from ee_tuning.storage.tensor_source import ShardSource, TensorSource


@dataclass(frozen=True)
class Sources:
    """The sources of a stage's weights, and the configurations known before any weights are read."""

    config: ModelConfig
    backbone: ShardSource
    exits: ExitHeadsConfig | None
    """Configuration of the heads; None without exits."""
    exit_tensors: ShardSource | None


@dataclass(frozen=True)
class LoadedModel:
    """A stage with its weights, and facts about the whole model."""

    model: EarlyExitModel
    stages: list[tuple[int, int]]
    """First and last layer, 1-based, of every stage."""
    exits: ExitHeadsConfig | None
    """Configuration of the heads; None without exits."""
    heads_digest: str | None = None
    """sha256 of the heads' weights from the artifact's manifest: ExitHeadsReader.digest."""


def load_for_tuning(
    config: Config, topology: Topology, fit: Fit | None = None, listed: ListedTokens | None = None
) -> LoadedModel:
    """Loads the layers up to the last exit, and the heads from exits.path or initialized as `exits` describes.

    New heads use `fit` where exits.init is fitted, and `listed` where they have a shortlist. All layers and the final
    head are loaded where tuning.loss or tuning.compare_final need them. Raises InputError where model, exits and layout
    do not fit each other.
    """
    reader, model_config = _open_model(config, topology)
    with reader:
        exits, tensors = _open_exits(config, model_config, reader, topology, fit, listed)
        plans = plan_tuning(config, model_config, exits, topology)
        return build_stage(Sources(model_config, reader, exits, tensors), plans, topology)


def load_for_fitting(config: Config, topology: Topology, listed: ListedTokens | None = None) -> LoadedModel:
    """Loads all layers, the final norm, and the heads that `exits` describes without the map to be fitted.

    `exits` of the result describes the artifact to be written. Raises like `load_for_tuning`.
    """
    reader, model_config = _open_model(config, topology)
    with reader:
        exits, tensors = _open_exits(config, model_config, reader, topology, None, listed)
        plans = plan_fitting(config, model_config, exits, topology)
        return build_stage(Sources(model_config, reader, exits, tensors), plans, topology)


def load_for_generation(config: Config, topology: Topology) -> LoadedModel:
    """Loads all layers, the final head, and the heads of exits.path, if given. Raises like `load_for_tuning`."""
    reader, model_config = _open_model(config, topology)
    with reader:
        exits, tensors = (
            _open_exits(config, model_config, reader, topology, None) if config.exits.path else (None, None)
        )
        plans = plan_generation(config, model_config, exits, topology)
        loaded = build_stage(Sources(model_config, reader, exits, tensors), plans, topology)
        return dataclasses.replace(
            loaded, heads_digest=tensors.digest if isinstance(tensors, ExitHeadsReader) else None
        )


def fitted_dtype(exits: ExitHeadsConfig) -> torch.dtype:
    """Returns the dtype of maps on their way to the heads."""
    return torch.promote_types(exits.torch_dtype, torch.float32)


def build_stage(sources: Sources, plans: list[StagePlan], topology: Topology) -> LoadedModel:
    """Builds this rank's stage of `plans`, with its weights."""
    plan, config = plans[topology.stage], sources.config
    model = EarlyExitModel(config, topology, plan)
    shard = (topology.tp, topology.tp_rank, plan.dtype)
    for name, parameter in model.backbone.named_parameters():
        _fill(parameter, partial(read_backbone_tensor, sources.backbone, config, name, *shard), topology)
    for name, linear in quantized_weights(model.backbone):
        _fill_quantized(linear, partial(read_backbone_tensor, sources.backbone, config, name, *shard), topology)
    for spec in plan.own_exits:
        for name, parameter in model.exit_head(spec.layer).named_parameters():
            assert sources.exit_tensors is not None
            _fill(parameter, partial(read_exit_tensor, sources.exit_tensors, config, spec, name, *shard), topology)
    return LoadedModel(model, [(each.first_layer, each.last_layer) for each in plans], sources.exits)


def _open_model(config: Config, topology: Topology) -> tuple[BackboneSource, ModelConfig]:
    reader, model_config, _ = open_model(config.model)
    model_config.check_layout(topology.tp, topology.pp)
    check_model(reader, model_config, topology, verifies=config.exits.verify)
    return reader, model_config


def _open_exits(
    config: Config,
    model_config: ModelConfig,
    reader: BackboneSource,
    topology: Topology,
    fit: Fit | None,
    listed: ListedTokens | None = None,
) -> tuple[ExitHeadsConfig, TensorSource]:
    """Opens the artifact at exits.path, which must belong to this model, or initial weights as `exits`, `fit` and
    `listed` describe them.
    """
    if config.exits.path is None:
        layers = config.exits.layers(model_config.num_layers)
        if layers or not config.tuning.trained.has_backbone:
            model_config.check_exit_layers(layers)
        exits = on_first_rank(topology, lambda: initial_exits_config(config, model_config, reader, listed))
        exits = dataclasses.replace(exits, fitted=fit.record if fit else None)
        return exits, InitialExits(exits, reader, model_config, fit.maps if fit else None, fit.other if fit else None)
    artifact = ExitHeadsReader(Path(config.exits.path), topology, verifies=config.exits.verify)
    check_bound_to(artifact, on_first_rank(topology, lambda: fingerprint(reader, model_config)))
    artifact.check_complete(model_config)
    return artifact.config, artifact


def _fill(parameter: nn.Parameter, read: Callable[[], Tensor], topology: Topology) -> None:
    with torch.no_grad():
        if topology.dp_rank == 0:
            parameter.copy_(read())
        if topology.dp > 1:
            dist.broadcast(parameter, group_src=0, group=topology.dp_group)


def _fill_quantized(linear: QuantizedLinear, read: Callable[[], Tensor], topology: Topology) -> None:
    if topology.dp_rank == 0:
        linear.quantize_(read())
    if topology.dp > 1:
        for buffer in linear.buffers():
            dist.broadcast(buffer, group_src=0, group=topology.dp_group)
