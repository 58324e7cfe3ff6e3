"""One stage of an early-exit model: frozen backbone layers with their exit heads. Exits cut the network into segments.

`run_layers` runs whole sequences, for tuning and evaluation; decoding runs the same layers token by token
(`decode_layer.py`).
"""

from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ee_tuning.config import WeightFormat
from ee_tuning.model.backbone import BackboneStage
from ee_tuning.model.documents import PackedDocuments
from ee_tuning.model.exit_head import ExitHead, ExitInput
from ee_tuning.model.exit_spec import ExitSpec
from ee_tuning.model.head_kinds import HEAD_CLASSES
from ee_tuning.model.sequence_parallel import gather_sequence, local_sequence, scatter_sequence
from ee_tuning.model_config.config import ModelConfig
from ee_tuning.parallel.draft_vocab import draft_vocab
from ee_tuning.parallel.shortlist import exit_vocab
from ee_tuning.parallel.time_parts import part
from ee_tuning.parallel.topology import Topology
from ee_tuning.parallel.vocab import VocabShard

# s sequence, or this rank's part of it where the plan cuts it over tensor parallelism · b micro-batch · h hidden


@dataclass(frozen=True, kw_only=True)
class StagePlan:
    """The parts of one stage."""

    first_layer: int
    last_layer: int
    exits: tuple[ExitSpec, ...]
    """All exits of the model, on any stage."""
    token_ids: tuple[int, ...] = ()
    """The exits' shortlist, increasing; empty for the whole vocabulary."""
    has_final_head: bool
    """Whether the last stage holds the model's own norm and output matrix."""
    shares_output_matrix: bool = False
    """Whether every stage with an exit holds the model's output matrix, tied to it or not."""
    shares_final_head: bool = False
    """Whether exits apply the model's own norm and output matrix, which every stage with an exit then holds."""
    final_head_stages: tuple[int, ...] = ()
    """The stages that hold the model's own norm and output matrix, in tuning."""
    max_length: int
    """Most positions that will be computed."""
    dtype: torch.dtype
    cuts_sequence: bool = False
    """Whether hidden states between layers are cut along the sequence over tensor parallelism."""
    weights: WeightFormat = "native"
    """Storage format of the layers' matrices."""

    @property
    def exit_layers(self) -> tuple[int, ...]:
        """Layers followed by an exit, on any stage. At a drafting head no token leaves, so it is none."""
        return tuple(spec.layer for spec in self.exits if spec.draft is None)

    @property
    def own_exits(self) -> tuple[ExitSpec, ...]:
        """The exits on this stage."""
        return tuple(spec for spec in self.exits if self.first_layer <= spec.layer <= self.last_layer)

    @property
    def drafts(self) -> bool:
        """Whether a drafting head is on this stage."""
        return any(spec.draft is not None for spec in self.own_exits)

    @property
    def aux_layers(self) -> tuple[int, ...]:
        """The layers whose outputs a drafting head reads, on any stage."""
        return next((spec.draft.aux_layers for spec in self.exits if spec.draft is not None), ())

    @property
    def brought(self) -> tuple[int, ...]:
        """The layers whose states come with the hidden states from the stage before, which are themselves the output of
        its last layer.
        """
        return tuple(layer for layer in self.aux_layers if layer < self.first_layer - 1)

    @property
    def carried(self) -> tuple[int, ...]:
        """The layers whose states go on with the hidden states to the next stage."""
        return tuple(layer for layer in self.aux_layers if layer < self.last_layer)

    @property
    def ties_output(self) -> bool:
        """Whether an exit on this stage uses the backbone's frozen output matrix."""
        return any(spec.ties_output for spec in self.own_exits)


class EarlyExitModel(nn.Module):
    """One stage: the `backbone`, frozen unless it is trained, and `exit_heads`, keyed by layer. Weights are
    uninitialized until they are loaded.
    """

    def __init__(self, config: ModelConfig, topology: Topology, plan: StagePlan):
        super().__init__()
        self.config, self.topology, self.plan = config, topology, plan
        self.trains_backbone = False
        """Whether layers keep what a backward pass through them needs."""
        self.trains_embedding = False
        """Whether the embedding keeps what a backward pass needs."""
        self.takes_gradient = False
        """Whether the stage before needs the gradient of what this one receives."""
        self.recomputes = False
        """Whether the backward pass computes a layer's activations anew."""
        self.vocab = VocabShard.of(config.vocab_size, config.padded_vocab_size(topology.tp), topology)
        is_drafted = any(spec.draft is not None for spec in plan.exits)
        self.exit_vocab = (draft_vocab if is_drafted else exit_vocab)(plan.token_ids, self.vocab, topology)
        """The vocabulary of the exits."""
        has_final = plan.has_final_head and topology.is_last_stage
        self.backbone = BackboneStage(
            config,
            topology,
            first_layer=plan.first_layer,
            last_layer=plan.last_layer,
            has_embedding=topology.is_first_stage or plan.drafts,
            has_output=has_final or plan.ties_output or (plan.shares_output_matrix and bool(plan.own_exits)),
            has_final_norm=has_final or (plan.shares_final_head and bool(plan.own_exits)),
            max_length=plan.max_length,
            dtype=plan.dtype,
            cuts_sequence=plan.cuts_sequence,
            weights=plan.weights,
        )
        tied = self.backbone.output_layer.weight if plan.ties_output else None
        self.exit_heads = nn.ModuleDict(
            {
                str(spec.layer): HEAD_CLASSES[spec.architecture](
                    spec,
                    config,
                    topology,
                    dtype=plan.dtype,
                    tied_weight=tied,
                    angles=self.backbone.angles,
                    cuts_sequence=plan.cuts_sequence,
                )
                for spec in plan.own_exits
            }
        )

        if plan.shares_final_head:
            for head in self.exit_heads.values():
                head.norm = self.backbone.decoder["final_layernorm"]

    def exit_head(self, layer: int) -> ExitHead:
        """Returns the head after `layer`, which must be on this stage."""
        head = self.exit_heads[str(layer)]
        assert isinstance(head, ExitHead)
        return head

    @part("embedding")
    def embed(self, tokens: Tensor, documents: PackedDocuments | None = None) -> Tensor:  # [b, s] int64 -> [s, b, h]
        """Embeds tokens, on the first stage only."""
        with torch.set_grad_enabled(self.trains_embedding and torch.is_grad_enabled()):
            hidden = self.backbone.embed(tokens, documents.positions if documents else None)
            if not self.plan.cuts_sequence:
                return hidden
            # Megatron-core would cut it, too, but asks for CUDA's random numbers for a dropout of zero.
            if self.trains_embedding:
                return scatter_sequence(hidden, self.topology.tp_group).clone()
            return local_sequence(hidden, self.topology).clone()

    @torch.no_grad()
    def embed_ahead(self, labels: Tensor, num_steps: int) -> tuple[Tensor, ...]:  # [s, b] int64 -> [s, b, h] each
        """Returns embeddings of the tokens 1, 2, … `num_steps` ahead of each token, `labels` being those 1 ahead. Past
        the row's end they are those of arbitrary tokens. Only on the stage that drafts.
        """
        s = labels.shape[0]
        ahead = self.backbone.embed(F.pad(labels, (0, 0, 0, num_steps - 1)).t().contiguous())
        steps = [ahead[step : step + s] for step in range(num_steps)]
        return tuple(local_sequence(each, self.topology) if self.plan.cuts_sequence else each for each in steps)

    @torch.no_grad()
    def whole_sequence(self, x: Tensor) -> Tensor:  # [s, …] -> [s, …]
        """Gathers all ranks' parts of the sequence if the plan cuts it, else returns `x`."""
        return gather_sequence(x.contiguous(), self.topology.tp_group) if self.plan.cuts_sequence else x

    def hidden_shape(self, seq_length: int, micro_batch_size: int) -> tuple[int, int, int]:
        """Returns the shape [s, b, h] of hidden states between layers and stages, for sequences of `seq_length`."""
        return (
            seq_length // (self.topology.tp if self.plan.cuts_sequence else 1),
            micro_batch_size,
            self.config.hidden_size,
        )

    def relay_shapes(self, seq_length: int, micro_batch_size: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Returns the shapes [1 + c, s, b, h] of the message from the stage before and of the message to the next one
        (`stage_states.py`).
        """
        shape = self.hidden_shape(seq_length, micro_batch_size)
        return (1 + len(self.plan.brought), *shape), (1 + len(self.plan.carried), *shape)

    @part("layers, the rest")
    def run_layers(
        self,
        hidden: Tensor,  # [s, b, h]
        documents: PackedDocuments | None = None,
        *,
        through: int | None = None,
        aux: dict[int, Tensor] | None = None,
        dropped: frozenset[int] = frozenset(),
    ) -> tuple[Tensor, dict[int, ExitInput]]:  # [s, b, h], …
        """Runs this stage's layers up to layer `through` over whole sequences. Returns their output, and the exits'
        inputs.

        `documents` separates documents that share a row. `aux` holds the states of the layers `plan.brought`, for a
        drafting head; those of this stage's own layers are added to it. The layers `dropped` are left out.
        """
        with torch.set_grad_enabled(self.trains_backbone and torch.is_grad_enabled()):
            return self._run_layers(hidden, documents, through, {} if aux is None else aux, dropped)

    def _run_layers(
        self,
        hidden: Tensor,
        documents: PackedDocuments | None,
        through: int | None,
        aux: dict[int, Tensor],
        dropped: frozenset[int],
    ) -> tuple[Tensor, dict[int, ExitInput]]:
        inputs: dict[int, ExitInput] = {}
        last = self.plan.last_layer if through is None else min(through, self.plan.last_layer)
        for number in range(self.plan.first_layer - 1, last + 1):
            if number >= self.plan.first_layer:
                hidden = self._run_layer(number, hidden, documents, inputs, is_dropped=number in dropped)
            if number in self.plan.aux_layers:
                aux[number] = hidden
        if self.plan.drafts and last == self.plan.last_layer:
            states = torch.cat([aux[layer] for layer in self.plan.aux_layers], dim=-1)
            inputs[last] = ExitInput(states, documents=documents)
        return hidden, inputs

    def _run_layer(
        self,
        number: int,
        hidden: Tensor,
        documents: PackedDocuments | None,
        inputs: dict[int, ExitInput],
        *,
        is_dropped: bool,
    ) -> Tensor:
        """Returns a layer's output, or its input if it is dropped. Adds the input of the layer's exit to `inputs`, if
        it has one that reads this layer only.
        """
        if str(number) in self.exit_heads and self.exit_head(number).takes_mlp_input:
            hidden, inputs[number] = self._run_layer_with_mlp_exit(number, hidden, documents)
            return hidden
        hidden = hidden if is_dropped else self._layer_output(number, hidden, documents)
        if str(number) in self.exit_heads and self.exit_head(number).spec.draft is None:
            inputs[number] = ExitInput(hidden, documents=documents)
        return hidden

    @torch.no_grad()
    def final_hidden(self, hidden: Tensor) -> Tensor:  # […, h] -> […, h]
        """Returns the input of the model's own output matrix, on the last stage only."""
        return self.backbone.final_norm(hidden)

    def _run_layer_with_mlp_exit(
        self, number: int, hidden: Tensor, documents: PackedDocuments | None
    ) -> tuple[Tensor, ExitInput]:
        # The post-attention residual enters the norm before the MLP, in every layer spec of Megatron's.
        seen: list[ExitInput] = []
        hook = self.backbone.layer(number).pre_mlp_layernorm.register_forward_hook(partial(_keep, seen))
        try:
            hidden = self._layer_output(number, hidden, documents)
        finally:
            hook.remove()
        return hidden, seen[0]

    def _layer_output(self, number: int, hidden: Tensor, documents: PackedDocuments | None) -> Tensor:
        if not (self.recomputes and torch.is_grad_enabled()):
            return self.backbone.run_layer(number, hidden, documents)
        recomputed: Tensor = checkpoint(
            self.backbone.run_layer, number, hidden, documents, use_reentrant=False, preserve_rng_state=False
        )
        return recomputed


def _keep(seen: list[ExitInput], norm: nn.Module, arguments: tuple[Tensor, ...], normed: Tensor) -> None:
    seen.append(ExitInput(normed, residual=arguments[0]))


def layer_parts(model: EarlyExitModel) -> dict[str, list[nn.Module]]:
    """Returns the modules of this stage's layers by the name of their part in a report of the time."""
    layers = [model.backbone.layer(number) for number in range(model.plan.first_layer, model.plan.last_layer + 1)]
    return {"attention": [layer.self_attention for layer in layers], "MLP": [layer.mlp for layer in layers]}
