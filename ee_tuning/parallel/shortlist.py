"""Exits with a shortlist: one class for each listed token, and a last class for any other token.

The list is sorted by id and cut over tensor parallelism like a vocabulary. Probabilities are those of the whole
vocabulary, with all unlisted tokens summed into one class. So confidence keeps its meaning, and where "any other token"
is likeliest the exit has no confidence at all.
"""

# v vocabulary · v/tp this rank's true rows of it · n tokens in the list · c classes, n + 1 · t tokens of a batch … any
# leading dimensions
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
    log_sum_exp,
    padded_size,
    top1,
)

UNSURE = -1.0
"""Confidence where "any other token" is likeliest. No threshold is as low."""


@dataclass(frozen=True, eq=False)
class Shortlist(VocabShard):
    """This rank's shard of the classes; `size` is c."""

    token_ids: Tensor
    """[n] int64, increasing."""
    whole: VocabShard
    """This rank's shard of the model's vocabulary."""
    local_span: tuple[int, int]
    """Positions in the list of this rank's vocabulary shard: the first one, and the one after the last."""

    @classmethod
    def of_tokens(cls, token_ids: Sequence[int], whole: VocabShard, topology: Any) -> "Shortlist":
        """Builds this rank's shard. `token_ids` must be increasing and fewer than the vocabulary."""
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
        """The class of all unlisted tokens."""
        return self.size - 1

    @cached_property
    def _class_of(self) -> Tensor:  # [v] int64
        table = torch.full((self.whole.size,), self.other, device=self.token_ids.device)
        return table.scatter_(0, self.token_ids, torch.arange(self.other, device=table.device))

    def classes(self, token_ids: Tensor) -> Tensor:  # […] int64 -> […] int64
        """Returns the class of each token. Ids outside of the vocabulary stay outside of the classes."""
        known = self._class_of[token_ids.clamp(0, self.whole.size - 1)]
        return torch.where(token_ids < 0, token_ids, torch.where(token_ids >= self.whole.size, self.size, known))

    def to_class_logits(self, logits: Tensor) -> Tensor:  # [t, v/tp] -> [t, this rank's true rows of the classes]
        """Returns the logits of classes for the logits of all tokens, up to a common constant.

        Overwrites `logits` (float32 at least).
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
        """Returns the logit of "any other token" and the log-sum-exp of all. Overwrites `logits` (float32 at least)."""
        first, last = self.local_span
        total = logits.logsumexp(-1)
        other = logits.index_fill_(-1, self.token_ids[first:last] - self.whole.first, -torch.inf).logsumexp(-1)
        if self.world_size == 1:
            return other, total
        merged = self.gather(torch.stack((other, total))).logsumexp(0)
        return merged[0], merged[1]

    def likeliest_classes(self, logits: Tensor) -> Tensor:  # [t, v/tp] -> [t] int64
        """Returns the class of the likeliest token, or `other` if it is not listed. Among equal logits the lowest id
        wins.
        """
        if logits.shape[-1]:
            largest, column = logits.max(-1)
        else:  # this shard holds padding only
            largest = logits.new_full((len(logits),), -torch.inf)
            column = torch.zeros(len(logits), dtype=torch.int64, device=logits.device)
        ids = column + self.whole.first
        if self.world_size > 1:
            winner = self.gather(largest).argmax(0)  # shards are in the order of their ids
            ids = self.gather(ids).gather(0, winner[None])[0]
        return self.classes(ids)

    def other_column(self, values: Tensor) -> Tensor:  # [t, this rank's true rows] -> [t, 1]
        """Returns the column of `other`, or zeros if another rank has it. Meant to be summed over the shards."""
        place = self.other - self.first
        return values[:, place : place + 1] if 0 <= place < values.shape[-1] else values.new_zeros(len(values), 1)


def exit_vocab(token_ids: Sequence[int], whole: VocabShard, topology: Any) -> VocabShard:
    """Returns the vocabulary of exits: a shortlist of the listed tokens, or the whole vocabulary without a list."""
    return Shortlist.of_tokens(token_ids, whole, topology) if token_ids else whole


def token_top1(
    logits: Tensor,  # […, rows of `vocab`]
    vocab: VocabShard,
) -> Top1:
    """Like `top1`, with ids of the model's vocabulary.

    For a shortlist it returns the likeliest listed token; where "any other token" is likelier, its probability is
    UNSURE.
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
    """Like `confidences`, over the classes of a shortlist. UNSURE where "any other token" is likeliest."""
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
    """Like `log_probabilities_of`. An unlisted token gets an equal share of "any other token"."""
    if not isinstance(vocab, Shortlist):
        return log_probabilities_of(logits, token_ids, vocab)
    classes = vocab.classes(token_ids)
    found = log_probabilities_of(logits, classes, vocab)
    return torch.where(classes == vocab.other, found - math.log(vocab.whole.size - vocab.other), found)


def token_logits(
    logits: Tensor,  # […, rows of `vocab`]
    vocab: VocabShard,
) -> Tensor:  # […, v], dtype of logits
    """Like `gather_logits`, for the whole vocabulary on every rank. Tokens that the exit can not predict get -inf."""
    gathered = gather_logits(logits, vocab)
    if not isinstance(vocab, Shortlist):
        return gathered
    whole = gathered.new_full((*gathered.shape[:-1], vocab.whole.size), -torch.inf)
    whole[..., vocab.token_ids] = gathered[..., :-1]
    return whole


def token_likeliest(
    logits: Tensor,  # [t, rows of `vocab`]
    vocab: VocabShard,
    count: int,
) -> tuple[Tensor, Tensor]:  # [t, count] int64; [t, count], float32 (float64 for float64 logits)
    """Returns the likeliest tokens and their log-probabilities, the same bits as `token_log_probabilities`; -inf for
    tokens that a shortlist lacks.
    """
    largest, ids = at_least_float32(token_logits(logits, vocab)).topk(count)
    return ids, largest - log_sum_exp(logits, vocab)[:, None]


def _merged(
    vocab: Shortlist, listed: Tensor, true: Tensor, other: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Merges over the shards: largest logit of a listed token, its class, log-sum-exp, and logit of any other token."""
    nothing = true.new_full(true.shape[:-1], -torch.inf)
    best, index = listed.max(-1) if listed.shape[-1] else (nothing, torch.zeros_like(nothing))
    rival = nothing if other is None else other[..., 0]
    own = torch.stack([each.double() for each in (best, index + vocab.first, rival, true.logsumexp(-1))])
    parts = vocab.gather(own)
    largest, winner = parts[:, 0].max(0)
    classes = parts[:, 1].gather(0, winner[None])[0].long().clamp(max=vocab.other - 1)
    return largest, classes, parts[:, 3].logsumexp(0), parts[:, 2].amax(0)
