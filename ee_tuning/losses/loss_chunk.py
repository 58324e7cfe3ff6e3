"""The loss of a chunk of tokens, computed in place: first the values, then the gradient in the buffer of the logits.

Quantities that run over the vocabulary are summed over the shards in two small collectives per chunk, and two more with
a teacher.
"""

# v this rank's true rows of the vocabulary · n tokens of the chunk
from collections.abc import Mapping

import torch
from torch import Tensor

from ee_tuning.losses.objective import LK_RATE, Objective
from ee_tuning.losses.teacher import TeacherChunk, likeliest_ids, row_maxima, row_products
from ee_tuning.parallel.shortlist import Shortlist
from ee_tuning.parallel.vocab import VocabShard

PER_TOKEN = ("cross_entropy", "forward_kl", "total_variation", "confidence", "agreement")
"""Possible keys of `LossChunk.per_token`."""


class LossChunk:
    """The logits of a chunk, turned into exponentials, and the values that follow from them."""

    per_token: dict[str, Tensor]
    """[n] each: `cross_entropy` in nats and `confidence`. With a teacher also `forward_kl` in nats, `total_variation`,
    and `agreement` if the teacher names its likeliest token. With a shortlist all refer to its classes, and
    `confidence` is 0 where "any other token" is likeliest.
    """
    largest: Tensor
    """[n]: the largest probability."""

    def __init__(
        self,
        logits: Tensor,  # [n, v]
        labels: Tensor,  # [n], classes where `vocab` is a shortlist
        vocab: VocabShard,
        teacher_chunk: TeacherChunk | None,
    ) -> None:
        """Overwrites `logits`."""
        local = (labels - vocab.first)[:, None]
        self._column = local.clamp(0, max(vocab.true_rows - 1, 0))
        self._is_here = (local >= 0) & (local < vocab.true_rows)
        self._vocab, self._teacher_chunk, self.per_token = vocab, teacher_chunk, {}
        shifted = logits.sub_(vocab.max_over_shards(row_maxima(logits)))
        if teacher_chunk is not None and teacher_chunk.likeliest is not None:
            self.per_token["agreement"] = likeliest_ids(shifted, vocab) == teacher_chunk.likeliest
        sums = [_at_label(shifted, self._column, self._is_here), *_of_other(shifted, vocab)]
        sums += [] if teacher_chunk is None else teacher_chunk.sums_of_logits(shifted)
        self._exponentials = shifted.exp_()
        sums = [shifted.sum(-1, keepdim=True), *sums] + (
            [] if teacher_chunk is None else teacher_chunk.sums_of_exponentials(shifted)
        )
        # A shard of padding alone must take part in the collectives, too.
        self._total, of_label, *rest = vocab.sum_over_shards(torch.stack(sums))
        other_column, of_teacher = (rest[:1], rest[1:]) if isinstance(vocab, Shortlist) else ([], rest)
        # Without the fill, a label that no shard holds would give a loss that no training lowers.
        losses = (
            (self._total.log() - of_label).squeeze(-1).masked_fill_((labels < 0) | (labels >= vocab.size), torch.nan)
        )
        self.largest = 1 / self._total.squeeze(-1)  # the largest exponential is 1
        confidence = self.largest.masked_fill(other_column[0].squeeze(-1) == 0, 0.0) if other_column else self.largest
        self.per_token.update(cross_entropy=losses, confidence=confidence)
        if teacher_chunk is not None:
            self.per_token["forward_kl"] = teacher_chunk.divergence(of_teacher, self._total).squeeze(-1)
            self._compare(teacher_chunk)

    def _compare(self, teacher_chunk: TeacherChunk) -> None:
        """Computes the total variation and the terms of its gradient: the sign of p - t, and the mean of that sign
        under p.
        """
        self._signs = torch.div(self._exponentials, self._total, out=teacher_chunk.spare).sub_(
            teacher_chunk.probabilities
        )
        distance = self._signs.abs().sum(-1, keepdim=True)
        mean_sign = row_products(self._signs.sign_(), self._exponentials) / self._total
        distance, self._mean_sign = self._vocab.sum_over_shards(torch.stack((distance, mean_sign)))
        self.per_token["total_variation"] = distance.squeeze(-1) / 2

    def gradient_in_place(
        self,
        weights: Tensor,  # [n, 1]
        objective: Objective,
    ) -> Tensor:  # [n, v]
        """Returns the gradient of weights · objective with respect to the logits.

        Call it last: it overwrites its inputs.
        """
        gradient, teacher_chunk, share = self._exponentials, self._teacher_chunk, self._shares(objective)
        scale, of_likelihood = weights / self._total, share["cross_entropy"] + share["forward_kl"]
        if teacher_chunk is not None and _is_any(share["total_variation"]):  # ½ p (sign - its mean)
            signs = self._signs.sub_(self._mean_sign).mul_(share["total_variation"] / 2)
            gradient.mul_(signs.add_(of_likelihood).mul_(scale))
        else:
            gradient.mul_(scale * of_likelihood)
        if teacher_chunk is not None and _is_any(share["forward_kl"]):  # p - t
            gradient.sub_(teacher_chunk.probabilities.mul_(weights * share["forward_kl"]))
        if objective.cross_entropy and gradient.shape[-1]:  # p - one-hot
            gradient.scatter_add_(-1, self._column, torch.where(self._is_here, -weights * objective.cross_entropy, 0.0))
        return gradient

    def _shares(self, objective: Objective) -> dict[str, Tensor | float]:  # [n, 1] or a number each
        found = shares(objective, self.per_token)
        columns = {name: each[:, None] if isinstance(each, Tensor) else each for name, each in found.items()}
        return {"cross_entropy": 0.0, "forward_kl": 0.0, "total_variation": 0.0, **columns}


def shares(objective: Objective, per_token: Mapping[str, Tensor]) -> dict[str, Tensor | float]:  # [n] or a number each
    """Returns the coefficient of each of PER_TOKEN's distances in a token's loss, without distances that are not part
    of it.
    """
    found: dict[str, Tensor | float] = {
        name: share
        for name in ("cross_entropy", "forward_kl", "total_variation")
        if (share := getattr(objective, name))
    }
    if objective.lk:
        of_kl = (-LK_RATE * (1 - per_token["total_variation"])).exp()
        for name, share in (("forward_kl", of_kl), ("total_variation", 1 - of_kl)):
            found[name] = found.get(name, 0.0) + objective.lk * share
    return found


def _is_any(share: Tensor | float) -> bool:
    return isinstance(share, Tensor) or share != 0


def _at_label(shifted: Tensor, column: Tensor, is_here: Tensor) -> Tensor:  # [n, v], [n, 1], [n, 1] -> [n, 1]
    if not shifted.shape[-1]:
        return shifted.new_zeros(len(shifted), 1)
    return shifted.gather(-1, column).masked_fill_(~is_here, 0.0)


def _of_other(shifted: Tensor, vocab: VocabShard) -> list[Tensor]:  # [n, v] -> [n, 1], where `vocab` is a shortlist
    return [vocab.other_column(shifted).clone()] if isinstance(vocab, Shortlist) else []
