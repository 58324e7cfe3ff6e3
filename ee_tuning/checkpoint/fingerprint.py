"""The fingerprint of a backbone, which binds exit heads to their model.

It is the same in every format: whole tensors under Hugging Face's names, as float32, without padding. Only a few rows
of each tensor are read, so it is cheap for 140 GB.
"""

import dataclasses
import hashlib
import sys
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from ee_tuning.checkpoint.names import backbone_tensor_shapes
from ee_tuning.errors import InputError
from ee_tuning.json_file import to_json
from ee_tuning.model_config.config import ModelConfig, RopeConfig
from ee_tuning.storage.tensor_source import TensorSource

_SHAPE_FIELDS = (
    "family",
    "num_layers",
    "hidden_size",
    "ffn_hidden_size",
    "num_attention_heads",
    "num_query_groups",
    "kv_channels",
    "vocab_size",
    "ties_embeddings",
)
_FAMILY_FIELDS = (
    "norm",
    "position",
    "activation",
    "is_gated",
    "has_linear_bias",
    "has_qkv_bias",
    "has_proj_bias",
    "has_qk_norm",
    "num_experts",
    "moe_router_topk",
    "moe_ffn_hidden_size",
    "renormalizes_router",
    "dense_layers",
)


def model_shape(config: ModelConfig) -> dict[str, Any]:
    """Returns the fields that determine a backbone's tensors, their shapes and their use. Fields with Llama's values
    are left out.
    """
    fields = dataclasses.asdict(config)
    llama = {field.name: field.default for field in dataclasses.fields(config)}
    return {
        name: fields[name]
        for name in (*_SHAPE_FIELDS, *(name for name in _FAMILY_FIELDS if fields[name] != llama[name]))
    }


def config_of_shape(shape: Mapping[str, Any], where: Path) -> ModelConfig:
    """Returns a ModelConfig with the tensor shapes that `model_shape` described. It is not enough for a forward pass.

    Raises InputError, naming `where`, on an invalid description.
    """
    hints = typing.get_type_hints(ModelConfig)
    fields: dict[str, Any] = {}
    for name in (*_SHAPE_FIELDS, *(name for name in _FAMILY_FIELDS if name in shape)):
        value = shape.get(name)
        if not _is_kind(value, hints[name]) or (type(value) is int and value < (name in _SHAPE_FIELDS)):
            raise InputError(
                f"{where} does not describe its model: {name} must not be {value!r}; fetch or convert the exits again"
            )
        fields[name] = tuple(value) if isinstance(value, list) else value
    return ModelConfig(**fields, max_position_embeddings=1, norm_epsilon=1e-6, rope=RopeConfig())


def _is_kind(value: Any, hint: Any) -> bool:
    """Whether a value from JSON has the type of a ModelConfig field."""
    if typing.get_origin(hint) is Literal:
        return isinstance(value, str) and value in typing.get_args(hint)
    if typing.get_origin(hint) is tuple:
        return isinstance(value, list | tuple) and all(_is_kind(item, typing.get_args(hint)[0]) for item in value)
    return type(value) is hint


def fingerprint(reader: TensorSource, config: ModelConfig) -> str:
    """Returns the sha256, in hex, of the shape as canonical JSON and, per tensor sorted by name, its rows 0, n/3, 2n/3
    and n−1 as little-endian float32.

    Raises InputError where a backbone tensor is missing, broken or of another shape.
    """
    digest = hashlib.sha256(to_json(model_shape(config), sort_keys=True, separators=(",", ":")).encode())
    for name, shape in sorted(backbone_tensor_shapes(config).items()):
        reader.check_shape(name, shape)
        n = shape[0]
        for row in (0, n // 3, 2 * n // 3, n - 1):
            digest.update(_float32_bytes(reader.rows(name, row, row + 1)))
    return digest.hexdigest()


def _float32_bytes(tensor: Tensor) -> bytes:
    array = tensor.to(torch.float32).numpy()
    return (array if sys.byteorder == "little" else array.byteswap()).tobytes()
