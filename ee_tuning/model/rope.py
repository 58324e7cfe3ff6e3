"""Rotary position angles, for every scaling of a Llama configuration.

Frequencies are computed here, because Megatron-core's llama3 scaling fixes three of its four numbers.
"""

import math

import torch
from torch import Tensor

from ee_tuning.model_config.config import ModelConfig, RopeConfig

# s positions · d width of a head


def inverse_frequencies(rope: RopeConfig, width: int) -> Tensor:  # [d/2], float32
    """Returns the radians per position of each pair of dimensions, for a head of `width`."""
    frequencies = 1.0 / rope.theta ** (torch.arange(0, width, 2).float() / width)
    if rope.kind == "linear":
        return frequencies / rope.factor
    if rope.kind == "llama3":
        return _llama3(frequencies, rope)
    if rope.kind == "longrope":
        return 1.0 / (torch.tensor(rope.short_factor) * rope.theta ** (torch.arange(0, width, 2).float() / width))
    if rope.kind == "yarn":
        return _yarn(frequencies, rope, width)
    return frequencies


def rotary_angles(config: ModelConfig, length: int, device: torch.device) -> Tensor:  # [s, d], float32
    """Returns the angle of each position and dimension; the second half of the dimensions repeats the first. Zeros for
    learned positions.
    """
    if config.position == "learned":
        return torch.zeros(length, config.kv_channels, device=device)
    positions = torch.arange(length, dtype=torch.float32)
    half = torch.outer(positions, inverse_frequencies(config.rope, config.kv_channels))
    return torch.cat((half, half), dim=-1).to(device)


def _llama3(frequencies: Tensor, rope: RopeConfig) -> Tensor:
    """Scales as Llama 3.1 does: long waves are stretched by `factor`, short ones kept, and those between blended
    linearly in frequency.
    """
    original, low, high = rope.original_max_position_embeddings, rope.low_freq_factor, rope.high_freq_factor
    wavelengths = 2 * math.pi / frequencies
    share_kept = ((original / wavelengths - low) / (high - low)).clamp(0, 1)
    return (1 - share_kept) * frequencies / rope.factor + share_kept * frequencies


def _yarn(frequencies: Tensor, rope: RopeConfig, width: int) -> Tensor:
    """Scales as YaRN does (arXiv 2309.00071, section 3.2): a ramp over dimensions, from kept to interpolated by
    `factor`.
    """

    def dimension_of(rotations: float) -> float:
        return (
            width
            * math.log(rope.original_max_position_embeddings / (rotations * 2 * math.pi))
            / (2 * math.log(rope.theta))
        )

    low, high = dimension_of(rope.beta_fast), dimension_of(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, width - 1)
    span = high - low if high > low else 0.001
    interpolated = ((torch.arange(width // 2, dtype=torch.float32) - low) / span).clamp(0, 1)
    return frequencies / rope.factor * interpolated + frequencies * (1 - interpolated)
