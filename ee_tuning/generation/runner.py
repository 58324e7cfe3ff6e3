"""Runs a piece of the network over the pending tokens of some sequences, on the stage that owns it."""

import itertools
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ee_tuning.generation.head_layers import HeadLayers
from ee_tuning.generation.kv_cache import KVCache
from ee_tuning.generation.pieces import Piece
from ee_tuning.generation.sequence import Sequence
from ee_tuning.model.config import ModelConfig
from ee_tuning.model.early_exit import EarlyExitModel
from ee_tuning.model.exit_head import ExitInput
from ee_tuning.model.layer_run import LayerRun
from ee_tuning.model.ragged_attention import CachePlaces, rotation_tables
from ee_tuning.model.ragged_head import RaggedExitHead, RaggedFinalHead, RaggedHead
from ee_tuning.model.ragged_layer import RaggedLayer
from ee_tuning.model.static_pass import StaticPasses
from ee_tuning.model.token_pass import TokenPass
from ee_tuning.parallel.stage_link import StageLink

# t tokens of a ragged batch · h hidden


class PieceOutput(NamedTuple):
    """What a pass leaves: the states behind the piece's last layer, and what an exit there takes. None on other
    stages.
    """

    hidden: Tensor | None  # [t, h]
    exit_input: ExitInput | None
    firsts: tuple[int, ...]
    """Per sequence, the index of its first token of the pass."""
    lengths: tuple[int, ...]


class _Passes:
    """What goes through the layers together. The newest one is kept: the pieces of a step mostly see the same
    tokens.
    """

    def __init__(self, tables: tuple[Tensor, Tensor], config: ModelConfig, cache: KVCache):
        self._tables, self._num_places = tables, cache.num_places
        self._per_group = config.num_attention_heads // config.num_query_groups
        self._static = StaticPasses(
            tables, width=config.hidden_size, num_places=cache.num_places, bytes_per_place=cache.bytes_per_token
        )
        self._newest: TokenPass | None = None

    def __call__(self, rows: list[Sequence], starts: list[int], lengths: list[int]) -> TokenPass:
        """A pass of `lengths` tokens of `rows` from `starts` on."""
        places = [s.places for s in rows if s.places is not None]
        newest = self._newest
        if newest is None or starts != newest.starts or lengths != newest.lengths or not _are_same(places, newest.rows):
            newest = self._newest = TokenPass(
                places,
                starts,
                lengths,
                self._tables,
                queries_per_group=self._per_group,
                num_places=self._num_places,
                static_passes=self._static,
            )
        return newest


def _are_same(some: list[CachePlaces], others: list[CachePlaces]) -> bool:
    return len(some) == len(others) and all(a is b for a, b in zip(some, others, strict=True))


class Runner:
    """The layers of one stage, and their caches."""

    def __init__(self, model: EarlyExitModel, pieces: tuple[Piece, ...], cache: KVCache, link: StageLink):
        self.model, self.topology, self.config, self.pieces, self.cache = (
            model,
            model.topology,
            model.config,
            pieces,
            cache,
        )
        self.link = link
        own = range(model.plan.first_layer, model.plan.last_layer + 1)
        self.layers = {number: RaggedLayer(model.backbone.layer(number), self.config, self.topology) for number in own}
        self.exit_heads = {
            spec.layer: RaggedExitHead(model, model.exit_head(spec.layer), self.topology)
            for spec in model.plan.own_exits
        }
        self.heads: dict[int | None, RaggedHead] = dict(self.exit_heads.items())
        """Heads of this stage by the layer that an exit follows; None is the model's own."""
        if model.plan.has_final_head and self.topology.is_last_stage:
            self.heads[None] = RaggedFinalHead(model)
        self.tables = rotation_tables(model.backbone.angles[: cache.max_length], model.plan.dtype)
        own_layers = frozenset(spec.layer for spec in model.plan.exits if spec.architecture == "layer")
        self.describe = _Passes(self.tables, self.config, cache)
        self.head_layers = HeadLayers(own_layers, self.exit_heads, cache, self.describe)
        self._runs: dict[tuple[int, int], LayerRun] = {}
        self._carried: tuple[int, list[Sequence], PieceOutput] | None = None
        """What the newest pass gave to the piece behind it: mostly the next pass is of the same rows, and nothing is
        cut and joined.
        """
        # A token's row of the embedding is all there is to it in one process: Megatron's modules take ten times as long
        # over it.
        is_plain = self.config.position == "rope" and self.topology.tp == 1 and self.topology.is_first_stage
        self.words: Tensor | None = model.backbone.embedding.word_embeddings.weight if is_plain else None
        """[v, h]"""
        self.is_native = (
            self.config.position == "rope"
            and bool(self.layers)
            and all(layer.is_native for layer in self.layers.values())
        )
        """Whether the kernels can take a token through all layers of this stage, from the embedding on where that is
        here.
        """

    def run(self, index: int, rows: list[Sequence], through: int | None = None) -> PieceOutput:
        """One pass of `rows`' pending tokens through piece `index`, and on through the pieces up to `through` of the
        same stage.

        States wait behind the last one for those rows that go deeper.
        """
        last = index if through is None else through
        piece, starts = self.pieces[last], [s.watermarks[index] for s in rows]
        ends = [s.num_fed for s in rows] if index == 0 else [s.watermarks[index - 1] for s in rows]
        lengths = [end - start for start, end in zip(starts, ends, strict=True)]
        for sequence, end in zip(rows, ends, strict=True):
            for passed in range(index, last + 1):
                sequence.watermarks[passed] = end
        firsts = tuple(itertools.accumulate(lengths[:-1], initial=0))
        hidden, exit_input = self._entrance(index, rows, starts, lengths), None
        if hidden is not None:
            hidden, exit_input = self.layers_of(index, last)(hidden, self.describe(rows, starts, lengths))
            if (head := self.exit_heads.get(piece.last_layer)) is not None:
                exit_input = head.take(hidden, exit_input)
        if piece.last_layer in self.head_layers.own:
            self.head_layers.keep(piece.last_layer, last, rows, hidden, firsts)
        output = PieceOutput(hidden, exit_input, firsts, tuple(lengths))
        if hidden is not None and last + 1 < len(self.pieces):
            self._carried = (last + 1, rows, output)
        return output

    def settle(self) -> None:
        """Leaves what the newest pass carries behind it with its sequences, those that go deeper: before anything else
        is done to them.
        """
        if self._carried is not None:
            index, rows, output = self._carried
            self._carried = None
            assert output.hidden is not None
            for sequence, first, length in zip(rows, output.firsts, output.lengths, strict=True):
                if index <= sequence.last_piece:
                    sequence.boundary[index].append(output.hidden[first : first + length])

    def layers_of(self, index: int, last: int) -> LayerRun:
        """The layers of the pieces from `index` to `last`, with their caches; on the stage that has them."""
        if (index, last) not in self._runs:  # with the caches, which a piece that no token reaches has none of
            numbers = range(self.pieces[index].first_layer, self.pieces[last].last_layer + 1)
            self._runs[index, last] = LayerRun(
                [self.layers[n] for n in numbers], [self.cache.layer(n) for n in numbers]
            )
        return self._runs[index, last]

    def asked_states(
        self, index: int, head_layer: int | None, rows: list[Sequence], states: list[int], output: PieceOutput
    ) -> ExitInput | None:
        """What a head behind piece `index` takes at `states`, places in the pass that left `output`; None on the other
        stages.

        `head_layer` None is the final head. Early exits are asked about the newest token of each of `rows`.
        """
        if head_layer in self.head_layers.own:
            return self.head_layers.ask(head_layer, index, rows)
        inputs = output.exit_input
        if output.hidden is None or inputs is None:
            return None
        if head_layer is None:
            inputs = ExitInput(output.hidden)
        return inputs if states == list(range(inputs.hidden.shape[0])) else inputs.rows(states)

    def _entrance(
        self, index: int, rows: list[Sequence], starts: list[int], lengths: list[int]
    ) -> Tensor | None:  # [t, h]
        """The pending tokens' states where the piece is computed: embedded, kept from before, or sent by the stage
        before.
        """
        here, stage = self.pieces[index].stage == self.topology.stage, self.topology.stage
        carried = self._carried
        if index == 0:
            self.settle()
            return self.embedded(rows, starts, lengths) if here else None
        before = self.pieces[index - 1].stage
        hidden = None
        if carried is not None and carried[:2] == (index, rows) and not any([s.boundary[index] for s in rows]):
            self._carried, hidden = None, carried[2].hidden
        elif before == stage:
            self.settle()
            parts = [states for s in rows for states in s.boundary[index]]
            hidden = parts[0] if len(parts) == 1 else torch.cat(parts)
            for sequence in rows:
                sequence.boundary[index].clear()
        if here and before == stage:
            return hidden
        if before == stage:
            assert hidden is not None
            self.link.send(hidden)
        elif here:
            return self.link.receive(sum(lengths), self.config.hidden_size, self.model.plan.dtype)
        return None

    def embedded(self, rows: list[Sequence], starts: list[int], lengths: list[int]) -> Tensor:  # [t, h]
        """`lengths` tokens of `rows` from `starts` on; on the first stage."""
        ids = [
            token for s, start, n in zip(rows, starts, lengths, strict=True) for token in s.tokens[start : start + n]
        ]
        if self.words is not None and len(ids) == 1:
            return self.words[ids[0] : ids[0] + 1]
        flat, positions = torch.tensor([ids], device=self.topology.device), None
        if self.words is not None:
            return F.embedding(flat[0], self.words)
        if self.config.position == "learned":
            positions = torch.tensor(
                [[p for start, n in zip(starts, lengths, strict=True) for p in range(start, start + n)]],
                device=self.topology.device,
            )
        return self.model.backbone.embed(flat, positions)[:, 0]
