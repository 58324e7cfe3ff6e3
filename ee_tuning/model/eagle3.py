"""The drafting head of EAGLE-3 (arXiv 2503.01840).

The states of several layers are fused and, with the next token's embedding, go through the head's own layer. Its output
predicts the token after next, and goes through the layer again with the next embedding, and so on. Parameters are laid
out as in vLLM and speculators (`artifact/eagle3_names.py`). Tensor parallelism cuts the layer by heads and inner
width, and the output matrix by vocabulary; the fusing map and the norms are replicated.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ee_tuning.model.attention import softmax_scale
from ee_tuning.model.documents import PackedDocuments
from ee_tuning.model.exit_head import ExitHead, ExitInput, ExitMLP
from ee_tuning.model.norm import exit_norm
from ee_tuning.model.rope import inverse_frequencies
from ee_tuning.model.sequence_parallel import gather_sequence, reduce_scatter_sequence
from ee_tuning.model.unrolled_attention import unrolled_attention
from ee_tuning.model_config.config import ModelConfig
from ee_tuning.parallel.topology import Topology
from ee_tuning.parallel.tp_autograd import copy_to_tp, reduce_from_tp

# s sequence, or this rank's part of it where it is cut · b micro-batch · h hidden · a layers that are read · k steps
# n query heads, g key-value heads of this rank · d width of a head

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Queries [s, b, n, d], keys and values [s, b, g, d], without rotation, of all tokens -> [s, b, n * d]."""


class Eagle3Head(ExitHead):
    """W Norm(Layer(…)), with `own_hidden` [s, k * b, h] for all steps side by side, like rows of the micro-batch.

    `inputs.hidden` [s, b, a * h] holds the states of the layers it reads; `inputs.next_embeddings`, [s, b, h] each,
    holds for step i the embeddings of the tokens i + 1 ahead. Step i then predicts the token i + 2 ahead.
    """

    attends_to_earlier = True

    def build(self, config: ModelConfig, topology: Topology, tensor: dict[str, Any]) -> None:
        assert self.spec.draft is not None
        own, width, num_read = self.spec.draft.layer_config(config), config.hidden_size, len(self.spec.draft.aux_layers)
        self.fc = nn.Linear(num_read * width, width, bias=False, **tensor)
        if self.spec.draft.norm_before_fc:
            self.input_norm = nn.RMSNorm(num_read * width, eps=own.norm_epsilon, **tensor)
        if self.spec.draft.fc_norm:
            self.fc_norm = nn.ModuleList(exit_norm(own, **tensor) for _ in range(num_read))
        self.midlayer = DraftLayer(
            own,
            topology,
            norm_before_residual=self.spec.draft.norm_before_residual,
            cuts_sequence=self.cuts_sequence,
            tensor=tensor,
        )
        self.norm = exit_norm(own, **tensor)

    @property
    def partial_gradients(self) -> tuple[str, ...]:
        """The norms of queries and keys, since each rank norms its own heads."""
        return tuple(name for name, _ in self.named_parameters() if name.endswith(("q_norm.weight", "k_norm.weight")))

    def fused(self, states: Tensor) -> Tensor:  # […, a * h] -> […, h]
        """Fuses the states: the input of the first step."""
        draft = self.spec.draft
        assert draft is not None
        if draft.norm_before_fc:
            states = self.input_norm(states)
        if draft.fc_norm:
            parts = states.chunk(len(self.fc_norm), dim=-1)
            states = torch.cat([norm(part) for norm, part in zip(self.fc_norm, parts, strict=True)], dim=-1)
        return self.fc(states)

    def own_hidden(self, inputs: ExitInput) -> Tensor:  # [s, k * b, h]
        assert self.spec.draft is not None and inputs.next_embeddings
        state, text = self.fused(inputs.hidden), _UnrolledText(self.midlayer, inputs.documents)
        said = []
        for embedding in inputs.next_embeddings:
            state = self.midlayer(state, embedding, text.attend)
            said.append(self.norm(state))
            state = said[-1] if self.spec.draft.norm_output else state
        return torch.stack(said, dim=1).flatten(1, 2)


class DraftLayer(nn.Module):
    """A transformer layer whose attention reads the normed embedding and the normed state side by side."""

    def __init__(
        self,
        config: ModelConfig,
        topology: Topology,
        *,
        norm_before_residual: bool,
        cuts_sequence: bool,
        tensor: dict[str, Any],
    ) -> None:
        super().__init__()
        self.config, self.norm_before_residual, self.cuts_sequence = config, norm_before_residual, cuts_sequence
        self.group = topology.tp_group if topology.tp > 1 else None
        self.num_heads = config.num_attention_heads // topology.tp
        self.num_groups = config.num_query_groups // topology.tp
        width, inner = config.kv_channels, config.num_attention_heads * config.kv_channels // topology.tp
        self.input_layernorm, self.hidden_norm = exit_norm(config, **tensor), exit_norm(config, **tensor)
        self.post_attention_layernorm = exit_norm(config, **tensor)
        rows = inner + 2 * self.num_groups * width
        # Rows of queries, then of keys, then of values.
        attention: dict[str, nn.Module] = {
            "qkv": nn.Linear(2 * config.hidden_size, rows, bias=False, **tensor),
            "o_proj": nn.Linear(inner, config.hidden_size, bias=False, **tensor),
        }
        if config.has_qk_norm:
            attention |= {f"{which}_norm": nn.RMSNorm(width, eps=config.norm_epsilon, **tensor) for which in ("q", "k")}
        self.self_attn = nn.ModuleDict(attention)
        self.mlp = ExitMLP(config, topology, cuts_sequence=cuts_sequence, **tensor)
        self.scale = softmax_scale(config)

    def forward(self, state: Tensor, embedding: Tensor, attend: Attend) -> Tensor:  # [s, b, h], [s, b, h] -> [s, b, h]
        normed = self.hidden_norm(state)
        residual = normed if self.norm_before_residual else state
        read = self._for_shards(torch.cat((self.input_layernorm(embedding), normed), dim=-1))
        residual = residual + self._projected(attend(*self._queries_keys_values(read)))
        return residual + self.mlp(self.post_attention_layernorm(residual))

    def rotated(self, heads: Tensor, positions: Tensor) -> Tensor:  # [s, b, n, d], [s, 1 or b] int64 -> [s, b, n, d]
        """Rotates queries or keys to their positions."""
        frequencies = inverse_frequencies(self.config.rope, self.config.kv_channels).to(heads.device)
        half = positions[:, :, None, None].float() * frequencies
        angles = torch.cat((half, half), dim=-1)
        first, second = heads.chunk(2, dim=-1)
        turned = torch.cat((-second, first), dim=-1)
        return heads * angles.cos().to(heads.dtype) + turned * angles.sin().to(heads.dtype)

    def _for_shards(self, x: Tensor) -> Tensor:
        if self.group is None:
            return x
        return gather_sequence(x, self.group) if self.cuts_sequence else copy_to_tp(x, self.group)

    def _queries_keys_values(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:  # [s, b, 2 * h]
        width = self.config.kv_channels
        heads = self.self_attn["qkv"](x).unflatten(-1, (-1, width))
        query, key, value = heads.split((self.num_heads, self.num_groups, self.num_groups), dim=-2)
        if self.config.has_qk_norm:
            query, key = self.self_attn["q_norm"](query), self.self_attn["k_norm"](key)
        return query, key, value

    def _projected(self, x: Tensor) -> Tensor:  # [s, b, n * d] -> [s, b, h]
        out: Tensor = self.self_attn["o_proj"](x)
        if self.group is None:
            return out
        return (reduce_scatter_sequence if self.cuts_sequence else reduce_from_tp)(out, self.group)


class _UnrolledText:
    """The keys and values of all steps so far for a whole text. Every call of `attend` is the next step."""

    def __init__(self, layer: DraftLayer, documents: PackedDocuments | None) -> None:
        self._layer, self._documents = layer, documents
        self._keys: list[Tensor] = []
        self._values: list[Tensor] = []

    def attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Adds the keys and values of the next step, and returns the attention's output for its queries. A step's
        tokens stand one place behind those of the step before.
        """
        known = None if self._documents is None else self._documents.positions
        places = torch.arange(query.shape[0], device=query.device)[:, None] if known is None else known.t()
        places = places + len(self._keys)
        self._keys.append(self._layer.rotated(key, places))
        self._values.append(value)
        query = self._layer.rotated(query, places)
        return unrolled_attention(query, self._keys, self._values, self._layer.scale, self._documents)
