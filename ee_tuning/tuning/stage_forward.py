"""One micro-batch, or a chunk of it, through the layers of this stage: receive, run, send.

No stage waits for a later one: hidden states leave before the first loss is computed.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from ee_tuning.losses.teacher import Lesson, Teacher
from ee_tuning.losses.teacher_channel import TeacherChannel
from ee_tuning.model.documents import PackedDocuments
from ee_tuning.model.early_exit import EarlyExitModel
from ee_tuning.model.exit_head import ExitInput
from ee_tuning.model.sequence_chunk import KeyValueCache
from ee_tuning.model.stage_states import packed, unpacked
from ee_tuning.parallel.pinned_staging import to_device
from ee_tuning.parallel.relay import NextAction, Relay
from ee_tuning.parallel.topology import Topology
from ee_tuning.parallel.watchdog import hang_watchdog
from ee_tuning.tuning.microbatch_schedule import Microbatch
from ee_tuning.tuning.sequence_chunks import documents_of
from ee_tuning.tuning.teacher_model import TeacherModel


class LayerEnds(NamedTuple):
    """Input and output of this stage's layers, where the model is trained."""

    entering: Tensor
    """[s, b, h]: a leaf of the graph through the layers where the stage before needs its gradient."""
    leaving: Tensor
    """[s, b, h], with that graph behind it in training."""


@dataclass(frozen=True)
class StageOutput:
    """The results of a micro-batch's forward pass on this stage."""

    microbatch: Microbatch
    next_action: NextAction
    exit_inputs: dict[int, ExitInput]
    """Input of each exit, by layer."""
    teacher: Lesson | None
    """The teacher, where it is already known: on the last stage."""
    ends: LayerEnds | None = None
    """None where the model is frozen: a micro-batch that waits for its teacher would keep both alive."""
    final_teacher: Teacher | None = None
    """The teacher of the final head, on the last stage, where tuning.teacher_model is given."""


class StageForward:
    """Forward passes of this stage in the relay."""

    def __init__(
        self,
        model: EarlyExitModel,
        relay: Relay,
        topology: Topology,
        teacher_channel: TeacherChannel | None = None,
        teacher_model: TeacherModel | None = None,
        dropped: Callable[[Microbatch], frozenset[int]] = lambda microbatch: frozenset(),
    ) -> None:
        """`dropped` returns the layers that a micro-batch leaves out."""
        self._teacher_model, self._dropped = teacher_model, dropped
        self._model, self._relay, self._topology, self._teacher_channel = model, relay, topology, teacher_channel
        self._cache = KeyValueCache()

    def forward(self, microbatch: Microbatch, next_action: NextAction) -> StageOutput:
        """Runs the layers and sends the result on. The first stage chooses `next_action`; the others pass it on."""
        teacher_channel = self._teacher_channel
        if teacher_channel is not None and not teacher_channel.serves(microbatch.is_training):
            teacher_channel = None
        documents = documents_of(microbatch.chunk, self._cache, self._topology.device)
        entering, next_action = self._entering(microbatch, documents, next_action)
        what = f"the layers of a micro-batch of step {microbatch.step} (its tensor-parallel ranks take part)"
        with hang_watchdog(self._topology, what):
            with torch.set_grad_enabled(microbatch.is_training):
                hidden, exit_inputs = self._model.run_layers(
                    entering.hidden, documents, aux=entering.aux, dropped=self._dropped(microbatch)
                )
            taught = None
            if self._teacher_model is not None and entering.teacher_hidden is not None:
                taught = self._teacher_model.forward(entering.teacher_hidden, documents)
        ends = LayerEnds(entering.hidden, hidden) if self._model.trains_backbone else None
        output = StageOutput(microbatch, next_action, exit_inputs, None, ends)
        if self._topology.is_last_stage:
            return replace(
                output,
                teacher=teacher_channel.publish(hidden) if teacher_channel else None,
                final_teacher=self._teacher_model.distribution(taught)
                if self._teacher_model and taught is not None
                else None,
            )
        if teacher_channel:
            teacher_channel.expect()
        states = packed(hidden, entering.aux, self._model.plan.carried)
        self._relay.send(states if taught is None else torch.cat([states, taught[None]], -1), next_action=next_action)
        return output

    def _entering(
        self, microbatch: Microbatch, documents: PackedDocuments | None, next_action: NextAction
    ) -> tuple["_Entering", NextAction]:
        model, teacher = self._model, self._teacher_model
        if self._topology.is_first_stage:
            tokens = to_device(microbatch.chunk.tokens, self._topology.device)
            taught = None if teacher is None else teacher.embed(tokens, documents)
            with torch.set_grad_enabled(microbatch.is_training):
                return _Entering(model.embed(tokens, documents), {}, taught), next_action
        states, next_action = self._relay.receive()
        taught = None
        if teacher is not None:
            own, other = states.split([states.shape[-1] - teacher.width, teacher.width], dim=-1)
            states, taught = own.contiguous(), other[0].contiguous()
        hidden, aux = unpacked(states, model.plan.brought)
        hidden.requires_grad_(model.takes_gradient and microbatch.is_training)
        return _Entering(hidden, aux, taught), next_action


class _Entering(NamedTuple):
    """Input of this stage's layers."""

    hidden: Tensor
    aux: dict[int, Tensor]
    teacher_hidden: Tensor | None
    """[s, b, ht]: input of the teacher model's layers."""
