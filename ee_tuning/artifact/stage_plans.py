"""Plans of the pipeline stages: which layers, exits and output matrices each stage holds. Nothing is read here."""

import dataclasses

import torch

from ee_tuning.artifact.exit_config import ExitHeadsConfig
from ee_tuning.checkpoint.trained_names import check_frozen_output, check_tied, check_trainable
from ee_tuning.config import Config, TuningSection
from ee_tuning.errors import InputError
from ee_tuning.model.early_exit import StagePlan
from ee_tuning.model.partition import final_head_cost, stage_costs, stage_layers
from ee_tuning.model.quantized_linear import check_weight_format
from ee_tuning.model_config.config import ModelConfig
from ee_tuning.notices import warn_once
from ee_tuning.parallel.device import multiplies_bfloat16
from ee_tuning.parallel.topology import Topology


def plan_tuning(config: Config, model: ModelConfig, exits: ExitHeadsConfig, topology: Topology) -> list[StagePlan]:
    """Returns the plan of each stage for tuning.

    Raises InputError where there are fewer layers than stages, the sequence can not be cut evenly, or tuning.trainable
    can not be done with the model.
    """
    check_trainable(config.tuning, model)
    if exits.ties_output and exits.exit_layers and not config.exits.shares_head:
        check_tied(config.tuning)
    cuts_sequence, teacher = _cuts_sequence(config, topology), exits.teacher_plan(config.tuning)
    if teacher is not None and teacher.sends_hidden and not config.exits.shares_head:
        check_frozen_output(config.tuning)
    costs = tuning_costs(config, model, exits)
    has_final_head = teacher is not None or config.tuning.trained.has_backbone
    plans = _plans(config, exits, costs, topology, has_final_head=has_final_head, max_length=config.tuning.seq_length)
    weights = config.tuning.backbone_weights
    check_weight_format(weights, model)
    ends = [bool(plan.own_exits) and config.exits.shares_head for plan in plans[:-1]] + [has_final_head]
    return [
        dataclasses.replace(
            plan,
            final_head_stages=tuple(stage for stage, has_end in enumerate(ends) if has_end),
            shares_output_matrix=teacher is not None and teacher.sends_hidden,
            shares_final_head=config.exits.shares_head,
            cuts_sequence=cuts_sequence,
            weights=weights,
        )
        for plan in plans
    ]


def plan_fitting(config: Config, model: ModelConfig, exits: ExitHeadsConfig, topology: Topology) -> list[StagePlan]:
    """Returns the plan of each stage for a fit. Heads have no map and no output matrix then. Raises like
    `plan_tuning`.
    """
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


def plan_frozen(config: Config, model: ModelConfig, topology: Topology) -> list[StagePlan]:
    """Returns each stage's plan of a second model that runs beside the tuned one. Raises like `plan_tuning`."""
    costs = stage_costs(model, model.num_layers, (), config.tuning.seq_length, trains_heads=False, has_final_head=True)
    return [
        StagePlan(
            first_layer=first,
            last_layer=last,
            exits=(),
            has_final_head=True,
            max_length=config.tuning.seq_length,
            dtype=compute_dtype(config, topology),
            cuts_sequence=_cuts_sequence(config, topology),
        )
        for first, last in stage_layers((), costs, topology.pp)
    ]


def plan_generation(
    config: Config, model: ModelConfig, exits: ExitHeadsConfig | None, topology: Topology
) -> list[StagePlan]:
    """Returns the plan of each stage for decoding. Raises like `plan_tuning`."""
    costs = stage_costs(
        model, model.num_layers, exits.heads if exits else (), 0, trains_heads=False, has_final_head=True
    )
    return _plans(config, exits, costs, topology, has_final_head=True, max_length=model.max_position_embeddings)


def tuning_costs(config: Config, model: ModelConfig, exits: ExitHeadsConfig) -> list[float]:
    """Returns the multiply-adds per token of each layer built for tuning, with its exit."""
    has_final_head = exits.teacher_plan(config.tuning) is not None or config.tuning.trained.has_backbone
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


def backward_cost(tuning: TuningSection, model: ModelConfig) -> float:
    """Returns the multiply-adds per token of the backward pass through the layers, the final head included: as many as
    forward for the gradients of states, and as many again for those of weights, unless these are frozen beside LoRA.
    """
    trained = tuning.trained
    if not trained.has_backbone:
        return 0.0
    costs = stage_costs(model, model.num_layers, (), tuning.seq_length, trains_heads=False, has_final_head=False)
    times = {"lora": 1, "mlp": 2, "last": 2, "half": 2, "backbone": 2, "all": 2, "heads": 0}[
        trained.kind
    ] + tuning.recompute_activations
    return times * sum(costs[trained.first_layer(model.num_layers) - 1 :]) + final_head_cost(model)


def forward_cost(model: ModelConfig, seq_length: int) -> float:
    """Returns the multiply-adds per token of a whole model's forward pass."""
    return sum(stage_costs(model, model.num_layers, (), seq_length, trains_heads=False, has_final_head=True))


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
    cuts_sequence, tuning = config.parallel.sequence_parallel and topology.tp > 1, config.tuning
    if tuning.forward_chunk_length and tuning.seq_length % tuning.forward_chunk_length:
        raise InputError(
            f"tuning.forward_chunk_length must divide tuning.seq_length = {tuning.seq_length}, got {tuning.pass_length}; "
            "give a divisor, or 0"
        )
    if cuts_sequence and tuning.pass_length % topology.tp:
        key = "forward_chunk_length" if tuning.forward_chunk_length else "seq_length"
        raise InputError(
            f"parallel.sequence_parallel cuts the sequence into tensor_model_parallel_size = {topology.tp} equal parts, but "
            f"tuning.{key} is {tuning.pass_length}; set it to a multiple of {topology.tp}, or leave it whole"
        )
    return cuts_sequence


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
