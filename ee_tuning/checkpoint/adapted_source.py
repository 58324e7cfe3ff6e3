"""A model with trained weights over it: LoRA's products are added to matrices, or tensors take the place of its own.

Everything is still read by slices. A number does not depend on the slice that it is read in, so the fingerprint of a
model with an adapter is that of the merged folder.
"""

import math
from pathlib import Path
from typing import Any, Protocol, Self

import torch
from torch import Tensor

from ee_tuning.checkpoint.names import backbone_tensor_shapes
from ee_tuning.checkpoint.trained_names import PEFT_PREFIX
from ee_tuning.errors import InputError
from ee_tuning.json_file import read_json
from ee_tuning.model_config.config import ModelConfig
from ee_tuning.storage.safetensors_reader import SafetensorsFolder
from ee_tuning.storage.tensor_slice import TensorShape
from ee_tuning.storage.tensor_source import TensorSource

LORA, LORA_STEM = "adapter_config.json", "adapter_model"
TRAINED, TRAINED_STEM = "trained_config.json", "trained"
"""Description and weights of a folder that holds whole tensors."""
_UNSUPPORTED = {
    "use_dora": False,
    "bias": "none",
    "fan_in_fan_out": False,
    "rank_pattern": {},
    "alpha_pattern": {},
    "modules_to_save": None,
    "lora_bias": False,
}
"""Keys of peft's file that change the sum, and the value that is supported."""


class _Base(TensorSource, Protocol):
    """The model: a BackboneSource of formats.py, which imports this file."""

    folder: Path
    manifest_verified: bool

    def weight_files(self) -> set[str]: ...
    def check_complete(self, config: ModelConfig) -> None: ...
    def __exit__(self, *error: object) -> None: ...


class AdaptedSource(TensorSource):
    """`base` with the weights of `folder` over it. A context manager, and a BackboneSource.

    Raises InputError where the folder holds neither form, or tensors that do not fit the model.
    """

    def __init__(self, base: _Base, config: ModelConfig, folder: Path):
        self.base, self.folder, self.adapter = base, base.folder, folder
        is_lora = (folder / LORA).is_file()
        if not is_lora and not (folder / TRAINED).is_file():
            raise InputError(
                f"model.adapter must be a folder with {LORA} (LoRA, as peft saves it) or {TRAINED} (as `tune` writes it), "
                f"and {folder} holds neither"
            )
        self._weights = SafetensorsFolder(folder, LORA_STEM if is_lora else TRAINED_STEM)
        shapes = backbone_tensor_shapes(config)
        self._scale = _lora_scale(folder / LORA) if is_lora else 0.0
        self._pairs = _lora_pairs(self._weights, shapes) if is_lora else {}
        self._replaced = set() if is_lora else _replaced(self._weights, shapes)

    @property
    def manifest_verified(self) -> bool:
        return self.base.manifest_verified

    @manifest_verified.setter
    def manifest_verified(self, value: bool) -> None:
        self.base.manifest_verified = value

    def weight_files(self) -> set[str]:
        """Returns the names of the model's own files."""
        return self.base.weight_files()

    def check_complete(self, config: ModelConfig) -> None:
        self.base.check_complete(config)

    def shape(self, name: str) -> TensorShape:
        """Returns the shape of the whole tensor."""
        return self.base.shape(name)

    def dtype(self, name: str) -> torch.dtype:
        """Returns the dtype of the tensor: the stored one of the file that it is read from."""
        return self._weights.dtype(name) if name in self._replaced else self.base.dtype(name)

    def check_shape(self, name: str, shape: TensorShape) -> None:
        self.base.check_shape(name, shape)

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Returns rows [stop - start, …]."""
        if name in self._replaced:
            return self._weights.rows(name, start, stop)
        own, pair = self.base.rows(name, start, stop), self._pairs.get(name)
        if pair is None:
            return own
        return self._sum(own, self._weights.full(pair[0]), self._weights.rows(pair[1], start, stop))

    def columns(self, name: str, start: int, stop: int) -> Tensor:
        """Returns columns [n, stop - start]."""
        if name in self._replaced:
            return self._weights.columns(name, start, stop)
        own, pair = self.base.columns(name, start, stop), self._pairs.get(name)
        if pair is None:
            return own
        return self._sum(own, self._weights.columns(pair[0], start, stop), self._weights.full(pair[1]))

    def _sum(self, own: Tensor, a: Tensor, b: Tensor) -> Tensor:  # [o, i], [r, i], [o, r] -> [o, i]
        # Rank by rank: a matrix product may round differently for slices of another shape.
        wide = torch.promote_types(own.dtype, torch.float32)
        a, b = a.to(wide), b.to(wide)
        total = torch.zeros(own.shape, dtype=wide)
        for column, row in zip(b.t(), a, strict=True):
            total += column[:, None] * row
        return own.to(wide).add_(total.mul_(self._scale)).to(own.dtype)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._weights.close()
        self.base.__exit__(*error)


def _lora_scale(path: Path) -> float:
    try:
        tree: dict[str, Any] = read_json(path)
        if str(tree["peft_type"]) != "LORA":
            raise InputError(f"{path} must describe LoRA, got peft_type {tree['peft_type']!r}; merge it by peft")
        for key, supported in _UNSUPPORTED.items():
            if (value := tree.get(key, supported)) and value != supported:
                raise InputError(
                    f"{path}: {key} = {value!r} is not supported (must be {supported!r}); merge it by peft"
                )
        rank, alpha = int(tree["r"]), float(tree["lora_alpha"])
        return alpha / (math.sqrt(rank) if tree.get("use_rslora") else rank)
    except InputError:
        raise
    except (OSError, ValueError, KeyError, TypeError, AttributeError, ZeroDivisionError) as error:
        raise InputError(f"{path} is no configuration of LoRA: {error!r}; fetch the adapter again") from error


def _lora_pairs(weights: SafetensorsFolder, shapes: dict[str, TensorShape]) -> dict[str, tuple[str, str]]:
    """Returns the model's tensor -> its A and B. Raises InputError where one fits no matrix."""
    pairs: dict[str, tuple[str, str]] = {}
    for name in weights.names():
        stem, _, kind = name.removeprefix(PEFT_PREFIX).rpartition(".lora_")
        target, partner = f"{stem}.weight", f"{name[: -len(kind)]}{'B' if kind[:1] == 'A' else 'A'}{kind[1:]}"
        if kind not in ("A.weight", "B.weight") or target not in shapes or partner not in weights.files:
            raise InputError(
                f"{weights.table}: tensor {name} is beside no matrix of this model; give the adapter of this model, or merge "
                "it by peft"
            )
        a, b = (name, partner) if kind[0] == "A" else (partner, name)
        (rank, inputs), (outputs, width) = weights.shape(a), weights.shape(b)
        if rank != width or (outputs, inputs) != shapes[target]:
            raise InputError(
                f"{weights.table}: {a} and {b} must fit {target} of shape {list(shapes[target])}, got "
                f"{[rank, inputs]} and {[outputs, width]}; give the adapter of this model"
            )
        pairs[target] = a, b
    return pairs


def _replaced(weights: SafetensorsFolder, shapes: dict[str, TensorShape]) -> set[str]:
    for name in weights.names():
        if name not in shapes:
            raise InputError(f"{weights.table}: the model has no tensor {name}; give the weights trained for it")
        weights.check_shape(name, shapes[name])
    return set(weights.names())
