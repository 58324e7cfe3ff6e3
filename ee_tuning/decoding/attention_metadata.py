"""The description of a batch of tokens, for attention: one for all layers of a pass, and in the form that each backend
takes.
"""

from torch import Tensor

from ee_tuning.decoding.captured_batch import CapturedBatch, GraphCache
from ee_tuning.decoding.eager_attention import EagerBatch, SlotMapping, eager_batch
from ee_tuning.kernel import calls


class AttentionMetadata:
    """Row i has `lengths[i]` new tokens at positions `starts[i]`…, and `rows[i]` is the slot mapping of its sequence.

    `tables`, [positions, d] each, are those of `rotation_tables`; `num_places` is the size of a layer's cache;
    `graph_cache` serves layers that can be captured as CUDA graphs.
    """

    def __init__(
        self,
        rows: list[SlotMapping],
        starts: list[int],
        lengths: list[int],
        tables: tuple[Tensor, Tensor],
        *,
        queries_per_group: int,
        num_places: int,
        graph_cache: GraphCache | None = None,
    ):
        self.rows, self.starts, self.lengths = rows, starts, lengths
        self.num_tokens = sum(lengths)
        self._tables, self._queries_per_group, self._num_places = tables, queries_per_group, num_places
        self._eager: EagerBatch | None = None
        self._native: calls.Pass | None = None
        self._captured: CapturedBatch | None = None
        self._graph_cache = graph_cache

    @property
    def eager(self) -> EagerBatch:
        """Returns the batch for torch's operators: masks and indices, built once for all layers."""
        if self._eager is None:
            self._eager = eager_batch(
                self.rows,
                self.starts,
                self.lengths,
                *self._tables,
                queries_per_group=self._queries_per_group,
                num_places=self._num_places,
            )
        return self._eager

    @property
    def captured(self) -> CapturedBatch | None:
        """Returns the batch for CUDA graphs, padded, and valid until another batch is loaded; None where `eager`
        serves.
        """
        if self._graph_cache is not None:
            self._captured, self._graph_cache = self._graph_cache.fitting(self.rows, self.starts, self.lengths), None
        if self._captured is not None:
            self._captured.load(self.rows, self.starts, self.lengths, self)
        return self._captured

    @property
    def native(self) -> calls.Pass:
        """Returns the batch for the CPU kernels."""
        if self._native is None:
            self._native = calls.native_batch(
                self.starts, self.lengths, [row.address for row in self.rows], *self._tables
            )
        return self._native
