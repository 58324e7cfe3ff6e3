"""Exit heads: what turns the hidden states of an intermediate layer into logits.

An exit head is the same module while tuning, where it is trained over whole sequences, and while decoding, where it sees a row a sequence.
Tensor parallelism cuts the MLP by its inner width and the output matrix by vocabulary; norms are replicated.
"""
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from ee_tuning.config import Architecture
from ee_tuning.model.activation import activation
from ee_tuning.model.config import ModelConfig
from ee_tuning.model.documents import PackedDocuments
from ee_tuning.model.norm import exit_norm
from ee_tuning.parallel.topology import Group, Topology

# … any leading dimensions · h hidden · f/tp this rank's part of the MLP's inner width · v/tp its shard of the vocabulary

Result = TypeVar("Result")


@dataclass(frozen=True)
class ExitInput:
    """What a head takes from the backbone at exit layer l: no gradient is asked of it."""

    hidden: Tensor
    """[…, h]: x_l, layer l's output, for `embedding` and `norm`; layer l's normed post-attention residual for `mlp`."""
    residual: Tensor | None = None
    """[…, h]: for `mlp`, a_l, layer l's post-attention residual."""
    documents: PackedDocuments | None = None
    """For a head that attends: which tokens of a row may see each other, where documents are told apart."""


class _SumOverShards(torch.autograd.Function):
    """Forward all-reduce, backward identity: the gradient of a sum that every rank holds."""

    @staticmethod
    def forward(ctx: object, partial: Tensor, group: Group) -> Tensor:
        partial = partial.contiguous()
        dist.all_reduce(partial, group=group)
        return partial

    @staticmethod
    def backward(ctx: object, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0], None


class ExitMLP(nn.Module):
    """The family's MLP: W₂ (σ(gate x) · up x), or W₂ σ(W₁ x), each map with a bias where the family has one."""

    def __init__(self, config: ModelConfig, topology: Topology, **tensor: Any):
        super().__init__()
        inner, has_bias = config.ffn_hidden_size // topology.tp, config.has_linear_bias
        self.activation, self.is_gated = activation(config), config.is_gated
        # Where gated: rows of gate, then rows of up.
        self.fc1 = nn.Linear(config.hidden_size, (1 + self.is_gated) * inner, bias=has_bias, **tensor)
        self.fc2 = nn.Linear(inner, config.hidden_size, bias=has_bias, **tensor)
        self.group = topology.tp_group if topology.tp > 1 else None

    def forward(self, x: Tensor) -> Tensor:  # […, h] -> […, h]
        """See the class."""
        if self.is_gated:
            gate, up = self.fc1(x).chunk(2, dim=-1)
            inner = self.activation(gate) * up
        else:
            inner = self.activation(self.fc1(x))
        if self.group is None:
            return self.fc2(inner)
        out = _SumOverShards.apply(F.linear(inner, self.fc2.weight), self.group)
        return out if self.fc2.bias is None else out + self.fc2.bias


class ExitHead(nn.Module):
    """The head after layer `layer`: `embedding`: W x; `norm`: W Norm(x); `mlp`: W Norm(a + MLP(PreMLPNorm(a))).

    The design is EE-Tuning's (arXiv 2402.00518).

    `tied_weight` is the backbone's frozen output matrix [v/tp, h]; None where the head trains its own.
    """

    def __init__(self, layer: int, architecture: Architecture, config: ModelConfig, topology: Topology, *, dtype: torch.dtype,
                 tied_weight: Tensor | None):
        super().__init__()
        self.layer, self.architecture = layer, architecture
        tensor: dict[str, Any] = {"dtype": dtype, "device": topology.device}
        if architecture != "embedding":
            self.norm = exit_norm(config, **tensor)
        if architecture == "mlp":
            self.mlp = ExitMLP(config, topology, **tensor)
        if tied_weight is None:
            self.output = nn.Linear(config.hidden_size, config.padded_vocab_size(topology.tp) // topology.tp, bias=False, **tensor)
        self._tied = (tied_weight,)  # in a tuple, so that it is no parameter of the head

    @property
    def output_weight(self) -> Tensor:  # [v/tp, h]
        """The output matrix, trained or tied."""
        return self.output.weight if self._tied[0] is None else self._tied[0]

    @staticmethod
    def tensor_parallel_dim(parameter: str) -> int | None:
        """The dimension along which the named parameter is cut over TP; None where every rank holds all of it."""
        return {"mlp.fc1.weight": 0, "mlp.fc1.bias": 0, "mlp.fc2.weight": 1, "output.weight": 0}.get(parameter)

    def final_hidden(self, inputs: ExitInput) -> Tensor:  # […, h]
        """What the output matrix is applied to."""
        if self.architecture == "embedding":
            return inputs.hidden
        if self.architecture == "norm":
            return self.norm(inputs.hidden)
        assert inputs.residual is not None
        return self.norm(inputs.residual + self.mlp(inputs.hidden))

    def forward(self, inputs: ExitInput, project: Callable[[Tensor, Tensor], Result]) -> Result:
        """`project(final hidden […, h], output weight [v/tp, h])`: logits, or a loss that never makes them.

        Projecting inside forward is what `fully_shard` needs: parameters are whole only while it runs.
        """
        return project(self.final_hidden(inputs), self.output_weight)
