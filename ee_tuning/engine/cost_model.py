"""The costs of passes and heads, which speculation plans with: expected from the bytes of weights that they read, or
measured on this machine.
"""

import time
from bisect import bisect_right
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from ee_tuning.decoding.attention_metadata import AttentionMetadata
from ee_tuning.decoding.captured_batch import GraphCache
from ee_tuning.decoding.decode_head import DecodeExitHead
from ee_tuning.decoding.decode_layer import DecodeLayer
from ee_tuning.decoding.eager_attention import BLOCK_SIZE, LayerCache, SlotMapping
from ee_tuning.decoding.layer_stack import LayerStack
from ee_tuning.engine.block_pool import blocks_for
from ee_tuning.engine.stage_model import StageModel
from ee_tuning.model.exit_head import ExitInput

COUNTS = (1, 4, 16)
"""Tokens of the measured passes."""
REPEATS = 5
CONTEXT = 64
"""Tokens before them."""
SHARE_OF_ONE_MORE = {"cache": 0.2, "cpu": 0.1, "cuda": 0.01}
"""The expected cost of one more token in a pass, as a share of a pass of one token, by where the weights lie: in a
processor's cache, where they are read faster, in its memory, or on a GPU.
"""
CACHE_BYTES = 64 << 20
"""Bytes below which a model is assumed to lie in the cache. One number, since every rank has to plan alike."""

Curve = tuple[float, ...]
"""Seconds, or numbers in proportion to them, at each of COUNTS."""


@dataclass(frozen=True)
class Costs:
    """Seconds, or numbers in proportion to them: plans depend on ratios alone."""

    segments: tuple[Curve, ...]
    """The layers of each segment."""
    heads: dict[int, Curve]
    """The head of each early exit."""
    final_head: Curve
    overhead: float = 0.0
    """Constant part of a step's cost."""

    def of_segment(self, number: int, num_tokens: float) -> float:
        """Returns the cost of a pass of `count` tokens, possibly a mean number, through a segment."""
        return _between(self.segments[number], num_tokens)

    def of_head(self, layer: int | None, num_tokens: float) -> float:
        """Returns the cost of a head for `count` tokens; None is the final head."""
        return _between(self.final_head if layer is None else self.heads[layer], num_tokens)

    def of_all(self, num_tokens: int) -> float:
        """Returns the cost of a step of `count` tokens at full depth, without exits."""
        layers = sum(self.of_segment(number, num_tokens) for number in range(len(self.segments)))
        return self.overhead + layers + self.of_head(None, num_tokens)


def expected_costs(stage: StageModel) -> Costs:
    """Returns costs in bytes of weights, since reading them bounds decoding. The same on every rank of any layout."""
    config, plan = stage.config, stage.model.plan
    inner = config.moe_router_topk * config.moe_ffn_hidden_size if config.num_experts else config.ffn_hidden_size
    mlp = config.hidden_size * inner * (3 if config.is_gated else 2)
    heads_width = (2 * config.num_attention_heads + 2 * config.num_query_groups) * config.kv_channels
    layer, matrix = mlp + config.hidden_size * heads_width, config.hidden_size * config.vocab_size
    num_bytes = (config.num_layers * layer + matrix) * plan.dtype.itemsize
    growth = [1 + share_of_one_more(stage.topology.device.type, num_bytes) * (count - 1) for count in COUNTS]

    def curve(num_parameters: float) -> Curve:
        return tuple(num_parameters * plan.dtype.itemsize * factor for factor in growth)

    listed = config.hidden_size * stage.model.exit_vocab.size
    of_kind = {"layer": layer, "mlp": mlp, "eagle3": layer + 4 * config.hidden_size**2}
    heads = {e.layer: curve(listed + of_kind.get(e.architecture, 0)) for e in plan.exits}
    segments = [curve(layer * (s.last_layer + 1 - s.first_layer)) for s in stage.segments]
    return Costs(tuple(segments), heads, curve(matrix))


def share_of_one_more(device: str, num_bytes: int) -> float:
    """Returns the expected cost of one more token in a pass of a model of this many bytes, as a share of a pass of one
    token.
    """
    if device != "cpu":
        return SHARE_OF_ONE_MORE["cuda"]
    return SHARE_OF_ONE_MORE["cache" if num_bytes < CACHE_BYTES else "cpu"]


def head_cost(costs: Costs, num_tokens: float) -> float:
    """Returns the cost of a pass of a model's drafting head, its only head besides the last."""
    (layer,) = costs.heads
    return costs.of_head(layer, num_tokens)


def measure_costs(stage: StageModel) -> Costs:
    """Times the segments and heads of a model in one process, on arbitrary inputs.

    Segments run one after the other, as in a step: the weights of one evict those of another from a processor's cache.
    All but the last one run twice and count the mean: drafts come one after the other, and find in the cache what the
    draft before them left. The fastest of several rounds counts, because other work on a machine only adds time.
    """
    num_segments = len(stage.segments)
    figures = torch.zeros(2 * num_segments + 1, len(COUNTS), dtype=torch.float64)
    for column, count in enumerate(COUNTS):
        probe = CostProbe(stage, count)
        figures[:, column] = torch.stack([probe.run() for _ in range(REPEATS)]).amin(0)
    curves: list[Curve] = [tuple(row) for row in figures.cummax(dim=1)[0].tolist()]  # more tokens never cost less
    heads = {
        segment.exit_layer: curves[num_segments + number]
        for number, segment in enumerate(stage.segments)
        if segment.exit_layer is not None
    }
    return Costs(tuple(curves[:num_segments]), heads, curves[2 * num_segments - 1], overhead=curves[-1][0])


class CostProbe:
    """Passes of `count` tokens behind CONTEXT others, with a cache of their own that all layers share."""

    def __init__(self, stage: StageModel, count: int):
        self._stage, self._count = stage, count
        plan, config, device = stage.model.plan, stage.config, stage.topology.device
        self._hidden = torch.ones(count, config.hidden_size, dtype=plan.dtype, device=device)
        self._num_places = blocks_for(CONTEXT + count) * BLOCK_SIZE
        self._places = SlotMapping(index=torch.arange(self._num_places), first=0)
        shape = (self._num_places + BLOCK_SIZE, config.num_query_groups // stage.topology.tp, config.kv_channels)
        cache = LayerCache(keys=self._hidden.new_zeros(shape), values=self._hidden.new_zeros(shape))
        # Angles for any length of context: the engine's own tables may end before the measured tokens do.
        cos, sin = (table.new_ones(CONTEXT + count, table.shape[-1]) for table in stage.tables)
        self._tables = cos, sin
        self._graph_cache = GraphCache(
            self._tables,
            width=config.hidden_size,
            num_places=self._num_places,
            bytes_per_place=stage.cache.bytes_per_token,
        )

        def run_of(layers: Iterable[DecodeLayer]) -> LayerStack:
            chosen = list(layers)
            return LayerStack(chosen, [cache] * len(chosen))

        self._segments = [
            run_of(stage.layers[n] for n in range(each.first_layer, each.last_layer + 1)) for each in stage.segments
        ]
        self._own_layers = {
            number: run_of([head.layer]) for number, head in stage.heads.items() if head.layer is not None
        }

    def run(self) -> Tensor:  # [2 segments + 1] float64
        """Returns the seconds of each segment, of the head behind each, and of describing the pass."""
        stage, hidden, last = self._stage, self._hidden, len(self._segments) - 1
        seconds = torch.zeros(2 * len(self._segments) + 1, dtype=torch.float64)
        began = time.perf_counter()
        tokens = self._describe()
        self._segments[0].prepare(tokens)
        seconds[-1] = time.perf_counter() - began
        for number, segment in enumerate(self._segments):
            times = 1 if number == last else 2
            for _ in range(times):
                began = time.perf_counter()
                hidden, exit_input = segment(hidden, tokens)
                hidden[0, 0].item()  # waits for a device that computes asynchronously
                passed = time.perf_counter()
                if number in stage.heads:
                    self._ask(number, hidden, exit_input, tokens)
                seconds[number] += (passed - began) / times
                seconds[len(self._segments) + number] += (time.perf_counter() - passed) / times
        return seconds

    def _describe(self) -> AttentionMetadata:
        config = self._stage.config
        return AttentionMetadata(
            [self._places],
            [CONTEXT],
            [self._count],
            self._tables,
            queries_per_group=config.num_attention_heads // config.num_query_groups,
            num_places=self._num_places,
            graph_cache=self._graph_cache,
        )

    def _ask(self, number: int, hidden: Tensor, exit_input: ExitInput, tokens: AttentionMetadata) -> None:
        head, taken = self._stage.heads[number], ExitInput(hidden)
        if number in self._own_layers:
            taken = ExitInput(hidden, layer_output=self._own_layers[number](hidden, tokens)[0])
        elif isinstance(head, DecodeExitHead):
            taken = head.take(hidden, exit_input)
        head.ask(taken)[1].tolist()  # waits for the answer


def _between(curve: Curve, count: float) -> float:
    """Interpolates linearly between the measured counts, and extrapolates from the last two."""
    right = min(max(bisect_right(COUNTS, count), 1), len(COUNTS) - 1)
    (a, b), (low, high) = COUNTS[right - 1 : right + 1], curve[right - 1 : right + 1]
    return low + (high - low) * (count - a) / (b - a)
