"""Writes tensors in torch.save's file format as a stream. torch itself needs the whole tensor in memory, twice.

The format is an uncompressed zip archive: `data.pkl` describes the tensor, `data/0` holds its bytes. torch_file.py
reads it.
"""

import collections
import io
import math
import pickle
import zipfile
from collections.abc import Iterable
from typing import Any, Protocol, cast

import torch
from torch import Tensor
from torch._utils import _rebuild_tensor_v2

from ee_tuning.storage.tensor_blocks import as_bytes
from ee_tuning.storage.tensor_slice import TensorShape

_STORAGES = {
    torch.float64: torch.DoubleStorage,
    torch.float32: torch.FloatStorage,
    torch.float16: torch.HalfStorage,
    torch.bfloat16: torch.BFloat16Storage,
}
_ZIP64 = 1 << 31
ARCHIVE_BYTES = 4096
"""Upper bound of an archive's bytes beside its tensor's."""


class ByteSink(Protocol):
    """A destination of sequential writes."""

    def write(self, data: bytes) -> int:
        """Appends the bytes and returns their number."""

    def flush(self) -> None:
        """Flushes buffered bytes; may do nothing."""


def write_tensor(out: ByteSink, shape: TensorShape, dtype: torch.dtype, blocks: Iterable[Tensor]) -> None:
    """Appends an archive of one tensor whose consecutive rows are `blocks`."""
    num_bytes = math.prod(shape) * dtype.itemsize
    with zipfile.ZipFile(cast(Any, out), "w", zipfile.ZIP_STORED) as archive:
        archive.writestr(_entry("data.pkl"), _described(shape, dtype))
        archive.writestr(_entry("byteorder"), "little")
        written = 0
        with archive.open(_entry("data/0"), "w", force_zip64=num_bytes >= _ZIP64) as record:
            for block in blocks:
                assert block.dtype == dtype, (block.dtype, dtype)
                written += record.write(as_bytes(block))
        assert written == num_bytes, (written, shape, dtype)
        archive.writestr(_entry("version"), "3\n")


def _entry(name: str) -> zipfile.ZipInfo:
    return zipfile.ZipInfo(f"archive/{name}")  # dated 1980: the bytes must not depend on the time of writing


class _Storage:
    def __init__(self, dtype: torch.dtype, num_elements: int):
        self.pid = ("storage", _STORAGES[dtype], "0", "cpu", num_elements)


class _Tensor:
    def __init__(self, shape: TensorShape, dtype: torch.dtype):
        strides = tuple(math.prod(shape[dim + 1 :]) for dim in range(len(shape)))
        self.arguments: tuple[Any, ...] = (
            _Storage(dtype, math.prod(shape)),
            0,
            shape,
            strides,
            False,
            collections.OrderedDict(),
        )

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuild_tensor_v2, self.arguments


class _Pickler(pickle.Pickler):
    def persistent_id(self, obj: Any) -> Any:
        return obj.pid if isinstance(obj, _Storage) else None


def _described(shape: TensorShape, dtype: torch.dtype) -> bytes:
    buffer = io.BytesIO()
    _Pickler(buffer, protocol=2).dump(_Tensor(shape, dtype))
    return buffer.getvalue()
