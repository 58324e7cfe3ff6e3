"""Writes a distributed checkpoint in torch's format (`.metadata`, `*.distcp`), tensor by tensor and block by block.

torch's own writer needs all tensors of a process in memory at once. Each process writes its own files, and the first
one describes the whole.
"""

import io
import math
import pickle
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)

from ee_tuning.json_file import to_json
from ee_tuning.progress import Advance
from ee_tuning.storage.hashed_file import HashedFile
from ee_tuning.storage.metadata_pickle import METADATA
from ee_tuning.storage.safetensors_layout import SHARD_BYTES
from ee_tuning.storage.tensor_slice import TensorShape
from ee_tuning.storage.torch_archive import ARCHIVE_BYTES, write_tensor


@dataclass(frozen=True)
class Chunk:
    """A rectangle of a tensor of the checkpoint or, with an empty `shape`, an object."""

    key: str
    dtype: torch.dtype = torch.uint8
    shape: TensorShape = ()
    """The shape of the whole tensor."""
    offsets: TensorShape = ()
    sizes: TensorShape = ()


@dataclass(frozen=True)
class StoredChunk:
    """The position of a chunk in its file."""

    chunk: Chunk
    file: str
    start: int
    length: int


class DistcpWriter:
    """Writes one process's files in `folder`, each at most SHARD_BYTES, except that a larger tensor has a file of its
    own.

    A context manager. Raises OSError.
    """

    def __init__(self, folder: Path, rank: int, advance: Advance, *, beside_other_work: bool = False):
        self.written: list[StoredChunk] = []
        self.sums: dict[str, str] = {}
        """sha256 of the closed files, by file name."""
        self._folder, self._rank, self._advance, self._beside_other_work = folder, rank, advance, beside_other_work
        self._file: HashedFile | None = None

    def __enter__(self) -> "DistcpWriter":
        return self

    def __exit__(self, *raised: Any) -> None:
        self._close(*raised)

    def add_tensor(self, chunk: Chunk, blocks: Iterable[Tensor]) -> None:
        """Appends a chunk whose consecutive rows are `blocks`."""
        file = self._room(needed := math.prod(chunk.sizes) * chunk.dtype.itemsize + ARCHIVE_BYTES)
        start = file.num_bytes
        write_tensor(file, chunk.sizes, chunk.dtype, self._counted(blocks))
        assert file.num_bytes - start <= needed, (chunk, file.num_bytes - start)
        self.written.append(StoredChunk(chunk, self._name(), start, file.num_bytes - start))

    def add_object(self, key: str, content: Any) -> None:
        """Appends an object that is no tensor."""
        buffer = io.BytesIO()
        torch.save(content, buffer)
        file = self._room(buffer.tell())
        start = file.num_bytes
        file.write(buffer.getvalue())
        self.written.append(StoredChunk(Chunk(key), self._name(), start, file.num_bytes - start))

    def _counted(self, blocks: Iterable[Tensor]) -> Iterable[Tensor]:
        for block in blocks:
            yield block
            self._advance(block.numel() * block.itemsize)

    def _room(self, needed: int) -> HashedFile:
        """Returns a file with room for `needed` bytes."""
        if self._file is not None and self._file.num_bytes + needed > SHARD_BYTES:
            self._close(None, None, None)
        if self._file is None:
            self._file = HashedFile(self._folder / self._name(), beside_other_work=self._beside_other_work)
        return self._file

    def _name(self) -> str:
        return f"__{self._rank}_{len(self.sums)}.distcp"

    def _close(self, *raised: Any) -> None:
        if self._file is not None:
            self._file.__exit__(*raised)
            if raised[0] is None:
                self.sums[self._name()] = self._file.sha256
            self._file = None


def write_common(folder: Path, content: dict[str, Any]) -> None:
    """Writes `common.pt`, which holds the objects that are not sharded, and `metadata.json`."""
    torch.save(content, folder / "common.pt")
    (folder / "metadata.json").write_text(
        to_json(
            {
                "sharded_backend": "torch_dist",
                "sharded_backend_version": 1,
                "common_backend": "torch",
                "common_backend_version": 1,
            }
        ),
        encoding="utf-8",
    )


def write_metadata(folder: Path, written: Iterable[StoredChunk]) -> None:
    """Writes `.metadata`, which describes the chunks of all processes."""
    tensors: dict[str, TensorStorageMetadata | BytesStorageMetadata] = {}
    places: dict[MetadataIndex, _StorageInfo] = {}
    for each in sorted(written, key=lambda each: (each.chunk.key, each.chunk.offsets)):
        chunk = each.chunk
        info = _StorageInfo(relative_path=each.file, offset=each.start, length=each.length)
        if not chunk.shape:
            tensors[chunk.key] = BytesStorageMetadata()
            places[MetadataIndex(chunk.key)] = info
            continue
        entry = tensors.setdefault(
            chunk.key, TensorStorageMetadata(TensorProperties(dtype=chunk.dtype), torch.Size(chunk.shape), [])
        )
        assert isinstance(entry, TensorStorageMetadata)
        places[MetadataIndex(chunk.key, chunk.offsets, len(entry.chunks))] = info
        entry.chunks.append(ChunkStorageMetadata(torch.Size(chunk.offsets), torch.Size(chunk.sizes)))
    metadata = Metadata(tensors, storage_data=places, storage_meta=StorageMeta(), version="1.0.0")
    (folder / METADATA).write_bytes(pickle.dumps(metadata))
