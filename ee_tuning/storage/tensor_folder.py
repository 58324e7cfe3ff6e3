"""Writes a folder of tensors that come one after the other from any rank, such as gathered weights of a run.

Sizes are known beforehand, so the headers are written first and every tensor has its position: tensors come in any
order, by several processes at once, and are never all in memory. The bytes depend on names, shapes, dtype and values
only. Files get the umask's default mode (safetensors' own writer sets 0600).
"""

import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from ee_tuning.parallel.collectives import on_first_rank
from ee_tuning.parallel.topology import Topology
from ee_tuning.progress import Advance
from ee_tuning.storage.atomic_write import os_errors_as_input_errors
from ee_tuning.storage.safetensors_layout import SHARD_BYTES, SafetensorsLayout
from ee_tuning.storage.shared_folder import write_shared_folder
from ee_tuning.storage.tensor_blocks import as_bytes
from ee_tuning.storage.tensor_slice import TensorShape


def write_tensor_folder(
    output: Path,
    topology: Topology | None,
    tensors: Iterable[tuple[str, Tensor]],
    stem: str,
    shapes: Mapping[str, TensorShape],
    dtype: torch.dtype,
    complete: Callable[[Path], None],
    *,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Writes `tensors` as STEM.safetensors, or shards with an index, in `dtype`. All ranks call it and iterate over
    `tensors`, which may run collectives; each tensor comes from exactly one rank. `complete` writes the folder's other
    files on rank 0.

    Raises InputError where the disk refuses. `output` is then as it was.
    """
    layout = SafetensorsLayout(stem, shapes, dtype, shard_bytes)

    def write(partial: Path, own: list[str], advance: Advance) -> list[str]:
        def create() -> None:
            with os_errors_as_input_errors(output):
                _create_files(partial, layout)

        on_first_rank(topology, create)
        written = []
        for name, tensor in tensors:
            _write_tensor(partial, layout, name, tensor)
            written.append(name)
        return written

    def finish(partial: Path, reports: list[list[str]]) -> dict[str, str]:
        names = [name for written in reports for name in written]
        assert sorted(names) == sorted(shapes), sorted(set(names) ^ set(shapes)) or "a tensor came from two ranks"
        layout.write_index(partial)
        complete(partial)
        return {}

    write_shared_folder(output, topology, {}, write, finish, num_bytes=layout.num_bytes)


def _create_files(folder: Path, layout: SafetensorsLayout) -> None:
    """Creates the files at their full length, with headers. One process calls it, before any writes."""
    for file, header in layout.headers.items():
        with open(folder / file, "xb") as out:
            out.write(header)
            out.truncate(layout.file_bytes(file))


def _write_tensor(folder: Path, layout: SafetensorsLayout, name: str, tensor: Tensor) -> None:
    """Writes one whole tensor, cast to the layout's dtype, at its position."""
    place, shape = layout.places[name], layout.shapes[name]
    assert tuple(tensor.shape) == shape, (name, tuple(tensor.shape), shape)
    data = as_bytes(tensor.detach().to("cpu", layout.dtypes[name]).contiguous())
    file = os.open(folder / place.file, os.O_WRONLY)
    try:
        done = 0
        while done < len(data):  # one call writes at most 2 GB
            done += os.pwrite(file, data[done:], place.offset + done)
        os.fsync(file)
    finally:
        os.close(file)
