"""Micro-batches of packed samples, for each replica its own, from any position on.

The samples of a run form one endless sequence: epoch after epoch, each shuffled by (seed, epoch). A position is an
index into that sequence. Of the next micro_batch_size × dp samples, replica r gets the r-th micro_batch_size. So the
global batch of a step is the same set for every number of replicas and every micro-batch size, and a run resumes from
its position, an int, under another layout without repeating or skipping a sample. Every stage and every tensor-parallel
rank has its own source that yields the same: only hidden states are sent between them.

s sequence · b micro-batch
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ee_tuning.config import TuningSection
from ee_tuning.data.tokens import Samples
from ee_tuning.errors import InputError

VALIDATION_SEED = 0  # not the run's seed, so that losses of runs with different seeds stay comparable


@dataclass(frozen=True, kw_only=True)
class Batch:
    """A micro-batch of one replica."""

    tokens: Tensor
    """[b, s] int64."""
    labels: Tensor
    """[s, b] int64: the token after each one."""
    loss_mask: Tensor
    """[s, b] float32: 1 where a label counts; 0 in rows that pad a validation micro-batch."""
    document_ids: Tensor | None = None
    """[b, s] int64, growing by one where a document begins. Present where attention stays within documents
    (data.reset_attention_mask).
    """
    position_ids: Tensor | None = None
    """[b, s] int64: position of each token in its document (data.reset_position_ids)."""

    def chunks(self, length: int = 0) -> "list[BatchChunk]":
        """Returns its chunks of `length` tokens per row, in order; one chunk of everything for 0."""
        whole = self.tokens.shape[1]
        length = length or whole
        return [BatchChunk(batch=self, start=start, stop=start + length) for start in range(0, whole, length)]


@dataclass(frozen=True, kw_only=True)
class BatchChunk:
    """Tokens `start` .. `stop` - 1 of each row of a batch: c of them."""

    batch: Batch
    start: int
    stop: int

    @property
    def tokens(self) -> Tensor:
        """[b, c]."""
        return self.batch.tokens[:, self.start : self.stop].contiguous()

    @property
    def labels(self) -> Tensor:
        """[c, b]."""
        return self.batch.labels[self.start : self.stop]

    @property
    def loss_mask(self) -> Tensor:
        """[c, b]."""
        return self.batch.loss_mask[self.start : self.stop]

    @property
    def shape(self) -> tuple[int, int]:
        """(b, s) of the whole batch."""
        b, s = self.batch.tokens.shape
        return b, s

    @property
    def ends_rows(self) -> bool:
        """Whether no chunk of the batch follows."""
        return self.stop == self.shape[1]

    @property
    def is_whole(self) -> bool:
        """Whether it is all of the batch."""
        return self.start == 0 and self.ends_rows

    @property
    def whole(self) -> "BatchChunk":
        """All of the batch."""
        return BatchChunk(batch=self.batch, start=0, stop=self.shape[1])


def count_microbatches(tuning: TuningSection, dp: int) -> int:
    """Returns the micro-batches per step of one of `dp` replicas. Raises InputError where they do not divide the global
    batch.
    """
    for name, size in (("micro_batch_size", tuning.micro_batch_size), ("global_batch_size", tuning.global_batch_size)):
        if size < 1:
            raise InputError(f"tuning.{name} must be at least 1, got {size}")
    unit = tuning.micro_batch_size * dp
    below = tuning.global_batch_size // unit * unit
    if below != tuning.global_batch_size:
        choice = f"{below} or {below + unit}" if below else f"{unit}"
        raise InputError(
            f"tuning.global_batch_size must be a multiple of micro_batch_size × replicas = {tuning.micro_batch_size} × {dp} = "
            f"{unit}, got {tuning.global_batch_size}; set it to {choice}, or change tuning.micro_batch_size"
        )
    return tuning.global_batch_size // unit


class BatchSource(Iterator[Batch]):
    """Yields endless training micro-batches of replica `dp_rank` among `dp`.

    `position` counts the samples that all replicas have consumed. A run stopped after `step` steps is at step ×
    global_batch_size, and resumes with a source at that position, for any dp. Raises InputError where the batch sizes
    do not divide.
    """

    def __init__(self, samples: Samples, tuning: TuningSection, *, dp: int, dp_rank: int, position: int = 0) -> None:
        assert 0 <= dp_rank < dp and position >= 0
        self.num_microbatches = count_microbatches(tuning, dp)
        self.position = position
        self._samples = samples
        self._order = samples.order(tuning.seed)
        self._micro_batch_size = tuning.micro_batch_size
        self._dp = dp
        self._dp_rank = dp_rank

    def __next__(self) -> Batch:
        """Returns the next micro-batch, and advances the position by those of all replicas."""
        start = self.position + self._dp_rank * self._micro_batch_size
        chosen = [self._order.sample_at(start + row) for row in range(self._micro_batch_size)]
        self.position += self._micro_batch_size * self._dp
        return _batch(self._samples, chosen, self._micro_batch_size)


def validation_batches(samples: Samples | None, tuning: TuningSection, *, dp: int, dp_rank: int) -> list[Batch]:
    """Returns the validation micro-batches of replica `dp_rank`: tuning.eval_iters of them, or fewer if samples run
    out.

    Each replica has the same number. Together they hold the first eval_iters × micro_batch_size × dp samples of a fixed
    order, each once, so if the split is no larger, every layout validates on all of it. Rows beyond the last sample
    have loss mask 0, possibly whole micro-batches of a replica: divide sums over all replicas. Empty where eval_iters
    is 0 or nothing is held out.
    """
    if tuning.eval_iters < 0:
        raise InputError(f"tuning.eval_iters must be at least 0, got {tuning.eval_iters}; 0 for no validation")
    if samples is None or tuning.eval_iters == 0:
        return []
    size = tuning.micro_batch_size
    order = samples.order(VALIDATION_SEED)
    chosen = [order.sample_at(position) for position in range(min(tuning.eval_iters * size * dp, order.num_distinct))]
    return list(batches_of_each(samples, chosen, tuning, dp=dp, dp_rank=dp_rank))


def batches_of_each(
    samples: Samples, chosen: Sequence[int], tuning: TuningSection, *, dp: int, dp_rank: int
) -> Iterator[Batch]:
    """Returns micro-batches of replica `dp_rank`, the same number for each replica.

    Together they hold the `chosen` samples, each once, and padding rows of loss mask 0.
    """
    size = tuning.micro_batch_size
    for start in range(dp_rank * size, -(-len(chosen) // (size * dp)) * size * dp, size * dp):
        yield _batch(samples, chosen[start : start + size], size)


def _batch(samples: Samples, chosen: Sequence[int], micro_batch_size: int) -> Batch:
    """Builds a batch of the `chosen` samples, padded to `micro_batch_size` rows with sample 0 under loss mask 0."""
    rows = [samples.sample(index) for index in [*chosen, *[0] * (micro_batch_size - len(chosen))]]
    block, loss_mask = _stacked([row.tokens for row in rows]), _stacked([row.loss_mask for row in rows])
    loss_mask[len(chosen) :] = 0.0
    ids = [row.document_ids for row in rows if row.document_ids is not None]
    positions = [row.position_ids for row in rows if row.position_ids is not None]
    return Batch(
        tokens=block[:, :-1].contiguous(),
        labels=block[:, 1:].T.contiguous(),
        loss_mask=loss_mask.T.contiguous(),
        document_ids=_stacked(ids) if ids else None,
        position_ids=_stacked(positions) if positions else None,
    )


def _stacked(rows: Sequence[NDArray]) -> Tensor:
    return torch.from_numpy(np.stack(rows))
