"""One safetensors file, read by positional reads: no byte of it stays mapped or in memory, however large it is.

The header is checked as a whole before anything is believed: the tensors it tells of must fill the file, one after the other.
"""
import itertools
import json
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ee_tuning.checkpoint.names import Shape
from ee_tuning.errors import InputError

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
"""safetensors' names of the types a model may be stored in."""
_TORCH_DTYPES = {**DTYPES, "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8,
                 "BOOL": torch.bool, "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2}
_BITS = {**{name: 8 * dtype.itemsize for name, dtype in _TORCH_DTYPES.items()}, "U64": 64, "U32": 32, "U16": 16, "C64": 64,
         "F8_E8M0": 8, "F6_E2M3": 6, "F6_E3M2": 6, "F4": 4}
_MAX_HEADER_BYTES = 100_000_000  # the format's own limit
_REMEDY = "fetch it again"


@dataclass(frozen=True)
class StoredEntry:
    """A tensor of a file, as the header tells of it."""

    dtype: str
    """In safetensors' spelling."""
    shape: Shape
    start: int
    """Of its bytes, from the beginning of the file."""
    stop: int


class SafetensorsFile:
    """An open file. Raises InputError, naming it, where it can not be read or its header does not describe it."""

    def __init__(self, path: Path):
        self.path = path
        try:
            self._handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise InputError(f"{path} can not be read: {error.strerror}; {_REMEDY}") from error
        try:
            self.tensors = _read_header(self._handle)
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            self.close()
            raise InputError(f"{path} is not a whole safetensors file: {_told(error)}; {_REMEDY}") from error

    def close(self) -> None:
        """Gives the file back; harmless when done twice."""
        if self._handle >= 0:
            os.close(self._handle)
            self._handle = -1

    __del__ = close

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """[stop - start, …]: these rows, as stored; no other bytes are read."""
        entry = self.tensors[name]
        assert 0 <= start <= stop <= entry.shape[0], (name, start, stop, entry)
        out, data = self._allocated(name, (stop - start, *entry.shape[1:]))
        self._read(name, data, entry.start + start * math.prod(entry.shape[1:]) * out.itemsize)
        return out

    def columns(self, name: str, start: int, stop: int) -> Tensor:
        """[n, stop - start, …]: these columns, as stored. One read a row: no other bytes are read."""
        entry = self.tensors[name]
        assert 0 <= start <= stop <= entry.shape[1], (name, start, stop, entry)
        out, data = self._allocated(name, (entry.shape[0], stop - start, *entry.shape[2:]))
        column = math.prod(entry.shape[2:]) * out.itemsize
        row, width = entry.shape[1] * column, (stop - start) * column
        for index in range(entry.shape[0]):
            self._read(name, data[index * width:(index + 1) * width], entry.start + index * row + start * column)
        return out

    def full(self, name: str) -> Tensor:
        """The whole tensor, as stored."""
        entry = self.tensors[name]
        out, data = self._allocated(name, entry.shape)
        self._read(name, data, entry.start)
        return out

    def _allocated(self, name: str, shape: Shape) -> tuple[Tensor, memoryview]:
        """A tensor to be filled, and its bytes."""
        entry = self.tensors[name]
        if entry.dtype not in _TORCH_DTYPES:
            raise InputError(f"{self.path}: tensor {name} is stored as {entry.dtype}, which can not be read here")
        out = torch.empty(shape, dtype=_TORCH_DTYPES[entry.dtype])
        return out, out.reshape(-1).view(torch.uint8).numpy().data

    def _read(self, name: str, data: memoryview, offset: int) -> None:
        done = 0
        while done < len(data):  # one call reads at most 2 GB
            try:
                count = os.preadv(self._handle, [data[done:]], offset + done)
            except OSError as error:
                raise InputError(f"{self.path}: tensor {name} can not be read: {error.strerror}; {_REMEDY}") from error
            if count == 0:
                raise InputError(f"{self.path} was cut short while it was read, in tensor {name}; {_REMEDY}")
            done += count


def refuse_doubles(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """For json: an object whose keys are all different. Raises ValueError, where json keeps the later one in silence."""
    tree = dict(pairs)
    if len(tree) != len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{next(name for name in names if names.count(name) > 1)} stands in it twice")
    return tree


def _read_header(handle: int) -> dict[str, StoredEntry]:
    size = os.fstat(handle).st_size
    length = int.from_bytes(os.pread(handle, 8, 0), "little")
    if size < 8 or length > min(size - 8, _MAX_HEADER_BYTES):
        raise ValueError(f"it has {size} bytes, of which {length} are said to be header")
    text = os.pread(handle, length, 8)
    if not text.startswith(b"{"):
        raise ValueError("its header is no JSON object")
    tree = json.loads(text.decode(), object_pairs_hook=refuse_doubles)
    metadata = tree.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise ValueError("its __metadata__ must map texts to texts")
    entries = {name: _entry(name, fields, 8 + length) for name, fields in tree.items()}
    in_order = sorted(entries.items(), key=lambda item: (item[1].start, item[1].stop))
    ends = [8 + length, *(entry.stop for _, entry in in_order)]
    for end, (name, entry) in zip(ends, in_order, strict=False):
        if entry.start != end:
            raise ValueError(f"tensor {name} must begin at byte {end}, where the one before ends, and is said to begin at {entry.start}")
    if ends[-1] != size:
        raise ValueError(f"its tensors end at byte {ends[-1]}, and it has {size}")
    return entries


def _entry(name: str, fields: dict[str, Any], begin: int) -> StoredEntry:
    dtype, shape, offsets = fields["dtype"], fields["shape"], fields["data_offsets"]
    if dtype not in _BITS:
        raise ValueError(f"tensor {name} is of the unknown type {dtype!r}")
    if len(offsets) != 2 or not all(type(n) is int and n >= 0 for n in itertools.chain(shape, offsets)):
        raise ValueError(f"tensor {name} has the shape {shape} and lies at {offsets}")
    start, stop = offsets
    if math.prod(shape) * _BITS[dtype] != 8 * (stop - start):
        raise ValueError(f"tensor {name} of shape {shape} in {dtype} can not take {stop - start} bytes")
    return StoredEntry(dtype, tuple(shape), begin + start, begin + stop)


def _told(error: Exception) -> str:
    """On one line, and not as long as a hostile file would have it."""
    text = f"{error.args[0]} is missing from its header" if isinstance(error, KeyError) else str(error)
    return " ".join(text.split())[:300]
