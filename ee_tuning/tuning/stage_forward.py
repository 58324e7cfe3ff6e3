"""One micro-batch through this stage: receive, run frozen layers, send; and, when its teacher signal is here, the
losses.

No stage waits for a later one: hidden states leave before the first loss is computed.
"""

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from ee_tuning.data.loader import Batch
from ee_tuning.model.documents import PackedDocuments
from ee_tuning.model.early_exit import EarlyExitModel
from ee_tuning.model.exit_head import ExitInput
from ee_tuning.model.stage_states import packed, unpacked
from ee_tuning.parallel.pinned_staging import to_device
from ee_tuning.parallel.relay import NextAction, Relay
from ee_tuning.parallel.topology import Topology
from ee_tuning.parallel.watchdog import hang_watchdog
from ee_tuning.tuning.drafting import Drafting, Targets
from ee_tuning.tuning.loss import ExitLoss, linear_loss
from ee_tuning.tuning.microbatch_schedule import Microbatch
from ee_tuning.tuning.objective import Objective
from ee_tuning.tuning.optimizer import ExitOptimizer
from ee_tuning.tuning.teacher import Teacher
from ee_tuning.tuning.teacher_channel import TeacherChannel

# s sequence, or this rank's part of it where the plan cuts it · b micro-batch · h hidden · v/tp this rank's shard of
# the vocabulary


@dataclass(frozen=True)
class StageOutput:
    """The results of a micro-batch's forward pass on this stage."""

    microbatch: Microbatch
    next_action: NextAction
    exit_inputs: dict[int, ExitInput]
    """Input of each exit, by layer."""
    teacher: Teacher | None
    """The teacher, where it is already known: on the last stage."""


class StageForward:
    """Forward passes and losses of this stage in the relay."""

    def __init__(
        self,
        model: EarlyExitModel,
        relay: Relay,
        topology: Topology,
        loss_chunk_tokens: int,
        objective: Objective,
        teacher_channel: TeacherChannel | None = None,
        *,
        validates_against_teacher: bool = False,
        drafting: Drafting | None = None,
    ) -> None:
        """`teacher_channel` is required where `objective` or validations need a teacher, `drafting` on the stage of a
        drafting head.
        """
        assert teacher_channel is not None or not (objective.wants_teacher or validates_against_teacher)
        self._model, self._relay, self._topology, self._teacher_channel = model, relay, topology, teacher_channel
        self._drafting = drafting
        self._needs_teacher = {
            True: objective.wants_teacher,
            False: objective.wants_teacher or validates_against_teacher,
        }
        self._project = partial(
            linear_loss,
            vocab=model.exit_vocab,
            chunk_tokens=loss_chunk_tokens,
            objective=objective,
            sums_gradient=not model.plan.cuts_sequence,
        )

    @property
    def num_ahead(self) -> int:
        """Number of micro-batches by which `forward` should be ahead of `train` and `evaluate`."""
        return 0 if self._teacher_channel is None else self._teacher_channel.num_ahead

    def forward(self, microbatch: Microbatch, next_action: NextAction) -> StageOutput:
        """Runs the frozen layers and sends the result on. The first stage chooses `next_action`; the others pass
        it on.
        """
        batch, teacher_channel = (
            microbatch.batch,
            self._teacher_channel if self._needs_teacher[microbatch.is_training] else None,
        )
        documents = PackedDocuments.of(batch.document_ids, batch.position_ids, self._topology.device)
        aux: dict[int, Tensor] = {}
        if self._topology.is_first_stage:
            hidden = self._model.embed(to_device(batch.tokens, self._topology.device), documents)
        else:
            states, next_action = self._relay.receive()
            hidden, aux = unpacked(states, self._model.plan.brought)
        with hang_watchdog(
            self._topology,
            f"the layers of a micro-batch of step {microbatch.step} (its tensor-parallel ranks take part)",
        ):
            hidden, exit_inputs = self._model.run_layers(hidden, documents, aux=aux)
        if self._topology.is_last_stage:
            return StageOutput(
                microbatch, next_action, exit_inputs, teacher_channel.publish(hidden) if teacher_channel else None
            )
        if teacher_channel:
            teacher_channel.expect()
        self._relay.send(packed(hidden, aux, self._model.plan.carried), next_action=next_action)
        return StageOutput(microbatch, next_action, exit_inputs, None)

    def teacher_signal(self, output: StageOutput) -> Teacher | None:
        """Returns the teacher of a micro-batch, or None where it needs none. Call it once for each micro-batch, in
        order.
        """
        if (
            output.teacher is not None
            or self._teacher_channel is None
            or not self._needs_teacher[output.microbatch.is_training]
        ):
            return output.teacher
        return self._teacher_channel.teacher_signal()

    def train(self, output: StageOutput, teacher: Teacher | None, exits: list[ExitOptimizer]) -> dict[int, ExitLoss]:
        """Runs each exit forward and backward; gradients add up. Returns sums by exit layer."""
        losses, targets = {}, self._targets(output.microbatch.batch, teacher)
        for each in exits:
            each.begin_microbatch(output.microbatch.is_last)
            result = self._loss(each, output, targets)
            result.loss.backward()
            losses[each.layer] = result._replace(loss=result.loss.detach())
        return losses

    @torch.no_grad()
    def evaluate(self, output: StageOutput, teacher: Teacher | None, exits: list[ExitOptimizer]) -> dict[int, ExitLoss]:
        """Runs each exit forward without a gradient. Returns sums by exit layer."""
        targets = self._targets(output.microbatch.batch, teacher)
        return {each.layer: self._loss(each, output, targets) for each in exits}

    def _loss(self, exit: ExitOptimizer, output: StageOutput, targets: Targets) -> ExitLoss:
        inputs, drafting = output.exit_inputs[exit.layer], self._drafting
        if drafting is None:
            return exit.head(inputs, partial(self._projected_loss, targets))
        ids = None if inputs.documents is None else inputs.documents.ids
        project = partial(self._projected_loss, drafting.targets(targets, ids))
        result = exit.head(drafting.inputs(inputs, targets.labels), project)
        drafts = None if result.agreement is None else drafting.accepted(result.agreement, targets, ids)
        return result._replace(drafts=drafts)

    def _projected_loss(self, targets: Targets, hidden: Tensor, weight: Tensor) -> ExitLoss:  # …, [s, b, h], [v/tp, h]
        return self._project(hidden, weight, targets.labels, targets.loss_mask, teacher=targets.teacher)

    def _targets(self, batch: Batch, teacher: Teacher | None) -> Targets:
        # One copy to the device serves every exit.
        labels, loss_mask = (to_device(each, self._topology.device) for each in (batch.labels, batch.loss_mask))
        return Targets(labels, loss_mask, teacher)
