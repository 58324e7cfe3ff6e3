"""Computes where each tensor lies in a safetensors file, or in shards cut like Hugging Face's, before any is written.

The layout depends on names, shapes and dtypes only, so every process computes the same one.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from ee_tuning.json_file import to_json
from ee_tuning.storage.safetensors_file import TORCH_DTYPES
from ee_tuning.storage.tensor_slice import TensorShape

SHARD_BYTES = 5_000_000_000
"""Largest file size, as Hugging Face cuts shards. A single larger tensor gets its own file."""
_NAMES = {dtype: name for name, dtype in TORCH_DTYPES.items()}


@dataclass(frozen=True)
class TensorLocation:
    """The position of a tensor."""

    file: str
    offset: int


class SafetensorsLayout:
    """The layout of `<stem>.safetensors`, or of shards and their index. `dtypes` holds one per tensor, or one for
    all.
    """

    def __init__(
        self,
        stem: str,
        shapes: Mapping[str, TensorShape],
        dtypes: Mapping[str, torch.dtype] | torch.dtype,
        shard_bytes: int = SHARD_BYTES,
    ):
        self.stem, self.shapes = stem, dict(shapes)
        self.dtypes = dict.fromkeys(shapes, dtypes) if isinstance(dtypes, torch.dtype) else dict(dtypes)
        self.files = self._assign_files(shard_bytes)
        """File -> its tensors, in order."""
        self.headers = {file: self._header(names) for file, names in self.files.items()}
        self.places = self._assign_places()

    @property
    def num_bytes(self) -> int:
        """Size of all tensors in bytes."""
        return sum(map(self.tensor_bytes, self.shapes))

    def tensor_bytes(self, name: str) -> int:
        """Returns the size of one tensor in bytes."""
        return math.prod(self.shapes[name]) * self.dtypes[name].itemsize

    def file_bytes(self, file: str) -> int:
        """Returns the size of a whole file in bytes."""
        return len(self.headers[file]) + sum(map(self.tensor_bytes, self.files[file]))

    def write_index(self, folder: Path) -> None:
        """Writes the index of the shards. A single file needs none."""
        if len(self.files) == 1:
            return
        index = {
            "metadata": {"total_size": self.num_bytes},
            "weight_map": {name: place.file for name, place in self.places.items()},
        }
        (folder / f"{self.stem}.safetensors.index.json").write_text(to_json(index, indent=2) + "\n", encoding="utf-8")

    def _assign_files(self, shard_bytes: int) -> dict[str, list[str]]:
        shards: list[list[str]] = [[]]
        used = 0
        for name in self.shapes:
            if shards[-1] and used + self.tensor_bytes(name) > shard_bytes:
                shards.append([])
                used = 0
            shards[-1].append(name)
            used += self.tensor_bytes(name)
        if len(shards) == 1:
            return {f"{self.stem}.safetensors": shards[0]}
        return {f"{self.stem}-{i:05d}-of-{len(shards):05d}.safetensors": names for i, names in enumerate(shards, 1)}

    def _header(self, names: list[str]) -> bytes:
        tree: dict[str, object] = {"__metadata__": {"format": "pt"}}
        start = 0
        for name in names:
            stop = start + self.tensor_bytes(name)
            tree[name] = {
                "dtype": _NAMES[self.dtypes[name]],
                "shape": list(self.shapes[name]),
                "data_offsets": [start, stop],
            }
            start = stop
        text = to_json(tree, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)  # aligns the data
        return len(text).to_bytes(8, "little") + text

    def _assign_places(self) -> dict[str, TensorLocation]:
        places = {}
        for file, names in self.files.items():
            offset = len(self.headers[file])
            for name in names:
                places[name] = TensorLocation(file, offset)
                offset += self.tensor_bytes(name)
        return places
