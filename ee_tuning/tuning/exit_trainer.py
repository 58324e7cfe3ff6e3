"""Training and validation of a stage's exits on the micro-batches that went through the stage, and their metrics."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from math import isnan

import torch
from torch import Tensor

from ee_tuning.config import TuningSection
from ee_tuning.losses.drafting import Drafting, Targets
from ee_tuning.losses.loss import ExitLoss, linear_loss
from ee_tuning.losses.loss_metrics import Divisor, LossSums, training_figures, validation_figures
from ee_tuning.losses.teacher import Lesson
from ee_tuning.losses.teacher_channel import TeacherChannel
from ee_tuning.model.early_exit import EarlyExitModel
from ee_tuning.model.exit_head import ExitHead, ExitInput
from ee_tuning.parallel.pinned_staging import to_device
from ee_tuning.parallel.relay import NextAction
from ee_tuning.parallel.time_parts import count_step, part
from ee_tuning.parallel.topology import Topology
from ee_tuning.parallel.watchdog import hang_watchdog
from ee_tuning.training_log.metrics import MetricsGatherer
from ee_tuning.training_log.throughput import Throughput
from ee_tuning.tuning.backbone_trainer import BackboneTrainer, Root
from ee_tuning.tuning.optimizer import ExitOptimizer, ExitUpdate, update_exits
from ee_tuning.tuning.schedule import learning_rate, loss_weight_ramp
from ee_tuning.tuning.sequence_chunks import JoinedChunks
from ee_tuning.tuning.settings import loss_weights, objective
from ee_tuning.tuning.stage_forward import StageOutput


class ExitTrainer:
    """The exits of this stage. `step` counts the optimizer steps taken; `validated_step` had the last validation."""

    def __init__(
        self,
        exits: list[ExitOptimizer],
        model: EarlyExitModel,
        tuning: TuningSection,
        topology: Topology,
        teacher_channel: TeacherChannel | None,
        backbone: BackboneTrainer | None = None,
    ) -> None:
        """`teacher_channel` is required where losses or validations need a teacher, `backbone` where it is trained."""
        self._backbone = backbone
        self.exits, self.step = exits, 0
        self.validated_step: int | None = None
        self._tuning, self._topology, self._sums = tuning, topology, LossSums()
        self._teacher_channel, self._drafting = teacher_channel, Drafting.of(model, tuning)
        self._joined = JoinedChunks(model)
        self._trained = [each for each in exits if each.trains]
        self._exit_layers = [spec.layer for spec in model.plan.exits]
        own = model.plan.own_exits if model.plan.shares_final_head else ()
        self._shared = {spec.layer: model.exit_head(spec.layer) for spec in own}
        self._weights = loss_weights(tuning, tuple(self._exit_layers)) if own else {}
        self._divisor: Divisor = "weights" if tuning.divide_by_token_weights else "tokens"
        self._skipped: Counter[int] = Counter()
        self._linear_loss = partial(
            linear_loss,
            vocab=model.exit_vocab,
            chunk_tokens=tuning.loss_chunk_tokens,
            objective=objective(tuning),
            sums_gradient=not model.plan.cuts_sequence,
        )

    def process(self, output: StageOutput, metrics: MetricsGatherer, throughput: Throughput) -> None:
        """Trains or validates the exits on one micro-batch. All ranks of the stage process the same micro-batches in
        order.
        """
        microbatch = output.microbatch
        self._sums.add(self.train(output) if microbatch.is_training else self.evaluate(output))
        if microbatch.is_last and microbatch.is_training:
            self.end_step(output, metrics, throughput)
        elif microbatch.is_last:
            self.end_validation(output, metrics)

    def end_step(self, output: StageOutput, metrics: MetricsGatherer, throughput: Throughput) -> None:
        """Updates all exits, and posts a record if one is due."""
        tuning, sums, self.step = self._tuning, self._take_sums(), output.microbatch.step
        lr, ramp = learning_rate(self.step, tuning), loss_weight_ramp(self.step, tuning)
        with hang_watchdog(self._topology, f"the update of step {self.step} (all ranks of its stage take part)"):
            active = self._active(self.step)
            updates = update_exits(active, sums, self._divisor, lr, ramp, self._topology) if active else {}
            if self._backbone is not None:
                updates |= self._update_backbone(self._backbone, sums, lr)
        self._skipped.update(layer for layer, update in updates.items() if update.is_skipped)
        throughput.count_step()
        count_step()
        if (
            self.step % tuning.log_interval
            and output.next_action is not NextAction.END
            and self.step != tuning.train_iters
        ):
            return
        throughput.mark(trained=True)
        has_teacher = self._teacher_channel is not None and self._teacher_channel.serves(is_training=True)
        own, stage = throughput.report(), str(self._topology.stage)
        metrics.post(
            {
                "kind": "train",
                "step": self.step,
                "lr": lr,
                **training_figures({layer: update.mean_metrics for layer, update in updates.items()}, has_teacher),
                "grad_norm": {str(layer): update.grad_norm for layer, update in updates.items()},
                "skipped": {str(layer): count for layer, count in self._skipped.items()},
                "tokens_per_second": own["tokens_per_second"],
                "flops_per_second": own["flops_per_second"],
                "idle_share": {stage: own["idle_share"]},
                "memory_bytes": {stage: own["memory_bytes"]},
            }
        )
        self._skipped.clear()

    def end_validation(self, output: StageOutput, metrics: MetricsGatherer) -> None:
        """Posts the validation record of all exits."""
        for each in self.exits:
            each.reshard()
        self.validated_step = output.microbatch.step
        mean_metrics = self._take_sums().mean_metrics(self._topology, self._divisor)
        metrics.post(
            {
                "kind": "validation",
                "step": self.validated_step,
                **validation_figures(mean_metrics, has_teacher=self._teacher_channel is not None),
            }
        )

    @part("exit heads, backward")
    def train(self, output: StageOutput) -> dict[int, ExitLoss]:
        """Runs each trained exit forward and backward, and then the layers, where they are trained; gradients add up.
        Returns sums by exit layer.
        """
        losses, roots = dict[int, ExitLoss](), list[Root]()
        ramp = loss_weight_ramp(output.microbatch.step, self._tuning)
        for ready in self._parts(output):
            targets = self._targets(ready)
            for each in self._active(output.microbatch.step):
                if each.layer not in ready.exit_inputs:
                    continue
                each.begin_microbatch(output.microbatch.is_last)
                inputs, cuts = ready.exit_inputs[each.layer], list[tuple[Tensor, Tensor]]()
                if self._backbone is not None:
                    inputs, cuts = inputs.leaves()
                result = self._loss(each.head, inputs, targets)
                result.loss.backward()
                losses[each.layer] = result._replace(loss=result.loss.detach())
                roots += [(x, leaf.grad * (each.loss_weight * ramp)) for x, leaf in cuts if leaf.grad is not None]
            if self._backbone is not None:
                depths = self._backbone.depths(output.microbatch)
                for layer in sorted(self._shared.keys() & depths):
                    losses[layer], own = self._train_shared(layer, ready.exit_inputs[layer], targets, ramp)
                    roots += own
                final = self._backbone.final_loss(ready, targets) if self._backbone.layer in depths else None
                self._backbone.backward(ready, final, roots)
                losses |= {} if final is None else {self._backbone.layer: final._replace(loss=final.loss.detach())}
        return losses

    def _train_shared(
        self, layer: int, inputs: ExitInput, targets: Targets, ramp: float
    ) -> tuple[ExitLoss, list[Root]]:
        """Runs the final head behind an earlier layer forward and backward: a part of its weights' gradient. Returns
        the loss, and where the layers' backward pass begins.
        """
        inputs, cuts = inputs.leaves()
        result = self._loss(self._shared[layer], inputs, targets)
        if result.loss.requires_grad:  # not where head and layers before it are frozen
            result.loss.backward(torch.full_like(result.loss, self._weights[layer] * ramp))
        roots = [(x, leaf.grad) for x, leaf in cuts if leaf.grad is not None]
        return result._replace(loss=result.loss.detach()), roots

    @torch.no_grad()
    def evaluate(self, output: StageOutput) -> dict[int, ExitLoss]:
        """Runs each exit forward without a gradient. Returns sums by exit layer."""
        losses = dict[int, ExitLoss]()
        for ready in self._parts(output):
            targets = self._targets(ready)
            heads = {each.layer: each.head for each in self.exits} | self._shared
            losses |= {
                layer: self._loss(head, ready.exit_inputs[layer], targets)
                for layer, head in heads.items()
                if layer in ready.exit_inputs
            }
            final = self._backbone.final_loss(ready, targets) if self._backbone is not None else None
            if final is not None and self._backbone is not None:
                losses[self._backbone.layer] = final
        return losses

    def _parts(self, output: StageOutput) -> Iterator[StageOutput]:
        """Yields the output for the exits that take it as it is, with its teacher. With the last chunk of a
        micro-batch, also yields the whole micro-batch for the exits that attend to earlier tokens.
        """
        output, chunk = replace(output, teacher=self._teacher(output)), output.microbatch.chunk
        if chunk.is_whole or not self._joined.layers:
            yield output
            return
        yield replace(output, exit_inputs=self._joined.others(output.exit_inputs))
        beside = output.teacher.by_token if output.teacher is not None else {}
        if whole := self._joined.add(chunk, output.exit_inputs, beside):
            inputs, by_token = whole
            yield replace(
                output,
                microbatch=replace(output.microbatch, chunk=chunk.whole),
                exit_inputs=inputs,
                teacher=None if output.teacher is None else output.teacher.with_tokens(by_token),
            )

    def _active(self, step: int) -> list[ExitOptimizer]:
        """Returns the trained exits of this stage that an optimizer step updates."""
        active = self._tuning.depths.exits(step, self._exit_layers)
        return [each for each in self._trained if each.layer in active]

    @part("exit heads")
    def _loss(self, head: ExitHead, inputs: ExitInput, targets: Targets) -> ExitLoss:
        drafting = self._drafting
        if drafting is None:
            return head(inputs, partial(self._projected_loss, targets))
        ids = None if inputs.documents is None else inputs.documents.ids
        project = partial(self._projected_loss, drafting.targets(targets, ids))
        result = head(drafting.inputs(inputs, targets.labels), project)
        drafts = None if result.agreement is None else drafting.accepted(result.agreement, targets, ids)
        return result._replace(drafts=drafts)

    def _update_backbone(self, backbone: BackboneTrainer, sums: LossSums, lr: float) -> dict[int, ExitUpdate]:
        """Updates the model's weights. The result has the figures of the final head, on the last stage, and of this
        stage's exits that share it, if a micro-batch trained them.
        """
        norm, is_skipped = backbone.update(lr)
        layers = [*self._shared, *[backbone.layer] * self._topology.is_last_stage]
        means = sums.only(layers, self._topology.device).mean_metrics(self._topology, self._divisor)
        return {layer: ExitUpdate(each, norm, is_skipped) for layer, each in means.items() if not isnan(each["tokens"])}

    def _projected_loss(self, targets: Targets, hidden: Tensor, weight: Tensor) -> ExitLoss:  # …, [s, b, h], [v/tp, h]
        return self._linear_loss(hidden, weight, targets.labels, targets.loss_mask, teacher=targets.teacher)

    def _targets(self, output: StageOutput) -> Targets:
        chunk = output.microbatch.chunk
        # One copy to the device serves every exit.
        labels, loss_mask = (to_device(each, self._topology.device) for each in (chunk.labels, chunk.loss_mask))
        return Targets(labels, loss_mask, output.teacher)

    def _teacher(self, output: StageOutput) -> Lesson | None:
        """Returns the teacher of a micro-batch, or None where it needs none. Call it once for each micro-batch, in
        order.
        """
        channel = self._teacher_channel
        if output.teacher is not None or channel is None or not channel.serves(output.microbatch.is_training):
            return output.teacher
        return channel.teacher_signal()

    def _take_sums(self) -> LossSums:
        sums, self._sums = self._sums, LossSums()
        return sums
