"""The drafting head of EAGLE-3 (arXiv 2503.01840) in decoding: drafts of several sequences, one token after the other,
behind each check; one pass of the model checks all drafts.

The head reads the states of some layers for tokens that the model has checked, each with the embedding of the token
that follows it, and then its own output. Its keys and values lie in a cache of its own; those of drafts are overwritten
by those of checked tokens.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ee_tuning.engine.boundary_ring import PassStates
from ee_tuning.engine.cost_model import Costs, head_cost
from ee_tuning.engine.draft_proposer import keep_agreed
from ee_tuning.engine.sequence import Sequence
from ee_tuning.engine.stage_model import StageModel
from ee_tuning.engine.step_plan import Answer, RowOutput, RowPlan, plan_of_check
from ee_tuning.model.eagle3 import Eagle3Head
from ee_tuning.parallel.draft_vocab import DraftVocab
from ee_tuning.parallel.stage_link import StageLink
from ee_tuning.parallel.vocab import top1

# t tokens of several sequences, one sequence after the other · a layers that are read · h hidden
# n query heads, g key-value heads of this rank · d width of a head


@dataclass(frozen=True, kw_only=True)
class DraftInput:
    """Checked tokens of a sequence that the head has not read yet."""

    sequence: Sequence
    start: int
    """The position of the first one. The tokens behind each of them are known."""
    states: Tensor
    """[tokens, a * h]"""
    num_drafts: int
    """Number of drafts wanted behind these tokens."""


class DraftHead:
    """The head on this rank. Shares its weights."""

    def __init__(self, stage: StageModel, head: Eagle3Head, num_slots: int, max_length: int):
        self._stage, self._head, self._max_length = stage, head, max_length
        self._vocab = stage.model.exit_vocab
        groups, width = head.midlayer.num_groups, head.midlayer.config.kv_channels
        shape = (num_slots, max_length, groups, width)
        dtype, device = stage.model.plan.dtype, stage.topology.device
        self._keys, self._values = (torch.zeros(shape, dtype=dtype, device=device) for _ in range(2))

    def states_of(self, sequence: Sequence, passes: Mapping[int, PassStates]) -> tuple[int, Tensor]:
        """Returns (position of the first token, [tokens, a * h]): the states that a step left of a sequence, by
        layer.
        """
        parts, start = list[Tensor](), 0
        assert self._head.spec.draft is not None
        for layer in self._head.spec.draft.aux_layers:
            states = passes[layer]
            place = next(i for i, row in enumerate(states.rows) if row is sequence)
            first, start = sum(states.lengths[:place]), states.starts[place]
            parts.append(states.hidden[first : first + states.lengths[place]])
        return start, torch.cat(parts, dim=-1)

    def draft(self, inputs: list[DraftInput]) -> list[list[int]]:
        """Reads the tokens of each input and returns its drafts, the likeliest token each time. All tensor-parallel
        ranks return the same.
        """
        drafts: list[list[int]] = [[] for _ in inputs]
        rows, lengths = [each.sequence for each in inputs], [each.states.shape[0] for each in inputs]
        starts = [each.start for each in inputs]
        state = self._head.fused(torch.cat([each.states for each in inputs]))
        tokens = [
            t
            for each, n in zip(inputs, lengths, strict=True)
            for t in each.sequence.tokens[each.start + 1 : each.start + 1 + n]
        ]
        for step in range(max(1, *(each.num_drafts for each in inputs))):
            state = self._through_layer(state, tokens, rows, starts, lengths)
            wanted = [i for i, each in enumerate(inputs) if each.sequence in rows and each.num_drafts > step]
            if not wanted:
                break
            ends = torch.tensor(lengths).cumsum(0) - 1
            kept = [i for i, row in enumerate(rows) if any(inputs[w].sequence is row for w in wanted)]
            state = state[ends[kept].to(state.device)]
            normed = self._head.norm(state)
            tokens = self._likeliest(normed)
            for each, token in zip(wanted, tokens, strict=True):
                drafts[each].append(token)
            assert self._head.spec.draft is not None
            state = normed if self._head.spec.draft.norm_output else state
            starts = [starts[i] + lengths[i] for i in kept]
            rows, lengths = [rows[i] for i in kept], [1] * len(kept)
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

        def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:  # [t, 1, n, d], [t, 1, g, d] -> [t, 1, n * d]
            query, key = layer.rotated(query, positions), layer.rotated(key, positions)
            parts, first = [], 0
            for row, start, length in zip(rows, starts, lengths, strict=True):
                own, stop = slice(first, first + length), start + length
                keys, values = self._keys[row.slot], self._values[row.slot]
                keys[start:stop], values[start:stop] = key[own, 0], value[own, 0]
                parts.append(_attend(query[own, 0], keys[:stop], values[:stop], start, layer.scale))
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


MOST_DRAFTS = 8
"""Most drafts of a round."""
MEMORY, PRIOR = 0.98, 0.7
"""Weight of a count after the next one; prior probability of the first draft."""
TRY_EVERY = 16
"""Rounds without drafts after which one token is drafted, to see whether the text has become easier."""


class DraftHeadProposer:
    """Plans the drafts of an engine's sequences, each of which may have `max_pending`. All ranks plan the same; those
    of the last stage have the `head`, and send its drafts to the others over `link`.
    """

    def __init__(self, head: DraftHead | None, link: StageLink, costs: Costs, stage: StageModel):
        self._head, self._link, self._costs = head, link, costs
        self._num_layers, self._max_pending = stage.config.num_layers, stage.max_pending
        self._last_stage = stage.topology.pp - 1
        self._seen, self._right = [1.0] * MOST_DRAFTS, [PRIOR] * MOST_DRAFTS
        self._num_rounds = 0

    def plan(self, sequence: Sequence, num_rows: int) -> RowPlan:
        """Returns the row of a sequence whose newest token and its drafts are scheduled."""
        return plan_of_check(sequence, num_rows)

    def update(self, row: RowPlan, output: RowOutput) -> list[tuple[Answer, int]]:
        """Checks the drafts of a sequence: final tokens, each with the layer that it left at."""
        were_looked_up = row.sequence.drafts.are_complete
        num_kept = keep_agreed(row.sequence, output.answers)
        for place in range(0 if were_looked_up else min(num_kept + 1, len(output.answers) - 1)):
            self._seen[place] = MEMORY * self._seen[place] + 1
            self._right[place] = MEMORY * self._right[place] + (place < num_kept)
        return [(answer, self._num_layers) for answer in output.answers[: num_kept + 1]]

    def propose(self, read: list[tuple[Sequence, RowOutput]]) -> None:
        """Reads the states that steps computed of sequences whose newest tokens are final, and adds drafts to those
        that decode.
        """
        counts = [self._length(sequence) if _decodes(sequence) else 0 for sequence, _ in read]
        if not read:
            return
        tokens = torch.empty(sum(counts), dtype=torch.int64)
        if self._head is not None:
            inputs = [
                self._input(self._head, sequence, output, count)
                for (sequence, output), count in zip(read, counts, strict=True)
            ]
            tokens = torch.tensor([token for drafts in self._head.draft(inputs) for token in drafts], dtype=torch.int64)
        if len(tokens) and self._last_stage > 0:
            self._link.broadcast(tokens, self._last_stage)
        drafts = iter(tokens.tolist())
        for (sequence, _), count in zip(read, counts, strict=True):
            sequence.add_drafts([next(drafts) for _ in range(count)], self._num_layers)

    def _input(self, head: DraftHead, sequence: Sequence, output: RowOutput, num_drafts: int) -> DraftInput:
        start, states = head.states_of(sequence, output.read_states)
        # States of rejected drafts are useless, and the newest token's are not computed yet.
        known = states[: sequence.num_final - 1 - start]
        return DraftInput(sequence=sequence, start=start, states=known, num_drafts=num_drafts)

    def rate(self, sequence: Sequence) -> float:
        """Returns tokens per second and sequence with the head's drafts."""
        return self._best(sequence)[1]

    def _length(self, sequence: Sequence) -> int:
        """Returns the number of drafts; sometimes one, even if no draft seems to pay."""
        best, _, most = self._best(sequence)
        self._num_rounds += 1
        return best or max(0, min(most, int(self._num_rounds % TRY_EVERY == 0)))

    def _best(self, sequence: Sequence) -> tuple[int, float, int]:
        """Returns the number of drafts with most tokens per second by past acceptance, that rate, and the number of
        drafts that there is room for.
        """
        assert sequence.slot_mapping is not None
        room = len(sequence.slot_mapping.index) - len(sequence.tokens)
        most = min(MOST_DRAFTS, self._max_pending, sequence.limit - len(sequence.tokens) - 1, room)
        num_rows, costs = sequence.drafts.num_rows, self._costs
        best, best_rate, expected, share = 0, 1 / costs.of_all(num_rows), 1.0, 1.0
        for count in range(1, most + 1):
            share *= self._right[count - 1] / self._seen[count - 1]
            expected += share
            rate = expected / (costs.of_all(num_rows * (count + 1)) + count * head_cost(costs, num_rows))
            if rate > best_rate:
                best, best_rate = count, rate
        return best, best_rate, most


def _decodes(sequence: Sequence) -> bool:
    """Whether all tokens but the newest are computed."""
    return sequence.num_output > 0 and sequence.num_computed[-1] == len(sequence.tokens) - 1
