"""Exits that say a part of the vocabulary only: a class for each token of a list, and one more, the last, for any other
token.

The list is in the order of ids, and cut over tensor parallelism as a vocabulary is. Probabilities are those of the
whole vocabulary, with all that is not listed taken together: so confidence is what it would be, and where "any other
token" is likeliest an exit is sure of nothing.
"""

# v vocabulary · v/tp this rank's true rows of it · n tokens in the list · c classes, n + 1 · t tokens that are looked
# at … any leading dimensions
import math
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from ee_tuning.parallel.vocab import (
    Top1,
    VocabShard,
    at_least_float32,
    confidences,
    gather_logits,
    log_probabilities_of,
    padded_size,
    top1,
)

UNSURE = -1.0
"""Confidence where "any other token" is likeliest: no threshold is so low."""


@dataclass(frozen=True, eq=False)
class Shortlist(VocabShard):
    """A shard of the classes; `size` is c."""

    token_ids: Tensor
    """[n] int64, increasing."""
    whole: VocabShard
    """This rank's part of the model's vocabulary."""
    local_span: tuple[int, int]
    """The first token of the list that lies in this rank's part of the vocabulary, and the one behind the last."""

    @classmethod
    def of_tokens(cls, token_ids: Sequence[int], whole: VocabShard, topology: Any) -> "Shortlist":
        """`token_ids` are increasing, and fewer than the vocabulary has."""
        assert 0 < len(token_ids) < whole.size and token_ids[0] >= 0 and token_ids[-1] < whole.size
        size, stop = len(token_ids) + 1, whole.first + whole.true_rows
        rows = padded_size(size, topology.tp) // topology.tp
        span = (bisect_left(token_ids, whole.first), bisect_left(token_ids, stop))
        return cls(
            size,
            topology.tp_rank * rows,
            rows,
            topology.tp_group,
            topology.tp,
            torch.tensor(token_ids, device=topology.device),
            whole,
            span,
        )

    @property
    def other(self) -> int:
        """The class of all tokens that are not listed."""
        return self.size - 1

    @cached_property
    def _class_of(self) -> Tensor:  # [v] int64
        table = torch.full((self.whole.size,), self.other, device=self.token_ids.device)
        return table.scatter_(0, self.token_ids, torch.arange(self.other, device=table.device))

    def classes(self, token_ids: Tensor) -> Tensor:  # […] int64 -> […] int64
        """The class of each token; what is no token stays none, so that it is no class either."""
        known = self._class_of[token_ids.clamp(0, self.whole.size - 1)]
        return torch.where(token_ids < 0, token_ids, torch.where(token_ids >= self.whole.size, self.size, known))

    def to_class_logits(self, logits: Tensor) -> Tensor:  # [t, v/tp] -> [t, this rank's true rows of the classes]
        """Logits of classes from those of all tokens, by as many as both have in common; overwrites `logits` (float32
        at least).
        """
        first, last = self.local_span
        columns = self.token_ids[first:last] - self.whole.first
        listed = logits[:, columns]
        other = logits.index_fill_(-1, columns, -torch.inf).logsumexp(-1)
        if self.world_size == 1:
            return torch.cat((listed, other[:, None]), dim=-1)
        everything = logits.new_full((len(logits), self.size), -torch.inf)
        everything[:, first:last] = listed
        self.max_over_shards(everything)
        everything[:, self.other] = self.gather(other).logsumexp(0)
        return everything[:, self.first : self.first + self.true_rows]

    def other_and_total(self, logits: Tensor) -> tuple[Tensor, Tensor]:  # [t, v/tp] -> [t], [t]
        """The logit of "any other token" and the log-sum-exp of all; overwrites `logits` (float32 at least)."""
        first, last = self.local_span
        total = logits.logsumexp(-1)
        other = logits.index_fill_(-1, self.token_ids[first:last] - self.whole.first, -torch.inf).logsumexp(-1)
        if self.world_size == 1:
            return other, total
        merged = self.gather(torch.stack((other, total))).logsumexp(0)
        return merged[0], merged[1]

    def likeliest_classes(self, logits: Tensor) -> Tensor:  # [t, v/tp] -> [t] int64
        """The class of the likeliest token, of equal ones that with the lowest id; `other` where it is not listed."""
        if logits.shape[-1]:
            largest, column = logits.max(-1)
        else:  # a shard of padding alone
            largest, column = (
                logits.new_full((len(logits),), -torch.inf),
                torch.zeros(len(logits), dtype=torch.int64, device=logits.device),
            )
        ids = column + self.whole.first
        if self.world_size > 1:
            winner = self.gather(largest).argmax(0)  # shards come in the order of their ids
            ids = self.gather(ids).gather(0, winner[None])[0]
        return self.classes(ids)

    def other_column(self, values: Tensor) -> Tensor:  # [t, this rank's true rows] -> [t, 1]
        """The column of `other`, zeros where it is another rank's: to be summed over the shards."""
        place = self.other - self.first
        return values[:, place : place + 1] if 0 <= place < values.shape[-1] else values.new_zeros(len(values), 1)


def exit_vocab(token_ids: Sequence[int], whole: VocabShard, topology: Any) -> VocabShard:
    """What exits say: the tokens of a list, or the whole vocabulary where there is none."""
    return Shortlist.of_tokens(token_ids, whole, topology) if token_ids else whole


def token_top1(
    logits: Tensor,  # […, rows of `vocab`]
    vocab: VocabShard,
) -> Top1:
    """`top1` in ids of the model's vocabulary. Of a shortlist the likeliest token that is listed; where "any other
    token" is likelier its probability is given as UNSURE.
    """
    if not isinstance(vocab, Shortlist):
        return top1(logits, vocab)
    true, place = at_least_float32(vocab.without_padding(logits)), vocab.other - vocab.first
    listed, other = true[..., : max(place, 0)], true[..., place : place + 1] if 0 <= place < vocab.rows else None
    if vocab.world_size == 1:
        assert other is not None
        (best, index), total, rival = listed.max(-1), true.logsumexp(-1), other[..., 0]
    else:
        best, index, total, rival = _merged(vocab, listed, true, other)
    return Top1(vocab.token_ids[index], torch.where(rival > best, UNSURE, (best - total).exp()).to(true.dtype))


def token_confidences(
    logits: Tensor,  # […, rows of `vocab`]
    vocab: VocabShard,
    measure: str,
) -> Tensor:  # […], float32 (float64 for float64 logits)
    """`confidences` over the classes of a shortlist, UNSURE where "any other token" is likeliest."""
    if not isinstance(vocab, Shortlist):
        return confidences(logits, vocab, measure)
    likeliest = token_top1(logits, vocab).max_probability
    if measure == "max_probability":
        return likeliest
    return torch.where(likeliest == UNSURE, UNSURE, confidences(logits, vocab, measure))


def token_log_probabilities(
    logits: Tensor,  # [t, rows of `vocab`]
    token_ids: Tensor,  # [t] int64
    vocab: VocabShard,
) -> Tensor:  # [t], float32 (float64 for float64 logits)
    """`log_probabilities_of` tokens; one that is not listed has the part of "any other token" that each of them has."""
    if not isinstance(vocab, Shortlist):
        return log_probabilities_of(logits, token_ids, vocab)
    classes = vocab.classes(token_ids)
    found = log_probabilities_of(logits, classes, vocab)
    return torch.where(classes == vocab.other, found - math.log(vocab.whole.size - vocab.other), found)


def token_logits(
    logits: Tensor,  # […, rows of `vocab`]
    vocab: VocabShard,
) -> Tensor:  # […, v], dtype of logits
    """`gather_logits` of the whole vocabulary, on every rank; -inf where an exit can not say a token."""
    gathered = gather_logits(logits, vocab)
    if not isinstance(vocab, Shortlist):
        return gathered
    whole = gathered.new_full((*gathered.shape[:-1], vocab.whole.size), -torch.inf)
    whole[..., vocab.token_ids] = gathered[..., :-1]
    return whole


def _merged(
    vocab: Shortlist, listed: Tensor, true: Tensor, other: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What all shards say: the largest logit of a listed token, its class, the log-sum-exp, and the logit of any other
    token.
    """
    nothing = true.new_full(true.shape[:-1], -torch.inf)
    best, index = listed.max(-1) if listed.shape[-1] else (nothing, torch.zeros_like(nothing))
    rival = nothing if other is None else other[..., 0]
    own = torch.stack([each.double() for each in (best, index + vocab.first, rival, true.logsumexp(-1))])
    parts = vocab.gather(own)
    largest, winner = parts[:, 0].max(0)
    classes = parts[:, 1].gather(0, winner[None])[0].long().clamp(max=vocab.other - 1)
    return largest, classes, parts[:, 3].logsumexp(0), parts[:, 2].amax(0)
