"""Output matrix and cross-entropy in one step, chunk after chunk of tokens, over a vocabulary shard.

The logits of a chunk become their softmax, then their own gradient, in one buffer that the next chunk uses again; both gradients are
taken at once, in the forward pass. So a head of any vocabulary costs one chunk of logits, never sequence × batch × vocabulary.
"""
# s sequence · b micro-batch · h hidden · v vocabulary · v/tp this rank's rows, padding included · n tokens of all or of a chunk
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ee_tuning.parallel.vocab import VocabShard


def linear_cross_entropy(hidden: Tensor,  # [s, b, h]
                         weight: Tensor,  # [v/tp, h], of hidden's dtype
                         labels: Tensor,  # [s, b], int64
                         loss_mask: Tensor,  # [s, b], float; any weights, 0 leaves a token out
                         *,
                         vocab: VocabShard,
                         chunk_tokens: int,  # tokens whose logits exist at one time
                         ) -> Tensor:  # scalar, nats, float32 (float64 for float64 hidden states)
    """Sum over tokens of loss_mask · cross-entropy of softmax(weight · hidden), the same on every tensor-parallel rank.

    Differentiable, once, in hidden and weight; what does not require a gradient costs none, and without gradients only the loss is
    computed. The gradient of hidden is already summed over the shards. In bf16, the weight's is accumulated in float32.
    A label outside of 0 .. vocabulary - 1 is allowed where loss_mask is 0 only; elsewhere the loss is NaN.
    """
    assert hidden.dtype == weight.dtype and weight.shape[0] == vocab.rows and chunk_tokens > 0
    if torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad):
        return _LinearCrossEntropy.apply(hidden, weight, labels, loss_mask, vocab, chunk_tokens)
    return _walk(hidden, weight, labels, loss_mask, vocab, chunk_tokens, False, False).loss


@torch.no_grad()
def token_losses(hidden: Tensor,  # [s, b, h]
                 weight: Tensor,  # [v/tp, h]
                 labels: Tensor,  # [s, b], int64
                 *,
                 vocab: VocabShard,
                 chunk_tokens: int,
                 ) -> Tensor:  # [s, b], nats, float32 (float64 for float64 hidden states)
    """Each token's cross-entropy, without a gradient; NaN for a label outside of the vocabulary."""
    return _walk(hidden, weight, labels, None, vocab, chunk_tokens, False, False).per_token.view_as(labels)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, labels: Tensor, loss_mask: Tensor, vocab: VocabShard,
                chunk_tokens: int) -> Tensor:
        wants_hidden, wants_weight = ctx.needs_input_grad[:2]
        walked = _walk(hidden, weight, labels, loss_mask, vocab, chunk_tokens, wants_hidden, wants_weight)
        # Held by hand and not by save_for_backward: the engine may then take the weight's gradient over without a copy.
        ctx.gradients, ctx.weight_dtype = (walked.grad_hidden, walked.grad_weight), weight.dtype
        return walked.loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.gradients is None:
            raise RuntimeError("linear_cross_entropy went backward once already and kept no gradients; compute the loss again")
        (grad_hidden, grad_weight), ctx.gradients = ctx.gradients, None
        if grad_hidden is not None:
            grad_hidden.mul_(grad_loss)
        if grad_weight is not None:
            grad_weight = grad_weight.mul_(grad_loss).to(ctx.weight_dtype)
        return grad_hidden, grad_weight, None, None, None, None


@dataclass(frozen=True)
class _Walked:
    """What one walk over the chunks leaves."""

    loss: Tensor
    per_token: Tensor  # [n], not weighed by the mask
    grad_hidden: Tensor | None  # [s, b, h]
    grad_weight: Tensor | None  # [v/tp, h], float32 at least


def _walk(hidden: Tensor, weight: Tensor, labels: Tensor, loss_mask: Tensor | None, vocab: VocabShard, chunk_tokens: int,
          wants_hidden: bool, wants_weight: bool) -> _Walked:
    tokens, flat_labels = hidden.reshape(-1, hidden.shape[-1]), labels.reshape(-1)
    accumulate = torch.promote_types(hidden.dtype, torch.float32)
    mask = torch.ones_like(flat_labels, dtype=accumulate) if loss_mask is None else loss_mask.reshape(-1).to(accumulate)
    true_weight = weight[:vocab.true_rows]
    grad_tokens = tokens.new_empty(tokens.shape) if wants_hidden else None
    grad_weight = torch.zeros_like(weight, dtype=accumulate) if wants_weight else None
    per_token = mask.new_empty(len(tokens))
    scratch = _Scratch(min(chunk_tokens, len(tokens)), vocab.true_rows, hidden, accumulate)

    for start in range(0, len(tokens), chunk_tokens):
        part = slice(start, start + chunk_tokens)
        logits = scratch.logits(tokens[part], true_weight)
        target = _target_rows(flat_labels[part], vocab)
        per_token[part], total = _exponentials_in_place(logits, flat_labels[part], target, vocab)
        if not wants_hidden and not wants_weight:
            continue
        grad_logits = scratch.narrowed(_gradient_in_place(logits, total, target, mask[part]))
        if grad_tokens is not None:
            torch.mm(grad_logits, true_weight, out=grad_tokens[part])
        if grad_weight is not None:
            _add_product(grad_weight[:vocab.true_rows], grad_logits, tokens[part])

    if grad_tokens is not None:
        vocab.sum_over_shards(grad_tokens)
    loss = torch.where(mask == 0, 0.0, per_token * mask).sum()
    return _Walked(loss, per_token, None if grad_tokens is None else grad_tokens.view_as(hidden), grad_weight)


class _Scratch:
    """The one buffer of logits; for 16-bit inputs, a second one of theirs that takes the matrix products' side."""

    def __init__(self, num_tokens: int, num_rows: int, like: Tensor, dtype: torch.dtype) -> None:
        self.wide = like.new_empty(num_tokens, num_rows, dtype=dtype)
        self.narrow = self.wide if like.dtype == dtype else like.new_empty(num_tokens, num_rows)

    def logits(self, tokens: Tensor, weight: Tensor) -> Tensor:
        """tokens [n, h] · weight [v, h] transposed, in the wide buffer."""
        narrow = torch.mm(tokens, weight.t(), out=self.narrow[:len(tokens)])
        return narrow if self.narrow is self.wide else self.wide[:len(tokens)].copy_(narrow)

    def narrowed(self, gradient: Tensor) -> Tensor:
        """The wide buffer's content in the inputs' dtype."""
        return gradient if self.narrow is self.wide else self.narrow[:len(gradient)].copy_(gradient)


@dataclass(frozen=True)
class _Target:
    """Where a chunk's labels lie in this shard."""

    column: Tensor  # [n, 1], in range even where the label is not here
    is_here: Tensor  # [n, 1], bool


def _target_rows(labels: Tensor, vocab: VocabShard) -> _Target:
    local = (labels - vocab.first)[:, None]
    return _Target(local.clamp(0, max(vocab.true_rows - 1, 0)), (local >= 0) & (local < vocab.true_rows))


def _exponentials_in_place(logits: Tensor, labels: Tensor, target: _Target, vocab: VocabShard) -> tuple[Tensor, Tensor]:
    """Turns logits [n, v] into exp(logits - their largest); each token's cross-entropy [n] and the exponentials' sums [n, 1]."""
    if vocab.true_rows:
        largest = vocab.max_over_shards(logits.amax(-1, keepdim=True))
        logits.sub_(largest)
        of_target = logits.gather(-1, target.column).masked_fill_(~target.is_here, 0.0)
    else:  # a shard of padding alone still takes part in the collectives
        vocab.max_over_shards(logits.new_full((len(logits), 1), -torch.inf))
        of_target = logits.new_zeros(len(logits), 1)
    total = logits.exp_().sum(-1, keepdim=True)
    total, of_target = vocab.sum_over_shards(torch.stack((total, of_target)))
    losses = (total.log() - of_target).squeeze(-1)
    # Without this a label of no shard would pass as a loss that no training lowers.
    return losses.masked_fill_((labels < 0) | (labels >= vocab.size), torch.nan), total


def _gradient_in_place(exponentials: Tensor, total: Tensor, target: _Target, mask: Tensor) -> Tensor:
    """Turns exponentials [n, v] into the gradient mask · (softmax - one-hot)."""
    scale = mask[:, None]
    exponentials.mul_(scale / total)
    if exponentials.shape[-1]:
        exponentials.scatter_add_(-1, target.column, torch.where(target.is_here, -scale, 0.0))
    return exponentials


def _add_product(grad_weight: Tensor, grad_logits: Tensor, tokens: Tensor) -> None:
    """grad_weight [v, h] += grad_logits [n, v] transposed · tokens [n, h], the sum in grad_weight's dtype."""
    if grad_weight.dtype == grad_logits.dtype:
        grad_weight.addmm_(grad_logits.t(), tokens)
    else:
        grad_weight.add_(torch.mm(grad_logits.t(), tokens))
