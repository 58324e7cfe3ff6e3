"""A drafter of EAGLE-3 written down plainly."""

import dataclasses
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ee_tuning.artifact.exit_names import exit_shard
from ee_tuning.checkpoint.names import merge_shards
from ee_tuning.model.draft_spec import DraftSpec
from ee_tuning.model.eagle3 import Eagle3Head


@dataclasses.dataclass
class PlainDrafter:
    """One draft of one text: lists of vectors, one token at a time, from the layout's names alone."""

    tensors: dict[str, Tensor]
    draft: DraftSpec

    def norm(self, x: Tensor, name: str) -> Tensor:
        return (
            x * (x.square().mean(-1, keepdim=True) + self.draft.norm_epsilon).rsqrt() * self.tensors[f"{name}.weight"]
        )

    def fused(self, states: list[Tensor]) -> Tensor:  # [h] each -> [h]
        if self.draft.fc_norm:
            states = [self.norm(state, f"fc_norm.{index}") for index, state in enumerate(states)]
        joined = torch.cat(states)
        return self.tensors["fc.weight"] @ (self.norm(joined, "input_norm") if self.draft.norm_before_fc else joined)

    def turned(self, head: Tensor, position: int) -> Tensor:  # [d]
        half = len(head) // 2
        angles = position / self.draft.rope.theta ** (torch.arange(half).double() / half)
        first, second = head[:half], head[half:]
        return torch.cat((first * angles.cos() - second * angles.sin(), second * angles.cos() + first * angles.sin()))

    def layer(self, state: Tensor, embedding: Tensor, position: int, cache: list[tuple[Tensor, Tensor]]) -> Tensor:
        """Through the layer; its keys and values [g, d] are added to `cache`."""
        own, width = "midlayer.", self.draft.kv_channels
        normed = self.norm(state, own + "hidden_norm")
        residual = normed if self.draft.norm_before_residual else state
        read = torch.cat((self.norm(embedding, own + "input_layernorm"), normed))
        query, key, value = ((self.tensors[f"{own}self_attn.{x}_proj.weight"] @ read).view(-1, width) for x in "qkv")
        if self.draft.family == "qwen3":
            query, key = self.norm(query, own + "self_attn.q_norm"), self.norm(key, own + "self_attn.k_norm")
        key = torch.stack([self.turned(each, position) for each in key])
        cache.append((key, value))
        heads, share = [], len(query) // len(key)
        for index, each in enumerate(query):
            scores = torch.stack([self.turned(each, position) @ k[index // share] for k, _ in cache]) / width**0.5
            heads.append(scores.softmax(0) @ torch.stack([v[index // share] for _, v in cache]))
        residual = residual + self.tensors[own + "self_attn.o_proj.weight"] @ torch.cat(heads)
        x = self.norm(residual, own + "post_attention_layernorm")
        gate, up = (self.tensors[f"{own}mlp.{which}_proj.weight"] @ x for which in ("gate", "up"))
        return residual + self.tensors[own + "mlp.down_proj.weight"] @ (F.silu(gate) * up)

    def drafts(self, states: list[list[Tensor]], embeddings: list[Tensor], num_steps: int) -> list[Tensor]:
        """Logits [v] of each step behind the last of the tokens whose `states` are known; `embeddings` are those of
        all tokens, the drafted ones too.
        """
        cache: list[tuple[Tensor, Tensor]] = []
        for position, each in enumerate(states):  # the text so far
            state = self.layer(self.fused(each), embeddings[position + 1], position, cache)
        said = []
        for step in range(num_steps):
            said.append(self.tensors["output.weight"] @ self.norm(state, "norm"))
            if step + 1 < num_steps:
                begins = self.norm(state, "norm") if self.draft.norm_output else state
                position = len(states) + step
                state = self.layer(begins, embeddings[position + 1], position, cache)
        return said


def tensors_of(head: Eagle3Head, model_config: Any) -> dict[str, Tensor]:
    """The head's tensors by the layout's names."""
    tensors: dict[str, Tensor] = {}
    for name, parameter in head.named_parameters():
        whole = merge_shards([exit_shard(head.spec, name, model_config, 1, 0)], [parameter.detach()])
        tensors |= {each.split(".", 2)[2]: value for each, value in whole.items()}
    return tensors
