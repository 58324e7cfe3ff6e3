"""A backbone layer over a ragged batch, straight through the weights of Megatron's modules.

A decode step moves so few numbers that Python above the matrix products would cost several times what they do: this walk makes some
fifteen calls a layer where Megatron's own forward makes over a hundred. Tests hold it equal to that forward.
"""
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from ee_tuning.model.attention import LayerCache, RaggedBatch, ragged_attention, rotate, softmax_scale
from ee_tuning.model.backbone import BackboneStage
from ee_tuning.model.exit_head import ExitInput
from ee_tuning.parallel.topology import Topology

# t tokens of a ragged batch · h hidden · g key-value heads of this rank · d width of a head


class RaggedLayer:
    """Layer `number` (1-based) of a stage, for decoding. Shares the stage's weights."""

    def __init__(self, backbone: BackboneStage, number: int, topology: Topology):
        config, layer = backbone.config, backbone.layer(number)
        self.input_norm = layer.input_layernorm.weight
        self.qkv = column_major(layer.self_attention.linear_qkv.weight)
        self.proj = layer.self_attention.linear_proj.weight
        self.mlp_norm = layer.pre_mlp_layernorm.weight
        self.fc1, self.fc2 = column_major(layer.mlp.linear_fc1.weight), layer.mlp.linear_fc2.weight
        self.epsilon, self.shape = config.norm_epsilon, (config.hidden_size,)
        self.per_group = config.num_attention_heads // config.num_query_groups
        self.heads_shape = (config.num_query_groups // topology.tp, self.per_group + 2, config.kv_channels)
        self.scale = softmax_scale(config)
        self.group = topology.tp_group if topology.tp > 1 else None

    def __call__(self, x: Tensor, cache: LayerCache, batch: RaggedBatch) -> tuple[Tensor, ExitInput]:  # [t, h] -> [t, h], …
        """The layer's output, and what an `mlp` exit here takes (made on the way in any case)."""
        normed = F.rms_norm(x, self.shape, self.input_norm, self.epsilon)
        qkv = F.linear(normed, self.qkv).view(-1, *self.heads_shape)                    # [t, g, n/g + 2, d]
        rotated = rotate(qkv[:, :, :-1], batch)                                         # queries, and the key behind them
        attended = ragged_attention(rotated[:, :, :-1], rotated[:, :, -1], qkv[:, :, -1], cache, batch, self.scale)
        residual = self._project(attended, self.proj, x)
        normed = F.rms_norm(residual, self.shape, self.mlp_norm, self.epsilon)
        gate, up = F.linear(normed, self.fc1).chunk(2, dim=-1)
        return self._project(F.silu(gate).mul_(up), self.fc2, residual), ExitInput(normed, residual=residual)

    def _project(self, x: Tensor, weight: Tensor, residual: Tensor) -> Tensor:
        if self.group is None:
            return torch.addmm(residual, x, weight.t())
        partial = F.linear(x, weight)
        dist.all_reduce(partial, group=self.group)
        return partial.add_(residual)


def column_major(weight: nn.Parameter) -> Tensor:
    """The same matrix [tall, wide], its columns laid one after the other, in place.

    On a CPU a row of activations times a tall matrix reads it up to twice as fast so (benchmarks/decoding.py); wide ones gain nothing.
    """
    if weight.device.type == "cpu" and weight.is_contiguous():
        weight.data = weight.data.t().contiguous().t()
    return weight
