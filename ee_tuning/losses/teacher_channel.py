"""The teacher signal: computed on the last stage, once per micro-batch, and sent back to every stage with an exit.

The frozen backbone runs ahead: a stage keeps its exits' inputs until the teacher signal arrives. It runs ahead by a
fixed number of micro-batches, the same on all ranks of the stage; if each rank looked for itself whether a signal has
arrived, their collectives would not match.
"""

from collections.abc import Iterable

import torch
from torch import Tensor

from ee_tuning.config import TeacherPlan, TuningSection
from ee_tuning.losses.teacher import HiddenTeacher, Lesson, TopKTeacher, top_k_teacher
from ee_tuning.model.early_exit import EarlyExitModel
from ee_tuning.model.sequence_parallel import local_sequence
from ee_tuning.parallel.feedback import Feedback
from ee_tuning.parallel.time_parts import part
from ee_tuning.parallel.topology import Topology

# s sequence, or this rank's part of it where the plan cuts it · b micro-batch · h hidden · n its tokens · k tokens of a
# TopKTeacher


class TeacherChannel:
    """This stage's end of the teacher channel."""

    def __init__(
        self,
        model: EarlyExitModel,
        topology: Topology,
        tuning: TuningSection,
        plan: TeacherPlan,
        stages_with_exits: Iterable[int],
    ) -> None:
        self._model, self._topology, self._tuning, self._plan = model, topology, tuning, plan
        student_stages = tuple(stage for stage in stages_with_exits if stage < topology.pp - 1)
        shape, dtype = model.hidden_shape(tuning.pass_length, tuning.micro_batch_size), model.plan.dtype
        if not plan.sends_hidden:
            num_tokens, k = shape[0] * shape[1], min(tuning.teacher_top_k, model.exit_vocab.size)
            shape, dtype = (num_tokens, 2, k), torch.promote_types(dtype, torch.float32)
        self.feedback = Feedback(topology, shape, dtype, student_stages)
        self._is_student = topology.stage in student_stages

    @property
    def num_ahead(self) -> int:
        """Number of micro-batches by which the backbone is ahead of the exits: as many as the later stages hold."""
        return self._topology.pp - 1 - self._topology.stage if self._is_student else 0

    def serves(self, is_training: bool) -> bool:
        """Whether micro-batches of training, or of validations, need a teacher. All validations do."""
        return self._plan.in_training or not is_training

    def expect(self) -> None:
        """Posts the receive of the teacher signal for a micro-batch that is about to be sent on."""
        if self._is_student:
            self.feedback.expect()

    @part("teacher")
    def publish(self, hidden: Tensor) -> Lesson:  # [s, b, h], the last layer's output
        """Computes the teacher of a micro-batch on the last stage, and sends it to the student stages."""
        hidden, weight = self._model.final_hidden(hidden), self._model.backbone.output_layer.weight
        if self._plan.sends_hidden:
            self.feedback.send(hidden)
            return HiddenTeacher(self._model.whole_sequence(hidden), weight)
        signal = top_k_teacher(
            self._model.whole_sequence(hidden),
            weight,
            self._tuning.teacher_top_k,
            vocab=self._model.exit_vocab,
            chunk_tokens=self._tuning.loss_chunk_tokens,
        )
        # Sent as one tensor, float32 at least, which holds every id exactly.
        numbers = torch.stack((signal.ids.to(signal.probabilities.dtype), signal.probabilities), dim=1)
        self.feedback.send(local_sequence(numbers, self._topology) if self._model.plan.cuts_sequence else numbers)
        return signal

    def teacher_signal(self) -> Lesson | None:
        """Returns the teacher of the oldest expected micro-batch on other stages, or None on stages without exits."""
        if not self._is_student:
            return None
        # Under tensor parallelism all ranks of a stage take their parts in order.
        signal = self._model.whole_sequence(self.feedback.take())
        if self._plan.sends_hidden:
            return HiddenTeacher(signal, self._model.backbone.output_layer.weight)
        return TopKTeacher(signal[:, 0].long(), signal[:, 1])
