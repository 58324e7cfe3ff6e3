"""Safetensors files written tensor by tensor, in any order and by any number of processes at once, never held in memory whole.

Sizes are known beforehand, so the headers are written and every tensor has its place. The bytes depend on names, shapes, dtype and values
alone. Files get the modes that the umask leaves (safetensors' own writer makes them 0600).
"""
import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ee_tuning.checkpoint.names import Shape
from ee_tuning.checkpoint.safetensors_reader import DTYPES

SHARD_BYTES = 5_000_000_000
"""A file's largest size, as Hugging Face cuts them; a single larger tensor gets a file of its own."""
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class _Place:
    file: str
    offset: int
    shape: Shape


class SafetensorsWriter:
    """`<stem>.safetensors`, or shards and their index, in a folder that exists. Every process makes its own writer from the same shapes."""

    def __init__(self, folder: Path, stem: str, shapes: Mapping[str, Shape], dtype: torch.dtype, shard_bytes: int = SHARD_BYTES):
        self.folder, self.stem, self.dtype = folder, stem, dtype
        self.shapes = dict(shapes)
        self._files = self._assign_files(shard_bytes)
        self._headers = {file: self._header(names) for file, names in self._files.items()}
        self._places = self._assign_places()

    @property
    def num_bytes(self) -> int:
        """Of all tensors."""
        return sum(map(self.tensor_bytes, self.shapes))

    def tensor_bytes(self, name: str) -> int:
        """Of one tensor."""
        return math.prod(self.shapes[name]) * self.dtype.itemsize

    def create(self) -> None:
        """Makes the files at their full length, headers in place, and the index. One process does, before any writes."""
        for file, names in self._files.items():
            with open(self.folder / file, "xb") as out:
                out.write(self._headers[file])
                out.truncate(len(self._headers[file]) + sum(map(self.tensor_bytes, names)))
        if len(self._files) > 1:
            index = {"metadata": {"total_size": self.num_bytes}, "weight_map": {name: place.file for name, place in self._places.items()}}
            (self.folder / f"{self.stem}.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")

    def write(self, name: str, tensor: Tensor) -> None:
        """Puts one whole tensor, cast to the writer's dtype, in its place on the disk."""
        place = self._places[name]
        assert tuple(tensor.shape) == place.shape, (name, tuple(tensor.shape), place.shape)
        data = tensor.detach().to("cpu", self.dtype).contiguous().reshape(-1).view(torch.uint8).numpy().data
        file = os.open(self.folder / place.file, os.O_WRONLY)
        try:
            done = 0
            while done < len(data):  # one call writes at most 2 GB
                done += os.pwrite(file, data[done:], place.offset + done)
            os.fsync(file)
        finally:
            os.close(file)

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
            tree[name] = {"dtype": _NAMES[self.dtype], "shape": list(self.shapes[name]), "data_offsets": [start, stop]}
            start = stop
        text = json.dumps(tree, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)  # the data begins aligned
        return len(text).to_bytes(8, "little") + text

    def _assign_places(self) -> dict[str, _Place]:
        places = {}
        for file, names in self._files.items():
            offset = len(self._headers[file])
            for name in names:
                places[name] = _Place(file, offset, self.shapes[name])
                offset += self.tensor_bytes(name)
        return places
