"""What passes and heads cost on this machine, measured once: what speculation reckons with. All ranks agree on the
figures.
"""

import time
from bisect import bisect_right
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from ee_tuning.generation.block_pool import blocks_for
from ee_tuning.generation.runner import Runner
from ee_tuning.model.exit_head import ExitInput
from ee_tuning.model.layer_run import LayerRun
from ee_tuning.model.ragged_attention import BLOCK_SIZE, CachePlaces, LayerCache
from ee_tuning.model.ragged_layer import RaggedLayer
from ee_tuning.model.static_pass import StaticPasses
from ee_tuning.model.token_pass import TokenPass

COUNTS = (1, 4, 16)
"""Tokens of the measured passes."""
REPEATS = 5
CONTEXT = 64
"""Tokens before them."""

Curve = tuple[float, ...]
"""Seconds at each of COUNTS."""


@dataclass(frozen=True)
class Costs:
    """Seconds."""

    pieces: tuple[Curve, ...]
    heads: dict[int, Curve]
    """The curve of each early exit."""
    final_head: Curve
    overhead: float = 0.0
    """The seconds of a step, whatever runs in it."""

    def of_piece(self, index: int, num_tokens: float) -> float:
        """A pass of so many tokens, or so many in the mean, through a piece."""
        return _between(self.pieces[index], num_tokens)

    def of_head(self, layer: int | None, num_tokens: float) -> float:
        """A head asked about so many tokens; None is the final one."""
        return _between(self.final_head if layer is None else self.heads[layer], num_tokens)

    def of_all(self, num_tokens: int) -> float:
        """A step of so many tokens at full depth, no exit asked."""
        return (
            self.overhead
            + sum(self.of_piece(i, num_tokens) for i in range(len(self.pieces)))
            + self.of_head(None, num_tokens)
        )


def measure_costs(runner: Runner) -> Costs:
    """Times this stage's pieces and heads on numbers that do not matter; then each figure is that of the slowest rank
    that has one.

    The pieces run one after the other, as in a step: what one leaves in a processor's cache, the others push out. Those
    before the last one run twice and count the mean: drafts come one after the other, and find in the cache what the
    draft before them left. Of several such rounds the fastest counts, for what else runs on a machine only ever adds.
    """
    num_pieces = len(runner.pieces)
    figures = torch.zeros(2 * num_pieces + 1, len(COUNTS), dtype=torch.float64)
    for column, count in enumerate(COUNTS):
        imitation = _Imitation(runner, count)
        runs = torch.stack([_one_run(imitation) for _ in range(REPEATS)])
        figures[:, column] = runs.amin(0)
    if runner.topology.num_in_replica > 1:
        dist.all_reduce(figures, op=dist.ReduceOp.MAX, group=runner.topology.replica_control)
    curves: list[Curve] = [tuple(row) for row in figures.cummax(dim=1)[0].tolist()]  # more tokens never cost less
    heads = {
        piece.exit_layer: curves[num_pieces + i]
        for i, piece in enumerate(runner.pieces[:-1])
        if piece.exit_layer is not None
    }
    return Costs(tuple(curves[:num_pieces]), heads, curves[2 * num_pieces - 1], overhead=curves[-1][0])


class _Imitation:
    """This stage's pieces and heads, with a cache of their own that all layers share: `count` tokens behind CONTEXT
    others.
    """

    def __init__(self, runner: Runner, count: int):
        self.runner, self.count = runner, count
        plan, config, device = runner.model.plan, runner.config, runner.topology.device
        self.hidden = torch.ones(count, config.hidden_size, dtype=plan.dtype, device=device)
        self.num_places = blocks_for(CONTEXT + count) * BLOCK_SIZE
        self.places = CachePlaces(index=torch.arange(self.num_places), first=0)
        shape = (self.num_places + BLOCK_SIZE, config.num_query_groups // runner.topology.tp, config.kv_channels)
        cache = LayerCache(keys=self.hidden.new_zeros(shape), values=self.hidden.new_zeros(shape))
        # Of any length of context: the engine's own tables may end before the measured tokens do.
        cos, sin = (table.new_ones(CONTEXT + count, table.shape[-1]) for table in runner.tables)
        self.tables = cos, sin
        self.static_passes = StaticPasses(
            self.tables,
            width=config.hidden_size,
            num_places=self.num_places,
            bytes_per_place=runner.cache.bytes_per_token,
        )
        own = [piece for piece in runner.pieces if piece.stage == runner.topology.stage]
        self.pieces = {
            piece: self._run(cache, [runner.layers[n] for n in range(piece.first_layer, piece.last_layer + 1)])
            for piece in own
        }
        self.own_layers = {
            layer: self._run(cache, [head.layer]) for layer, head in runner.exit_heads.items() if head.layer is not None
        }

    def tokens(self) -> TokenPass:
        """A pass, told anew."""
        config = self.runner.config
        return TokenPass(
            [self.places],
            [CONTEXT],
            [self.count],
            self.tables,
            queries_per_group=config.num_attention_heads // config.num_query_groups,
            num_places=self.num_places,
            static_passes=self.static_passes,
        )

    def ask(self, layer: int | None, hidden: Tensor, inner: ExitInput, tokens: TokenPass) -> None:
        """A head about all tokens; its answer has come when this returns."""
        taken = ExitInput(hidden)
        if layer in self.own_layers:
            taken = ExitInput(hidden, layer_output=self.own_layers[layer](hidden, tokens)[0])
        elif layer is not None:
            taken = self.runner.exit_heads[layer].take(hidden, inner)
        self.runner.heads[layer].ask(taken)[1].tolist()

    def _run(self, cache: LayerCache, layers: list[RaggedLayer]) -> LayerRun:
        return LayerRun(layers, [cache] * len(layers))


def _one_run(imitation: _Imitation) -> Tensor:
    """Seconds of each piece, of the head behind each, and of getting ready."""
    pieces, hidden = imitation.runner.pieces, imitation.hidden
    seconds = torch.zeros(2 * len(pieces) + 1, dtype=torch.float64)
    began = time.perf_counter()
    tokens = imitation.tokens()
    next(iter(imitation.pieces.values())).prepare(tokens)
    seconds[-1] = time.perf_counter() - began
    last = len(pieces) - 1
    for index, piece in enumerate(pieces):
        if piece in imitation.pieces:
            times = 1 if index == last else 2
            for _ in range(times):
                began = time.perf_counter()
                hidden, inner = imitation.pieces[piece](hidden, tokens)
                hidden[0, 0].item()  # on a device that computes behind Python's back, it has to be waited for
                passed = time.perf_counter()
                if index == last or piece.exit_layer is not None:
                    imitation.ask(None if index == last else piece.exit_layer, hidden, inner, tokens)
                seconds[index] += (passed - began) / times
                seconds[len(pieces) + index] += (time.perf_counter() - passed) / times
    return seconds


def _between(curve: Curve, count: float) -> float:
    """Straight lines between the counts that were measured, and on from the last two."""
    right = min(max(bisect_right(COUNTS, count), 1), len(COUNTS) - 1)
    (a, b), (low, high) = COUNTS[right - 1 : right + 1], curve[right - 1 : right + 1]
    return low + (high - low) * (count - a) / (b - a)
