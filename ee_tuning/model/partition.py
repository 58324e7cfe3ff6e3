"""Which layers each pipeline stage gets: contiguous, by cost, exits included."""
from ee_tuning.config import Architecture
from ee_tuning.errors import InputError
from ee_tuning.model.config import ModelConfig


def layer_cost(config: ModelConfig) -> float:
    """Multiply-adds per token of one layer's forward pass, attention scores left out."""
    heads = config.kv_channels * (config.num_attention_heads + config.num_query_groups)
    return config.hidden_size * (2 * heads + _mlp_matrices(config) * config.ffn_hidden_size)


def exit_head_cost(config: ModelConfig, architecture: Architecture) -> float:
    """Multiply-adds per token of one exit head's forward pass."""
    mlp = _mlp_matrices(config) * config.hidden_size * config.ffn_hidden_size if architecture == "mlp" else 0
    return mlp + config.hidden_size * config.vocab_size


def stage_costs(config: ModelConfig, num_layers: int, exit_layers: tuple[int, ...], architecture: Architecture, *,
                trains_heads: bool, has_final_head: bool) -> list[float]:
    """Cost of each of the first `num_layers` layers with what hangs on it. Training a head costs three forward passes of it."""
    passes = 3 if trains_heads else 1
    costs = [layer_cost(config) + (passes * exit_head_cost(config, architecture) if layer in exit_layers else 0.0)
             for layer in range(1, num_layers + 1)]
    if has_final_head:
        costs[-1] += exit_head_cost(config, "norm")
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
