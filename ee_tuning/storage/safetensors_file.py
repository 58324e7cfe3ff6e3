"""Reads one safetensors file by positional reads, so that none of it stays mapped or in memory. The library maps
files, and a mapped file that is cut short ends the process by SIGBUS.

The header is checked first: its tensors must fill the file one after the other.
"""

import itertools
import math
import operator
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ee_tuning.errors import InputError
from ee_tuning.foreign_content import describe_content
from ee_tuning.json_file import parse_json
from ee_tuning.storage.open_files import OpenFile, Reopened, unreadable
from ee_tuning.storage.tensor_slice import TensorShape

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
"""safetensors' names of the dtypes a model may be stored in."""
TORCH_DTYPES = {
    **DTYPES,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}
"""Those, and all others that are read and written."""
_BITS = {
    **{name: 8 * dtype.itemsize for name, dtype in TORCH_DTYPES.items()},
    "U64": 64,
    "U32": 32,
    "U16": 16,
    "C64": 64,
    "F8_E8M0": 8,
    "F6_E2M3": 6,
    "F6_E3M2": 6,
    "F4": 4,
}
_MAX_HEADER_BYTES = 100_000_000  # the format's own limit
_REMEDY = "fetch it again"


TensorRange = tuple[slice, ...]
"""A slice of each leading dimension."""


@dataclass(frozen=True)
class TensorEntry:
    """A tensor of a file, from the header."""

    dtype: str
    """The dtype by safetensors' name."""
    shape: TensorShape
    begin: int
    """Position of the first byte in the file."""
    end: int


class SafetensorsFile:
    """A file, opened on demand.

    Raises InputError, naming it, where it can not be read or its header does not describe it.
    """

    def __init__(self, path: Path):
        self.path = path
        self._file: Reopened[OpenFile] = Reopened(path, OpenFile)
        try:
            self.entries = _read_header(self._file.now().handle)
            """Entries by name, in the order of storage."""
        except (OSError, ValueError, KeyError, TypeError) as error:
            self.close()
            if reason := describe_content(path):
                raise InputError(f"{path} {reason}") from error
            raise InputError(f"{path} is not a whole safetensors file: {_in_one_line(error)}; {_REMEDY}") from error

    def close(self) -> None:
        """Closes the file until it is read again. May be called twice."""
        self._file.close()

    def read(self, name: str, part: TensorRange = ()) -> Tensor:
        """Reads this part of the tensor, as stored, and no other bytes. Dimensions missing in `part` are whole."""
        entry = self.entries[name]
        if entry.dtype not in TORCH_DTYPES:
            raise InputError(f"{self.path}: tensor {name} is stored as {entry.dtype}, which can not be read here")
        whole = [(0, size) for size in entry.shape]
        bounds = [_bounds(each, size) for each, size in zip(part, entry.shape, strict=False)] + whole[len(part) :]
        out = torch.empty([stop - start for start, stop in bounds], dtype=TORCH_DTYPES[entry.dtype])
        # The last cut dimension and all after it are contiguous; there is one such run for each index before them.
        cut = max((dim for dim in range(len(bounds)) if bounds[dim] != whole[dim]), default=0)
        strides = [math.prod(entry.shape[dim + 1 :]) * out.itemsize for dim in range(len(bounds))]
        data = out.reshape(-1).view(torch.uint8).numpy().data
        done, length = 0, math.prod(out.shape[cut:]) * out.itemsize
        for index in itertools.product(*(range(*bound) for bound in bounds[:cut])):
            start = entry.begin + sum(
                map(operator.mul, (*index, *(start for start, _ in bounds[cut : cut + 1])), strides)
            )
            self._fill(name, data[done : done + length], start)
            done += length
        return out

    def _fill(self, name: str, data: memoryview, offset: int) -> None:
        try:
            self._file.now().read_at(offset, data)
        except OSError as error:
            raise unreadable(self.path, error) from error
        except EOFError as error:
            raise InputError(f"{self.path} was cut short while it was read, in tensor {name}; {_REMEDY}") from error


def _bounds(part: slice, size: int) -> tuple[int, int]:
    start, stop = part.start or 0, size if part.stop is None else part.stop
    assert 0 <= start <= stop <= size and part.step is None, (part, size)
    return start, stop


def _read_header(handle: int) -> dict[str, TensorEntry]:
    size = os.fstat(handle).st_size
    length = int.from_bytes(os.pread(handle, 8, 0), "little")
    if size < 8 or length > min(size - 8, _MAX_HEADER_BYTES):
        raise ValueError(f"it has {size} bytes, of which {length} are said to be header")
    text = os.pread(handle, length, 8)
    if not text.startswith(b"{"):
        raise ValueError("its header is no JSON object")
    tree = parse_json(text)
    metadata = tree.pop("__metadata__", None)  # some writers write null for none
    metadata = {} if metadata is None else metadata
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise ValueError("its __metadata__ must map texts to texts")
    entries = {name: _entry(name, fields, 8 + length) for name, fields in tree.items()}
    in_order = dict(sorted(entries.items(), key=lambda item: (item[1].begin, item[1].end)))
    ends = [8 + length, *(entry.end for entry in in_order.values())]
    for end, (name, entry) in zip(ends, in_order.items(), strict=False):
        if entry.begin != end:
            raise ValueError(
                f"tensor {name} must begin at byte {end}, where the one before ends, and is said to begin at {entry.begin}"
            )
    if ends[-1] != size:
        raise ValueError(f"its tensors end at byte {ends[-1]}, and it has {size}")
    return in_order


def _entry(name: str, fields: dict[str, Any], begin: int) -> TensorEntry:
    dtype, shape, offsets = fields["dtype"], fields["shape"], fields["data_offsets"]
    if dtype not in _BITS:
        raise ValueError(f"tensor {name} is of the unknown type {dtype!r}")
    if len(offsets) != 2 or not all(type(n) is int and n >= 0 for n in itertools.chain(shape, offsets)):
        raise ValueError(f"tensor {name} has the shape {shape} and lies at {offsets}")
    start, stop = offsets
    if math.prod(shape) * _BITS[dtype] != 8 * (stop - start):
        raise ValueError(f"tensor {name} of shape {shape} in {dtype} can not take {stop - start} bytes")
    return TensorEntry(dtype, tuple(shape), begin + start, begin + stop)


def _in_one_line(error: Exception) -> str:
    return f"{error.args[0]} is missing from its header" if isinstance(error, KeyError) else str(error)
