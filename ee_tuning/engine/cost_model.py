"""The costs of passes and heads, which speculation plans with, expected from the bytes of weights that they read."""

from bisect import bisect_right
from dataclasses import dataclass

from ee_tuning.engine.stage_model import StageModel

COUNTS = (1, 6, 16)
"""Tokens of passes whose costs are known."""
GROWTH = {"cache": (1.0, 2.0, 4.0), "cpu": (1.0, 1.3, 2.5), "cuda": (1.0, 1.05, 1.15)}
"""The expected costs of passes of COUNTS tokens, in passes of one token, by where the weights lie: in a processor's
cache, where they are read faster, in its memory, where reading them hides most of the arithmetic of the first tokens,
or on a GPU. Those of processors are of 2 cores of an AMD EPYC (Zen 4) with AVX-512 (SmolLM2-135M: docs/benchmarks.md),
and are taken for other processors, too.
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

    def of_segment(self, number: int, num_tokens: float) -> float:
        """Returns the cost of a pass of `num_tokens` tokens, possibly a mean number, through a segment."""
        return _between(self.segments[number], num_tokens)

    def of_head(self, layer: int | None, num_tokens: float) -> float:
        """Returns the cost of a head for `num_tokens` tokens; None is the final head."""
        return _between(self.final_head if layer is None else self.heads[layer], num_tokens)

    def of_all(self, num_tokens: int) -> float:
        """Returns the cost of a step of `num_tokens` tokens at full depth, without exits."""
        layers = sum(self.of_segment(number, num_tokens) for number in range(len(self.segments)))
        return layers + self.of_head(None, num_tokens)


def expected_costs(stage: StageModel) -> Costs:
    """Returns costs in bytes of weights, since reading them bounds decoding. The same on every rank of any layout."""
    config, plan = stage.config, stage.model.plan
    inner = config.moe_router_topk * config.moe_ffn_hidden_size if config.num_experts else config.ffn_hidden_size
    mlp = config.hidden_size * inner * (3 if config.is_gated else 2)
    heads_width = (2 * config.num_attention_heads + 2 * config.num_query_groups) * config.kv_channels
    layer, matrix = mlp + config.hidden_size * heads_width, config.hidden_size * config.vocab_size
    num_bytes = (config.num_layers * layer + matrix) * plan.dtype.itemsize
    growth = expected_growth(stage.topology.device.type, num_bytes)

    def curve(num_parameters: float) -> Curve:
        return tuple(num_parameters * plan.dtype.itemsize * factor for factor in growth)

    listed = config.hidden_size * stage.model.exit_vocab.size
    of_kind = {"layer": layer, "mlp": mlp, "eagle3": layer + 4 * config.hidden_size**2}
    heads = {e.layer: curve(listed + of_kind.get(e.architecture, 0)) for e in plan.exits}
    segments = [curve(layer * (s.last_layer + 1 - s.first_layer)) for s in stage.segments]
    return Costs(tuple(segments), heads, curve(matrix))


def expected_growth(device: str, num_bytes: int) -> Curve:
    """Returns the expected costs of passes of COUNTS tokens of a model of this many bytes, in passes of one token."""
    if device != "cpu":
        return GROWTH["cuda"]
    return GROWTH["cache" if num_bytes < CACHE_BYTES else "cpu"]


def head_cost(costs: Costs, num_tokens: float) -> float:
    """Returns the cost of a pass of a model's drafting head, its only head besides the last."""
    (layer,) = costs.heads
    return costs.of_head(layer, num_tokens)


def _between(curve: Curve, count: float) -> float:
    """Interpolates linearly between COUNTS, and extrapolates from the last two."""
    right = min(max(bisect_right(COUNTS, count), 1), len(COUNTS) - 1)
    (a, b), (low, high) = COUNTS[right - 1 : right + 1], curve[right - 1 : right + 1]
    return low + (high - low) * (count - a) / (b - a)
