"""`ee-tuning tune --dry-run`: runs the real tuning code at full world size on fake tensors, without a GPU.

It runs one rank of each kind of stage, and needs only the model's config.json. Any error of shape, layout or type in
the first step on the cluster occurs here, too.
"""

import dataclasses
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from ee_tuning.artifact.exit_config import ExitHeadsConfig
from ee_tuning.artifact.load import Sources, build_stage
from ee_tuning.artifact.shapes import as_tuned, shape_sources
from ee_tuning.artifact.stage_plans import plan_tuning
from ee_tuning.config import Config, replace
from ee_tuning.data.loader import count_microbatches
from ee_tuning.data.splits import check_data_settings
from ee_tuning.data.tokens import DocumentRules, PackedSamples, Splits
from ee_tuning.errors import InputError
from ee_tuning.losses.loss import ExitLoss
from ee_tuning.losses.teacher_channel import TeacherChannel
from ee_tuning.model.early_exit import EarlyExitModel, StagePlan
from ee_tuning.parallel.fake_world import fake_world
from ee_tuning.parallel.relay import NextAction
from ee_tuning.parallel.topology import Topology, check_world_size
from ee_tuning.planning.dry_fit import print_fit, profile_fit
from ee_tuning.planning.dry_relay import DryRelay
from ee_tuning.planning.memory_tracker import MemoryTracker
from ee_tuning.tuning.exit_trainer import ExitTrainer
from ee_tuning.tuning.microbatch_schedule import Microbatch
from ee_tuning.tuning.optimizer import ExitOptimizer
from ee_tuning.tuning.settings import check_settings, check_shared_head
from ee_tuning.tuning.stage_forward import StageForward, StageOutput
from ee_tuning.tuning.tuner import Tuner


@dataclass(frozen=True, kw_only=True)
class RankProfile:
    """The costs of one rank of a stage in one optimizer step and one validation."""

    stages: tuple[int, ...]
    """All stages of this kind. The rank is of the first one."""
    rank: int
    layers: tuple[tuple[int, int], ...]
    """First and last layer of each of them."""
    exits: tuple[tuple[int, ...], ...]
    """Layers followed by an exit, of each of them."""
    memory: dict[str, int]
    """Bytes in use at the peak, by the keys of MEMORY."""
    layer_flops: int
    """Operations of one micro-batch in the frozen layers."""
    head_flops: int
    """Operations of one micro-batch in the heads, forward and backward."""
    validation_flops: int
    """Operations of one micro-batch in the heads, forward only."""
    tp_bytes: int
    """Bytes gathered and reduced over tensor parallelism, per micro-batch. An all-reduce counts as both."""
    dp_bytes: int
    """Bytes gathered and reduced over replicas, per step."""
    pp_bytes: int
    """Bytes sent to the next stage, per micro-batch."""
    seconds: float
    """Seconds that the dry run took."""


MEMORY = {
    "weights": "the backbone, output matrices of tied exits included",
    "optimizer": "of what is trained: float32 masters and Adam's two moments, this replica's part",
    "heads": "of the heads: whole copies in the computing dtype",
    "gradients": "of what is trained: what stays between two micro-batches",
    "activations": "hidden states in the layers, what layers that are trained keep for the backward pass, keys and values of a sequence's earlier chunks, and what waits for the exits",
    "queue": "what exits keep of micro-batches that wait for the final head's lesson, and of chunks that wait for the last one",
    "relay": "hidden states on their way in",
    "loss": "one chunk of logits with its gradient, and what else the heads' forward and backward passes need",
    "other": "batches, counts, the update's temporaries",
}
"""Contents of a rank's memory, the keys of `RankProfile.memory`."""


def dry_run(config: Config, world_size: int | None) -> None:
    """Profiles the job and prints a line per kind of stage. Raises like `profile_ranks`."""
    parallel = config.parallel
    tp, pp = parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size
    world_size = tp * pp if world_size is None else world_size
    profiles = profile_ranks(config, world_size)
    print(
        f"dry run of {config.model.path} on {world_size} ranks: tensor {tp} × pipeline {pp} × data {world_size // (tp * pp)}, "
        "one rank of each kind of stage"
    )
    for each in profiles:
        which = f"stage {each.stages[0]}" if len(each.stages) == 1 else f"stages {', '.join(map(str, each.stages))}"
        first, last = each.layers[0]
        exits = f"exits after {', '.join(map(str, each.exits[0]))}" if each.exits[0] else "no exit"
        print(
            f"{which}: rank {each.rank}, layers {first}..{last}, {exits}; "
            f"{sum(each.memory.values()) / 1e9:.1f} GB at the most; {each.seconds:.1f} s"
        )
    print_fit(profile_fit(config, world_size))
    print("every shape fits: one optimizer step and one validation ran through, without numbers")


def profile_ranks(config: Config, world_size: int) -> list[RankProfile]:
    """Runs one rank of each kind of stage through one optimizer step and one validation.

    The layout is tensor × pipeline of `config`, with as many replicas as `world_size` allows. The default of
    model.dtype is bfloat16, as on a GPU. Raises InputError as `tune` would where config, model, exits and layout do not
    fit each other; any other exception would have ended the first step, too.
    """
    check_settings(config.tuning)
    check_shared_head(config.exits, config.tuning)
    if config.tuning.teacher_model is not None:
        raise InputError(
            f"plans and dry runs do not count a second model, got tuning.teacher_model = {config.tuning.teacher_model}; leave "
            "it out, and add its weights and a forward pass"
        )
    check_world_size(config.parallel, world_size)
    config = as_tuned(config)
    parallel, sources = config.parallel, shape_sources(config)
    assert sources.exits is not None
    config = _shortened(config, sources.exits, world_size)
    tp, pp = parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size
    sources.config.check_layout(tp, pp)
    check_data_settings(
        config.data, config.tuning.seq_length, sources.config.max_position_embeddings, config.tuning.eval_iters > 0
    )
    per_stage = world_size // pp
    kinds: dict[Any, list[int]] = {}
    with fake_world(parallel, world_size, 0) as topology:
        plans = plan_tuning(config, sources.config, sources.exits, topology)
    for stage, plan in enumerate(plans):
        kinds.setdefault(_kind(plan, stage, pp), []).append(stage)
    profiles = []
    for stages in kinds.values():
        try:
            profiles.append(_profile_rank(config, sources, world_size, stages, stages[0] * per_stage))
        except Exception as error:
            error.add_note(f"in the dry run of rank {stages[0] * per_stage} of {world_size}, stage {stages[0]} of {pp}")
            raise
    return profiles


def _shortened(config: Config, exits: ExitHeadsConfig, world_size: int) -> Config:
    """Returns the job with at most two micro-batches per step and one per validation, since further ones cost the same.

    With a teacher, it keeps enough for the queue of waiting micro-batches to reach its full length. A chunk counts as a
    micro-batch, unless a head takes whole sequences.
    """
    tuning, parallel = config.tuning, config.parallel
    dp = world_size // (parallel.tensor_model_parallel_size * parallel.pipeline_model_parallel_size)
    count = count_microbatches(tuning, dp)
    if tuning.trained.has_backbone:  # enough for a stage to keep as many as it may
        count = min(count, parallel.pipeline_model_parallel_size + 1)
    else:
        count = parallel.pipeline_model_parallel_size + 1 if tuning.teacher_plan(ties_output=False) else min(count, 2)
    if not any(spec.architecture in ("layer", "eagle3") for spec in exits.heads):
        count = -(-count // max(1, tuning.seq_length // tuning.pass_length))
    return replace(
        config,
        model={"dtype": config.model.dtype or "bfloat16"},
        tuning={"global_batch_size": count * tuning.micro_batch_size * dp, "eval_iters": min(tuning.eval_iters, 1)},
    )


def _kind(plan: StagePlan, stage: int, num_stages: int) -> Any:
    """Returns a key that is equal for stages with equal costs."""
    exits = tuple(dataclasses.replace(spec, layer=spec.layer - plan.first_layer) for spec in plan.own_exits)
    # Earlier stages wait longer, for the teacher or for gradients.
    queue = stage if plan.has_final_head else None
    carries = len(plan.brought), len(plan.carried)
    return plan.last_layer - plan.first_layer, exits, carries, stage == 0, stage == num_stages - 1, queue


def _profile_rank(config: Config, sources: Sources, world_size: int, stages: list[int], rank: int) -> RankProfile:
    began, tracker = time.perf_counter(), MemoryTracker()
    with fake_world(config.parallel, world_size, rank) as topology, tracker.account():
        assert sources.exits is not None
        plans = plan_tuning(config, sources.config, sources.exits, topology)
        loaded = build_stage(sources, plans, topology)
        tracker.reclassify("building", "weights")
        with tracker.during("other"):
            tuner = Tuner(loaded, _samples(config), config, topology)
        tracker.peak.clear()  # the peak of loading, which happens in parts
        if tuner.backbone is not None:
            tracker.reclassify("other", "optimizer", tuner.backbone.optimizer.state_tensors())
            tuner.backbone.optimizer.watch_gradients(lambda each: tracker.reclassify("loss", "gradients", [each]))
        for each in tuner.exits:
            tracker.reclassify("other", "optimizer", _state(each))
            each.head.register_forward_pre_hook(partial(_classify_whole_copies, tracker))
        with tracker.during("other"):
            stage_forward = _MeasuredForward(loaded.model, config, topology, tracker, tuner.teacher_channel)
            trainer = _MeasuredTrainer(tuner, loaded.model, tracker)
            tuner.dry_step(stage_forward, trainer)
    alike = [plans[stage] for stage in stages]

    def sent(group: Any, phase: str) -> int:
        return tracker.sent[phase, group.group_name] if group.size() > 1 else 0

    return RankProfile(
        stages=tuple(stages),
        rank=rank,
        layers=tuple((each.first_layer, each.last_layer) for each in alike),
        exits=tuple(tuple(spec.layer for spec in each.own_exits) for each in alike),
        memory={kind: tracker.peak[kind] for kind in MEMORY},
        layer_flops=tracker.flops["activations"] // stage_forward.num_forward,
        head_flops=tracker.flops["loss"] // trainer.num_trained,
        validation_flops=tracker.flops["validation"] // max(trainer.num_validated, 1),
        tp_bytes=sent(topology.tp_group, "activations") // stage_forward.num_forward
        + sent(topology.tp_group, "loss") // trainer.num_trained,
        dp_bytes=sent(topology.dp_group, "loss") + sent(topology.dp_group, "other") * (tuner.backbone is not None),
        pp_bytes=sent(topology.pp_group, "activations") // stage_forward.num_forward,
        seconds=time.perf_counter() - began,
    )


def _state(optimizer: ExitOptimizer) -> Iterator[Tensor]:
    """Yields this replica's part of master weights and moments, and Adam's counts."""
    for parameter, state in optimizer.adam.state.items():
        yield from (each.to_local() if isinstance(each, DTensor) else each for each in (parameter, *state.values()))


def _classify_whole_copies(tracker: MemoryTracker, head: nn.Module, arguments: Any) -> None:
    # After fully_shard's own hook, the parameters are whole.
    tracker.reclassify("loss", "heads", head.parameters())


def _samples(config: Config) -> Splits:
    """Returns one sample of zeros, repeated, with the data's shape and what the document rules need."""
    length = config.tuning.seq_length
    samples = PackedSamples(np.zeros(length + 1, dtype=np.int32), length, rules=DocumentRules.of(config.data))
    return Splits(train=samples, valid=samples if config.tuning.eval_iters else None)


class _MeasuredForward(StageForward):
    """Attributes the costs of forward passes to their phase."""

    def __init__(
        self,
        model: EarlyExitModel,
        config: Config,
        topology: Topology,
        tracker: MemoryTracker,
        teacher_channel: TeacherChannel | None,
    ) -> None:
        tuning = config.tuning
        receives, sends = model.relay_shapes(tuning.pass_length, tuning.micro_batch_size)
        super().__init__(
            model,
            _AccountedRelay(topology, receives, model.plan.dtype, sends, tracker),
            topology,
            teacher_channel,
        )
        self._tracker, self.num_forward = tracker, 0
        self._is_ahead = teacher_channel is not None and teacher_channel.num_ahead > 0

    def forward(self, microbatch: Microbatch, next_action: NextAction) -> StageOutput:
        self.num_forward += microbatch.chunk.ends_rows
        with self._tracker.during("activations"):
            output = super().forward(microbatch, next_action)
        if self._is_ahead:
            kept = [
                each
                for inputs in output.exit_inputs.values()
                for each in (inputs.hidden, inputs.residual)
                if each is not None
            ]
            self._tracker.reclassify("activations", "queue", kept)
        return output


class _MeasuredTrainer(ExitTrainer):
    """Attributes the costs of losses to their phase."""

    def __init__(self, tuner: Tuner, model: EarlyExitModel, tracker: MemoryTracker) -> None:
        super().__init__(tuner.exits, model, tuner.tuning, tuner.topology, tuner.teacher_channel, tuner.backbone)
        self._tracker = tracker
        self.num_trained = self.num_validated = 0

    def train(self, output: StageOutput) -> dict[int, ExitLoss]:
        self.num_trained += output.microbatch.chunk.ends_rows
        with self._tracker.during("loss"):
            losses = super().train(output)
        self._tracker.reclassify("loss", "queue", self._joined.kept)
        self._tracker.reclassify("loss", "gradients")
        return losses

    def evaluate(self, output: StageOutput) -> dict[int, ExitLoss]:
        self.num_validated += output.microbatch.chunk.ends_rows
        with self._tracker.during("validation"):
            return super().evaluate(output)


class _AccountedRelay(DryRelay):
    """Reports the posted receives of a relay to the memory tracker."""

    def __init__(
        self,
        topology: Topology,
        shape: tuple[int, ...],
        dtype: torch.dtype,
        sends: tuple[int, ...],
        tracker: MemoryTracker,
    ) -> None:
        super().__init__(topology, shape, dtype, sends=sends)
        self._tracker = tracker

    def _post_receive(self) -> Any:
        with self._tracker.during("relay"):
            return super()._post_receive()
