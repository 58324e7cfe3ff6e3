"""Tokens of several sequences that go through layers together, as attention wants them told: to torch, CUDA graphs or
the kernels.
"""

from torch import Tensor

from ee_tuning.kernel import calls
from ee_tuning.model.ragged_attention import CachePlaces, RaggedBatch, ragged_batch
from ee_tuning.model.static_pass import StaticPass, StaticPasses


class TokenPass:
    """Row i brings `lengths[i]` tokens at positions `starts[i]`…, and `rows[i]` says where its sequence lies in every
    layer's cache.

    `tables`, [positions, d] each, are those of `rotation_tables`; `num_places` is a cache's; `static_passes` are for
    layers that can be recorded.
    """

    def __init__(
        self,
        rows: list[CachePlaces],
        starts: list[int],
        lengths: list[int],
        tables: tuple[Tensor, Tensor],
        *,
        queries_per_group: int,
        num_places: int,
        static_passes: StaticPasses | None = None,
    ):
        self.rows, self.starts, self.lengths = rows, starts, lengths
        self.num_tokens = sum(lengths)
        self._tables, self._queries_per_group, self._num_places = tables, queries_per_group, num_places
        self._batch: RaggedBatch | None = None
        self._native: calls.Pass | None = None
        self._static: StaticPass | None = None
        self._static_passes = static_passes

    @property
    def batch(self) -> RaggedBatch:
        """The batch as torch's operators take it: masks and indices, built once for all layers."""
        if self._batch is None:
            self._batch = ragged_batch(
                self.rows,
                self.starts,
                self.lengths,
                *self._tables,
                queries_per_group=self._queries_per_group,
                num_places=self._num_places,
            )
        return self._batch

    @property
    def static(self) -> StaticPass | None:
        """The batch as layers that can be recorded take it: padded, and valid until another pass is told; None where
        `batch` serves.
        """
        if self._static_passes is not None:
            self._static, self._static_passes = self._static_passes.fitting(self.rows, self.starts, self.lengths), None
        if self._static is not None:
            self._static.tell(self.rows, self.starts, self.lengths, self)
        return self._static

    @property
    def native(self) -> calls.Pass:
        """The batch as the kernels take it."""
        if self._native is None:
            self._native = calls.token_pass(
                self.starts, self.lengths, [row.address for row in self.rows], *self._tables
            )
        return self._native
