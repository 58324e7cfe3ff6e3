"""Sequences in chunks, each of which goes down the relay like a micro-batch: keys and values of earlier chunks for
attention, and chunks joined again for exit heads that attend.

A message is a chunk, so a stage begins when the first chunk is there, and messages are as small as chunks. The order of
chunks is the same on every stage, as that of micro-batches is.
"""

# s tokens of a whole row, or this rank's part of them where the plan cuts it · c tokens of a chunk, or this rank's part
# · b micro-batch · n numbers per token
from collections.abc import Mapping

import torch
from torch import Tensor

from ee_tuning.data.loader import BatchChunk
from ee_tuning.model.documents import PackedDocuments
from ee_tuning.model.early_exit import EarlyExitModel
from ee_tuning.model.exit_head import ExitInput
from ee_tuning.model.sequence_chunk import KeyValueCache, SequenceChunk


def documents_of(chunk: BatchChunk, cache: KeyValueCache, device: torch.device) -> PackedDocuments | None:
    """Returns the inputs of attention beside the tokens: documents and, in `cache`, the earlier chunks of the rows."""
    batch = chunk.batch
    if chunk.is_whole:
        return PackedDocuments.of(batch.document_ids, batch.position_ids, device)
    return SequenceChunk.between(
        chunk.start,
        chunk.stop,
        batch.document_ids,
        batch.position_ids,
        shape=chunk.shape,
        cache=cache,
        device=device,
    )


class JoinedChunks:
    """The chunks of a micro-batch, joined for the exit heads of this stage that attend to earlier tokens.

    Such a head has weights to train in its attention, so its gradient goes through the keys and values of all chunks:
    it takes whole rows. The states that it reads are kept until the last chunk has arrived.
    """

    def __init__(self, model: EarlyExitModel) -> None:
        self._model = model
        self.layers = frozenset(
            spec.layer for spec in model.plan.own_exits if model.exit_head(spec.layer).attends_to_earlier
        )
        """The layers that these heads follow."""
        self._states: dict[int, Tensor] = {}
        self._beside: dict[str, Tensor] = {}

    @property
    def kept(self) -> list[Tensor]:
        """The tensors of chunks that wait for the last one."""
        return [*self._states.values(), *self._beside.values()]

    def others(self, inputs: Mapping[int, ExitInput]) -> dict[int, ExitInput]:
        """Returns the inputs of heads that take chunks as they come."""
        return {layer: each for layer, each in inputs.items() if layer not in self.layers}

    def add(
        self, chunk: BatchChunk, inputs: Mapping[int, ExitInput], beside: Mapping[str, Tensor]
    ) -> tuple[dict[int, ExitInput], dict[str, Tensor]] | None:
        """Adds a chunk: the inputs of the heads, and tensors `beside` them of all ranks' tokens, [c · b, …] or
        [c, b, …].

        Returns both for whole rows with the last chunk.
        """
        for layer in self.layers:
            self._add_states(chunk, layer, inputs[layer].hidden)
        for name, each in beside.items():
            per_place = len(each) // (chunk.stop - chunk.start)
            if name not in self._beside:
                self._beside[name] = each.new_empty(per_place * chunk.shape[1], *each.shape[1:])
            self._beside[name][per_place * chunk.start : per_place * chunk.stop] = each
        if not chunk.ends_rows:
            return None
        batch, device = chunk.batch, self._model.topology.device
        documents = PackedDocuments.of(batch.document_ids, batch.position_ids, device)
        joined = {layer: ExitInput(states, documents=documents) for layer, states in self._states.items()}
        whole = joined, self._beside
        self._states, self._beside = {}, {}
        return whole

    def _add_states(self, chunk: BatchChunk, layer: int, states: Tensor) -> None:  # [c, b, n]
        """Stores this rank's tokens. Where the sequence is cut, the rank's part of a chunk differs from the chunk's
        tokens in its part of the row.
        """
        states, topology = self._model.whole_sequence(states), self._model.topology
        size = chunk.shape[1] // (topology.tp if self._model.plan.cuts_sequence else 1)
        first = size * topology.tp_rank if self._model.plan.cuts_sequence else 0
        if layer not in self._states:
            self._states[layer] = states.new_empty(size, *states.shape[1:])
        low, high = max(chunk.start, first), min(chunk.stop, first + size)
        if low < high:
            self._states[layer][low - first : high - first] = states[low - chunk.start : high - chunk.start]
