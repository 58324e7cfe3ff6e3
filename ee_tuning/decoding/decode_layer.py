"""A backbone layer over a ragged batch, straight through the weights of Megatron's modules.

A decode step moves so few numbers that Python code would take several times as long as the matrix products: this path
makes some fifteen calls a layer, and Megatron's own forward over a hundred. Tests hold it equal to that forward. On a
CPU a kernel takes its place where there is one, on a GPU it is recorded (`layer_stack.py`); as it stands it then serves
passes of many tokens.
"""

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from ee_tuning.decoding import graphs
from ee_tuning.decoding.captured_batch import CapturedBatch
from ee_tuning.decoding.column_major import column_major, row_major
from ee_tuning.decoding.decode_experts import DecodeExperts
from ee_tuning.decoding.eager_attention import EagerBatch, LayerCache, rotate
from ee_tuning.kernel import calls
from ee_tuning.model.activation import activation
from ee_tuning.model.attention import softmax_scale
from ee_tuning.model.exit_head import ExitInput
from ee_tuning.model_config.config import ModelConfig
from ee_tuning.parallel.topology import Topology

# t tokens of a ragged batch · h hidden · g key-value heads of this rank · n/g query heads of each · d width of a head


class DecodeLayer:
    """A layer of the backbone's kind (`build_layer`), for decoding. Shares its weights."""

    def __init__(self, layer: Any, config: ModelConfig, topology: Topology):
        attention, mlp = layer.self_attention, layer.mlp
        self.input_norm, self.mlp_norm = layer.input_layernorm.weight, layer.pre_mlp_layernorm.weight
        self.has_layer_norm = config.norm == "layer"
        if self.has_layer_norm:
            self.input_norm_bias, self.mlp_norm_bias = layer.input_layernorm.bias, layer.pre_mlp_layernorm.bias
        self.is_native = topology.tp == 1 and not layer.is_moe_layer and calls.serves(attention.linear_qkv.weight)
        # Experts query the device for their numbers of tokens, which no recording can do.
        self.is_recordable = not layer.is_moe_layer and graphs.is_supported(topology)
        tall = row_major if self.is_native else column_major
        self.qkv, self.qkv_bias = tall(attention.linear_qkv.weight), attention.linear_qkv.bias
        self.proj, self.proj_bias = attention.linear_proj.weight, attention.linear_proj.bias
        self.experts: DecodeExperts | None = None
        if layer.is_moe_layer:
            self.experts = DecodeExperts(mlp, config, topology)
        else:
            self.fc1, self.fc1_bias = tall(mlp.linear_fc1.weight), mlp.linear_fc1.bias
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
        self.native_shape = native_shape(config)

    def native(self, cache: LayerCache) -> calls.Layer:
        """The layer as the kernels take it, if they support it (`is_native`). Layer and cache must outlive it."""
        made = calls.Layer()
        biases = (
            {"input_norm_bias": self.input_norm_bias, "mlp_norm_bias": self.mlp_norm_bias}
            if self.has_layer_norm
            else {}
        )
        calls.fill(
            made,
            {
                "input_norm": self.input_norm,
                "qkv": self.qkv,
                "qkv_bias": self.qkv_bias,
                "head_norm": self.head_norm,
                "proj": self.proj,
                "proj_bias": self.proj_bias,
                "mlp_norm": self.mlp_norm,
                "keys": cache.keys,
                "values": cache.values,
                **biases,
            },
        )
        calls.fill(made.mlp, {"fc1": self.fc1, "fc1_bias": self.fc1_bias, "fc2": self.fc2, "fc2_bias": self.fc2_bias})
        made.mlp.inner, made.mlp.is_gated = self.fc2.shape[1], self.is_gated
        return made

    def __call__(
        self,
        x: Tensor,  # [t, h]
        cache: LayerCache,
        batch: EagerBatch | CapturedBatch,
        *,
        keeps: bool = True,
    ) -> tuple[Tensor, ExitInput]:  # [t, h], …
        """Returns the layer's output, and the input of an `mlp` exit here (computed in any case). Without `keeps`, only
        the output is valid afterwards; `x` is not.
        """
        if self.has_layer_norm:
            normed = F.layer_norm(x, self.shape, self.input_norm, self.input_norm_bias, self.epsilon)
        else:
            normed = F.rms_norm(x, self.shape, self.input_norm, self.epsilon)
        qkv = F.linear(normed, self.qkv, self.qkv_bias).view(-1, *self.heads_shape)  # [t, g, n/g + 2, d]
        heads = qkv[:, :, :-1]  # queries, and the key behind them
        if self.head_norm is not None:
            heads = F.rms_norm(heads, self.head_shape, None, self.epsilon).mul_(self.head_norm)
        if self.is_rotated:
            heads = rotate(heads, batch.cos, batch.sin)
        cache.keys.index_copy_(0, batch.places, heads[:, :, -1])
        cache.values.index_copy_(0, batch.places, qkv[:, :, -1])
        attended = batch.attend(heads[:, :, :-1], cache, self.scale)
        residual = self._project(attended, self.proj, self.proj_bias, x, keeps)
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
        return self._project(inner, self.fc2, self.fc2_bias, residual, keeps), ExitInput(normed, residual=residual)

    def _project(self, x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor, keeps: bool) -> Tensor:
        if self.group is None:
            if bias is None:  # in place, because a GPU would copy the residual first
                return torch.addmm(residual, x, weight.t()) if keeps else residual.addmm_(x, weight.t())
            return F.linear(x, weight, bias).add_(residual)
        partial = F.linear(x, weight)
        dist.all_reduce(partial, group=self.group)
        if bias is not None:
            partial.add_(bias)
        return partial.add_(residual)


def native_shape(config: ModelConfig) -> calls.Shape:
    """Returns the shape that the kernels need for every layer and head of a model that is not cut."""
    return calls.Shape(
        config.hidden_size,
        config.num_query_groups,
        config.num_attention_heads // config.num_query_groups,
        config.kv_channels,
        config.norm == "layer",
        config.position == "rope",
        calls.ACTIVATIONS.index(config.activation),
        config.norm_epsilon,
        softmax_scale(config),
    )
