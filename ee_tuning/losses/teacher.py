"""The final head as the exits' teacher, from its hidden states or from its k likeliest tokens.

A teacher's distribution is computed chunk by chunk beside the student's logits (loss.py), in buffers that the next
chunk reuses.
"""

# s sequence · b micro-batch · h hidden · v this rank's true rows of the vocabulary · n tokens of a chunk · k tokens
# that a TopKTeacher lists
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from ee_tuning.parallel.shortlist import Shortlist
from ee_tuning.parallel.vocab import VocabShard

NOT_LISTED = -1
"""A token that is no class of a shortlist."""


class TeacherChunk(Protocol):
    """A teacher's distribution for n tokens, built in three steps around the student's softmax."""

    probabilities: Tensor
    """[n, v], valid after `divergence`."""
    spare: Tensor
    """[n, v], a buffer that is free after `divergence`."""
    likeliest: Tensor | None
    """[n] int64: the teacher's likeliest token, the lowest id among equals, NOT_LISTED where a shortlist has no class
    for it. None where it was not requested.
    """

    def sums_of_logits(self, shifted: Tensor) -> list[Tensor]:
        """Returns partial sums [n, 1] of the student's logits minus their maximum [n, v], to be summed over the
        shards.
        """

    def sums_of_exponentials(self, exponentials: Tensor) -> list[Tensor]:
        """Returns further partial sums, of the student's exponentials."""

    def divergence(self, sums: list[Tensor], total: Tensor) -> Tensor:
        """Returns KL(teacher ‖ student) [n, 1] in nats, from the total sums and the student's sum of exponentials [n,
        1].
        """


class Teacher(Protocol):
    """A teacher for `linear_loss`."""

    def chunk(self, part: slice, buffers: "TeacherBuffers", vocab: VocabShard, wants_likeliest: bool) -> TeacherChunk:
        """Returns the distribution for tokens `part` of s · b, over the classes of `vocab` where it is a shortlist."""


class Lesson(Teacher, Protocol):
    """A teacher as it comes from the final head, which can be joined with those of other tokens."""

    @property
    def by_token(self) -> dict[str, Tensor]:
        """Its tensors that have a row for each token, in order, or for each place of s."""

    def with_tokens(self, by_token: Mapping[str, Tensor]) -> "Lesson":
        """Returns a teacher with these tensors instead."""


@dataclass(frozen=True)
class TeacherBuffers:
    """Buffers for one chunk, [n, v] each."""

    probabilities: Tensor
    spare: Tensor


@dataclass(frozen=True)
class HiddenTeacher:
    """A Teacher of the whole distribution: softmax of `weight` · `hidden`."""

    hidden: Tensor
    """[s, b, h], after the final norm."""
    weight: Tensor
    """[v/tp, h], the backbone's frozen output matrix."""

    @property
    def by_token(self) -> dict[str, Tensor]:
        return {"hidden": self.hidden}

    def with_tokens(self, by_token: Mapping[str, Tensor]) -> "HiddenTeacher":
        return replace(self, **by_token)

    def chunk(self, part: slice, buffers: TeacherBuffers, vocab: VocabShard, wants_likeliest: bool) -> TeacherChunk:
        tokens = self.hidden.reshape(-1, self.hidden.shape[-1])[part]
        likeliest, dtype = None, buffers.probabilities.dtype
        if isinstance(vocab, Shortlist):
            said = _class_logits(tokens, self.weight, vocab, dtype)
            logits, likeliest = buffers.probabilities.copy_(said.logits), said.likeliest if wants_likeliest else None
        else:
            logits = buffers.probabilities.copy_(tokens @ self.weight[: vocab.true_rows].t())
        largest = vocab.max_over_shards(row_maxima(logits))
        logits.sub_(largest)
        if wants_likeliest and likeliest is None:
            likeliest = likeliest_ids(logits, vocab)
        return WholeChunk(logits, buffers.spare, likeliest)


class WholeChunk:
    """A TeacherChunk of logits [n, v] less their largest over the shards, which it overwrites."""

    def __init__(self, shifted: Tensor, spare: Tensor, likeliest: Tensor | None) -> None:
        self.probabilities, self.spare, self.likeliest = shifted, spare, likeliest

    def sums_of_logits(self, shifted: Tensor) -> list[Tensor]:
        ratio = torch.sub(self.probabilities, shifted, out=self.spare)
        self.probabilities.exp_()
        return [self.probabilities.sum(-1, keepdim=True), row_products(self.probabilities, ratio)]

    def sums_of_exponentials(self, exponentials: Tensor) -> list[Tensor]:
        return []

    def divergence(self, sums: list[Tensor], total: Tensor) -> Tensor:
        own_total, weighed_ratio = sums
        self.probabilities.div_(own_total)
        return weighed_ratio / own_total - own_total.log() + total.log()


@dataclass(frozen=True)
class TopKTeacher:
    """A Teacher of the k likeliest tokens and the total probability of all others, the tail.

    The tail is distributed like the student's own: only its mass is taught. KL and total variation are then those of
    two distributions over k + 1 events, and lower bounds of the true ones.
    """

    ids: Tensor
    """[n, k] int64, likeliest first. With a shortlist its classes: first that of the likeliest token, then the
    likeliest others.
    """
    probabilities: Tensor
    """[n, k], float32 (float64 for a float64 backbone)."""

    @property
    def tail(self) -> Tensor:  # [n, 1]
        """Total probability of all tokens that are not listed."""
        return (1 - self.probabilities.sum(-1, keepdim=True)).clamp_(min=0)

    @property
    def by_token(self) -> dict[str, Tensor]:
        return {"ids": self.ids, "probabilities": self.probabilities}

    def with_tokens(self, by_token: Mapping[str, Tensor]) -> "TopKTeacher":
        return replace(self, **by_token)

    def chunk(self, part: slice, buffers: TeacherBuffers, vocab: VocabShard, wants_likeliest: bool) -> TeacherChunk:
        top_k = _TopKChunk(TopKTeacher(self.ids[part], self.probabilities[part]), buffers, vocab)
        if isinstance(vocab, Shortlist):
            top_k.likeliest = _listed(self.ids[part, 0], vocab)
        return top_k


class _TopKChunk:
    def __init__(self, teacher: TopKTeacher, buffers: TeacherBuffers, vocab: VocabShard) -> None:
        self._probabilities, self._tail = teacher.probabilities, teacher.tail
        self.probabilities, self.spare = buffers.probabilities, buffers.spare
        self.likeliest: Tensor | None = teacher.ids[:, 0]
        local = teacher.ids - vocab.first
        self._is_here = (local >= 0) & (local < vocab.true_rows)
        self._columns = local.clamp(0, max(vocab.true_rows - 1, 0))

    def sums_of_logits(self, shifted: Tensor) -> list[Tensor]:
        if not shifted.shape[-1]:  # a shard of padding alone
            return [shifted.new_zeros(len(shifted), 1)]
        log_ratio = self._probabilities.log() - shifted.gather(-1, self._columns)
        return [
            (self._probabilities * log_ratio)
            .masked_fill_(~self._is_here | (self._probabilities == 0), 0.0)
            .sum(-1, keepdim=True)
        ]

    def sums_of_exponentials(self, exponentials: Tensor) -> list[Tensor]:
        self.probabilities.copy_(exponentials)
        if exponentials.shape[-1]:
            # Added, not assigned: the columns of tokens in other shards all point to an edge of this one.
            top_k = exponentials.gather(-1, self._columns).neg_().masked_fill_(~self._is_here, 0.0)
            self.probabilities.scatter_add_(-1, self._columns, top_k)
        return [self.probabilities.sum(-1, keepdim=True)]

    def divergence(self, sums: list[Tensor], total: Tensor) -> Tensor:
        of_listed, tail_sum = sums
        tail_sum = tail_sum.clamp(min=torch.finfo(tail_sum.dtype).tiny)
        self.probabilities.mul_(self._tail / tail_sum)
        if self.probabilities.shape[-1]:
            self.probabilities.scatter_add_(-1, self._columns, self._probabilities.masked_fill(~self._is_here, 0.0))
        of_tail = torch.xlogy(self._tail, self._tail) - self._tail * (tail_sum.log() - total.log())
        return of_listed + (1 - self._tail) * total.log() + of_tail


@torch.no_grad()
def top_k_teacher(
    hidden: Tensor,  # [s, b, h], after the final norm
    weight: Tensor,  # [v/tp, h]
    k: int,
    *,
    vocab: VocabShard,
    chunk_tokens: int,
) -> TopKTeacher:
    """Returns the k likeliest tokens (all, if the vocabulary is smaller) of softmax(weight · hidden), the same on every
    shard.

    Among equal probabilities the lowest id comes first. With a shortlist the ids are its classes, as in TopKTeacher.
    """
    k, tokens = min(k, vocab.size), hidden.reshape(-1, hidden.shape[-1])
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    ids = tokens.new_empty(len(tokens), k, dtype=torch.int64)
    probabilities = tokens.new_empty(len(tokens), k, dtype=dtype)
    for start in range(0, len(tokens), chunk_tokens):
        part = slice(start, start + chunk_tokens)
        said = _class_logits(tokens[part], weight, vocab, dtype)
        values, columns = _local_top(said.logits, k + (said.likeliest is not None))
        total = said.logits.logsumexp(-1)
        if vocab.world_size > 1:
            values, columns = (vocab.gather(each).movedim(0, 1).flatten(1) for each in (values, columns + vocab.first))
            total = vocab.gather(total).logsumexp(0)
        by_id, ranks = columns.argsort(-1), values
        # "any other token" may be likelier than each listed one, so it is among the first two
        if said.likeliest is not None:
            first = said.likeliest.where(said.likeliest >= 0, vocab.size - 1)
            ranks = values.masked_fill((columns == first[:, None]) & (values > -torch.inf), torch.inf)
        order = by_id.gather(-1, ranks.gather(-1, by_id).argsort(stable=True, dim=-1, descending=True))[:, :k]
        ids[part], probabilities[part] = columns.gather(-1, order), (values.gather(-1, order) - total[:, None]).exp()
    return TopKTeacher(ids, probabilities)


class _ClassLogits(NamedTuple):
    """A teacher's logits and likeliest token, in a student's classes."""

    logits: Tensor
    """[n, v], float32 at least."""
    likeliest: Tensor | None
    """[n]: the class of the likeliest token, or NOT_LISTED. None where classes are tokens."""


def _class_logits(
    tokens: Tensor, weight: Tensor, vocab: VocabShard, dtype: torch.dtype
) -> _ClassLogits:  # [n, h], [v/tp, h]
    if not isinstance(vocab, Shortlist):
        return _ClassLogits((tokens @ weight[: vocab.true_rows].t()).to(dtype), None)
    logits = (tokens @ weight[: vocab.whole.true_rows].t()).to(dtype)
    likeliest = _listed(vocab.likeliest_classes(logits), vocab)
    return _ClassLogits(vocab.to_class_logits(logits), likeliest)


def _listed(classes: Tensor, vocab: Shortlist) -> Tensor:  # [n] -> [n]
    return torch.where(classes == vocab.other, NOT_LISTED, classes)


def _local_top(logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Returns this shard's k largest logits and their columns [n, k], padded with -inf where the shard has fewer."""
    values, columns = logits.topk(min(k, logits.shape[-1]), dim=-1)
    missing = k - values.shape[-1]
    return torch.nn.functional.pad(values, (0, missing), value=-torch.inf), torch.nn.functional.pad(
        columns, (0, missing)
    )


def row_maxima(logits: Tensor) -> Tensor:  # [n, v] -> [n, 1]
    """Returns the largest value of each row, -inf for a shard of padding alone."""
    return logits.amax(-1, keepdim=True) if logits.shape[-1] else logits.new_full((len(logits), 1), -torch.inf)


def row_products(one: Tensor, other: Tensor) -> Tensor:  # [n, v], [n, v] -> [n, 1]
    """Returns the inner products of rows without an intermediate matrix."""
    return torch.bmm(one[:, None], other[:, :, None])[:, 0]


def likeliest_ids(shifted: Tensor, vocab: VocabShard) -> Tensor:  # [n, v] -> [n] int64
    """Returns the lowest id at which the logits, minus their maximum over all shards, are 0."""
    nowhere = float(vocab.first + vocab.rows * vocab.world_size)
    ids = shifted.new_full((len(shifted),), nowhere, dtype=torch.float64)
    if shifted.shape[-1]:
        largest, column = shifted.max(-1)
        ids = torch.where(largest == 0, (column + vocab.first).double(), ids)
    return vocab.max_over_shards(ids.neg_()).neg_().long()
