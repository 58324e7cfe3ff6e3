"""The part of the vocabulary that a drafter says: its classes are the tokens of a list, and nothing else.

An output matrix has a row for each of them, cut over tensor parallelism as a vocabulary is. A token that is not listed
can not be drafted, and has no class; what a teacher says is compared among those that are listed.
"""

# v/tp this rank's rows of the model's vocabulary · n tokens in the list · n/tp this rank's rows of them · h hidden
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ee_tuning.parallel.vocab import VocabShard, padded_size

NOT_LISTED = -1
"""No class."""
_BLOCK = 1024
"""Rows that travel at a time."""


@dataclass(frozen=True, eq=False)
class DraftVocab(VocabShard):
    """A shard of the classes; `size` is n."""

    token_ids: Tensor
    """[n] int64, increasing."""
    whole: VocabShard
    """This rank's part of the model's vocabulary."""

    @classmethod
    def of_tokens(cls, token_ids: Sequence[int], whole: VocabShard, topology: Any) -> "DraftVocab":
        """`token_ids` are increasing ids of the vocabulary."""
        rows = padded_size(len(token_ids), topology.tp) // topology.tp
        ids = torch.tensor(token_ids, device=topology.device)
        return cls(len(token_ids), topology.tp_rank * rows, rows, topology.tp_group, topology.tp, ids, whole)

    def classes(self, token_ids: Tensor) -> Tensor:  # […] int64 -> […] int64
        """The class of each token; NOT_LISTED where it has none."""
        found = torch.searchsorted(self.token_ids, token_ids).clamp_(max=self.size - 1)
        return torch.where(self.token_ids[found] == token_ids, found, NOT_LISTED)

    def own_rows(self, weight: Tensor) -> Tensor:  # [v/tp, h] -> [n/tp, h]
        """This rank's rows of the model's output matrix, wherever they lie, zeros as padding. All ranks call it."""
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
    """What a drafter says: the tokens of a list, or the whole vocabulary where there is none."""
    return DraftVocab.of_tokens(token_ids, whole, topology) if token_ids else whole
