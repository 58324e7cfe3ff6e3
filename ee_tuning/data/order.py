"""The endless order in which samples are consumed. A position in it, an int, is all that a checkpoint stores of the
data.
"""

from collections.abc import Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from ee_tuning.parallel.megatron_import import importing_megatron


class Order(Protocol):
    """An endless order of samples."""

    @property
    def num_distinct(self) -> int:
        """Number of positions, from 0 on, before a sample repeats."""

    def sample_at(self, position: int) -> int:
        """Returns the index of the sample at `position`, which counts over all epochs."""


class SampleOrder:
    """An Order of epoch after epoch, each a permutation of all samples."""

    def __init__(self, num_samples: int, seed: int, part: int = 0) -> None:
        """`part` makes blended corpora of equal size have different orders."""
        assert num_samples > 0
        self.num_distinct = num_samples
        self._words = [seed & 0xFFFFFFFF, seed >> 32 & 0xFFFFFFFF], [part] * (part > 0)
        self._epoch = -1
        self._permutation: NDArray[np.int64] = np.empty(0, dtype=np.int64)

    def sample_at(self, position: int) -> int:
        epoch, place = divmod(position, self.num_distinct)
        if epoch != self._epoch:
            # RandomState, because NumPy guarantees its streams across versions: a run may resume under another one.
            self._permutation = np.random.RandomState([*self._words[0], epoch, *self._words[1]]).permutation(
                self.num_distinct
            )
            self._epoch = epoch
        return int(self._permutation[place])


class BlendedOrder:
    """An Order that blends samples of several corpora by weight.

    Next is the corpus furthest behind its share, as in Megatron-core. Each corpus has its own epochs and permutations.
    Samples are numbered through the corpora.
    """

    def __init__(self, sizes: Sequence[int], weights: Sequence[float], seed: int) -> None:
        self._sizes = np.array(sizes, dtype=np.int64)
        # NumPy's sum, as in Megatron-core: Python's own rounds differently since 3.12, and a run may resume under it.
        self._weights = np.array(weights, dtype=np.float64) / np.sum(weights, dtype=np.float64)
        self._firsts = np.cumsum(self._sizes) - self._sizes
        self._orders = [SampleOrder(size, seed, part) for part, size in enumerate(sizes)]
        self._corpus: NDArray[np.int16] = np.empty(0, dtype=np.int16)
        self._place: NDArray[np.int64] = np.empty(0, dtype=np.int64)

    @property
    def num_distinct(self) -> int:
        self._reach(int(self._sizes.sum()))
        repeats = np.flatnonzero(self._place >= self._sizes[self._corpus])
        return int(repeats[0])

    def sample_at(self, position: int) -> int:
        self._reach(position)
        corpus = int(self._corpus[position])
        return int(self._firsts[corpus]) + self._orders[corpus].sample_at(int(self._place[position]))

    def _reach(self, position: int) -> None:
        if position < len(self._corpus):
            return
        with importing_megatron():
            from megatron.core.datasets import helpers_cpp

        # The choice at a position depends on earlier ones only, so a longer table begins with the shorter one.
        size = max(1 << 16, 2 * (position + 1))
        self._corpus, self._place = np.empty(size, dtype=np.int16), np.empty(size, dtype=np.int64)
        helpers_cpp.build_blending_indices(self._corpus, self._place, self._weights, len(self._sizes), size, False)
