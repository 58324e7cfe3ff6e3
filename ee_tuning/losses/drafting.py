"""Targets of a drafting head: each step of each token's draft is compared with the model's own token there
(training-time test, arXiv 2503.01840).

A draft begins at token t, whose successor is known. Its step i predicts the token i + 2 ahead, which the final head
predicts at t + 1 + i. The steps lie side by side like rows of the micro-batch (`model/eagle3.py`).
"""

# s sequence · b micro-batch · h hidden · k steps · v/tp this rank's rows of the head's vocabulary · n tokens of a chunk
import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from ee_tuning.config import TuningSection
from ee_tuning.losses.teacher import (
    HiddenTeacher,
    Teacher,
    TeacherBuffers,
    TeacherChunk,
    WholeChunk,
    likeliest_ids,
    row_maxima,
)
from ee_tuning.model.early_exit import EarlyExitModel
from ee_tuning.model.exit_head import ExitInput
from ee_tuning.parallel.draft_vocab import NOT_LISTED, DraftVocab
from ee_tuning.parallel.fake_tensor import is_fake
from ee_tuning.parallel.vocab import VocabShard


class Targets(NamedTuple):
    """Targets of logits [s, b], or [s, k * b] for a drafting head."""

    labels: Tensor
    """int64, tokens or classes of a list."""
    loss_mask: Tensor
    """float, any weights."""
    teacher: Teacher | None


class Drafting:
    """Training and validation of this stage's drafting head, with drafts unrolled over the whole text."""

    def __init__(self, model: EarlyExitModel, num_steps: int, decay: float) -> None:
        """`decay` is the ratio of a step's weight to that of the step before."""
        self._model, self._num_steps, self._decay = model, num_steps, decay

    @classmethod
    def of(cls, model: EarlyExitModel, tuning: TuningSection) -> "Drafting | None":
        """Returns None on a stage without a drafting head."""
        return cls(model, tuning.ttt_steps, tuning.ttt_step_loss_decay) if model.plan.drafts else None

    def inputs(self, inputs: ExitInput, labels: Tensor) -> ExitInput:  # [s, b]
        """Returns the head's inputs with the embeddings of the text that its drafts follow."""
        return dataclasses.replace(inputs, next_embeddings=self._model.embed_ahead(labels, self._num_steps))

    def targets(self, exit_targets: Targets, document_ids: Tensor | None) -> Targets:
        """Returns the targets of all steps, from those of an exit [s, b]. `document_ids` [b, s] or None."""
        counts, vocab = self.counted(exit_targets.loss_mask, document_ids), self._model.exit_vocab
        teacher = exit_targets.teacher
        labels = exit_targets.labels[self._places(exit_targets.labels)]
        if isinstance(vocab, DraftVocab):  # an unlisted token can not be drafted, so it is not trained
            labels = vocab.classes(labels)
            counts, labels = counts * (labels != NOT_LISTED), labels.clamp(min=0)
        weights = self._decay ** torch.arange(self._num_steps, device=counts.device, dtype=counts.dtype)
        if teacher is not None:
            assert isinstance(teacher, HiddenTeacher)
            teacher = DraftTeacher(teacher.hidden, teacher.weight, self._draftable, self._num_steps)
        return Targets(labels.flatten(1), (counts * weights[:, None]).flatten(1), teacher)

    def counted(self, loss_mask: Tensor, document_ids: Tensor | None) -> Tensor:  # [s, b] -> [s, k, b]
        """Returns the loss mask of each step: a draft counts while it is within its row, its document and the loss
        mask.
        """
        s, held = len(loss_mask), self._places(loss_mask)
        is_within = torch.arange(s, device=held.device)[:, None] + 1 + self._steps(held) < s
        counts = loss_mask[:, None] * loss_mask[held].cumprod(1) * is_within[:, :, None]
        if document_ids is None:
            return counts
        ids = document_ids.t()
        return counts * (ids[held] == ids[:, None])

    def accepted(
        self,
        agreement: Tensor,  # [s · k · b]
        exit_targets: Targets,
        document_ids: Tensor | None,
    ) -> Tensor:  # [2 · k]
        """Counts the rounds of an engine along the text that reach each step, and those whose drafts up to it are the
        model's own.
        """
        counts = self.counted(exit_targets.loss_mask, document_ids)
        held = agreement.view_as(counts).to(counts.dtype).cumprod(1)
        reached = counts * _begins_round(counts, held)[:, None]
        return torch.stack((reached, reached * held)).sum((1, 3)).flatten()

    @cached_property
    def _draftable(self) -> Tensor:  # [n/tp, h]
        """Rows of the model's output matrix for the head's vocabulary. Collective over the ranks of a stage."""
        weight, vocab = self._model.backbone.output_layer.weight, self._model.exit_vocab
        return vocab.own_rows(weight) if isinstance(vocab, DraftVocab) else weight

    def _steps(self, like: Tensor) -> Tensor:
        return torch.arange(self._num_steps, device=like.device)

    def _places(self, of_tokens: Tensor) -> Tensor:  # [s, b] -> [s, k]
        """Returns the positions at which the final head predicts the token of a step, limited to the row's last
        token.
        """
        s = len(of_tokens)
        return (torch.arange(s, device=of_tokens.device)[:, None] + 1 + self._steps(of_tokens)).clamp(max=s - 1)


def _begins_round(counts: Tensor, held: Tensor) -> Tensor:  # [s, k, b] -> [s, b]
    """Marks with 1 where a round begins: after the tokens of the round before it, its accepted drafts and the model's
    own.

    No round begins where no later token counts.
    """
    begins = counts[:, 0].clamp(max=1)
    if is_fake(begins):
        return begins
    begins, next_places = begins.cpu(), torch.arange(len(begins))[:, None] + 1 + (held * counts).sum(1).cpu()
    free = torch.zeros(begins.shape[1], dtype=next_places.dtype)
    for place, each in enumerate(begins):
        each.mul_(free <= place)
        free = torch.where(each > 0, next_places[place], free)
    return begins.to(counts.device)


MEAN_LENGTH, RATE = "mean_acceptance_length", "acceptance_rate_"


def is_draft_metric(name: str) -> bool:
    """Whether `name` is a metric of `draft_metrics`."""
    return name == MEAN_LENGTH or name.startswith(RATE)


def draft_metrics(counts: Sequence[float]) -> dict[str, float]:
    """Returns metrics, named and defined as in vLLM, from the sums of `Drafting.accepted`.

    They are the share of rounds whose drafts are accepted up to each step, and the mean acceptance length, which
    includes the model's own token.
    """
    counted, accepted = counts[: len(counts) // 2], counts[len(counts) // 2 :]
    rates = [part / total if total else math.nan for part, total in zip(accepted, counted, strict=True)]
    return (
        {**{f"{RATE}{step}": rate for step, rate in enumerate(rates, 1)}, MEAN_LENGTH: 1 + sum(rates)} if rates else {}
    )


@dataclass(frozen=True)
class DraftTeacher:
    """The final head as teacher of drafts: softmax of `weight` · `hidden` at each step's position. Tokens are in the
    order of [s, k, b].
    """

    hidden: Tensor
    """[s, b, h], after the final norm."""
    weight: Tensor
    """[v/tp, h], the backbone's frozen output matrix."""
    draftable: Tensor
    """[n/tp, h]: the rows of `weight` for the head's vocabulary; the same matrix for the whole vocabulary."""
    num_steps: int

    def chunk(self, part: slice, buffers: TeacherBuffers, vocab: VocabShard, wants_likeliest: bool) -> TeacherChunk:
        """Returns the teacher's distributions for the tokens of `part`. Logits are computed once per place, even if
        several steps refer to it.
        """
        s, b, _ = self.hidden.shape
        width, stop = self.num_steps * b, min(part.stop, s * self.num_steps * b)
        first = min(part.start // width + 1, s - 1)
        said = self.hidden[first : (stop - 1) // width + self.num_steps + 1].flatten(0, 1)
        index = torch.arange(part.start, stop, device=said.device)
        place = (index // width + 1 + index // b % self.num_steps).clamp(max=s - 1)
        rows = (place - first) * b + index % b
        logits = buffers.probabilities.copy_((said @ self.draftable[: vocab.true_rows].t())[rows])
        logits.sub_(vocab.max_over_shards(row_maxima(logits)))
        likeliest = self._likeliest(said, vocab)[rows] if wants_likeliest else None
        return WholeChunk(logits, buffers.spare, likeliest)

    def _likeliest(self, said: Tensor, vocab: VocabShard) -> Tensor:  # [n, h] -> [n]
        """Returns the likeliest token of the whole vocabulary. No draft is accepted where it is not listed."""
        whole = vocab.whole if isinstance(vocab, DraftVocab) else vocab
        logits = (said @ self.weight[: whole.true_rows].t()).to(torch.promote_types(said.dtype, torch.float32))
        ids = likeliest_ids(logits.sub_(whole.max_over_shards(row_maxima(logits))), whole)
        return vocab.classes(ids) if isinstance(vocab, DraftVocab) else ids
