"""What needs all of the vocabulary's logits, computed with this rank's part of them.

Padded ids (the vocabulary size and above) are cut off before anything is computed, so they never win and never weigh in
a sum. Every function runs without gradient bookkeeping of its own: the loss, which needs one, is
ee_tuning/tuning/loss.py.
"""

# v vocabulary · v/tp this rank's rows, padding included · … any leading dimensions, as many numbers of rows as tokens
import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor


def padded_size(size: int, tp: int) -> int:
    """The next multiple of `tp`: as many rows of a vocabulary on every rank."""
    return math.ceil(size / tp) * tp


@dataclass(frozen=True)
class VocabShard:
    """Rows first .. first + rows - 1 of the padded vocabulary, which are this rank's."""

    size: int
    """The true vocabulary, padding left out."""
    first: int
    """Id of this rank's first row."""
    rows: int
    """Rows here, as many on every rank."""
    group: Any
    """Process group of the shards; not used where world_size is 1."""
    world_size: int
    """Number of shards."""

    @classmethod
    def of(cls, vocab_size: int, padded_vocab_size: int, topology: Any) -> "VocabShard":
        """Rank r of a Topology's tensor-parallel group has rows r·padded/tp up to (r + 1)·padded/tp."""
        assert padded_vocab_size % topology.tp == 0 and padded_vocab_size >= vocab_size > 0
        rows = padded_vocab_size // topology.tp
        return cls(vocab_size, topology.tp_rank * rows, rows, topology.tp_group, topology.tp)

    @property
    def true_rows(self) -> int:
        """Rows here that are no padding, the first ones; 0 where all of them are padding."""
        return min(max(self.size - self.first, 0), self.rows)

    def without_padding(self, logits: Tensor) -> Tensor:
        """[..., v/tp] -> [..., true_rows], a view."""
        assert logits.shape[-1] == self.rows, (tuple(logits.shape), self)
        return logits if self.first + self.rows <= self.size else logits[..., : self.true_rows]

    def max_over_shards(self, values: Tensor) -> Tensor:
        """`values`, overwritten by their largest over the shards, element by element."""
        if self.world_size > 1:
            dist.all_reduce(values, op=dist.ReduceOp.MAX, group=self.group)
        return values

    def sum_over_shards(self, values: Tensor) -> Tensor:
        """`values`, overwritten by their sum over the shards, element by element."""
        if self.world_size > 1:
            dist.all_reduce(values, group=self.group)
        return values

    def gather(self, values: Tensor) -> Tensor:
        """Every shard's `values` (of one shape): [tp, ...]."""
        gathered = values.new_empty(self.world_size, *values.shape)
        dist.all_gather_into_tensor(gathered, values[None].contiguous(), group=self.group)
        return gathered


class Top1(NamedTuple):
    """The likeliest token."""

    token_ids: Tensor
    """[...] int64; of equal logits the lowest id."""
    max_probability: Tensor
    """[...] float32 (float64 for float64 logits): its probability in the softmax over the vocabulary."""


def log_sum_exp(
    logits: Tensor,  # [..., v/tp]
    shard: VocabShard,
) -> Tensor:  # [...], float32 (float64 for float64 logits)
    """The log of the sum of exponentials over the whole vocabulary, in nats; the same bits on every rank."""
    local = at_least_float32(shard.without_padding(logits)).logsumexp(-1)  # of no rows: -inf, which weighs nothing
    return local if shard.world_size == 1 else shard.gather(local).logsumexp(0)


def log_probabilities_of(
    logits: Tensor,  # [n, v/tp]
    token_ids: Tensor,  # [n] int64, of the true vocabulary
    shard: VocabShard,
) -> Tensor:  # [n], float32 (float64 for float64 logits)
    """Log-probabilities of one token for each row of logits, in nats; the same bits on every rank."""
    local = token_ids - shard.first
    is_here = (local >= 0) & (local < shard.true_rows)
    found = at_least_float32(logits.new_zeros(len(logits)))
    if shard.true_rows:
        column = local.clamp(0, shard.true_rows - 1)[:, None]
        found = torch.where(is_here, at_least_float32(logits.gather(-1, column)[:, 0]), found)
    return shard.sum_over_shards(found) - log_sum_exp(logits, shard)


def top1(
    logits: Tensor,  # [..., v/tp]
    shard: VocabShard,
) -> Top1:
    """The likeliest token and its probability, the same bits on every rank. Gathers three numbers per shard and leading
    index.

    On one rank it is the last thing done for every decoded token and costs three calls into torch, about 4 µs for 257
    ids.
    """
    if shard.world_size == 1:
        logits = at_least_float32(shard.without_padding(logits))
        # The id is read from the logits: rounding makes ties among probabilities where the logits differ.
        return Top1(logits.argmax(-1), logits.softmax(-1).amax(-1))
    return _merge_top1(shard.gather(_local_top1(logits, shard)), logits.dtype)


def confidences(
    logits: Tensor,  # [..., v/tp]
    shard: VocabShard,
    measure: str,
) -> Tensor:  # [...], float32 (float64 for float64 logits)
    """How sure the softmax over the vocabulary is, in 0..1, higher is surer; the same bits on every rank.

    max_probability: p₁, the largest; margin: p₁ - p₂; entropy: 1 - H / ln v, of the true vocabulary.
    """
    if measure == "max_probability":
        return top1(logits, shard).max_probability
    parts = _local_entropy(logits, shard) if measure == "entropy" else _local_top2(logits, shard)
    parts = parts[None] if shard.world_size == 1 else shard.gather(parts)
    sums = parts[:, 0].logsumexp(0)
    if measure == "entropy":  # H = log Σe^z - Σ p z
        mean = (parts[:, 1] * (parts[:, 0] - sums).exp()).sum(0)
        value = 1 - (sums - mean) / math.log(shard.size) if shard.size > 1 else torch.ones_like(sums)
    else:
        first, second = (parts[:, 1:].flatten(0, 1) - sums).topk(2, dim=0)[0].exp()
        value = first - second
    return value if logits.dtype == torch.float64 else value.float()


def gather_logits(
    logits: Tensor,  # [..., v/tp]
    shard: VocabShard,
) -> Tensor:  # [..., v], dtype of logits
    """The whole vocabulary's logits on every rank, padding dropped."""
    if shard.world_size == 1:
        return shard.without_padding(logits)
    assert logits.shape[-1] == shard.rows
    return shard.gather(logits).movedim(0, -2).flatten(-2)[..., : shard.size]


def _local_top1(logits: Tensor, shard: VocabShard) -> Tensor:
    """This shard's largest logit, its id and the shard's log-sum-exp: [3, ...]. float64 holds every id and logit
    exactly.
    """
    true = at_least_float32(shard.without_padding(logits))
    if not shard.true_rows:
        return true.new_full((3, *true.shape[:-1]), -torch.inf, dtype=torch.float64)
    largest, index = true.max(-1)
    return torch.stack((largest.double(), (index + shard.first).double(), true.logsumexp(-1).double()))


def _local_top2(logits: Tensor, shard: VocabShard) -> Tensor:
    """This shard's log-sum-exp and its two largest logits: [3, ...] float64."""
    true = shard.without_padding(logits).double()
    filled = torch.cat((true, true.new_full((*true.shape[:-1], 2), -torch.inf)), dim=-1)
    return torch.cat((true.logsumexp(-1)[None], filled.topk(2, dim=-1)[0].movedim(-1, 0)))


def _local_entropy(logits: Tensor, shard: VocabShard) -> Tensor:
    """This shard's log-sum-exp, and the mean logit under the softmax over the shard: [2, ...] float64."""
    true = shard.without_padding(logits).double()
    weights = true.softmax(-1)
    # -inf · 0 is NaN: a token without probability weighs nothing.
    return torch.stack((true.logsumexp(-1), torch.where(weights > 0, weights * true, 0.0).sum(-1)))


def _merge_top1(parts: Tensor, dtype: torch.dtype) -> Top1:
    """The largest from every shard's part, [tp, 3, ...]. Shards come in the order of their ids, so the first of equals
    has the lowest.
    """
    largest, winner = parts[:, 0].max(0)
    token_ids = parts[:, 1].gather(0, winner[None])[0].long()
    probability = (largest - parts[:, 2].logsumexp(0)).exp()
    return Top1(token_ids, probability if dtype == torch.float64 else probability.float())


def at_least_float32(logits: Tensor) -> Tensor:
    """float64 as it is, all else in float32."""
    return logits if logits.dtype == torch.float64 else logits.float()
