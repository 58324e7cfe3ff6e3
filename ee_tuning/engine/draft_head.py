"""The drafting head of EAGLE-3 (arXiv 2503.01840) in decoding: drafts of several sequences, one token after the other.

The head reads the states of some layers for tokens that the model has checked, each with the embedding of the token
that follows it, and then its own output. Its keys and values lie in the sequence's blocks, like those of a layer; those
of drafts are overwritten by those of checked tokens.
"""

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from ee_tuning.engine.boundary_ring import PassStates
from ee_tuning.engine.sequence import Sequence
from ee_tuning.engine.stage_model import StageModel
from ee_tuning.model.eagle3 import Eagle3Head
from ee_tuning.parallel.draft_vocab import DraftVocab
from ee_tuning.parallel.vocab import top1

# t tokens of several sequences, one sequence after the other · a layers that are read · h hidden
# n query heads, g key-value heads of this rank · d width of a head


class DraftHead:
    """The head on this rank. Shares its weights."""

    def __init__(self, stage: StageModel, head: Eagle3Head):
        self._stage, self._head = stage, head
        self._vocab = stage.model.exit_vocab

    def keep(self, sequence: Sequence, passes: Mapping[int, PassStates]) -> None:
        """Keeps the states that a step left of a sequence's checked tokens, by layer, until the head reads them."""
        parts, start = list[Tensor](), 0
        assert self._head.spec.draft is not None
        for layer in self._head.spec.draft.aux_layers:
            states = passes[layer]
            place = next(i for i, row in enumerate(states.rows) if row is sequence)
            first, start = sum(states.lengths[:place]), states.starts[place]
            # States of rejected drafts are useless, and the newest token's are not computed yet.
            num_checked = min(states.lengths[place], sequence.num_final - 1 - start)
            parts.append(states.hidden[first : first + num_checked])
        unread = sequence.unread
        if start == 0:  # it begins, or begins anew with other memory
            unread.start, unread.states = 0, []
        unread.states.append(torch.cat(parts, dim=-1))

    def draft(self, wanted_of: list[tuple[Sequence, int]]) -> list[list[int]]:
        """Reads the states that are kept of each sequence, and returns the wanted number of drafts for each, the
        likeliest token each time. All tensor-parallel ranks return the same.
        """
        drafts: list[list[int]] = [[] for _ in wanted_of]
        rows, num_drafts = [sequence for sequence, _ in wanted_of], [count for _, count in wanted_of]
        lengths, starts = [row.unread.num_tokens for row in rows], [row.unread.start for row in rows]
        state = self._head.fused(torch.cat([states for row in rows for states in row.unread.states]))
        tokens = [
            t
            for row, start, n in zip(rows, starts, lengths, strict=True)
            for t in row.tokens[start + 1 : start + 1 + n]
        ]
        for row, length in zip(rows, lengths, strict=True):
            row.unread.start, row.unread.states = row.unread.start + length, []
        members = list(range(len(rows)))
        for step in range(max(1, *num_drafts)):
            state = self._through_layer(state, tokens, rows, starts, lengths)
            kept = [i for i, member in enumerate(members) if num_drafts[member] > step]
            if not kept:
                break
            ends = torch.tensor(lengths).cumsum(0) - 1
            state = state[ends[kept].to(state.device)]
            normed = self._head.norm(state)
            tokens = self._likeliest(normed)
            members, starts = [members[i] for i in kept], [starts[i] + lengths[i] for i in kept]
            rows, lengths = [rows[i] for i in kept], [1] * len(kept)
            for member, token in zip(members, tokens, strict=True):
                drafts[member].append(token)
            assert self._head.spec.draft is not None
            state = normed if self._head.spec.draft.norm_output else state
        return drafts

    def _through_layer(
        self, state: Tensor, tokens: list[int], rows: list[Sequence], starts: list[int], lengths: list[int]
    ) -> Tensor:  # [t, h]
        """Runs one pass through the head's layer: token i has `state` i and is followed by `tokens` i."""
        ids = torch.tensor([tokens], device=state.device)
        embedding = self._stage.model.backbone.embed(ids)  # [t, 1, h]
        positions = torch.tensor(
            [p for start, length in zip(starts, lengths, strict=True) for p in range(start, start + length)],
            device=state.device,
        )[:, None]
        layer = self._head.midlayer
        cache = self._stage.cache.draft_head(layer.config)

        def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:  # [t, 1, n, d], [t, 1, g, d] -> [t, 1, n * d]
            query, key = layer.rotated(query, positions), layer.rotated(key, positions)
            parts, first = [], 0
            for row, start, length in zip(rows, starts, lengths, strict=True):
                own, stop = slice(first, first + length), start + length
                assert row.slot_mapping is not None
                new, seen = (row.slot_mapping.span(first, stop, state.device) for first in (start, 0))
                cache.keys[new], cache.values[new] = key[own, 0], value[own, 0]
                parts.append(_attend(query[own, 0], cache.keys[seen], cache.values[seen], start, layer.scale))
                first += length
            return torch.cat(parts)[:, None]

        output: Tensor = layer(state[:, None], embedding, attend)
        return output[:, 0]

    def _likeliest(self, normed: Tensor) -> list[int]:  # [rows, h]
        ids = top1(F.linear(normed, self._head.output_weight), self._vocab).token_ids
        if isinstance(self._vocab, DraftVocab):
            ids = self._vocab.token_ids[ids]
        tokens: list[int] = ids.tolist()
        return tokens


def _attend(query: Tensor, keys: Tensor, values: Tensor, start: int, scale: float) -> Tensor:
    """Returns the attention's output [m, n * d] from [m, n, d] and [m + start, g, d]: token i sees the first start + i
    + 1 keys.
    """
    m, n, d = query.shape
    mask = None
    if m > 1:
        place = torch.arange(keys.shape[0], device=query.device)
        mask = place <= start + torch.arange(m, device=query.device)[:, None]
    q, k, v = (x.transpose(0, 1)[None] for x in (query, keys, values))
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale, enable_gqa=keys.shape[1] != n)
    return out[0].transpose(0, 1).reshape(m, n * d)
