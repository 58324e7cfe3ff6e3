"""Cuts streams of token ids into samples of equal length.

Sample i of a stream reads seq_length + 1 tokens from i · seq_length on: neighbours overlap by one token, so each token
but the stream's first is a label exactly once. Windows without a label that counts, as within a long prompt, are no
samples.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from ee_tuning.config import DataSection
from ee_tuning.data.order import BlendedOrder, Order, SampleOrder

# s sequence

_SCANNED_AT_ONCE = 1 << 24


@dataclass(frozen=True, kw_only=True)
class DocumentRules:
    """The separation of documents within a sample, as in the config's section `data`."""

    reset_attention_mask: bool = False
    reset_position_ids: bool = False
    eod_mask_loss: bool = False

    @classmethod
    def of(cls, data: DataSection) -> "DocumentRules":
        """Returns the rules of a job."""
        return cls(**{field.name: getattr(data, field.name) for field in fields(cls)})


class Sample(NamedTuple):
    """One row of a micro-batch."""

    tokens: NDArray[np.int64]
    """[s + 1]: inputs are all but the last, labels all but the first."""
    loss_mask: NDArray[np.float32]
    """[s]: 1 where a label counts."""
    document_ids: NDArray[np.int64] | None
    """[s], where attention must stay within a document."""
    position_ids: NDArray[np.int64] | None
    """[s], where positions restart with each document."""


class Samples(Protocol):
    """Samples for training or validation."""

    @property
    def seq_length(self) -> int:
        """Inputs per sample."""

    @property
    def num_windows(self) -> int:
        """Number of samples, and of windows skipped because none of their labels counts."""

    def __len__(self) -> int: ...

    def sample(self, index: int) -> Sample:
        """Returns one sample."""

    def order(self, seed: int) -> Order:
        """Returns the order in which samples are consumed."""

    def identity(self) -> dict[str, Any]:
        """Returns the facts that must not change when a run resumes at a position of the order."""


@dataclass(frozen=True)
class PackedSamples:
    """`Samples` that a stream of tokens is cut into."""

    stream: NDArray[np.integer]
    """[n] token ids of consecutive documents."""
    seq_length: int
    counts: NDArray[np.uint8] | None = None
    """[n]: 1 where a token counts as a label; None where all do."""
    starts: NDArray[np.int64] | None = None
    """[documents]: first token of each, in order; None where no rule needs them."""
    rules: DocumentRules = DocumentRules()
    windows: NDArray[np.int64] | None = None
    """[samples]: the windows of the stream that are samples; None where all are."""

    @property
    def num_windows(self) -> int:
        return max(0, len(self.stream) - 1) // self.seq_length

    def __len__(self) -> int:
        return self.num_windows if self.windows is None else len(self.windows)

    def sample(self, index: int) -> Sample:
        assert 0 <= index < len(self)
        s, first = self.seq_length, (index if self.windows is None else int(self.windows[index])) * self.seq_length
        tokens = self.stream[first : first + s + 1].astype(np.int64)
        loss_mask = (
            np.ones(s, np.float32) if self.counts is None else self.counts[first + 1 : first + s + 1].astype(np.float32)
        )
        begins = self._begins(first)
        if self.rules.eod_mask_loss:
            loss_mask[begins[1:]] = 0.0
        return Sample(
            tokens,
            loss_mask,
            np.cumsum(begins[:-1], dtype=np.int64) if self.rules.reset_attention_mask else None,
            _places(begins[:-1]) if self.rules.reset_position_ids else None,
        )

    def order(self, seed: int) -> SampleOrder:
        return SampleOrder(len(self), seed)

    def identity(self) -> dict[str, Any]:
        return {"number of training samples": len(self)}

    def _begins(self, first: int) -> NDArray[np.bool_]:
        """[s + 1]: where a document begins after the sample's first token."""
        begins = np.zeros(self.seq_length + 1, dtype=bool)
        if self.starts is not None:
            low, high = np.searchsorted(self.starts, (first, first + self.seq_length), side="right")
            begins[self.starts[low:high] - first] = True
        return begins


@dataclass(frozen=True)
class DocumentSamples:
    """`Samples` that are documents of a stream, each ending with the document, or where it is full.

    Documents without a label that counts, within that length, are left out.
    """

    stream: NDArray[np.integer]
    """[n] token ids of consecutive documents."""
    starts: NDArray[np.int64]
    """[documents]: first token of each, in order."""
    seq_length: int
    """Most inputs of a sample."""
    counts: NDArray[np.uint8] | None = None
    """[n]: 1 where a token counts as a label; None where all do."""

    @property
    def num_windows(self) -> int:
        """Number of documents."""
        return len(self.starts)

    def __len__(self) -> int:
        return len(self._bounds)

    def sample(self, index: int) -> Sample:
        """Returns one sample, possibly of fewer tokens than `seq_length` asks for."""
        first, stop = self._bounds[index]
        loss_mask = (
            np.ones(stop - first - 1, np.float32)
            if self.counts is None
            else self.counts[first + 1 : stop].astype(np.float32)
        )
        return Sample(self.stream[first:stop].astype(np.int64), loss_mask, None, None)

    def order(self, seed: int) -> SampleOrder:
        return SampleOrder(len(self), seed)

    def identity(self) -> dict[str, Any]:
        return {"number of training documents": len(self)}

    @cached_property
    def _bounds(self) -> NDArray[np.int64]:  # [samples, 2]
        """Returns the first token of each sample, and the one after its last."""
        stops = np.minimum(np.append(self.starts[1:], len(self.stream)), self.starts + self.seq_length + 1)
        bounds = np.stack((self.starts, stops), 1)[stops - self.starts > 1]
        if self.counts is None or not len(bounds):
            return bounds
        edges = (bounds + np.array([1, 0])).ravel()  # labels are all tokens of a sample but its first
        return bounds[
            np.add.reduceat(self.counts, edges[:-1] if edges[-1] == len(self.stream) else edges, dtype=np.int64)[::2]
            > 0
        ]


@dataclass(frozen=True)
class Mixture:
    """`Samples` of several streams or corpora, by weight or in one order."""

    parts: Sequence[Samples]
    weights: Sequence[float] | None
    """One per part; None where the parts are one corpus."""

    @property
    def seq_length(self) -> int:
        return self.parts[0].seq_length

    @property
    def num_windows(self) -> int:
        return sum(part.num_windows for part in self.parts)

    def __len__(self) -> int:
        return sum(map(len, self.parts))

    def sample(self, index: int) -> Sample:
        for part in self.parts:
            if index < len(part):
                return part.sample(index)
            index -= len(part)
        raise AssertionError("index is within the samples")

    def order(self, seed: int) -> Order:
        sizes = [len(part) for part in self.parts]
        return SampleOrder(len(self), seed) if self.weights is None else BlendedOrder(sizes, self.weights, seed)

    def identity(self) -> dict[str, Any]:
        total = sum(self.weights or [])
        blend = [
            [round(weight / total, 12), len(part)] for weight, part in zip(self.weights or [], self.parts, strict=False)
        ]
        return {"number of training samples": len(self), **({"blend of training samples": blend} if blend else {})}


def learned_windows(counts: NDArray[np.uint8] | None, seq_length: int) -> NDArray[np.int64] | None:
    """Returns the windows of a stream that hold a label that counts, or None where all do. `counts` has shape [n]."""
    num_windows = 0 if counts is None else max(0, len(counts) - 1) // seq_length
    if counts is None or not num_windows:
        return None
    holds, at_once = [], max(1, _SCANNED_AT_ONCE // seq_length)
    for first in range(0, num_windows, at_once):  # the file may exceed memory
        labels = counts[1 + first * seq_length : 1 + min(first + at_once, num_windows) * seq_length]
        holds.append(labels.reshape(-1, seq_length).any(axis=1))
    found = np.flatnonzero(np.concatenate(holds))
    return None if len(found) == num_windows else found


@dataclass(frozen=True, kw_only=True)
class Splits:
    """Training and validation samples."""

    train: Samples
    valid: Samples | None
    """None where nothing is held out."""


def _places(begins: NDArray[np.bool_]) -> NDArray[np.int64]:
    """Returns the distance of each token from the last beginning at or before it, or from the first token."""
    own = np.arange(len(begins))
    return own - np.maximum.accumulate(np.where(begins, own, 0))
