"""Reads the backbone from a Hugging Face folder. Each rank reads its own slices."""

import re
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor

from ee_tuning.checkpoint.experts_packed import Slab, expert_slabs, router_names
from ee_tuning.checkpoint.names import backbone_shard, backbone_tensor_shapes, embedding_name, output_name
from ee_tuning.checkpoint.unread import is_buffer, refuse_meaningful, unread
from ee_tuning.errors import InputError
from ee_tuning.model_config.config import ModelConfig
from ee_tuning.storage.safetensors_file import TensorRange
from ee_tuning.storage.safetensors_reader import SafetensorsFolder
from ee_tuning.storage.tensor_slice import TensorShape
from ee_tuning.storage.tensor_source import ShardSource

_BARE = {
    "transformer.": re.compile(r"(wte|wpe|ln_f|h\.\d+)\."),
    "model.": re.compile(r"(embed_tokens|norm|layers\.\d+)\."),
}
"""Tensors of models saved without their output matrix, such as GPT-2's published folders and embedding models. Their
names lack the prefix of whole models.
"""


class HuggingFaceReader(SafetensorsFolder):
    """The tensors of `model.safetensors` or its shards. See SafetensorsFolder."""

    def __init__(self, folder: Path):
        super().__init__(folder, "model")
        self._slabs: dict[str, Slab] = {}
        self._stored: dict[str, str] = {}
        self._slabs = expert_slabs(self)
        self._stored = {
            **_whole_names(self.files),
            **(router_names(self) if self._slabs else {}),
            **{name: slab.stored for name, slab in self._slabs.items()},
        }

    def holds(self, name: str) -> bool:
        """Whether a tensor with that name exists, in the names of the family's whole models."""
        return self.stored_name(name) in self.files

    def take_output_for_embedding(self, config: ModelConfig) -> None:
        """Uses the output matrix as the embedding that it is tied to, if only the former is stored."""
        if not self.holds(embedding_name(config)) and self.holds(output_name(config)):
            self._stored[embedding_name(config)] = output_name(config)

    def stored_name(self, name: str) -> str:
        """Returns `name` as it is stored: unchanged, without a prefix, or the pack that contains an expert."""
        return self._stored.get(name, name)

    def names(self) -> list[str]:
        """Returns the names of all tensors, sorted, as in the family's whole models, with each expert on its own."""
        return sorted([*self._stored, *set(self.files).difference(self._stored.values())])

    def shape(self, name: str) -> TensorShape:
        """Returns the shape of the whole tensor."""
        slab = self._slabs.get(name)
        return slab.shape if slab else super().shape(name)

    def _read(self, name: str, part: TensorRange) -> Tensor:
        slab = self._slabs.get(name)
        return super()._read(name, slab.within(part))[0] if slab else super()._read(name, part)

    def check_complete(self, config: ModelConfig) -> None:
        """Raises InputError where a backbone tensor is missing, has another shape, or would be ignored."""
        expected = backbone_tensor_shapes(config)
        unexpected_keys = [
            name
            for name in self.names()
            if name not in expected and name != output_name(config) and not is_buffer(name)
        ]
        refuse_meaningful((name, self._path(name)) for name in unexpected_keys)
        if (
            output_name(config) in expected
            and not self.holds(output_name(config))
            and self.holds(embedding_name(config))
        ):
            raise InputError(
                f"{self.table} holds no output matrix ({output_name(config)}), and the config ties none to the embedding "
                "(tie_word_embeddings): a model that embeds or scores texts has none; give the language model that it was "
                "made from"
            )
        for name, shape in expected.items():
            self.check_shape(name, shape)
        for name in unexpected_keys:
            raise unread(name, self._path(name), config, "config")


def _whole_names(files: Iterable[str]) -> dict[str, str]:
    """Maps the names of whole models to stored names that lack the prefix."""
    return {
        prefix + name: name
        for prefix, pattern in _BARE.items()
        if not any(name.startswith(prefix) for name in files)
        for name in files
        if pattern.match(name)
    }


def read_backbone_tensor(
    reader: ShardSource, config: ModelConfig, parameter: str, tp: int, tp_rank: int, dtype: torch.dtype
) -> Tensor:
    """Returns rank `tp_rank`'s part of a Megatron-core backbone parameter, as `dtype`, on the CPU.

    Raises InputError, naming file and tensor, where a tensor is missing, broken or of another shape, and KeyError on an
    unknown parameter.
    """
    return reader.shard(backbone_shard(parameter, config, tp, tp_rank), dtype)
