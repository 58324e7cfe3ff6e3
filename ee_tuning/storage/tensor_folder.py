"""Writes a folder of tensors that come one after the other from any rank, such as gathered weights of a run."""

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from ee_tuning.parallel.collectives import on_first_rank
from ee_tuning.parallel.topology import Topology
from ee_tuning.progress import Advance
from ee_tuning.storage.atomic_write import os_errors_as_input_errors
from ee_tuning.storage.safetensors_layout import SHARD_BYTES, SafetensorsLayout
from ee_tuning.storage.safetensors_writer import SafetensorsWriter
from ee_tuning.storage.shared_folder import write_shared_folder
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
        writer, written = SafetensorsWriter(partial, stem, shapes, dtype, shard_bytes), []

        def create() -> None:
            with os_errors_as_input_errors(output):
                writer.create()

        on_first_rank(topology, create)
        for name, tensor in tensors:
            writer.write(name, tensor)
            written.append(name)
        return written

    def finish(partial: Path, reports: list[list[str]]) -> dict[str, str]:
        names = [name for written in reports for name in written]
        assert sorted(names) == sorted(shapes), sorted(set(names) ^ set(shapes)) or "a tensor came from two ranks"
        layout.write_index(partial)
        complete(partial)
        return {}

    write_shared_folder(output, topology, {}, write, finish, num_bytes=layout.num_bytes)
