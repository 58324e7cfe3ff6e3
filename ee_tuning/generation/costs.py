"""What passes and heads cost on this machine, measured once: what speculation reckons with. All ranks agree on the figures."""
import time
from bisect import bisect_right
from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from ee_tuning.generation.runner import Runner
from ee_tuning.model.exit_head import ExitInput
from ee_tuning.model.ragged_attention import CachePlaces, LayerCache, RaggedBatch, ragged_batch
from ee_tuning.parallel.vocab import top1

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
    """Of each early exit."""
    final_head: Curve
    overhead: float = 0.0
    """Of a step, whatever runs in it."""

    def of_piece(self, index: int, num_tokens: float) -> float:
        """A pass of so many tokens, or so many in the mean, through a piece."""
        return _between(self.pieces[index], num_tokens)

    def of_head(self, layer: int | None, num_tokens: float) -> float:
        """A head asked about so many tokens; None is the final one."""
        return _between(self.final_head if layer is None else self.heads[layer], num_tokens)

    def of_all(self, num_tokens: int) -> float:
        """A step of so many tokens at full depth, no exit asked."""
        return self.overhead + sum(self.of_piece(i, num_tokens) for i in range(len(self.pieces))) + self.of_head(None, num_tokens)


def measure_costs(runner: Runner) -> Costs:
    """Times this stage's pieces and heads on numbers that do not matter; then each figure is that of the slowest rank that has one.

    The pieces run one after the other, as in a step: what one leaves in a processor's cache, the others push out. Those before the last one
    run twice and count the mean: drafts come one after the other, and find in the cache what the draft before them left. Of several such
    rounds the fastest counts, for what else runs on a machine only ever adds.
    """
    num_pieces = len(runner.pieces)
    figures = torch.zeros(2 * num_pieces + 1, len(COUNTS), dtype=torch.float64)
    for column, count in enumerate(COUNTS):
        runs = torch.stack([_one_run(runner, count) for _ in range(REPEATS)])
        figures[:, column] = runs.amin(0)
    if runner.topology.num_in_replica > 1:
        dist.all_reduce(figures, op=dist.ReduceOp.MAX, group=runner.topology.replica_control)
    curves: list[Curve] = [tuple(row) for row in figures.cummax(dim=1)[0].tolist()]  # more tokens never cost less
    heads = {piece.exit_layer: curves[num_pieces + i] for i, piece in enumerate(runner.pieces[:-1]) if piece.exit_layer is not None}
    return Costs(tuple(curves[:num_pieces]), heads, curves[2 * num_pieces - 1], overhead=curves[-1][0])


def _one_run(runner: Runner, count: int) -> Tensor:
    """Seconds of each piece, of the head behind each, and of getting ready, with `count` tokens."""
    seconds = torch.zeros(2 * len(runner.pieces) + 1, dtype=torch.float64)
    device = runner.topology.device
    hidden = torch.ones(count, runner.config.hidden_size, dtype=runner.model.plan.dtype, device=device)
    places = CachePlaces(index=torch.arange(CONTEXT + count, device=device), first=0)
    shape = (CONTEXT + count, runner.config.num_query_groups // runner.topology.tp, runner.config.kv_channels)
    cache = LayerCache(keys=hidden.new_zeros(shape), values=hidden.new_zeros(shape))
    # Of any length of context: the engine's own tables may end before the measured tokens do.
    cos, sin = (table.new_ones(CONTEXT + count, table.shape[-1]) for table in runner.tables)
    began = time.perf_counter()
    batch = ragged_batch([places], [CONTEXT], [count], cos, sin,
                         queries_per_group=runner.config.num_attention_heads // runner.config.num_query_groups,
                         num_places=CONTEXT + count)
    seconds[-1] = time.perf_counter() - began
    last = len(runner.pieces) - 1
    for index, piece in enumerate(runner.pieces):
        if piece.stage == runner.topology.stage:
            times = 1 if index == last else 2
            for _ in range(times):
                began = time.perf_counter()
                hidden, inner = _pass(runner, index, hidden, cache, batch)
                passed = time.perf_counter()
                if index == last:
                    logits = F.linear(runner.model.final_hidden(hidden), runner.model.backbone.output_layer.weight)
                    top1(logits, runner.model.vocab).token_ids.tolist()
                elif piece.exit_layer is not None:
                    _ask(runner, piece.exit_layer, hidden, inner, cache, batch)
                seconds[index] += (passed - began) / times
                seconds[len(runner.pieces) + index] += (time.perf_counter() - passed) / times
    return seconds


def _ask(runner: Runner, layer: int, hidden: Tensor, inner: ExitInput, cache: LayerCache, batch: RaggedBatch) -> None:
    head = runner.heads[layer]
    taken = head.take(hidden, inner) if head.layer is None else head.run_own_layer(hidden, cache, batch)
    top1(head.logits(taken), runner.model.vocab).token_ids.tolist()


def _pass(runner: Runner, index: int, hidden: Tensor, cache: LayerCache, batch: RaggedBatch) -> tuple[Tensor, ExitInput]:
    piece, inner = runner.pieces[index], ExitInput(hidden)
    for number in range(piece.first_layer, piece.last_layer + 1):
        hidden, inner = runner.layers[number](hidden, cache, batch)
    hidden[0, 0].item()  # on a device that computes behind Python's back, it has to be waited for
    return hidden, inner


def _between(curve: Curve, count: float) -> float:
    """Straight lines between the counts that were measured, and on from the last two."""
    right = min(max(bisect_right(COUNTS, count), 1), len(COUNTS) - 1)
    (a, b), (low, high) = COUNTS[right - 1: right + 1], curve[right - 1: right + 1]
    return low + (high - low) * (count - a) / (b - a)
