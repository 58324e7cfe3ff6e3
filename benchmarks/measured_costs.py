"""Costs of a model's segments and heads as measured on this machine, for benchmarks.

Speculation itself plans with costs that it expects from the bytes of weights (`expected_costs`).
"""

import time
from collections.abc import Iterable

import torch
from torch import Tensor

from ee_tuning.decoding.attention_metadata import AttentionMetadata
from ee_tuning.decoding.captured_batch import GraphCache
from ee_tuning.decoding.decode_head import DecodeExitHead
from ee_tuning.decoding.decode_layer import DecodeLayer
from ee_tuning.decoding.eager_attention import BLOCK_SIZE, LayerCache, SlotMapping
from ee_tuning.decoding.layer_stack import LayerStack
from ee_tuning.engine.cost_model import COUNTS, Costs, Curve
from ee_tuning.engine.kv_cache import blocks_for
from ee_tuning.engine.stage_model import StageModel
from ee_tuning.kernel import calls
from ee_tuning.model.exit_head import ExitInput

REPEATS = 5
CONTEXT = 64
"""Tokens before the measured ones."""


def measure_costs(stage: StageModel) -> Costs:
    """Times the segments and heads of a model in one process, on arbitrary inputs.

    Segments run one after the other, as in a step: the weights of one evict those of another from a processor's cache.
    All but the last one run twice and count the mean: drafts come one after the other, and find in the cache what the
    draft before them left. The fastest of several rounds counts, because other work on a machine only adds time.
    """
    num_segments = len(stage.segments)
    figures = torch.zeros(2 * num_segments, len(COUNTS), dtype=torch.float64)
    for column, count in enumerate(COUNTS):
        probe = CostProbe(stage, count)
        figures[:, column] = torch.stack([probe.run() for _ in range(REPEATS)]).amin(0)
    curves: list[Curve] = [tuple(row) for row in figures.cummax(dim=1)[0].tolist()]  # more tokens never cost less
    heads = {
        segment.exit_layer: curves[num_segments + number]
        for number, segment in enumerate(stage.segments)
        if segment.exit_layer is not None
    }
    return Costs(tuple(curves[:num_segments]), heads, curves[-1])


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

    def run(self) -> Tensor:  # [2 segments] float64
        """Returns the seconds of each segment, the first one with the description of the pass, and of the head behind
        each.
        """
        stage, hidden, last = self._stage, self._hidden, len(self._segments) - 1
        seconds = torch.zeros(2 * len(self._segments), dtype=torch.float64)
        began = time.perf_counter()
        tokens = self._describe()
        _prepare(self._segments[0], tokens)
        seconds[0] = time.perf_counter() - began
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


def _prepare(segment: LayerStack, tokens: AttentionMetadata) -> None:
    """Builds the form of the batch that these layers take, which their first call builds otherwise."""
    if segment.native is not None and tokens.num_tokens <= calls.MOST_TOKENS:
        _ = tokens.native
    elif tokens.captured is None:
        _ = tokens.eager
