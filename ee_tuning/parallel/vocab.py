"""Functions of all of the vocabulary's logits, computed on this rank's shard of them.

Ids of padding (the vocabulary size and above) are cut off first, so they never win and never count in a sum. No
function here records gradients; the loss, which needs them, is in ee_tuning/losses/loss.py.
"""

# v vocabulary · v/tp this rank's rows, padding included · … any leading dimensions; every number of rows is the same on
# all ranks
import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor


def padded_size(size: int, tp: int) -> int:
    """Returns the next multiple of `tp`, so that every rank has the same number of rows."""
    return math.ceil(size / tp) * tp


@dataclass(frozen=True)
class VocabShard:
    """This rank's rows of the padded vocabulary: first .. first + rows - 1."""

    size: int
    """The size of the true vocabulary, without padding."""
    first: int
    """Id of this rank's first row."""
    rows: int
    """Number of rows here, the same on every rank."""
    group: Any
    """Process group of the shards. Unused where world_size is 1."""
    world_size: int
    """Number of shards."""

    @classmethod
    def of(cls, vocab_size: int, padded_vocab_size: int, topology: Any) -> "VocabShard":
        """Builds the shard of a Topology's rank r: rows r·padded/tp up to (r + 1)·padded/tp."""
        assert padded_vocab_size % topology.tp == 0 and padded_vocab_size >= vocab_size > 0
        rows = padded_vocab_size // topology.tp
        return cls(vocab_size, topology.tp_rank * rows, rows, topology.tp_group, topology.tp)

    @property
    def true_rows(self) -> int:
        """Number of leading rows that are not padding; 0 where the shard holds padding only."""
        return min(max(self.size - self.first, 0), self.rows)

    def without_padding(self, logits: Tensor) -> Tensor:
        """Returns a view without padding: [..., v/tp] -> [..., true_rows]."""
        assert logits.shape[-1] == self.rows, (tuple(logits.shape), self)
        return logits if self.first + self.rows <= self.size else logits[..., : self.true_rows]

    def max_over_shards(self, values: Tensor) -> Tensor:
        """Overwrites `values` with their elementwise maximum over the shards."""
        if self.world_size > 1:
            dist.all_reduce(values, op=dist.ReduceOp.MAX, group=self.group)
        return values

    def sum_over_shards(self, values: Tensor) -> Tensor:
        """Overwrites `values` with their elementwise sum over the shards."""
        if self.world_size > 1:
            dist.all_reduce(values, group=self.group)
        return values

    def gather(self, values: Tensor) -> Tensor:
        """Returns the `values` of every shard, all of one shape: [tp, ...]."""
        gathered = values.new_empty(self.world_size, *values.shape)
        dist.all_gather_into_tensor(gathered, values[None].contiguous(), group=self.group)
        return gathered


class Top1(NamedTuple):
    """The likeliest token and its probability."""

    token_ids: Tensor
    """[...] int64. Among equal logits the lowest id wins."""
    max_probability: Tensor
    """[...] float32 (float64 for float64 logits): probability in the softmax over the vocabulary."""


def log_sum_exp(
    logits: Tensor,  # [..., v/tp]
    shard: VocabShard,
) -> Tensor:  # [...], float32 (float64 for float64 logits)
    """Returns the log of the sum of exponentials over the whole vocabulary, in nats. The same bits on every rank."""
    # -inf for a shard without rows, which then does not count
    local = at_least_float32(shard.without_padding(logits)).logsumexp(-1)
    return local if shard.world_size == 1 else shard.gather(local).logsumexp(0)


def log_probabilities_of(
    logits: Tensor,  # [n, v/tp]
    token_ids: Tensor,  # [n] int64, of the true vocabulary
    shard: VocabShard,
) -> Tensor:  # [n], float32 (float64 for float64 logits)
    """Returns the log-probability of one token per row of logits, in nats. The same bits on every rank."""
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
    """Returns the likeliest token and its probability, the same bits on every rank.

    Gathers three numbers per shard and leading index. On one rank this is the last operation of every decoded token and
    costs three calls into torch, about 4 µs for 257 ids.
    """
    if shard.world_size == 1:
        logits = at_least_float32(shard.without_padding(logits))
        # The id comes from the logits: rounding makes some probabilities equal where the logits differ.
        return Top1(logits.argmax(-1), logits.softmax(-1).amax(-1))
    return _merge_top1(shard.gather(_local_top1(logits, shard)), logits.dtype)


def confidences(
    logits: Tensor,  # [..., v/tp]
    shard: VocabShard,
    measure: str,
) -> Tensor:  # [...], float32 (float64 for float64 logits)
    """Returns the confidence of the softmax over the vocabulary, in 0..1. The same bits on every rank.

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
    """Returns the logits of the whole vocabulary on every rank, without padding."""
    if shard.world_size == 1:
        return shard.without_padding(logits)
    assert logits.shape[-1] == shard.rows
    return shard.gather(logits).movedim(0, -2).flatten(-2)[..., : shard.size]


def _local_top1(logits: Tensor, shard: VocabShard) -> Tensor:
    """Returns this shard's largest logit, its id and the shard's log-sum-exp: [3, ...] float64, which holds all
    exactly.
    """
    true = at_least_float32(shard.without_padding(logits))
    if not shard.true_rows:
        return true.new_full((3, *true.shape[:-1]), -torch.inf, dtype=torch.float64)
    largest, index = true.max(-1)
    return torch.stack((largest.double(), (index + shard.first).double(), true.logsumexp(-1).double()))


def _local_top2(logits: Tensor, shard: VocabShard) -> Tensor:
    """Returns this shard's log-sum-exp and its two largest logits: [3, ...] float64."""
    true = shard.without_padding(logits).double()
    filled = torch.cat((true, true.new_full((*true.shape[:-1], 2), -torch.inf)), dim=-1)
    return torch.cat((true.logsumexp(-1)[None], filled.topk(2, dim=-1)[0].movedim(-1, 0)))


def _local_entropy(logits: Tensor, shard: VocabShard) -> Tensor:
    """Returns this shard's log-sum-exp and the mean logit under the softmax over the shard: [2, ...] float64."""
    true = shard.without_padding(logits).double()
    weights = true.softmax(-1)
    # -inf · 0 is NaN: a token without probability must count as 0.
    return torch.stack((true.logsumexp(-1), torch.where(weights > 0, weights * true, 0.0).sum(-1)))


def _merge_top1(parts: Tensor, dtype: torch.dtype) -> Top1:
    """Merges the shards' parts, [tp, 3, ...]. Shards are in the order of ids, so the lowest of equal ids wins."""
    largest, winner = parts[:, 0].max(0)
    token_ids = parts[:, 1].gather(0, winner[None])[0].long()
    probability = (largest - parts[:, 2].logsumexp(0)).exp()
    return Top1(token_ids, probability if dtype == torch.float64 else probability.float())


def at_least_float32(logits: Tensor) -> Tensor:
    """Returns float64 as it is, and anything else as float32."""
    return logits if logits.dtype == torch.float64 else logits.float()
