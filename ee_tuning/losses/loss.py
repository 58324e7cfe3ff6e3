"""Output matrix and loss in one function, chunk by chunk of tokens, over a vocabulary shard.

The logits of a chunk are overwritten by their softmax, then by their gradient, and the next chunk reuses the buffer.
Both gradients are computed in the forward pass. So a head of any vocabulary needs one chunk of logits, or three with a
teacher, and never sequence × batch × vocabulary.
"""

# s sequence · b micro-batch · h hidden · v vocabulary · v/tp this rank's rows, padding included · n tokens of all or of
# a chunk
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ee_tuning.losses.loss_chunk import PER_TOKEN, LossChunk, shares
from ee_tuning.losses.objective import THRESHOLDS, Objective
from ee_tuning.losses.teacher import Teacher, TeacherBuffers
from ee_tuning.parallel.shortlist import Shortlist
from ee_tuning.parallel.time_parts import part
from ee_tuning.parallel.vocab import VocabShard

CROSS_ENTROPY = Objective()
STATISTICS = ("tokens", "weights", *PER_TOKEN, *(f"above_{threshold}" for threshold in THRESHOLDS))
"""Rows of `ExitLoss.statistics`: sums over the tokens, each multiplied by its loss mask."""


class ExitLoss(NamedTuple):
    """Sums over the tokens, the same on every tensor-parallel rank. float32 (float64 for float64 hidden states)."""

    loss: Tensor
    """Scalar, differentiable: sum of loss_mask · weight · objective."""
    statistics: Tensor
    """[len(STATISTICS)]. `weights` sums loss_mask · weight; `agreement` counts tokens that are the teacher's likeliest,
    too.
    """
    agreement: Tensor | None = None
    """[s · b]: whether each token is, without a gradient and with a teacher; None otherwise."""
    drafts: Tensor | None = None
    """Counts of drafts, where a drafting head is judged (drafting.py)."""


@part("loss and output matrices")
def linear_loss(
    hidden: Tensor,  # [s, b, h]
    weight: Tensor,  # [v/tp, h], of hidden's dtype
    labels: Tensor,  # [s, b], int64
    loss_mask: Tensor,  # [s, b], float; any weights, 0 leaves a token out
    *,
    vocab: VocabShard,
    chunk_tokens: int,  # tokens whose logits exist at one time
    objective: Objective = CROSS_ENTROPY,
    teacher: Teacher | None = None,  # its values at masked tokens do not matter
    # whether the gradient of `hidden` is summed over the shards, or each rank keeps its own share
    sums_gradient: bool = True,
) -> ExitLoss:
    """Returns the loss of softmax(weight · hidden) and its statistics.

    Differentiable, once, in `hidden` and `weight`. Gradients that are not required cost nothing, and without gradients
    only the sums are computed. In bf16, the gradient of `weight` is accumulated in float32. A label outside of 0 ..
    vocabulary - 1 is allowed only where loss_mask is 0; elsewhere the loss is NaN. With a shortlist everything refers
    to its classes: a label that is not listed is "any other token".
    """
    assert hidden.dtype == weight.dtype and weight.shape[0] == vocab.rows and chunk_tokens > 0
    assert teacher is not None or not objective.wants_teacher
    classes = vocab.classes(labels) if isinstance(vocab, Shortlist) else labels
    inputs = _LossInputs(
        classes.reshape(-1), loss_mask.reshape(-1), vocab, chunk_tokens, objective, teacher, sums_gradient
    )
    if torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad):
        return ExitLoss(*_LinearLoss.apply(hidden, weight, inputs))
    sums = _chunked_loss(hidden, weight, inputs, False, False)
    return ExitLoss(sums.loss, sums.statistics, sums.per_token["agreement"] if teacher is not None else None)


@torch.no_grad()
def token_losses(
    hidden: Tensor,  # [s, b, h]
    weight: Tensor,  # [v/tp, h]
    labels: Tensor,  # [s, b], int64
    *,
    vocab: VocabShard,
    chunk_tokens: int,
) -> Tensor:  # [s, b], nats, float32 (float64 for float64 hidden states)
    """Returns each token's cross-entropy, without a gradient. NaN for a label outside of the vocabulary."""
    mask = torch.ones_like(labels, dtype=torch.float32)
    inputs = _LossInputs(labels.reshape(-1), mask.reshape(-1), vocab, chunk_tokens, CROSS_ENTROPY, None, False)
    return _chunked_loss(hidden, weight, inputs, False, False).per_token["cross_entropy"].view_as(labels)


@dataclass(frozen=True)
class _LossInputs:
    """The inputs of the loss beside the two matrices."""

    labels: Tensor  # [n]
    mask: Tensor  # [n]
    vocab: VocabShard
    chunk_tokens: int
    objective: Objective
    teacher: Teacher | None
    sums_gradient: bool


class _LinearLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, inputs: _LossInputs) -> tuple[Tensor, Tensor]:
        sums = _chunked_loss(hidden, weight, inputs, *ctx.needs_input_grad[:2])
        # Stored directly and not by save_for_backward, so that the engine can take over the weight's gradient without a
        # copy.
        ctx.gradients, ctx.weight_dtype = (sums.grad_hidden, sums.grad_weight), weight.dtype
        ctx.mark_non_differentiable(sums.statistics)
        return sums.loss, sums.statistics

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.gradients is None:
            raise RuntimeError("linear_loss went backward once already and kept no gradients; compute the loss again")
        (grad_hidden, grad_weight), ctx.gradients = ctx.gradients, None
        if grad_hidden is not None:
            grad_hidden.mul_(grad_loss)
        if grad_weight is not None:
            grad_weight = grad_weight.mul_(grad_loss).to(ctx.weight_dtype)
        return grad_hidden, grad_weight, None


@dataclass(frozen=True)
class _LossSums:
    """The results of one pass over the chunks."""

    loss: Tensor
    statistics: Tensor  # [len(STATISTICS)]
    per_token: dict[str, Tensor]  # [n] each, not multiplied by the mask
    grad_hidden: Tensor | None  # [s, b, h]
    grad_weight: Tensor | None  # [v/tp, h], float32 at least


def _chunked_loss(
    hidden: Tensor, weight: Tensor, inputs: _LossInputs, wants_hidden: bool, wants_weight: bool
) -> _LossSums:
    tokens, vocab = hidden.reshape(-1, hidden.shape[-1]), inputs.vocab
    accumulate, differentiates = torch.promote_types(hidden.dtype, torch.float32), wants_hidden or wants_weight
    mask, true_weight = inputs.mask.to(accumulate), weight[: vocab.true_rows]
    grad_tokens = tokens.new_empty(tokens.shape) if wants_hidden else None
    grad_weight = torch.zeros_like(weight, dtype=accumulate) if wants_weight else None
    per_token, largest = {name: mask.new_zeros(len(tokens)) for name in PER_TOKEN}, mask.new_zeros(len(tokens))
    buffers = _ChunkBuffers(
        min(inputs.chunk_tokens, len(tokens)), vocab.true_rows, hidden, accumulate, inputs.teacher is not None
    )

    for start in range(0, len(tokens), inputs.chunk_tokens):
        part = slice(start, start + inputs.chunk_tokens)
        logits = buffers.logits(tokens[part], true_weight)
        teacher_chunk = (
            None
            if inputs.teacher is None
            else inputs.teacher.chunk(part, buffers.of_teacher(len(logits)), vocab, not differentiates)
        )
        chunk = LossChunk(logits, inputs.labels[part], vocab, teacher_chunk)
        for name, values in chunk.per_token.items():
            per_token[name][part] = values
        largest[part] = chunk.largest
        if not differentiates:
            continue
        weights = mask[part] * largest[part] if inputs.objective.weighs_by_confidence else mask[part]
        grad_logits = buffers.narrowed(chunk.gradient_in_place(weights[:, None], inputs.objective))
        if grad_tokens is not None:
            torch.mm(grad_logits, true_weight, out=grad_tokens[part])
        if grad_weight is not None:
            _add_product(grad_weight[: vocab.true_rows], grad_logits, tokens[part])

    if grad_tokens is not None and inputs.sums_gradient:
        vocab.sum_over_shards(grad_tokens)
    loss, statistics = _sums(per_token, largest, mask, inputs.objective)
    return _LossSums(
        loss, statistics, per_token, None if grad_tokens is None else grad_tokens.view_as(hidden), grad_weight
    )


def _sums(per_token: dict[str, Tensor], largest: Tensor, mask: Tensor, objective: Objective) -> tuple[Tensor, Tensor]:
    confidence = per_token["confidence"]
    weights = mask * largest if objective.weighs_by_confidence else mask
    terms = [share * per_token[name] for name, share in shares(objective, per_token).items()]
    # Each sum leaves masked tokens out whatever they hold: 0 times NaN is NaN.
    loss = torch.where(mask == 0, 0.0, weights * sum(terms[1:], terms[0])).sum()
    rows = [
        torch.ones_like(mask),
        torch.where(mask == 0, 0.0, weights / mask),
        *per_token.values(),
        *(confidence >= threshold for threshold in THRESHOLDS),
    ]
    return loss, torch.where(mask == 0, 0.0, mask * torch.stack([row.to(mask.dtype) for row in rows])).sum(-1)


class _ChunkBuffers:
    """Buffers for one chunk of logits: one for the student, two for a teacher.

    For 16-bit inputs one more buffer, in the inputs' dtype, takes part in the matrix products.
    """

    def __init__(self, num_tokens: int, num_rows: int, like: Tensor, dtype: torch.dtype, has_teacher: bool) -> None:
        self._wide = like.new_empty(1 + 2 * has_teacher, num_tokens, num_rows, dtype=dtype)
        self._narrow = self._wide[0] if like.dtype == dtype else like.new_empty(num_tokens, num_rows)

    def logits(self, tokens: Tensor, weight: Tensor) -> Tensor:
        """Returns tokens [n, h] · weight [v, h] transposed, in the student's buffer."""
        wide = self._wide[0, : len(tokens)]
        narrow = torch.mm(tokens, weight.t(), out=self._narrow[: len(tokens)])
        return wide if narrow.dtype == wide.dtype else wide.copy_(narrow)

    def of_teacher(self, num_tokens: int) -> TeacherBuffers:
        """Returns the teacher's buffers."""
        return TeacherBuffers(self._wide[1, :num_tokens], self._wide[2, :num_tokens])

    def narrowed(self, gradient: Tensor) -> Tensor:
        """Returns the student's buffer in the inputs' dtype."""
        return gradient if self._narrow.dtype == gradient.dtype else self._narrow[: len(gradient)].copy_(gradient)


def _add_product(grad_weight: Tensor, grad_logits: Tensor, tokens: Tensor) -> None:
    """Adds grad_logits [n, v] transposed · tokens [n, h] to grad_weight [v, h], in grad_weight's dtype."""
    if grad_weight.dtype == grad_logits.dtype:
        grad_weight.addmm_(grad_logits.t(), tokens)
    else:
        grad_weight.add_(torch.mm(grad_logits.t(), tokens))
