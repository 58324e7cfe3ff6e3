"""Exit heads with a layer of their own: their caches are filled when they are asked, and for requests that may ask them
alone.

Tokens that pass such an exit leave their states there. They run through the head's layer with the next token that it is
asked about, as one causal block: a head that nobody asks costs nothing.
"""

import itertools
from collections.abc import Callable

import torch
from torch import Tensor

from ee_tuning.generation.kv_cache import KVCache
from ee_tuning.generation.sequence import Sequence
from ee_tuning.model.exit_head import ExitInput
from ee_tuning.model.layer_run import LayerRun
from ee_tuning.model.ragged_head import RaggedExitHead
from ee_tuning.model.token_pass import TokenPass

# t tokens of a ragged batch · h hidden

LONGEST_WAIT = 64
"""Tokens of a sequence whose states may wait at a head, so that they take no more memory however long it is not asked.
"""


class HeadLayers:
    """`own` are all exits whose heads have a layer of their own, `heads` those of this stage. Every rank keeps the same
    watermarks.
    """

    def __init__(
        self,
        own: frozenset[int],
        heads: dict[int, RaggedExitHead],
        cache: KVCache,
        describe: Callable[[list[Sequence], list[int], list[int]], TokenPass],
    ):
        self.own, self.heads, self.cache, self._describe = own, heads, cache, describe
        self._runs: dict[int, LayerRun] = {}

    def keep(
        self, layer: int, index: int, rows: list[Sequence], hidden: Tensor | None, firsts: tuple[int, ...]
    ) -> None:  # [t, h]
        """Notes a pass of `rows` through piece `index`, which ends at exit `layer`; `hidden` where this stage made
        it.
        """
        late = []
        for sequence, first, end in zip(rows, firsts, (*firsts[1:], None), strict=True):
            if layer in sequence.head_watermarks:
                if hidden is not None:
                    sequence.head_states[layer].append(hidden[first:end])
                # What is read goes on at once, so that others who begin alike can share it.
                is_read = sequence.num_fed <= sequence.num_to_read
                if sequence.watermarks[index] - sequence.head_watermarks[layer] > (1 if is_read else LONGEST_WAIT):
                    late.append(sequence)
        if late:
            self._run(layer, index, late, num_left=1)  # it may be asked about the newest yet

    def ask(self, layer: int, index: int, rows: list[Sequence]) -> ExitInput | None:
        """What the head takes for the newest token of each of `rows` behind piece `index`; None where the head is on
        another stage.
        """
        return self._run(layer, index, rows, num_left=0)

    def _run(self, layer: int, index: int, rows: list[Sequence], num_left: int) -> ExitInput | None:
        starts = [s.head_watermarks[layer] for s in rows]
        lengths = [s.watermarks[index] - num_left - start for s, start in zip(rows, starts, strict=True)]
        parts = []
        for sequence, start, length in zip(rows, starts, lengths, strict=True):
            sequence.head_watermarks[layer] = start + length
            if layer in self.heads:
                states = sequence.head_states[layer]
                whole = states[0] if len(states) == 1 else torch.cat(states)
                assert len(whole) == length + num_left, "a token's state was not kept"
                parts.append(whole[:length])
                sequence.head_states[layer] = [whole[length:]] if num_left else []
        if layer not in self.heads:
            return None
        hidden = parts[0] if len(parts) == 1 else torch.cat(parts)
        made = ExitInput(hidden, layer_output=self.layer_of(layer)(hidden, self._describe(rows, starts, lengths))[0])
        return made if max(lengths) == 1 else made.rows([end - 1 for end in itertools.accumulate(lengths)])

    def layer_of(self, layer: int) -> LayerRun:
        """The layer that the head behind `layer` has of its own, with its cache; on the stage that has it."""
        if layer not in self._runs:  # with its cache, which a head that nobody asks has none of
            own = self.heads[layer].layer
            assert own is not None
            self._runs[layer] = LayerRun([own], [self.cache.exit_head(layer)])
        return self._runs[layer]
