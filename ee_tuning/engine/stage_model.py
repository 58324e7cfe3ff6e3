"""The layers, heads and caches of one pipeline stage, as decoding runs them."""

from ee_tuning.decoding.decode_head import DecodeExitHead, DecodeFinalHead, DecodeHead
from ee_tuning.decoding.decode_layer import DecodeLayer
from ee_tuning.decoding.eager_attention import rotation_tables
from ee_tuning.decoding.layer_stack import LayerStack
from ee_tuning.engine.batch_inputs import BatchDescriber, TokenEmbedding
from ee_tuning.engine.boundary_ring import BoundaryRing
from ee_tuning.engine.kv_cache import KVCache
from ee_tuning.engine.sampler import Sampler
from ee_tuning.engine.segments import Segment
from ee_tuning.model.early_exit import EarlyExitModel


class StageModel:
    """The layers, heads and caches of one stage."""

    def __init__(
        self,
        model: EarlyExitModel,
        segments: tuple[Segment, ...],
        cache: KVCache,
        *,
        num_slots: int,
        max_pending: int,
    ):
        """Each sequence has at most `max_pending` tokens pending in front of a segment between two steps."""
        self.model, self.topology, self.config = model, model.topology, model.config
        self.segments, self.cache, self.max_pending = segments, cache, max_pending
        plan, dtype = model.plan, model.plan.dtype
        own = range(plan.first_layer, plan.last_layer + 1)
        self.layers = {number: DecodeLayer(model.backbone.layer(number), self.config, self.topology) for number in own}
        exit_heads = {
            e.layer: DecodeExitHead(model, model.exit_head(e.layer), self.topology)
            for e in plan.own_exits
            if not e.draft
        }
        self.heads: dict[int, DecodeHead] = {}
        """Heads of this stage by the segment that they follow."""
        for number, segment in enumerate(segments):
            if segment.exit_layer in exit_heads:
                self.heads[number] = exit_heads[segment.exit_layer]
            elif segment.is_last and plan.has_final_head and self.topology.is_last_stage:
                self.heads[number] = DecodeFinalHead(model)
        own_layers = {spec.layer for spec in plan.exits if spec.architecture == "layer"}
        self.own_layers = frozenset(i for i, segment in enumerate(segments) if segment.exit_layer in own_layers)
        """Segments, of all stages, whose heads have their own layer."""
        self.reads_embedding = 0 in plan.aux_layers
        """Whether a drafting head reads the embedding."""
        self.tables = rotation_tables(model.backbone.angles[: cache.max_length], dtype)
        # A block of drafts and its newest token may be added to the pending tokens.
        self.ring = BoundaryRing(num_slots, 2 * (max_pending + 1), self.config.hidden_size, dtype, self.topology.device)
        self.sampler = Sampler(model.vocab.size)
        self.describe = BatchDescriber(self.tables, self.config, cache)
        self.embed = TokenEmbedding(model)
        self._runs: dict[tuple[int, int], LayerStack] = {}
        self._own_runs: dict[int, LayerStack] = {}
        self.is_native = (
            self.config.position == "rope"
            and bool(self.layers)
            and all(layer.is_native for layer in self.layers.values())
        )
        """Whether the CPU kernels can run all layers of this stage."""
        self.drafts_at_once = self.is_native and self.topology.num_in_replica == 1
        """Whether the kernels draft the tokens of a sequence one after the other, if its heads allow it."""
        self.seconds_in_heads = 0.0
        """Seconds in the heads of this rank."""
        self._segments_of = {stage: self._segments_on(stage) for stage in range(self.topology.pp)}

    def segments_of(self, stage: int) -> range:
        """Returns the numbers of a stage's segments."""
        return self._segments_of[stage]

    def _segments_on(self, stage: int) -> range:
        numbers = [number for number, segment in enumerate(self.segments) if segment.stage == stage]
        return range(numbers[0], numbers[-1] + 1)

    def layers_of(self, first: int, last: int) -> LayerStack:
        """Returns the layers of segments `first` to `last` of this stage, with their caches."""
        if (first, last) not in self._runs:  # a segment that no token reaches has no caches
            numbers = range(self.segments[first].first_layer, self.segments[last].last_layer + 1)
            self._runs[first, last] = LayerStack(
                [self.layers[n] for n in numbers], [self.cache.layer(n) for n in numbers]
            )
        return self._runs[first, last]

    def own_layer_of(self, number: int) -> LayerStack:
        """Returns the own layer of the head behind segment `number`, with its cache."""
        if number not in self._own_runs:  # a head that is never asked has no cache
            layer, exit_layer = self.heads[number].layer, self.segments[number].exit_layer
            assert layer is not None and exit_layer is not None
            self._own_runs[number] = LayerStack([layer], [self.cache.exit_head(exit_layer)])
        return self._own_runs[number]
