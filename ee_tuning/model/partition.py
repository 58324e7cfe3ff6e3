"""Splits the layers among pipeline stages: contiguously, by cost, exits included."""

import itertools

from ee_tuning.errors import InputError
from ee_tuning.model.exit_spec import ExitSpec
from ee_tuning.model_config.config import ModelConfig


def layer_cost(config: ModelConfig, layer: int, seq_length: int) -> float:
    """Returns the forward multiply-adds per token of `layer` (1-based) over sequences of `seq_length` tokens. A token
    attends to half of them on average.
    """
    queries, keys = config.kv_channels * config.num_attention_heads, config.kv_channels * config.num_query_groups
    inner = config.moe_router_topk * config.moe_ffn_hidden_size if config.has_experts(layer) else config.ffn_hidden_size
    router = config.num_experts if config.has_experts(layer) else 0
    return config.hidden_size * (2 * (queries + keys) + _mlp_matrices(config) * inner + router) + seq_length * queries


def exit_head_cost(config: ModelConfig, spec: ExitSpec, seq_length: int, *, trains: bool) -> float:
    """Returns the multiply-adds per token of one exit head: forward, and backward if it `trains`.

    A matrix product costs once more for the gradient of its weight, and once more for that of its input. The frozen
    matrix of a tied exit needs only the latter, and so does everything after it; the backbone's states need none.
    """
    hidden, inner = config.hidden_size, config.ffn_hidden_size
    if spec.draft is not None:
        return _draft_cost(config, spec, trains=trains)
    first, others = {
        "mlp": ((_mlp_matrices(config) - 1) * hidden * inner, hidden * inner),
        "layer": (0.0, layer_cost(config, config.num_layers, seq_length)),
        "adapter": (0.0, 2 * hidden * spec.adapter_rank),
    }.get(spec.architecture, (0.0, 0.0))
    others += hidden * (2 * spec.linear_rank or hidden) * spec.has_linear
    output = hidden * spec.output_rows(config.vocab_size)
    if not trains:
        return first + others + output
    output_passes = 2 if spec.ties_output or spec.architecture == "embedding" else 3
    return 2 * first + 3 * others + output_passes * output


def _draft_cost(config: ModelConfig, spec: ExitSpec, *, trains: bool) -> float:
    """Returns the multiply-adds of one step and the fusing before it. The caller counts the several steps of
    training.
    """
    assert spec.draft is not None
    own, hidden = spec.draft.layer_config(config), config.hidden_size
    reads = hidden * own.kv_channels * (own.num_attention_heads + 2 * own.num_query_groups)  # of the embedding, too
    layer = layer_cost(own, 1, 0) + reads + len(spec.draft.aux_layers) * hidden * hidden
    return (3 if trains else 1) * layer + (2 + (not spec.ties_output) if trains else 1) * hidden * spec.output_rows(
        config.vocab_size
    )


def final_head_cost(config: ModelConfig) -> float:
    """Returns the multiply-adds per token of the output matrix."""
    return config.hidden_size * config.vocab_size


def stage_costs(
    config: ModelConfig,
    num_layers: int,
    exits: tuple[ExitSpec, ...],
    seq_length: int,
    *,
    trains_heads: bool,
    has_final_head: bool,
    draft_steps: int = 1,
) -> list[float]:
    """Returns the cost of each of the first `num_layers` layers with its exit and heads.

    A drafting head runs `draft_steps` times.
    """
    costs = [layer_cost(config, layer, seq_length) for layer in range(1, num_layers + 1)]
    for spec in exits:
        times = 1 if spec.draft is None else draft_steps
        costs[spec.layer - 1] += times * exit_head_cost(config, spec, seq_length, trains=trains_heads)
    if has_final_head:
        costs[-1] += final_head_cost(config)
    return costs


def stage_layers(layout: tuple[int, ...], costs: list[float], num_stages: int) -> list[tuple[int, int]]:
    """Returns the (first, last) layer, 1-based, of each stage: as in `layout`, or split by cost where it is empty.

    A first stage without layers, (1, 0), has only the word embedding. Raises InputError where such a layout is
    impossible.
    """
    if not layout:
        return split_layers(costs, num_stages)
    if (
        len(layout) != num_stages
        or sum(layout) != len(costs)
        or layout[0] < 0
        or min(layout[1:], default=1) < 1
        or not any(layout)
    ):
        raise InputError(
            f"parallel.pipeline_layout must give each of the {num_stages} stages its number of layers, {len(costs)} in all "
            "(up to the last exit when tuning, the model's when decoding), and only the first may have none; got "
            f"{','.join(map(str, layout))}; leave it out to have them split by cost"
        )
    ends = list(itertools.accumulate(layout))
    return [(end - count + 1, end) for count, end in zip(layout, ends, strict=True)]


def split_layers(costs: list[float], num_stages: int) -> list[tuple[int, int]]:
    """Returns the (first, last) layer, 1-based, of each stage: the contiguous split with the lowest maximum cost.

    Raises InputError where there are fewer layers than stages.
    """
    if num_stages > len(costs):
        raise InputError(
            f"each pipeline stage must get a layer, but {len(costs)} layers are needed for {num_stages} stages; "
            f"use pipeline_model_parallel_size {len(costs)} or less, or a deeper exit"
        )
    low, high = max(costs), sum(costs)
    for _ in range(60):  # bisect on the maximum cost of a stage
        middle = (low + high) / 2
        low, high = (low, middle) if len(_fill(costs, middle)) <= num_stages else (middle, high)
    parts = _fill(costs, high)
    while len(parts) < num_stages:  # greedy filling may need fewer stages: halve the longest
        longest = max(range(len(parts)), key=lambda i: len(parts[i]))
        middle = len(parts[longest]) // 2
        parts[longest : longest + 1] = [parts[longest][:middle], parts[longest][middle:]]
    return [(part[0], part[-1]) for part in parts]


def _mlp_matrices(config: ModelConfig) -> int:
    return 3 if config.is_gated else 2


def _fill(costs: list[float], limit: float) -> list[list[int]]:
    parts: list[list[int]] = [[]]
    used = 0.0
    for layer, cost in enumerate(costs, 1):
        if parts[-1] and used + cost > limit * (1 + 1e-9):
            parts.append([])
            used = 0.0
        parts[-1].append(layer)
        used += cost
    return parts
