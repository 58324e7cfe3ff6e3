"""Exit heads, which turn the hidden states of an intermediate layer into logits.

The same module serves tuning, over whole sequences, and decoding, with one row per sequence. Tensor parallelism cuts
the MLP by its inner width and the output matrix by vocabulary; norms are replicated. Where the sequence is cut, too,
each rank has its part of the tokens, except within the MLP, within attention, and before the output matrix.
"""

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ee_tuning.model.activation import activation
from ee_tuning.model.backbone import apply_layer, build_layer
from ee_tuning.model.documents import PackedDocuments
from ee_tuning.model.exit_spec import ExitSpec
from ee_tuning.model.low_rank import LowRankMap
from ee_tuning.model.norm import exit_norm
from ee_tuning.model.sequence_parallel import gather_sequence, reduce_scatter_sequence
from ee_tuning.model_config.config import ModelConfig
from ee_tuning.parallel.topology import Topology
from ee_tuning.parallel.tp_autograd import copy_to_tp, reduce_from_tp
from ee_tuning.parallel.vocab import padded_size

# … any leading dimensions · h hidden · f/tp this rank's part of the MLP's inner width · v/tp its shard of the
# vocabulary, or of a shortlist's classes

Result = TypeVar("Result")


@dataclass(frozen=True)
class ExitInput:
    """Input of a head from the backbone at exit layer l. It needs a gradient only where the backbone is trained."""

    hidden: Tensor
    """[…, h]: x_l, layer l's output; for `mlp`, layer l's normed post-attention residual."""
    residual: Tensor | None = None
    """[…, h]: for `mlp`, a_l, layer l's post-attention residual."""
    documents: PackedDocuments | None = None
    """Separates documents that share a row."""
    layer_output: Tensor | None = None
    """[…, h]: for `layer`, the output of its own layer, where decoding has already run it for every token."""
    next_embeddings: tuple[Tensor, ...] = ()
    """[…, h] each: for `eagle3`, the embeddings of the tokens 1, 2, … ahead; its `hidden` are the states of all layers
    that it reads.
    """

    def rows(self, index: list[int]) -> "ExitInput":
        """Returns the input of the tokens at `index` of the first dimension, in decoding."""
        where = torch.tensor(index, pin_memory=self.hidden.is_cuda).to(self.hidden.device, non_blocking=True)
        return self._of_each(lambda x: x[where])

    def tokens(self, places: Tensor) -> "ExitInput":  # [n] int64
        """Returns the input for the tokens [n, h] at `places` of hidden states [s, b, h], numbered row by row of b.
        Each token stands alone.
        """
        return self._of_each(lambda x: x.flatten(0, 1)[places])

    def padded(self, count: int) -> "ExitInput":
        """Returns an input for `count` tokens, all zeros."""
        return self._of_each(lambda x: x.new_zeros(count, x.shape[1]))

    def overwrite(self, other: "ExitInput") -> None:
        """Overwrites the first places with an input of fewer tokens."""
        for mine, theirs in (
            (self.hidden, other.hidden),
            (self.residual, other.residual),
            (self.layer_output, other.layer_output),
        ):
            if mine is not None and theirs is not None:
                mine[: theirs.shape[0]] = theirs

    def leaves(self) -> tuple["ExitInput", list[tuple[Tensor, Tensor]]]:
        """Returns the same input cut off from the graph behind it, and each cut: (tensor, the leaf in its place).

        A head's backward pass then ends at the leaves, whose gradients the backbone's begins with.
        """
        cuts = []

        def cut(x: Tensor) -> Tensor:
            leaf = x.detach().requires_grad_(x.requires_grad)
            cuts.append((x, leaf))
            return leaf

        return dataclasses.replace(self._of_each(cut), documents=self.documents), cuts

    def _of_each(self, change: Callable[[Tensor], Tensor]) -> "ExitInput":
        residual = None if self.residual is None else change(self.residual)
        layer_output = None if self.layer_output is None else change(self.layer_output)
        return ExitInput(change(self.hidden), residual=residual, layer_output=layer_output)


class ExitMLP(nn.Module):
    """The family's MLP: W₂ (σ(gate x) · up x), or W₂ σ(W₁ x), with the biases of the family."""

    def __init__(self, config: ModelConfig, topology: Topology, *, cuts_sequence: bool, **tensor: Any):
        super().__init__()
        inner, has_bias = config.ffn_hidden_size // topology.tp, config.has_linear_bias
        self.activation, self.is_gated = activation(config), config.is_gated
        # If gated: rows of gate, then rows of up.
        self.fc1 = nn.Linear(config.hidden_size, (1 + self.is_gated) * inner, bias=has_bias, **tensor)
        self.fc2 = nn.Linear(inner, config.hidden_size, bias=has_bias, **tensor)
        self.group, self.cuts_sequence = topology.tp_group if topology.tp > 1 else None, cuts_sequence

    def forward(self, x: Tensor) -> Tensor:  # […, h] -> […, h]
        if self.cuts_sequence:
            x = gather_sequence(x, self.group)
        elif self.group is not None and x.requires_grad:  # where something before the MLP is trained
            x = copy_to_tp(x, self.group)
        if self.is_gated:
            gate, up = self.fc1(x).chunk(2, dim=-1)
            inner = self.activation(gate) * up
        else:
            inner = self.activation(self.fc1(x))
        if self.group is None:
            return self.fc2(inner)
        out = (reduce_scatter_sequence if self.cuts_sequence else reduce_from_tp)(
            F.linear(inner, self.fc2.weight), self.group
        )
        return out if self.fc2.bias is None else out + self.fc2.bias


class ExitHead(nn.Module, ABC):
    """Base of all architectures: the exit's layer and its output matrix. The design is EE-Tuning's (arXiv 2402.00518).

    `tied_weight` is the backbone's frozen output matrix [v/tp, h], for tied exits; `angles` [positions, d] are its
    rotations. `cuts_sequence`: the input is each rank's part of the sequence, and `project` gets all of it. Parameters
    are named as in `artifact/exit_names.py`, and uninitialized.
    """

    takes_mlp_input = False
    """Whether the head reads layer l's normed post-attention residual instead of its output."""
    attends_to_earlier = False
    """Whether a token's logits depend on the head's inputs at earlier tokens, by attention of its own."""

    def __init__(
        self,
        spec: ExitSpec,
        config: ModelConfig,
        topology: Topology,
        *,
        dtype: torch.dtype,
        tied_weight: Tensor | None,
        angles: Tensor,
        cuts_sequence: bool = False,
    ):
        super().__init__()
        self.spec, self.config, self.cuts_sequence, self._group = spec, config, cuts_sequence, topology.tp_group
        assert not spec.ties_output or tied_weight is not None
        # In a tuple, so that it is not registered as the head's own.
        self._backbones = (
            tied_weight if spec.ties_output else None,
            angles,
        )
        tensor: dict[str, Any] = {"dtype": dtype, "device": topology.device}
        self.build(config, topology, tensor)
        if spec.has_linear:
            width, rank = config.hidden_size, spec.linear_rank
            self.linear = LowRankMap(width, rank, **tensor) if rank else nn.Linear(width, width, **tensor)
        if not spec.ties_output:
            rows = padded_size(spec.output_rows(config.vocab_size), topology.tp) // topology.tp
            self.output = nn.Linear(config.hidden_size, rows, bias=False, dtype=dtype, device=topology.device)

    @property
    def exit_layer(self) -> int:
        """The backbone layer that it follows."""
        return self.spec.layer

    @property
    def output_weight(self) -> Tensor:  # [v/tp, h]
        """The output matrix, trained or tied."""
        tied = self._backbones[0]
        return self.output.weight if tied is None else tied

    @property
    def own_layer(self) -> nn.Module | None:
        """The head's own transformer layer, if any, which needs its own keys and values in decoding."""
        return None

    @property
    def partial_gradients(self) -> tuple[str, ...]:
        """Parameters replicated on every tensor-parallel rank of which each rank, though it has all tokens, computes a
        share of the gradient.
        """
        return ()

    def build(self, config: ModelConfig, topology: Topology, tensor: dict[str, Any]) -> None:
        """Creates the parameters between the backbone's states and the output matrix; `tensor` holds dtype and
        device.
        """

    @abstractmethod
    def own_hidden(self, inputs: ExitInput) -> Tensor:  # […, h]
        """Returns the architecture's output for the backbone's states."""

    def final_hidden(self, inputs: ExitInput) -> Tensor:  # […, h]
        """Returns the input of the output matrix: `own_hidden`, through the linear map if there is one."""
        hidden = self.own_hidden(inputs)
        mapped: Tensor = self.linear(hidden) if self.spec.has_linear else hidden
        return mapped

    def forward(self, inputs: ExitInput, project: Callable[[Tensor, Tensor], Result]) -> Result:
        """Returns `project(final hidden […, h], output weight [v/tp, h])`: logits, or a loss that never materializes
        them.

        `fully_shard` requires that the projection runs within forward, because parameters are whole only meanwhile.
        Where the sequence is cut, the gradient that `project` gives hidden states is this shard's share of it.
        """
        hidden = self.final_hidden(inputs)
        return project(gather_sequence(hidden, self._group) if self.cuts_sequence else hidden, self.output_weight)


class EmbeddingHead(ExitHead):
    """W x."""

    def own_hidden(self, inputs: ExitInput) -> Tensor:  # […, h]
        return inputs.hidden


class NormHead(ExitHead):
    """W Norm(x)."""

    def build(self, config: ModelConfig, topology: Topology, tensor: dict[str, Any]) -> None:
        self.norm = exit_norm(config, **tensor)

    def own_hidden(self, inputs: ExitInput) -> Tensor:  # […, h]
        return self.norm(inputs.hidden)


class LinearHead(NormHead):
    """W (T Norm(x) + b), the tuned lens (arXiv 2303.08112).

    Every tensor-parallel rank holds all of T, like any map of `ExitSpec.has_linear`: cutting it would cost a sum over
    ranks.
    """


class MLPHead(NormHead):
    """W Norm(a + MLP(PreMLPNorm(a))), with a layer l's post-attention residual and PreMLPNorm layer l's own, frozen."""

    takes_mlp_input = True

    def build(self, config: ModelConfig, topology: Topology, tensor: dict[str, Any]) -> None:
        super().build(config, topology, tensor)
        self.mlp = ExitMLP(config, topology, cuts_sequence=self.cuts_sequence, **tensor)

    def own_hidden(self, inputs: ExitInput) -> Tensor:  # […, h]
        assert inputs.residual is not None
        return self.norm(inputs.residual + self.mlp(inputs.hidden))


class AdapterHead(NormHead):
    """W Norm(x + B σ(A Norm_a(x))): a bottleneck beside the residual stream.

    Every tensor-parallel rank holds all of A and B: they are small, and cutting them would cost a sum over ranks in
    each direction.
    """

    def build(self, config: ModelConfig, topology: Topology, tensor: dict[str, Any]) -> None:
        super().build(config, topology, tensor)
        self.adapter = nn.ModuleDict(
            {
                "norm": exit_norm(config, **tensor),
                "down": nn.Linear(config.hidden_size, self.spec.adapter_rank, bias=False, **tensor),
                "up": nn.Linear(self.spec.adapter_rank, config.hidden_size, bias=False, **tensor),
            }
        )
        self.activation = activation(config)

    def own_hidden(self, inputs: ExitInput) -> Tensor:  # […, h]
        return self.norm(self.adapted(inputs.hidden))

    def adapted(self, x: Tensor) -> Tensor:  # […, h]
        """x + B σ(A Norm_a(x))."""
        parts = self.adapter
        return x + parts["up"](self.activation(parts["down"](parts["norm"](x))))


class LayerHead(NormHead):
    """W Norm(Layer(x)), with a transformer layer like the backbone's last one."""

    attends_to_earlier = True

    def build(self, config: ModelConfig, topology: Topology, tensor: dict[str, Any]) -> None:
        super().build(config, topology, tensor)
        self.layer = build_layer(config, topology, config.num_layers, tensor["dtype"], cuts_sequence=self.cuts_sequence)

    @property
    def own_layer(self) -> nn.Module:
        return self.layer

    @property
    def partial_gradients(self) -> tuple[str, ...]:
        """The norms of queries and keys, since each rank norms its own heads."""
        return tuple(name for name, _ in self.named_parameters() if "q_layernorm" in name or "k_layernorm" in name)

    def own_hidden(self, inputs: ExitInput) -> Tensor:  # […, h]
        """Returns the normed output of the head's own layer. The layer is run here where `inputs.layer_output` is None,
        and `inputs.hidden` must then be whole sequences [s, b, h].
        """
        out = inputs.layer_output
        return self.norm(
            apply_layer(self.layer, inputs.hidden, self._backbones[1], self.config, inputs.documents)
            if out is None
            else out
        )
