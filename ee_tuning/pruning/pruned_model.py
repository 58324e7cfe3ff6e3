"""A model without some of its layers: its shape, its config.json, and its tensors, read from the whole model's."""

import dataclasses
from collections.abc import Sequence
from typing import Any, Self

from ee_tuning.checkpoint.formats import BackboneSource
from ee_tuning.checkpoint.hf_names import HF_NAMES
from ee_tuning.checkpoint.names import backbone_tensor_shapes
from ee_tuning.export.export_source import ExportSource
from ee_tuning.export.plain_folder import plain_description
from ee_tuning.model_config.config import ModelConfig
from ee_tuning.storage.tensor_source import RenamedTensors


def kept_layers(num_layers: int, dropped: Sequence[int]) -> tuple[int, ...]:
    """Returns the layers (1-based) that stay."""
    return tuple(layer for layer in range(1, num_layers + 1) if layer not in dropped)


def pruned_config(model: ModelConfig, kept: Sequence[int]) -> ModelConfig:
    """Returns the shape of `model` with the layers `kept` alone, which get new numbers."""
    dense = tuple(number for number, layer in enumerate(kept, 1) if layer in model.dense_layers)
    return dataclasses.replace(model, num_layers=len(kept), dense_layers=dense)


class PrunedBackbone(RenamedTensors):
    """A BackboneSource with some layers of another one."""

    def __init__(self, source: BackboneSource, model: ModelConfig, kept: Sequence[int]):
        """`model` is the shape of the pruned model."""
        prefix, origins = f"{HF_NAMES[model.family].layers}.", {}
        for name in backbone_tensor_shapes(model):
            index, _, rest = name.removeprefix(prefix).partition(".")
            origins[name] = f"{prefix}{kept[int(index)] - 1}.{rest}" if name.startswith(prefix) else name
        super().__init__(source, origins)
        self._files = source.weight_files()
        self.folder, self.manifest_verified = source.folder, source.manifest_verified

    def weight_files(self) -> set[str]:
        """Returns the names of the files that hold tensors."""
        return self._files

    def check_complete(self, config: ModelConfig) -> None:
        """Raises InputError where a tensor of `config` is missing or has another shape."""
        for name, shape in backbone_tensor_shapes(config).items():
            self.check_shape(name, shape)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None: ...


def pruned_source(model: ExportSource, dropped: Sequence[int], special: dict[str, int]) -> ExportSource:
    """Returns `model`, without exits, without the layers `dropped`. It needs `model` to stay open.

    `special` holds token ids for config.json that the model's own lacks.
    """
    kept = kept_layers(model.model.num_layers, dropped)
    config = pruned_config(model.model, kept)
    described: dict[str, Any] = plain_description(model, config, kept, special)
    return dataclasses.replace(
        model, source=PrunedBackbone(model.source, config, kept), model=config, description=described, artifact=None
    )
