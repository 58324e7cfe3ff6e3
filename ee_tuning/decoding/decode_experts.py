"""The experts of a layer over a ragged batch, straight through the weights of Megatron's modules; see
decode_layer.py.
"""

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from ee_tuning.decoding.column_major import column_major
from ee_tuning.model.activation import activation
from ee_tuning.model.experts import MoELayer
from ee_tuning.model_config.config import ModelConfig
from ee_tuning.parallel.topology import Topology

# t tokens of a ragged batch · h hidden · e experts · k of them for each token


class DecodeExperts:
    """Shares the weights of `mlp`. Every tensor-parallel rank routes all tokens alike and computes its part of each
    expert.
    """

    def __init__(self, mlp: MoELayer, config: ModelConfig, topology: Topology):
        self.router = mlp.router.weight  # [e, h]
        self.fc1 = [column_major(expert.linear_fc1.weight) for expert in mlp.experts.local_experts]
        self.fc2 = [expert.linear_fc2.weight for expert in mlp.experts.local_experts]
        self.num_chosen, self.renormalizes = config.moe_router_topk, config.renormalizes_router
        self.activation = activation(config)
        self.group = topology.tp_group if topology.tp > 1 else None

    def __call__(self, normed: Tensor, residual: Tensor) -> Tensor:  # [t, h], [t, h] -> [t, h]
        """Returns `residual` plus the chosen experts' output for `normed`."""
        weights, chosen = self._route(normed)
        order = chosen.flatten().argsort(stable=True)  # [t · k], by expert
        tokens, shares = order // self.num_chosen, weights.flatten()[order, None]
        counts = torch.bincount(chosen.flatten(), minlength=len(self.fc1)).tolist()
        gathered = normed[tokens]
        out = torch.zeros_like(residual) if self.group is not None else residual.clone()
        first = 0
        for expert, count in enumerate(counts):
            if count:
                own = slice(first, first + count)
                gate, up = F.linear(gathered[own], self.fc1[expert]).chunk(2, dim=-1)
                inner = self.activation(gate).mul_(up).mul_(shares[own])
                out.index_add_(0, tokens[own], F.linear(inner, self.fc2[expert]))
                first += count
        if self.group is None:
            return out
        dist.all_reduce(out, group=self.group)
        return out.add_(residual)

    def _route(self, x: Tensor) -> tuple[Tensor, Tensor]:  # [t, h] -> [t, k], [t, k]
        """Returns each token's experts and their weights. The softmax is in float32, as in Megatron-core and
        transformers.
        """
        logits = F.linear(x, self.router)
        if self.renormalizes:
            best, chosen = logits.topk(self.num_chosen, dim=-1)
            return best.softmax(-1, dtype=torch.float32).to(x.dtype), chosen
        weights, chosen = logits.softmax(-1, dtype=torch.float32).to(x.dtype).topk(self.num_chosen, dim=-1)
        return weights, chosen
