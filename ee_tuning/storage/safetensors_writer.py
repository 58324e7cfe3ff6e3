"""Writes safetensors files tensor by tensor, in any order and by several processes at once, never all in memory.

Sizes are known beforehand, so the headers are written first and every tensor has its position. The bytes depend on
names, shapes, dtype and values only. Files get the umask's default mode (safetensors' own writer sets 0600).
"""

import os
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from ee_tuning.storage.safetensors_layout import SHARD_BYTES, SafetensorsLayout
from ee_tuning.storage.tensor_blocks import as_bytes
from ee_tuning.storage.tensor_slice import TensorShape


class SafetensorsWriter:
    """Writes `<stem>.safetensors`, or shards without their index, into an existing folder.

    Every process creates its own writer from the same shapes.
    """

    def __init__(
        self,
        folder: Path,
        stem: str,
        shapes: Mapping[str, TensorShape],
        dtype: torch.dtype,
        shard_bytes: int = SHARD_BYTES,
    ):
        self.folder, self.dtype = folder, dtype
        self.layout = SafetensorsLayout(stem, shapes, dtype, shard_bytes)
        self.shapes = self.layout.shapes

    def create(self) -> None:
        """Creates the files at their full length, with headers. One process calls it, before any writes."""
        for file, header in self.layout.headers.items():
            with open(self.folder / file, "xb") as out:
                out.write(header)
                out.truncate(self.layout.file_bytes(file))

    def write(self, name: str, tensor: Tensor) -> None:
        """Writes one whole tensor, cast to the writer's dtype, at its position."""
        place, shape = self.layout.places[name], self.shapes[name]
        assert tuple(tensor.shape) == shape, (name, tuple(tensor.shape), shape)
        data = as_bytes(tensor.detach().to("cpu", self.dtype).contiguous())
        file = os.open(self.folder / place.file, os.O_WRONLY)
        try:
            done = 0
            while done < len(data):  # one call writes at most 2 GB
                done += os.pwrite(file, data[done:], place.offset + done)
            os.fsync(file)
        finally:
            os.close(file)
