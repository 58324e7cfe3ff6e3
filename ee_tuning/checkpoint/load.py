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

from ee_tuning.checkpoint.convert import initial_exits_config
from ee_tuning.checkpoint.exit_heads import ExitHeadsConfig, ExitHeadsReader, check_bound_to, read_exit_tensor
from ee_tuning.checkpoint.exit_init import InitialExits
from ee_tuning.checkpoint.fingerprint import fingerprint
from ee_tuning.checkpoint.formats import BackboneSource, check_model, open_model
from ee_tuning.checkpoint.huggingface import read_backbone_tensor
from ee_tuning.checkpoint.safetensors_reader import TensorSource
from ee_tuning.config import Config
from ee_tuning.errors import InputError
from ee_tuning.model.config import ModelConfig
from ee_tuning.model.early_exit import EarlyExitModel, StagePlan
from ee_tuning.model.exit_spec import ListedTokens
from ee_tuning.model.fit import Fit
from ee_tuning.model.partition import stage_costs, stage_layers
from ee_tuning.model.quantized_linear import QuantizedLinear, check_weight_format, quantized_weights
from ee_tuning.notices import warn_once
from ee_tuning.parallel.collectives import on_first_rank
from ee_tuning.parallel.device import multiplies_bfloat16
from ee_tuning.parallel.topology import Topology


@dataclass(frozen=True)
class Sources:
    """The sources of a stage's weights, and the configurations known before any weights are read."""

    config: ModelConfig
    backbone: TensorSource
    exits: ExitHeadsConfig | None
    """Configuration of the heads; None without exits."""
    exit_tensors: TensorSource | None


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
        sources = Sources(model_config, reader, *_open_exits(config, model_config, reader, topology, fit, listed))
        return build_stage(sources, plan_tuning(config, sources, topology), topology)


def load_for_fitting(config: Config, topology: Topology, listed: ListedTokens | None = None) -> LoadedModel:
    """Loads all layers, the final norm, and the heads that `exits` describes without the map to be fitted.

    `exits` of the result describes the artifact to be written. Raises like `load_for_tuning`.
    """
    reader, model_config = _open_model(config, topology)
    with reader:
        sources = Sources(model_config, reader, *_open_exits(config, model_config, reader, topology, None, listed))
        return build_stage(sources, plan_fitting(config, sources, topology), topology)


def load_for_generation(config: Config, topology: Topology) -> LoadedModel:
    """Loads all layers, the final head, and the heads of exits.path, if given. Raises like `load_for_tuning`."""
    reader, model_config = _open_model(config, topology)
    with reader:
        exits, tensors = (
            _open_exits(config, model_config, reader, topology, None) if config.exits.path else (None, None)
        )
        _check_decodes(config, exits)
        sources = Sources(model_config, reader, exits, tensors)
        loaded = build_stage(sources, _plan_generation(config, sources, topology), topology)
        return dataclasses.replace(
            loaded, heads_digest=tensors.digest if isinstance(tensors, ExitHeadsReader) else None
        )


def plan_fitting(config: Config, sources: Sources, topology: Topology) -> list[StagePlan]:
    """Returns what each stage holds during a fit. Heads have no map and no output matrix then. Raises like
    `plan_tuning`.
    """
    exits, model = sources.exits, sources.config
    assert exits is not None
    cuts_sequence = _cuts_sequence(config, topology)
    check_weight_format(config.tuning.backbone_weights, model)
    heads = tuple(
        dataclasses.replace(
            head,
            ties_output=True,
            adds_linear=False,
            output_vocab=0,
            architecture="norm" if head.architecture == "linear" else head.architecture,
        )
        for head in exits.heads
    )
    costs = stage_costs(model, model.num_layers, (), config.tuning.seq_length, trains_heads=False, has_final_head=False)
    plans = _plans(config, exits, costs, topology, has_final_head=True, max_length=config.tuning.seq_length)
    return [
        dataclasses.replace(
            plan, exits=heads, token_ids=(), cuts_sequence=cuts_sequence, weights=config.tuning.backbone_weights
        )
        for plan in plans
    ]


def fitted_dtype(exits: ExitHeadsConfig) -> torch.dtype:
    """Returns the dtype of maps on their way to the heads."""
    return torch.promote_types(exits.torch_dtype, torch.float32)


def plan_tuning(config: Config, sources: Sources, topology: Topology) -> list[StagePlan]:
    """Returns what each stage holds during tuning.

    Raises InputError where there are fewer layers than stages, or the sequence can not be cut evenly.
    """
    exits = sources.exits
    assert exits is not None
    cuts_sequence = _cuts_sequence(config, topology)
    costs = tuning_costs(config, sources.config, exits)
    plans = _plans(
        config,
        exits,
        costs,
        topology,
        has_final_head=config.tuning.wants_final_head,
        max_length=config.tuning.seq_length,
    )
    weights = config.tuning.backbone_weights
    check_weight_format(weights, sources.config)
    return [
        dataclasses.replace(
            plan,
            shares_output_matrix=exits.sends_hidden(config.tuning),
            cuts_sequence=cuts_sequence,
            weights=weights,
        )
        for plan in plans
    ]


def tuning_costs(config: Config, model: ModelConfig, exits: ExitHeadsConfig) -> list[float]:
    """Returns the multiply-adds per token of each layer built for tuning, with its exit."""
    has_final_head = config.tuning.wants_final_head
    num_layers = model.num_layers if has_final_head else max(exits.exit_layers)
    return stage_costs(
        model,
        num_layers,
        exits.heads,
        config.tuning.seq_length,
        trains_heads=True,
        has_final_head=has_final_head,
        draft_steps=config.tuning.ttt_steps,
    )


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


def compute_dtype(config: Config, topology: Topology) -> torch.dtype:
    """Returns model.dtype, or else float32 on a CPU and bfloat16 on a GPU."""
    is_cpu = topology.device.type == "cpu"
    if is_cpu and config.model.dtype == "bfloat16" and not multiplies_bfloat16():
        warn_once(
            "this processor has no instructions for bfloat16: tuning and the reading of prompts take 2 to 11 times as long as in "
            "float32; leave --dtype away where memory allows (decoding token by token is no slower)"
        )
    return getattr(torch, config.model.dtype or ("float32" if is_cpu else "bfloat16"))


def _cuts_sequence(config: Config, topology: Topology) -> bool:
    cuts_sequence = config.parallel.sequence_parallel and topology.tp > 1
    if cuts_sequence and config.tuning.seq_length % topology.tp:
        raise InputError(
            f"parallel.sequence_parallel cuts the sequence into tensor_model_parallel_size = {topology.tp} equal parts, but "
            f"tuning.seq_length is {config.tuning.seq_length}; set it to a multiple of {topology.tp}, or leave it whole"
        )
    return cuts_sequence


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
        model_config.check_exit_layers(config.exits.layers(model_config.num_layers))
        exits = on_first_rank(topology, lambda: initial_exits_config(config, model_config, reader, listed))
        exits = dataclasses.replace(exits, fitted=fit.record if fit else None)
        return exits, InitialExits(exits, reader, model_config, fit.maps if fit else None, fit.other if fit else None)
    artifact = ExitHeadsReader(Path(config.exits.path), topology, verifies=config.exits.verify)
    check_bound_to(artifact, on_first_rank(topology, lambda: fingerprint(reader, model_config)))
    artifact.check_complete(model_config)
    return artifact.config, artifact


def _check_decodes(config: Config, exits: ExitHeadsConfig | None) -> None:
    if exits is not None and exits.draft is not None:
        raise InputError(
            f"{config.exits.path} holds a drafting head of EAGLE-3, and this decoder drafts by exits alone so far; serve it by an "
            "engine (ee-tuning export --format eagle3 or --format speculators), or leave --exits out"
        )


def _plan_generation(config: Config, sources: Sources, topology: Topology) -> list[StagePlan]:
    exits, model = sources.exits, sources.config
    costs = stage_costs(
        model, model.num_layers, exits.heads if exits else (), 0, trains_heads=False, has_final_head=True
    )
    return _plans(config, exits, costs, topology, has_final_head=True, max_length=model.max_position_embeddings)


def _plans(
    config: Config,
    exits: ExitHeadsConfig | None,
    costs: list[float],
    topology: Topology,
    *,
    has_final_head: bool,
    max_length: int,
) -> list[StagePlan]:
    return [
        StagePlan(
            first_layer=first,
            last_layer=last,
            exits=exits.heads if exits else (),
            token_ids=exits.token_ids if exits else (),
            has_final_head=has_final_head,
            max_length=max_length,
            dtype=compute_dtype(config, topology),
        )
        for first, last in stage_layers(config.parallel.pipeline_layout, costs, topology.pp)
    ]


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
