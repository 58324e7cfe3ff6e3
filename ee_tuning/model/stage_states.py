"""The message from stage to stage: hidden states, and those of earlier layers that a drafting head reads."""

# s sequence, or this rank's part of it where it is cut · b micro-batch · h hidden · c layers that are carried
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor


def packed(hidden: Tensor, aux: Mapping[int, Tensor], layers: Sequence[int]) -> Tensor:  # [s, b, h] -> [1 + c, s, b, h]
    """Packs both into one tensor. Without `layers` nothing is copied."""
    return torch.stack([hidden, *(aux[layer] for layer in layers)]) if layers else hidden[None]


def unpacked(states: Tensor, layers: Sequence[int]) -> tuple[Tensor, dict[int, Tensor]]:  # [1 + c, s, b, h]
    """Returns hidden states [s, b, h], and those of `layers` by layer."""
    hidden, *aux = states
    return hidden, dict(zip(layers, aux, strict=True))
