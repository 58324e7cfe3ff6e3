"""Size of a server's KV cache in tokens: a share of the free memory, unless the job sets it."""

import psutil
import torch

from ee_tuning.decoding.eager_attention import BLOCK_SIZE
from ee_tuning.errors import InputError
from ee_tuning.generation.llm import EarlyExitLLM
from ee_tuning.model.early_exit import StagePlan
from ee_tuning.model_config.config import ModelConfig
from ee_tuning.parallel.collectives import gather_lists
from ee_tuning.parallel.topology import Topology

SHARE = {"cpu": 0.5, "cuda": 0.8}
"""Share of the memory that is free after the model is loaded."""


def cache_size(
    llm: EarlyExitLLM, topology: Topology, max_model_len: int | None, num_replicas: int = 1
) -> tuple[int, int]:
    """Returns the tokens of the KV cache and the most tokens of one sequence, the same on all ranks. `num_replicas`
    servers share the machine's memory.

    Raises InputError where one sequence of `max_model_len` tokens does not fit.
    """
    config, plan, defaults = llm.model.config, llm.model.plan, llm.defaults
    longest = config.max_position_embeddings if max_model_len is None else max_model_len
    if longest > plan.max_length:
        raise InputError(
            f"--max-model-len must be at most {plan.max_length}, the positions of the model, got {longest}"
        )
    tokens = defaults.cache_tokens
    if tokens is None:
        layers = max(1, plan.last_layer - plan.first_layer + 1 + len(plan.exit_layers))
        per_token = layers * _bytes_of_layer(config, plan, topology)
        for exit_head in plan.own_exits:
            if exit_head.draft:
                per_token += _bytes_of_layer(exit_head.draft.layer_config(config), plan, topology)
        fits = int(SHARE[topology.device.type] * _free_bytes(topology) / _sharers(topology, num_replicas)) // per_token
        tokens = min(min(gather_lists([fits], topology)), defaults.max_batch_size * longest)
    tokens = tokens // BLOCK_SIZE * BLOCK_SIZE
    if max_model_len is None:
        longest = min(longest, tokens)
    if tokens < max(longest, 2):
        raise InputError(
            f"the KV cache must hold a sequence of --max-model-len {longest} tokens, and has room for {tokens}; lower "
            "--max-model-len, or give --cache-tokens"
        )
    return tokens, longest


def _bytes_of_layer(config: ModelConfig, plan: StagePlan, topology: Topology) -> int:
    """Returns the bytes of a token's keys and values in one layer of this rank."""
    return 2 * config.num_query_groups // topology.tp * config.kv_channels * plan.dtype.itemsize


def _free_bytes(topology: Topology) -> int:
    if topology.device.type == "cuda":
        return int(torch.cuda.mem_get_info(topology.device)[0])
    return int(psutil.virtual_memory().available)


def _sharers(topology: Topology, num_replicas: int) -> int:
    """Returns the number of processes that share this memory."""
    return 1 if topology.device.type == "cuda" else topology.world_size * num_replicas
