"""Which layers each pipeline stage gets: contiguous, by cost, exits included."""
from ee_tuning.errors import InputError
from ee_tuning.model.config import ModelConfig
from ee_tuning.model.exit_spec import ExitSpec


def layer_cost(config: ModelConfig, layer: int) -> float:
    """Multiply-adds per token of the forward pass of `layer` (1-based), attention scores left out."""
    heads = config.kv_channels * (config.num_attention_heads + config.num_query_groups)
    inner = config.moe_router_topk * config.moe_ffn_hidden_size if config.has_experts(layer) else config.ffn_hidden_size
    router = config.num_experts if config.has_experts(layer) else 0
    return config.hidden_size * (2 * heads + _mlp_matrices(config) * inner + router)


def exit_head_cost(config: ModelConfig, spec: ExitSpec) -> float:
    """Multiply-adds per token of one exit head's forward pass."""
    before = {"mlp": _mlp_matrices(config) * config.hidden_size * config.ffn_hidden_size, "layer": layer_cost(config, config.num_layers),
              "adapter": 2 * config.hidden_size * spec.adapter_rank}
    return before.get(spec.architecture, 0) + final_head_cost(config)


def final_head_cost(config: ModelConfig) -> float:
    """Multiply-adds per token of the output matrix."""
    return config.hidden_size * config.vocab_size


def stage_costs(config: ModelConfig, num_layers: int, exits: tuple[ExitSpec, ...], *, trains_heads: bool,
                has_final_head: bool) -> list[float]:
    """Cost of each of the first `num_layers` layers with what hangs on it. Training a head costs three forward passes of it."""
    costs = [layer_cost(config, layer) for layer in range(1, num_layers + 1)]
    for spec in exits:
        costs[spec.layer - 1] += (3 if trains_heads else 1) * exit_head_cost(config, spec)
    if has_final_head:
        costs[-1] += final_head_cost(config)
    return costs


def split_layers(costs: list[float], num_stages: int) -> list[tuple[int, int]]:
    """(first, last) layer, 1-based, of each stage: the contiguous split whose dearest stage is cheapest.

    Raises InputError where there are fewer layers than stages.
    """
    if num_stages > len(costs):
        raise InputError(f"each pipeline stage must get a layer, but {len(costs)} layers are needed for {num_stages} stages; "
                         f"use pipeline_model_parallel_size {len(costs)} or less, or a deeper exit")
    low, high = max(costs), sum(costs)
    for _ in range(60):  # bisect on what the dearest stage may cost
        middle = (low + high) / 2
        low, high = (low, middle) if len(_fill(costs, middle)) <= num_stages else (middle, high)
    parts = _fill(costs, high)
    while len(parts) < num_stages:  # greedy filling may need fewer stages: halve the longest
        longest = max(range(len(parts)), key=lambda i: len(parts[i]))
        middle = len(parts[longest]) // 2
        parts[longest:longest + 1] = [parts[longest][:middle], parts[longest][middle:]]
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
