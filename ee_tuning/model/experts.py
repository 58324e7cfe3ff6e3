"""Layers with experts: Megatron-core's own, where every tensor-parallel rank holds all tokens and a part of each
expert.
"""

from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import unset_fake_temporarily

from ee_tuning.model_config.config import ModelConfig
from ee_tuning.model_config.megatron_args import moe_layer_freq
from ee_tuning.parallel.fake_tensor import is_fake
from ee_tuning.parallel.megatron_import import importing_megatron
from ee_tuning.parallel.tp_autograd import copy_to_tp, reduce_from_tp

with importing_megatron():
    from megatron.core.transformer.moe import moe_utils
    from megatron.core.transformer.moe.moe_layer import MoELayer, get_default_pg_collection
    from megatron.core.transformer.moe.token_dispatcher import MoEAllGatherTokenDispatcher

# t tokens · h hidden · e experts

# The caller tests whether this is None, which Megatron-core forgets to set without Transformer Engine.
if not hasattr(moe_utils, "te_general_gemm"):
    moe_utils.te_general_gemm = None


def expert_fields(config: ModelConfig) -> dict[str, Any]:
    """Returns the fields of Megatron's TransformerConfig for experts; none without experts."""
    if not config.num_experts:
        return {}
    return {
        "num_moe_experts": config.num_experts,
        "moe_router_topk": config.moe_router_topk,
        "moe_ffn_hidden_size": config.moe_ffn_hidden_size,
        # A softmax over the chosen experts' logits equals a renormalized softmax over all.
        "moe_router_pre_softmax": not config.renormalizes_router,
        "moe_router_load_balancing_type": "none",
        "moe_layer_freq": moe_layer_freq(config),
        "moe_token_dispatcher_type": "allgather",
        "moe_grouped_gemm": False,
    }


def dispatch_in_place(mlp: MoELayer) -> None:
    """Keeps the tokens where they are.

    The stock dispatcher would gather them from every rank, though every rank has all of them, and compute each several
    times.
    """
    mlp.eval()  # training mode makes no difference here, and Megatron-core refuses it
    stock, kind = mlp.token_dispatcher, _Tokens if mlp.config.sequence_parallel else _TokensInPlace
    mlp.token_dispatcher = kind(
        stock.num_local_experts, stock.local_expert_indices, mlp.config, get_default_pg_collection()
    )


class _Tokens(MoEAllGatherTokenDispatcher):
    """The stock dispatcher. In a dry run, without values to choose by, every expert gets the same number of tokens."""

    def dispatch_postprocess(
        self,
        hidden_states: Tensor,  # [t, h]
        probs: Tensor,  # [t, e]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Returns the tokens by expert [t · k, h], their number per expert [e], and their weights [t · k]."""
        if not is_fake(hidden_states):
            return super().dispatch_postprocess(hidden_states, probs)
        num_experts, chosen = probs.shape[1], probs.shape[0] * self.router_topk
        self.hidden_shape_before_permute, self.local_map = hidden_states.shape, self.routing_map
        self.reversed_local_input_permutation_mapping = torch.empty(chosen, dtype=torch.int64, device=probs.device)
        self.local_probs = probs.flatten().index_select(0, self.reversed_local_input_permutation_mapping)
        with unset_fake_temporarily():
            counts = torch.tensor(
                [(expert + 1) * chosen // num_experts - expert * chosen // num_experts for expert in range(num_experts)]
            )
        return hidden_states.index_select(0, self.reversed_local_input_permutation_mapping), counts, self.local_probs


class _TokensInPlace(_Tokens):
    """Each rank computes its part of the chosen experts for every token, and the parts are summed."""

    def token_dispatch(self, hidden_states: Tensor, probs: Tensor) -> tuple[Tensor, Tensor]:  # [t, h], [t, e]
        """Returns the tokens unchanged."""
        return copy_to_tp(hidden_states, self.tp_group), copy_to_tp(probs, self.tp_group)

    def token_combine(self, hidden_states: Tensor) -> Tensor:  # [t, h]
        """Returns the sum over the ranks."""
        return reduce_from_tp(hidden_states, self.tp_group)
