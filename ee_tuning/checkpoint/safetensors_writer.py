"""Safetensors files written tensor by tensor, in any order and by any number of processes at once, never held in memory
whole.

Sizes are known beforehand, so the headers are written and every tensor has its place. The bytes depend on names,
shapes, dtype and values alone. Files get the modes that the umask leaves (safetensors' own writer makes them 0600).
"""

import os
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from ee_tuning.checkpoint.names import TensorShape
from ee_tuning.checkpoint.safetensors_layout import SHARD_BYTES, SafetensorsLayout
from ee_tuning.checkpoint.tensor_blocks import as_bytes


class SafetensorsWriter:
    """`<stem>.safetensors`, or shards and their index, in a folder that exists; not their index.

    Every process makes its own writer from the same shapes.
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
        """Makes the files at their full length, headers in place. One process does, before any writes."""
        for file, header in self.layout.headers.items():
            with open(self.folder / file, "xb") as out:
                out.write(header)
                out.truncate(self.layout.file_bytes(file))

    def write(self, name: str, tensor: Tensor) -> None:
        """Puts one whole tensor, cast to the writer's dtype, in its place on the disk."""
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
