"""Tunes exit heads on a frozen backbone, in a forward-only relay of micro-batches that drains only at the end.

Where the backbone is trained, too, gradients come back through the stages, and the relay drains at the end of a step.
"""

import dataclasses
from collections import deque
from collections.abc import Iterator
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any

from ee_tuning.artifact.convert import copied_tensors
from ee_tuning.artifact.exit_config import exit_config_tree
from ee_tuning.artifact.exit_heads import save_exit_heads
from ee_tuning.artifact.load import LoadedModel
from ee_tuning.artifact.stage_plans import backward_cost, forward_cost, tuning_costs
from ee_tuning.checkpoint.fingerprint import fingerprint
from ee_tuning.checkpoint.formats import open_model
from ee_tuning.config import Config, replace
from ee_tuning.data.loader import BatchSource, validation_batches
from ee_tuning.data.tokens import Splits
from ee_tuning.json_file import to_json
from ee_tuning.losses.teacher_channel import TeacherChannel
from ee_tuning.model.draft_spec import draft_tree
from ee_tuning.parallel.collectives import gather_lists, on_first_rank
from ee_tuning.parallel.relay import NextAction, Relay
from ee_tuning.parallel.topology import Topology
from ee_tuning.training_log.log_sinks import open_log_sinks
from ee_tuning.training_log.metrics import MetricsGatherer
from ee_tuning.training_log.throughput import Throughput
from ee_tuning.tuning.backbone_trainer import BackboneTrainer
from ee_tuning.tuning.exit_trainer import ExitTrainer
from ee_tuning.tuning.layer_skip import dropped_layers
from ee_tuning.tuning.microbatch_schedule import Microbatch, MicrobatchSchedule
from ee_tuning.tuning.optimizer import ExitOptimizer
from ee_tuning.tuning.save_stop_policy import SaveStopPolicy
from ee_tuning.tuning.saving import Saver
from ee_tuning.tuning.settings import loss_weights
from ee_tuning.tuning.stage_forward import StageForward, StageOutput
from ee_tuning.tuning.state import (
    Trained,
    TrainingProgress,
    latest_checkpoint,
    load_checkpoint,
    whole_backbone_tensors,
    whole_tensors,
)
from ee_tuning.tuning.stopping import StopRequest
from ee_tuning.tuning.teacher_model import TeacherModel
from ee_tuning.tuning.trained_weights import ADAPTER, save_trained_weights


class Tuner:
    """One stage's part of a run."""

    def __init__(self, loaded: LoadedModel, samples: Splits, config: Config, topology: Topology) -> None:
        assert loaded.exits is not None
        self.config, self.tuning, self.topology, self.exits_config = config, config.tuning, topology, loaded.exits
        self.run_folder = Path(config.tuning.run_folder)
        self._model, self._loaded = loaded.model, loaded
        weights = loss_weights(self.tuning, loaded.exits.exit_layers)
        own = () if loaded.model.plan.shares_final_head else loaded.model.plan.own_exits
        exits = [
            ExitOptimizer(loaded.model.exit_head(spec.layer), weights[spec.layer], self.tuning, topology)
            for spec in own
        ]
        self.teacher_channel = self._make_teacher_channel()
        """The channel of the teacher signal; None where no loss or validation needs it."""
        self.backbone = (
            BackboneTrainer(loaded.model, self.tuning, topology, config.parallel.distributed_timeout_minutes)
            if self.tuning.trained.has_backbone
            else None
        )
        """The backward pass through the layers; None where they are frozen."""
        path = self.tuning.teacher_model
        self._teacher_model = None if path is None else TeacherModel(config, path, loaded.model.config, topology)
        self._trainer = ExitTrainer(exits, loaded.model, self.tuning, topology, self.teacher_channel, self.backbone)
        self._samples = samples
        self._source = BatchSource(samples.train, self.tuning, dp=topology.dp, dp_rank=topology.dp_rank)
        self._validation = validation_batches(samples.valid, self.tuning, dp=topology.dp, dp_rank=topology.dp_rank)

    @property
    def step(self) -> int:
        """Number of optimizer steps taken."""
        return self._trainer.step

    @property
    def exits(self) -> list[ExitOptimizer]:
        """The exits of this stage."""
        return self._trainer.exits

    def resume(self) -> None:
        """Loads the latest checkpoint of the run folder, if there is one. Raises InputError where it is of another
        run.
        """
        folder = on_first_rank(self.topology, lambda: latest_checkpoint(self.run_folder))
        if folder is None:
            return
        progress = load_checkpoint(folder, self._fixed(), self._trained(), self._model.config, self.topology)
        self._trainer.step, self._trainer.validated_step = progress.step, progress.validated_step
        self._source = BatchSource(
            self._samples.train,
            self.tuning,
            dp=self.topology.dp,
            dp_rank=self.topology.dp_rank,
            position=progress.position,
        )

    def run(self) -> bool:
        """Trains until train_iters or a signal, saves a checkpoint, and returns whether train_iters was reached.

        Raises InputError, on all ranks, where a checkpoint can not be written; former ones stay as they are.
        """
        if self.step >= self.tuning.train_iters:
            return True
        relay, teacher_channel = self._relay(), self.teacher_channel
        stage_forward = StageForward(
            self._model, relay, self.topology, teacher_channel, self._teacher_model, self._dropped
        )
        schedule = MicrobatchSchedule(self._source, self._validation, self.tuning)
        # The validation before the first step, or one that was not run before a stop.
        validates_first = schedule.validates_after(self.step) and self._trainer.validated_step != self.step
        queue: deque[StageOutput] = deque()  # micro-batches that wait for their teacher signal
        saver = Saver(self._trained(), self._model.config, self.tuning, self.topology)
        with open_log_sinks(self.config, self.topology, self._loaded, self.step) as metrics, StopRequest() as stop:
            policy = SaveStopPolicy(self.tuning, self.topology, stop, saver)
            flops_per_token = 2 * sum(tuning_costs(self.config, self._model.config, self.exits_config))
            flops_per_token += 2 * backward_cost(self.tuning, self._model.config)
            if self._teacher_model is not None:
                flops_per_token += 2 * forward_cost(self._teacher_model.config, self.tuning.seq_length)
            throughput = Throughput(
                self.tuning.global_batch_size * self.tuning.seq_length,
                flops_per_token,
                lambda: (
                    relay.seconds_waited
                    + (teacher_channel.feedback.seconds_waited if teacher_channel else 0.0)
                    + (self.backbone.relay.seconds_waited if self.backbone else 0.0)
                ),
            )
            for microbatch in schedule.after(self.step, validates_first=validates_first):
                next_action = NextAction.NEXT
                for done, next_action in self._advance(
                    stage_forward, microbatch, policy.next_action(microbatch), queue, metrics, throughput
                ):
                    if next_action is not NextAction.NEXT:
                        throughput.mark(trained=microbatch.is_training)
                        self._save(saver, done, metrics)
                        policy.mark_saved()
                        throughput.mark(trained=False)
                throughput.mark(trained=microbatch.is_training)
                metrics.poll()
                if next_action is NextAction.END:
                    break
            relay.finish()
            if teacher_channel:
                teacher_channel.feedback.finish()
            if self.backbone:
                self.backbone.relay.finish()
            saver.wait()
            metrics.finish()
            saver.check()
        return self.step == self.tuning.train_iters

    def dry_step(self, stage_forward: StageForward, trainer: ExitTrainer | None = None) -> None:
        """Takes one optimizer step and one validation without records, by another `trainer` if given. For dry runs."""
        self._trainer = trainer or self._trainer
        metrics, throughput = MetricsGatherer(self.topology, lambda record: None), Throughput(1, 0.0, lambda: 0.0)
        schedule, queue = MicrobatchSchedule(self._source, self._validation, self.tuning), deque[StageOutput]()
        for microbatch in (*schedule.training(1), *schedule.validation(1)):
            deque(self._advance(stage_forward, microbatch, NextAction.NEXT, queue, metrics, throughput), maxlen=0)
        while queue:
            self._trainer.process(queue.popleft(), metrics, throughput)

    def never_updated(self) -> tuple[list[int], list[int]]:
        """Returns the trained exits of all stages that no step has updated, and all trained ones. All ranks call it."""
        own = [(each.layer, each.num_updates) for each in self.exits if each.trains and each.parameters]
        every = gather_lists(own, self.topology)
        return sorted({layer for layer, _ in every} - {layer for layer, count in every if count}), sorted(
            {layer for layer, _ in every}
        )

    def _make_teacher_channel(self) -> TeacherChannel | None:
        plan = self.exits_config.teacher_plan(self.tuning)
        if plan is None:
            return None
        stages = [
            stage
            for stage, (first, last) in enumerate(self._loaded.stages)
            if any(first <= layer <= last for layer in self.exits_config.exit_layers)
        ]
        return TeacherChannel(self._model, self.topology, self.tuning, plan, stages)

    def save_trained_weights(self, output: Path) -> str:
        """Writes the trained weights of the model. Returns the fingerprint of the model with them. All ranks
        call it.
        """
        assert self.backbone is not None
        config, tensors = self.config, whole_backbone_tensors(self.backbone.optimizer, self.topology)
        facts = {"trainable": self.tuning.trainable, "model_fingerprint": self.exits_config.model_fingerprint}
        facts |= self._facts()
        stored = self.exits_config.torch_dtype
        save_trained_weights(output, config, self._model.config, stored, facts, tensors, self.topology)

        def read() -> str:
            source, model, _ = open_model(replace(config, model={"adapter": str(output)}).model)
            with source:
                return fingerprint(source, model)

        return on_first_rank(self.topology, read)

    def save_exit_heads(self, output: Path, model_fingerprint: str | None = None) -> None:
        """Writes the artifact of the tuned heads, in the backbone's dtype. All ranks call it.

        It is bound to the model with `model_fingerprint`, by default the one that was loaded. Exits that share the
        final head become copies of it, as the trained weights of `run_folder` have it, which must be written before.
        """
        bound = model_fingerprint or self.exits_config.model_fingerprint
        exits = dataclasses.replace(self.exits_config, tuned=self._facts(), model_fingerprint=bound)
        tensors = whole_tensors(self.exits, self._model.config, self.topology)
        if self._model.plan.shares_final_head:
            config = replace(self.config, model={"adapter": str(self.run_folder / ADAPTER)})
            tensors = copied_tensors(config, exits, self.topology)
        save_exit_heads(output, exits, self._model.config, tensors, self.topology, overwrite=True)

    def _facts(self) -> dict[str, Any]:
        """Returns the facts about the run for its outputs."""
        settings = ["global_batch_size", "seq_length", "lr", "min_lr", "lr_decay_style", "backbone_weights", "seed"]
        settings += ["ttt_steps"] if self.exits_config.draft is not None else []
        settings += ["trainable", "depth_sampling"] if self.backbone else []
        return {
            "steps": self.step,
            "tokens": self._source.position * self.tuning.seq_length,
            **{key: getattr(self.tuning, key) for key in settings},
        }

    def _relay(self) -> Relay:
        receives, sends = self._model.relay_shapes(self.tuning.pass_length, self.tuning.micro_batch_size)
        if (teacher := self._teacher_model) is not None:
            receives, sends = ((*shape[:-1], shape[-1] + teacher.width) for shape in (receives, sends))
        return Relay(self.topology, receives, self._model.plan.dtype, sends=sends)

    def _advance(
        self,
        stage_forward: StageForward,
        microbatch: Microbatch,
        next_action: NextAction,
        queue: deque[StageOutput],
        metrics: MetricsGatherer,
        throughput: Throughput,
    ) -> Iterator[tuple[Microbatch, NextAction]]:
        """Runs a micro-batch through the layers, then trains or validates queued ones whose teacher signals must be
        here.

        Yields each finished micro-batch and the action after it.
        """
        if self.backbone is not None and microbatch.is_training:
            self.backbone.begin(microbatch.step)
        queue.append(stage_forward.forward(microbatch, next_action))
        is_end = queue[-1].next_action is NextAction.END
        while len(queue) > (0 if is_end else self._num_ahead(microbatch)):
            done, next_action = queue[0].microbatch, queue[0].next_action
            # Not kept in a variable: it would stay alive beside the next micro-batch's output.
            self._trainer.process(queue.popleft(), metrics, throughput)
            yield done, next_action

    def _dropped(self, microbatch: Microbatch) -> frozenset[int]:
        num_layers, exits = self._model.config.num_layers, self._model.plan.exits
        return dropped_layers(self.tuning, num_layers, exits, self.topology.dp_rank, microbatch)

    def _num_ahead(self, microbatch: Microbatch) -> int:
        if self.backbone is not None:
            return self.backbone.num_ahead(microbatch.is_training, microbatch.is_last)
        return 0 if self.teacher_channel is None else self.teacher_channel.num_ahead

    def _trained(self) -> Trained:
        return Trained(self.exits, self.backbone.optimizer if self.backbone else None)

    def _save(self, saver: Saver, done: Microbatch, metrics: MetricsGatherer) -> None:
        progress = TrainingProgress(
            step=self.step,
            position=done.position,
            validated_step=self._trainer.validated_step,
            fixed=self._fixed(),
        )
        # A run that resumes here must have the records of all steps before.
        saver.save(progress, before_latest=partial(metrics.finish, metrics.num_posted))

    def _lora_facts(self) -> list[Any] | None:
        tuning = self.tuning
        is_lora = tuning.trained.kind == "lora"
        return [tuning.lora_rank, tuning.lora_alpha, list(tuning.lora_targets)] if is_lora else None

    def _fixed(self) -> dict[str, Any]:
        exits = self.exits_config
        return {
            "model_fingerprint": exits.model_fingerprint,
            "exit_layers": list(exits.exit_layers),
            "architecture": exit_config_tree(exits)["architecture"],
            "adapter_rank": exits.adapter_rank,
            "output": exits.output,
            "adds_linear": list(exits.adds_linear) or None,
            "aux_layers": None if exits.draft is None else list(exits.draft.aux_layers),
            "draft": None if exits.draft is None else _digest(draft_tree(exits.draft)),
            "output_vocab": _digest(exits.token_ids) if exits.token_ids else None,
            "seq_length": self.tuning.seq_length,
            "seed": self.tuning.seed,
            "trainable": self.tuning.trainable if self.backbone else None,
            "shares_head": self._model.plan.shares_final_head or None,
            "lora": self._lora_facts(),
            **self._samples.train.identity(),
        }


def _digest(value: Any) -> str:
    return sha256(to_json(value).encode()).hexdigest()
