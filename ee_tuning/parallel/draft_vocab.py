"""The vocabulary of a drafting head: its classes are the tokens of a list, and nothing else.

An output matrix has one row per class, cut over tensor parallelism like a vocabulary. An unlisted token has no class
and can not be drafted; a teacher's distribution is compared among listed tokens only.
"""

# v/tp this rank's rows of the model's vocabulary · n tokens in the list · n/tp this rank's rows of them · h hidden
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ee_tuning.parallel.vocab import VocabShard, padded_size

NOT_LISTED = -1
"""A token without a class."""
_BLOCK = 1024
"""Rows that are sent at a time."""


@dataclass(frozen=True, eq=False)
class DraftVocab(VocabShard):
    """This rank's shard of the classes; `size` is n."""

    token_ids: Tensor
    """[n] int64, increasing."""
    whole: VocabShard
    """This rank's shard of the model's vocabulary."""

    @classmethod
    def of_tokens(cls, token_ids: Sequence[int], whole: VocabShard, topology: Any) -> "DraftVocab":
        """Builds this rank's shard. `token_ids` must be increasing ids of the vocabulary."""
        rows = padded_size(len(token_ids), topology.tp) // topology.tp
        ids = torch.tensor(token_ids, device=topology.device)
        return cls(len(token_ids), topology.tp_rank * rows, rows, topology.tp_group, topology.tp, ids, whole)

    def classes(self, token_ids: Tensor) -> Tensor:  # […] int64 -> […] int64
        """Returns the class of each token, or NOT_LISTED."""
        found = torch.searchsorted(self.token_ids, token_ids).clamp_(max=self.size - 1)
        return torch.where(self.token_ids[found] == token_ids, found, NOT_LISTED)

    def own_rows(self, weight: Tensor) -> Tensor:  # [v/tp, h] -> [n/tp, h]
        """Returns this rank's rows of the model's output matrix, from whichever rank has them, with zeros as padding.
        All ranks call it.
        """
        rows = weight.new_zeros(self.rows, weight.shape[1])
        for start in range(0, self.size, _BLOCK):
            local = self.token_ids[start : start + _BLOCK] - self.whole.first
            is_here = (local >= 0) & (local < self.whole.true_rows)
            block = weight[local.clamp(0, len(weight) - 1)] * is_here[:, None]
            self.sum_over_shards(block)
            first, last = max(start, self.first), min(start + len(block), self.first + self.rows)
            if first < last:
                rows[first - self.first : last - self.first] = block[first - start : last - start]
        return rows


def draft_vocab(token_ids: Sequence[int], whole: VocabShard, topology: Any) -> VocabShard:
    """Returns the vocabulary of a drafting head: the tokens of a list, or the whole vocabulary without a list."""
    return DraftVocab.of_tokens(token_ids, whole, topology) if token_ids else whole
