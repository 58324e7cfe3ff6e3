"""A backbone layer over a ragged batch, straight through the weights of Megatron's modules.

A decode step moves so few numbers that Python above the matrix products would cost several times what they do: this walk makes some
fifteen calls a layer where Megatron's own forward makes over a hundred. Tests hold it equal to that forward.
"""
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from ee_tuning.model.activation import activation
from ee_tuning.model.attention import softmax_scale
from ee_tuning.model.column_major import column_major
from ee_tuning.model.config import ModelConfig
from ee_tuning.model.exit_head import ExitHead, ExitInput, MLPHead
from ee_tuning.model.ragged_attention import LayerCache, RaggedBatch, ragged_attention, rotate
from ee_tuning.model.ragged_experts import RaggedExperts
from ee_tuning.parallel.topology import Topology

# t tokens of a ragged batch · h hidden · g key-value heads of this rank · n/g query heads of each · d width of a head


class RaggedLayer:
    """A layer of the backbone's kind (`build_layer`), for decoding. Shares its weights."""

    def __init__(self, layer: Any, config: ModelConfig, topology: Topology):
        attention, mlp = layer.self_attention, layer.mlp
        self.input_norm, self.mlp_norm = layer.input_layernorm.weight, layer.pre_mlp_layernorm.weight
        self.has_layer_norm = config.norm == "layer"
        if self.has_layer_norm:
            self.input_norm_bias, self.mlp_norm_bias = layer.input_layernorm.bias, layer.pre_mlp_layernorm.bias
        self.qkv, self.qkv_bias = column_major(attention.linear_qkv.weight), attention.linear_qkv.bias
        self.proj, self.proj_bias = attention.linear_proj.weight, attention.linear_proj.bias
        self.experts: RaggedExperts | None = None
        if layer.is_moe_layer:
            self.experts = RaggedExperts(mlp, config, topology)
        else:
            self.fc1, self.fc1_bias = column_major(mlp.linear_fc1.weight), mlp.linear_fc1.bias
            self.fc2, self.fc2_bias = mlp.linear_fc2.weight, mlp.linear_fc2.bias
        self.activation, self.is_gated, self.is_rotated = activation(config), config.is_gated, config.position == "rope"
        self.epsilon, self.shape, self.head_shape = config.norm_epsilon, (config.hidden_size,), (config.kv_channels,)
        self.per_group = config.num_attention_heads // config.num_query_groups
        self.heads_shape = (config.num_query_groups // topology.tp, self.per_group + 2, config.kv_channels)
        self.head_norm: Tensor | None = None
        if config.has_qk_norm:  # [n/g + 1, d]: a weight for each query head of a group, and for the key behind them
            query, key = attention.q_layernorm.weight, attention.k_layernorm.weight
            self.head_norm = torch.cat((query.expand(self.per_group, -1), key[None]))
        self.scale = softmax_scale(config)
        self.group = topology.tp_group if topology.tp > 1 else None

    def __call__(self, x: Tensor, cache: LayerCache, batch: RaggedBatch) -> tuple[Tensor, ExitInput]:  # [t, h] -> [t, h], …
        """The layer's output, and what an `mlp` exit here takes (made on the way in any case)."""
        if self.has_layer_norm:
            normed = F.layer_norm(x, self.shape, self.input_norm, self.input_norm_bias, self.epsilon)
        else:
            normed = F.rms_norm(x, self.shape, self.input_norm, self.epsilon)
        qkv = F.linear(normed, self.qkv, self.qkv_bias).view(-1, *self.heads_shape)     # [t, g, n/g + 2, d]
        heads = qkv[:, :, :-1]                                                          # queries, and the key behind them
        if self.head_norm is not None:
            heads = F.rms_norm(heads, self.head_shape, None, self.epsilon).mul_(self.head_norm)
        if self.is_rotated:
            heads = rotate(heads, batch)
        attended = ragged_attention(heads[:, :, :-1], heads[:, :, -1], qkv[:, :, -1], cache, batch, self.scale)
        residual = self._project(attended, self.proj, self.proj_bias, x)
        if self.has_layer_norm:
            normed = F.layer_norm(residual, self.shape, self.mlp_norm, self.mlp_norm_bias, self.epsilon)
        else:
            normed = F.rms_norm(residual, self.shape, self.mlp_norm, self.epsilon)
        if self.experts is not None:
            return self.experts(normed, residual), ExitInput(normed, residual=residual)
        inner = F.linear(normed, self.fc1, self.fc1_bias)
        if self.is_gated:
            gate, up = inner.chunk(2, dim=-1)
            inner = self.activation(gate).mul_(up)
        else:
            inner = self.activation(inner)
        return self._project(inner, self.fc2, self.fc2_bias, residual), ExitInput(normed, residual=residual)

    def _project(self, x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor) -> Tensor:
        if self.group is None:
            return torch.addmm(residual, x, weight.t()) if bias is None else F.linear(x, weight, bias).add_(residual)
        partial = F.linear(x, weight)
        dist.all_reduce(partial, group=self.group)
        if bias is not None:
            partial.add_(bias)
        return partial.add_(residual)


class RaggedHead:
    """An exit head for decoding. Shares its weights.

    A head with a layer of its own has a cache of its own: before it is asked about a token, it has to see all tokens before that one.
    """

    def __init__(self, head: ExitHead, topology: Topology):
        self.head = head
        self.layer = None if head.own_layer is None else RaggedLayer(head.own_layer, head.config, topology)
        if isinstance(head, MLPHead):
            column_major(head.mlp.fc1.weight)

    def take(self, hidden: Tensor, inner: ExitInput) -> ExitInput:  # [t, h]
        """What the head takes of a pass: `hidden` and `inner` are what the backbone's RaggedLayer before it returned."""
        return inner if self.head.takes_mlp_input else ExitInput(hidden)

    def run_own_layer(self, hidden: Tensor, cache: LayerCache, batch: RaggedBatch) -> ExitInput:  # [t, h]
        """Runs the layer that it has of its own; `cache` is that layer's."""
        assert self.layer is not None
        return ExitInput(hidden, layer_output=self.layer(hidden, cache, batch)[0])

    def logits(self, inputs: ExitInput) -> Tensor:  # [r, v/tp]
        """Of the rows (`ExitInput.rows`) that are asked."""
        return self.head(inputs, F.linear)
