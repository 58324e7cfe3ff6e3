"""Megatron-core's distributed checkpoints: `.metadata`, `.distcp` files, `common.pt`.

They are read by slices, whatever layout wrote them: each rank copies the rectangles it needs from the mapped files.
Layers, and the experts of each layer, may be stacked in one tensor (`decoder.layers.mlp.experts.experts.…`) or stand
alone (`decoder.layers.3.mlp.experts.experts.5.…`); norms may have the local spec's names or Transformer Engine's. The
formats `torch_dcp` and `fsdp_dtensor` have the same files without `common.pt`, and names that begin with `model.`;
`torch_dist` has no `common.pt` either since Megatron-core 0.19. Its former content lies among the tensors.
"""

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ee_tuning.checkpoint.hybrid_layers import FINAL_NORM as HYBRID_FINAL_NORM
from ee_tuning.checkpoint.hybrid_layers import HybridLayers
from ee_tuning.checkpoint.megatron_source import MegatronSource, is_harmless, norm_alias
from ee_tuning.checkpoint.names import backbone_parameter_names
from ee_tuning.errors import InputError
from ee_tuning.model_config.config import ModelConfig
from ee_tuning.notices import warn_once
from ee_tuning.storage.links import check_links
from ee_tuning.storage.metadata_pickle import METADATA, read_metadata_pickle
from ee_tuning.storage.open_files import MappedFile
from ee_tuning.storage.tensor_slice import TensorShape
from ee_tuning.storage.torch_file import Archive, StoredTensor, saved_arguments

_BESIDE = re.compile(r"(chained_\d+\.)?(optimizer|optimizer_state)\.|exits\.\d+\.|rng_state|rerun_state_machine")
"""Keys of data that is saved beside a model."""
_FURTHER_TOKENS = "mtp."
"""Megatron's layers for multi-token prediction."""
_LAYER = re.compile(r"(decoder\.layers\.)(\d+)\.(.+)")
_EXPERT = re.compile(r"(mlp\.experts\.)local_experts\.(\d+)\.(.+)")
_COMMON_STATE = "common_state/shard_0_1"
"""Key of the non-tensor data in a checkpoint of Megatron-core 0.19."""
_FINAL_NORM = "decoder.final_layernorm.weight"


@dataclass(frozen=True)
class _ChunkOnDisk:
    """A rectangle of a stored tensor, and its bytes in a file."""

    offsets: TensorShape
    sizes: TensorShape
    file: str
    start: int
    length: int


class DistributedCheckpoint:
    """The tensors of a distributed checkpoint, read by rectangles.

    Raises InputError, naming the file, where anything in it is invalid.
    """

    def __init__(self, folder: Path):
        # Imported here: it takes a third of the start of commands on other files.
        from torch.distributed.checkpoint.metadata import TensorStorageMetadata

        self.folder = folder
        metadata = read_metadata_pickle(folder)
        self.shapes: dict[str, TensorShape] = {}
        self.dtypes: dict[str, torch.dtype] = {}
        self._chunks: dict[str, list[_ChunkOnDisk]] = {}
        try:
            places = {
                (index.fqn, tuple(index.offset)): info
                for index, info in metadata.storage_data.items()
                if index.offset is not None
            }
            if len({(info.relative_path, info.offset) for info in places.values()}) != len(places):
                raise ValueError("two tensors in one place")
            for key, entry in metadata.state_dict_metadata.items():
                if isinstance(entry, TensorStorageMetadata):
                    self.shapes[key], self.dtypes[key] = tuple(entry.size), entry.properties.dtype
                    self._chunks[key] = [_chunk(chunk, places[key, tuple(chunk.offsets)]) for chunk in entry.chunks]
            self._objects = {
                index.fqn: _place(info) for index, info in metadata.storage_data.items() if index.offset is None
            }
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise InputError(
                f"{folder / METADATA} does not describe a distributed checkpoint: {error!r}; fetch it again"
            ) from error
        self._files: dict[str, MappedFile] = {}
        self._items: dict[tuple[str, int], StoredTensor] = {}

    def rectangle(self, key: str, lower: TensorShape, upper: TensorShape, *, is_checked: bool) -> Tensor:
        """Copies a rectangle [upper - lower] from the chunks that it overlaps. `is_checked`: their checksums are
        verified first.
        """
        out = torch.empty([high - low for low, high in zip(lower, upper, strict=True)], dtype=self.dtypes[key])
        boxes: list[tuple[TensorShape, TensorShape]] = []
        for chunk in self._chunks[key]:
            low = tuple(map(max, lower, chunk.offsets))
            high = tuple(
                min(end, offset + size) for end, offset, size in zip(upper, chunk.offsets, chunk.sizes, strict=True)
            )
            if any(map(int.__ge__, low, high)):
                continue
            if any(
                all(map(int.__lt__, low, other_high)) and all(map(int.__lt__, other_low, high))
                for other_low, other_high in boxes
            ):
                raise InputError(f"{self.folder / METADATA}: two chunks of {key} overlap; fetch the checkpoint again")
            boxes.append((low, high))
            try:
                stored = self._item(key, chunk)
                if is_checked:
                    stored.check()
            except InputError as error:
                raise InputError(f"{error} (it is where {self.folder / METADATA} says that {key} is)") from error
            stored.copy_part(chunk.sizes, _slices(low, high, chunk.offsets), out[_slices(low, high, lower)])
        if sum(math.prod(map(int.__sub__, high, low)) for low, high in boxes) != out.numel():
            raise InputError(f"{self.folder / METADATA}: no file holds all of {key}; fetch the checkpoint again")
        return out

    def stored_tensors(self) -> Iterator[tuple[str, str, StoredTensor]]:
        """Yields every chunk of every tensor: key, file, and stored data. Raises InputError where chunks do not cover a
        tensor.
        """
        for key, chunks in self._chunks.items():
            if sum(math.prod(chunk.sizes) for chunk in chunks) != math.prod(self.shapes[key]):
                raise InputError(
                    f"{self.folder / METADATA}: the chunks of {key} are not all of it; fetch the checkpoint again"
                )
            for chunk in chunks:
                yield key, chunk.file, self._item(key, chunk)

    def files(self) -> set[str]:
        """Returns the names of the files that hold tensors."""
        return {chunk.file for chunks in self._chunks.values() for chunk in chunks}

    def arguments(self, *, is_trusted: bool) -> dict[str, Any] | None:
        """Returns the arguments that were saved among the tensors, or None. `is_trusted` as in `Archive`."""
        for key in filter(self._objects.__contains__, (_COMMON_STATE, "args")):
            file, start, length = self._objects[key]
            mapped = self._file(key, file)
            saved = Archive(self.folder / file, mapped, start, start + length, is_trusted=is_trusted).content
            if key == _COMMON_STATE:  # an object of one shard
                return saved_arguments(saved[0]) if isinstance(saved, list) and saved else None
            return saved_arguments({"args": saved})
        return None

    def _file(self, key: str, file: str) -> MappedFile:
        if file not in self._files:
            if Path(file).name != file or file in ("", ".."):
                raise InputError(f"{self.folder / METADATA}: {key} must be in a file of this very folder, got {file!r}")
            check_links(self.folder, self.folder / file)
            self._files[file] = MappedFile(self.folder / file)
        return self._files[file]

    def _item(self, key: str, chunk: _ChunkOnDisk) -> StoredTensor:
        place = (chunk.file, chunk.start)
        if place not in self._items:
            mapped = self._file(key, chunk.file)
            archive = Archive(self.folder / chunk.file, mapped, chunk.start, chunk.start + chunk.length)
            stored = archive.content
            if (
                not isinstance(stored, StoredTensor)
                or math.prod(stored.shape) != math.prod(chunk.sizes)
                or stored.dtype != self.dtypes[key]
            ):
                raise archive.broken(
                    f"bytes {chunk.start} to {chunk.start + chunk.length} do not hold the part of {key} that "
                    f"{METADATA} says they do"
                )
            self._items[place] = stored
        return self._items[place]


class MegatronReader(MegatronSource):
    """A backbone in a distributed checkpoint of a stock GPTModel or HybridModel; see TensorSource."""

    def __init__(self, checkpoint: DistributedCheckpoint, config: ModelConfig):
        super().__init__(checkpoint.folder, config)
        self.checkpoint = checkpoint
        # The optimizer's states have the same names behind longer prefixes.
        self._prefix, norm = min(
            (
                (key.removesuffix(norm), norm)
                for key in checkpoint.shapes
                for norm in (_FINAL_NORM, HYBRID_FINAL_NORM)
                if key.endswith(norm)
            ),
            key=lambda found: len(found[0]),
            default=("", _FINAL_NORM),
        )
        self._hybrid: HybridLayers | None = None
        if norm == HYBRID_FINAL_NORM:
            own = [key.removeprefix(self._prefix) for key in checkpoint.shapes if key.startswith(self._prefix)]
            self._hybrid = HybridLayers(own, self.folder / METADATA)

    def stored_shape(self, parameter: str, rank: int) -> TensorShape | None:
        """Returns the shape of the whole parameter. Tensors of a distributed checkpoint are not sharded."""
        shapes = []
        for key, entry in self._places(parameter):
            shape = self.checkpoint.shapes[key]
            if any(map(int.__ge__, entry, shape)):
                return None
            shapes.append(shape[len(entry) :])
        return (sum(shape[0] for shape in shapes), *shapes[0][1:]) if shapes and all(shapes) else None

    def stored_dtype(self, parameter: str) -> torch.dtype:
        """Returns the dtype of an existing parameter."""
        return self.checkpoint.dtypes[self._places(parameter)[0][0]]

    def path(self, parameter: str, rank: int) -> Path:
        """Returns the metadata file, because a parameter's rows may lie in several files."""
        return self.folder / METADATA

    def read(self, parameter: str, rank: int, rows: slice, columns: slice | None) -> Tensor:
        """Reads a rectangle. A single row is read without its checksum; otherwise a fingerprint would read the whole
        checkpoint.
        """
        parts, row = [], 0
        for key, entry in self._places(parameter):
            shape = self.checkpoint.shapes[key][len(entry) :]
            lower, upper = max(rows.start - row, 0), min(rows.stop - row, shape[0])
            row += shape[0]
            if lower >= upper:
                continue
            width = [(columns.start, columns.stop) if columns else (0, size) for size in shape[1:]]
            bounds = [*((index, index + 1) for index in entry), (lower, upper), *width]
            part = self.checkpoint.rectangle(
                key,
                tuple(low for low, _ in bounds),
                tuple(high for _, high in bounds),
                is_checked=rows.stop - rows.start > 1 and not self.manifest_verified,
            )
            parts.append(part[(0,) * len(entry)])
        return torch.cat(parts) if len(parts) > 1 else parts[0]

    def weight_files(self) -> set[str]:
        """Returns the names of the files that hold tensors."""
        return self.checkpoint.files()

    def unexpected_keys(self) -> Iterator[tuple[str, Path]]:
        """Yields the tensors that neither `config` explains nor belong to optimizer, random states or exits beside the
        model.
        """
        used: dict[str, set[tuple[int, ...]]] = {}
        for parameter in backbone_parameter_names(self.config):
            for key, entry in self._places(parameter):
                used.setdefault(key, set()).add(entry)
        known = {*used, *map(norm_alias, used)}  # a norm may be stored under both of its names, for either layer spec
        for key in sorted(self.checkpoint.shapes):
            name = key.removeprefix(self._prefix)
            if name.startswith(_FURTHER_TOKENS):
                warn_once(
                    f"{self.folder}: {name} and what else begins with {_FURTHER_TOKENS} is not read: it predicts tokens after the "
                    "next one, and changes nothing in the model itself"
                )
            elif not (
                key in known or _BESIDE.match(key) or is_harmless(name, ties_embeddings=self.config.ties_embeddings)
            ):
                yield key, self.folder / METADATA
        for key, entries in used.items():
            stack = self.checkpoint.shapes[key][: len(next(iter(entries)))]
            if math.prod(stack) != len(entries):
                yield f"{key} of {' × '.join(map(str, stack))} layers or experts", self.folder / METADATA

    def _places(self, parameter: str) -> list[tuple[str, tuple[int, ...]]]:
        """Returns the stored tensors that a parameter consists of, one below the other, and the entry of a stack; None
        if absent.
        """
        stored = self._hybrid.name(parameter) if self._hybrid else parameter
        for name in (stored, norm_alias(stored)):
            for key, entry in stacked_names(name):
                key = self._prefix + key
                for keys in ([key], [f"{key}_w", f"{key}_v"]):  # the halves of a gated MLP may be stored separately
                    if all(each in self.checkpoint.shapes for each in keys):
                        return [(each, entry) for each in keys]
        return []


def stacked_names(parameter: str) -> list[tuple[str, tuple[int, ...]]]:
    """Returns the names that stock Megatron-core may use for a parameter, with its entry in the tensor of that name.

    Entries count the layers and, within them, the experts, where these are stacked.
    """
    layer = _LAYER.fullmatch(parameter)
    if layer is None:
        return [(parameter, ())]
    name, expert = layer[3], _EXPERT.fullmatch(layer[3])
    names: list[tuple[str, tuple[int, ...]]] = [(name, ())]
    if expert:
        names = [
            (f"{expert[1]}experts.{expert[3]}", (int(expert[2]),)),
            (f"{expert[1]}experts.{expert[2]}.{expert[3]}", ()),
            (f"{expert[1]}{expert[3]}{expert[2]}", ()),
            (name, ()),
        ]
    return [
        *((f"{layer[1]}{layer[2]}.{each}", entry) for each, entry in names),
        *((layer[1] + each, (int(layer[2]), *entry)) for each, entry in names),
    ]


def _chunk(chunk: Any, info: Any) -> _ChunkOnDisk:
    offsets, sizes = tuple(chunk.offsets), tuple(chunk.sizes)
    file, start, length = _place(info)
    if len(offsets) != len(sizes) or not all(isinstance(n, int) and n >= 0 for n in (*offsets, *sizes)):
        raise ValueError("a chunk of a negative size")
    return _ChunkOnDisk(offsets, sizes, file, start, length)


def _place(info: Any) -> tuple[str, int, int]:
    """Returns file, first byte and length."""
    if getattr(info, "transform_descriptors", None):
        raise ValueError(f"it was written with {info.transform_descriptors}, which is not supported")
    if not all(isinstance(n, int) and n >= 0 for n in (info.offset, info.length)):
        raise ValueError("a chunk of a negative size")
    return str(info.relative_path), info.offset, info.length


def _slices(low: TensorShape, high: TensorShape, origin: TensorShape) -> tuple[slice, ...]:
    return tuple(slice(start - zero, stop - zero) for start, stop, zero in zip(low, high, origin, strict=True))
