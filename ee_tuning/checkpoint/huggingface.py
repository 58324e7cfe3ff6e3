"""The backbone, read in place from a Hugging Face folder: each rank its own slices."""
import re
from pathlib import Path

import torch
from torch import Tensor

from ee_tuning.checkpoint.experts_packed import Slab, expert_slabs, router_names
from ee_tuning.checkpoint.names import Shape, backbone_shard, backbone_tensor_shapes, output_name
from ee_tuning.checkpoint.safetensors_file import Part
from ee_tuning.checkpoint.safetensors_reader import SafetensorsFolder, TensorSource, read_shard
from ee_tuning.errors import InputError
from ee_tuning.model.config import ModelConfig

_HARMLESS = re.compile(r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq|transformer\.h\.\d+\.attn\.(masked_)?bias")
"""Buffers that old versions saved."""
_BARE = re.compile(r"(wte|wpe|ln_f|h\.\d+)\.")
"""GPT-2's tensors where the model was saved without its output matrix, as the published ones are: `transformer.` is missing before them."""


class HuggingFaceReader(SafetensorsFolder):
    """Tensors of `model.safetensors`, or of its shards. See SafetensorsFolder."""

    def __init__(self, folder: Path):
        super().__init__(folder, "model")
        is_bare = not any(name.startswith("transformer.") for name in self.files)
        self._slabs: dict[str, Slab] = {}
        self._stored: dict[str, str] = {}
        self._slabs = expert_slabs(self)
        self._stored = {**{f"transformer.{name}": name for name in self.files if is_bare and _BARE.match(name)},
                        **(router_names(self) if self._slabs else {}), **{name: slab.stored for name, slab in self._slabs.items()}}

    def stored_name(self, name: str) -> str:
        """`name` itself, or how a bare GPT-2 has it, or the pack that an expert is in."""
        return self._stored.get(name, name)

    def names(self) -> list[str]:
        """Every tensor there is, sorted, as the family's whole models name them, each expert alone."""
        return sorted([*self._stored, *set(self.files).difference(self._stored.values())])

    def shape(self, name: str) -> Shape:
        """Of the whole tensor."""
        slab = self._slabs.get(name)
        return slab.shape if slab else super().shape(name)

    def _read(self, name: str, part: Part) -> Tensor:
        slab = self._slabs.get(name)
        return super()._read(name, slab.within(part))[0] if slab else super()._read(name, part)

    def check_complete(self, config: ModelConfig) -> None:
        """Raises InputError where a backbone tensor is missing, has another shape, or one is there that would be ignored."""
        expected = backbone_tensor_shapes(config)
        for name, shape in expected.items():
            self.check_shape(name, shape)
        for name in self.names():
            if name not in expected and name != output_name(config) and not _HARMLESS.fullmatch(name):
                raise InputError(f"{self._path(name)}: tensor {name} belongs to no {config.family} model with {config.num_layers} layers, "
                                 "and leaving it out would change the model; config and weights do not belong together")


def read_backbone_tensor(reader: TensorSource, config: ModelConfig, parameter: str, tp: int, tp_rank: int,
                         dtype: torch.dtype) -> Tensor:
    """Rank `tp_rank`'s part of a Megatron-core backbone parameter, as `dtype`, on the CPU.

    Raises InputError, naming file and tensor, where a tensor is missing, broken or of another shape; KeyError on an unknown parameter.
    """
    return read_shard(reader, backbone_shard(parameter, config, tp, tp_rank), dtype)
