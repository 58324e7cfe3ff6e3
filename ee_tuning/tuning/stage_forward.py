"""One micro-batch through the frozen layers of this stage: receive, run, send.

No stage waits for a later one: hidden states leave before the first loss is computed.
"""

from dataclasses import dataclass

from torch import Tensor

from ee_tuning.model.documents import PackedDocuments
from ee_tuning.model.early_exit import EarlyExitModel
from ee_tuning.model.exit_head import ExitInput
from ee_tuning.model.stage_states import packed, unpacked
from ee_tuning.parallel.pinned_staging import to_device
from ee_tuning.parallel.relay import NextAction, Relay
from ee_tuning.parallel.topology import Topology
from ee_tuning.parallel.watchdog import hang_watchdog
from ee_tuning.tuning.microbatch_schedule import Microbatch
from ee_tuning.tuning.teacher import Teacher
from ee_tuning.tuning.teacher_channel import TeacherChannel


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
    """Forward passes of this stage in the relay."""

    def __init__(
        self, model: EarlyExitModel, relay: Relay, topology: Topology, teacher_channel: TeacherChannel | None = None
    ) -> None:
        self._model, self._relay, self._topology, self._teacher_channel = model, relay, topology, teacher_channel

    def forward(self, microbatch: Microbatch, next_action: NextAction) -> StageOutput:
        """Runs the frozen layers and sends the result on. The first stage chooses `next_action`; the others pass
        it on.
        """
        batch, teacher_channel = microbatch.batch, self._teacher_channel
        if teacher_channel is not None and not teacher_channel.serves(microbatch.is_training):
            teacher_channel = None
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
