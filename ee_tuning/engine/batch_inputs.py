"""The inputs of a pass: embedded tokens, and the description of a batch that all layers share."""

import torch
import torch.nn.functional as F
from torch import Tensor

from ee_tuning.decoding.attention_metadata import AttentionMetadata
from ee_tuning.decoding.captured_batch import GraphCache
from ee_tuning.decoding.eager_attention import SlotMapping
from ee_tuning.engine.kv_cache import KVCache
from ee_tuning.engine.sequence import Sequence
from ee_tuning.model.early_exit import EarlyExitModel
from ee_tuning.model_config.config import ModelConfig

# t tokens of a pass · h hidden · v vocabulary


class BatchDescriber:
    """Describes passes. The newest description is kept, because the segments of a step mostly see the same tokens."""

    def __init__(self, tables: tuple[Tensor, Tensor], config: ModelConfig, cache: KVCache):
        self._tables, self._num_places = tables, cache.num_places
        self._per_group = config.num_attention_heads // config.num_query_groups
        self._static = GraphCache(
            tables, width=config.hidden_size, num_places=cache.num_places, bytes_per_place=cache.bytes_per_token
        )
        self._newest: AttentionMetadata | None = None

    def __call__(self, rows: list[Sequence], starts: list[int], lengths: list[int]) -> AttentionMetadata:
        """Describes a pass of `lengths` tokens of `rows` from `starts` on."""
        places = [s.slot_mapping for s in rows if s.slot_mapping is not None]
        newest = self._newest
        if newest is None or starts != newest.starts or lengths != newest.lengths or not _are_same(places, newest.rows):
            newest = self._newest = AttentionMetadata(
                places,
                starts,
                lengths,
                self._tables,
                queries_per_group=self._per_group,
                num_places=self._num_places,
                graph_cache=self._static,
            )
        return newest


def _are_same(some: list[SlotMapping], others: list[SlotMapping]) -> bool:
    return len(some) == len(others) and all(a is b for a, b in zip(some, others, strict=True))


class TokenEmbedding:
    """The embedding of tokens, on the first stage."""

    def __init__(self, model: EarlyExitModel):
        self._model, self._device = model, model.topology.device
        # Megatron's modules take ten times as long for a token, which in one process needs only its row.
        self.is_table = model.config.position == "rope" and model.topology.tp == 1 and model.topology.is_first_stage
        self.table: Tensor | None = model.backbone.embedding.word_embeddings.weight if self.is_table else None
        """[v, h]: the table, where embedding a token is only a lookup of its row."""

    def __call__(self, rows: list[Sequence], starts: list[int], lengths: list[int]) -> Tensor:  # [t, h]
        """Embeds `lengths` tokens of `rows` from `starts` on."""
        spans = list(zip(rows, starts, lengths, strict=True))
        ids = [token for row, start, length in spans for token in row.tokens[start : start + length]]
        if self.table is not None and len(ids) == 1:
            return self.table[ids[0] : ids[0] + 1]
        flat, positions = torch.tensor([ids], device=self._device), None
        if self.table is not None:
            return F.embedding(flat[0], self.table)
        if self._model.config.position == "learned":
            numbers = [position for _, start, length in spans for position in range(start, start + length)]
            positions = torch.tensor([numbers], device=self._device)
        return self._model.backbone.embed(flat, positions)[:, 0]
