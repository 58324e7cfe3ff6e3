"""Reads files of `torch.save` without running their pickle: tensors stay on disk and are read by slices.

A file, or a part of one, is a zip archive with a pickle and one record of raw bytes per storage. The unpickler imports
nothing and knows an allow-list of names (pickled_names.py); objects that are only carried along (random states,
enumerations) are not built. Records are mapped, or read from the file where only a part is needed, so that a slice
costs no more than its bytes. Each record has a CRC-32, which `StoredTensor.check` verifies.
"""

import argparse
import io
import mmap
import pickle
import struct
import types
import warnings
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ee_tuning.errors import InputError
from ee_tuning.foreign_content import describe_content
from ee_tuning.storage.open_files import MappedFile
from ee_tuning.storage.pickled_names import Inert, harmless, plain_name
from ee_tuning.storage.tensor_blocks import as_bytes

_STORAGES = {
    f"torch.{name}Storage": dtype
    for name, dtype in (
        ("Double", torch.float64),
        ("Float", torch.float32),
        ("Half", torch.float16),
        ("BFloat16", torch.bfloat16),
        ("Long", torch.int64),
        ("Int", torch.int32),
        ("Short", torch.int16),
        ("Char", torch.int8),
        ("Byte", torch.uint8),
        ("Bool", torch.bool),
    )
}
_UNTYPED = "torch.storage.UntypedStorage"


@dataclass(frozen=True)
class _Storage:
    record: str
    dtype: torch.dtype
    num_elements: int


class StoredTensor:
    """A tensor on disk."""

    def __init__(
        self, archive: "Archive", storage: _Storage, offset: int, shape: tuple[int, ...], stride: tuple[int, ...]
    ):
        self.archive, self.storage, self.offset, self.shape, self.stride = archive, storage, offset, shape, stride
        self.dtype = storage.dtype

    def mapped(self) -> Tensor:
        """Returns the tensor with its bytes still on disk, for slicing and copying but not for writing. Raises
        InputError where it is broken.
        """
        flat = self.archive.record(self.storage)
        try:
            return flat.as_strided(self.shape, self.stride, self.offset)
        except (RuntimeError, TypeError, ValueError) as error:
            raise self.archive.broken(
                f"a tensor of shape {list(self.shape)} does not fit its {flat.numel()} stored values"
            ) from error

    def check(self) -> None:
        """Raises InputError where the stored bytes do not match their checksum. Reads all of them, once."""
        self.archive.check_record(self.storage.record)
        self.release()

    def release(self) -> None:
        """Releases the mapped pages that were read, which would otherwise count as this process's memory."""
        self.archive.release_record(self.storage.record)

    def copy_part(self, shape: tuple[int, ...], part: tuple[slice, ...], out: Tensor) -> None:
        """Copies a rectangle of the tensor, viewed as `shape`, to `out`. Raises InputError where the file is broken.

        It reads one contiguous part of the file: page faults through the mapping would cost three times as much.
        """
        whole = self.mapped()
        source = whole.reshape(shape)[part]
        is_view = source.untyped_storage().data_ptr() == whole.untyped_storage().data_ptr()
        if is_view and source.is_contiguous() and out.is_contiguous():
            self.archive.read_record(self.storage.record, int(source.storage_offset()) * source.itemsize, as_bytes(out))
        else:
            out.copy_(source)
            self.release()


class Archive:
    """The archive in bytes `start`..`stop` of a file that is mapped as `data`; `content` is the saved object.

    Raises InputError, naming `path`, where it is broken or, unless `is_trusted`, names anything outside of the
    allow-list.
    """

    def __init__(
        self, path: Path, data: MappedFile, start: int = 0, stop: int | None = None, *, is_trusted: bool = False
    ):
        self.path, self._data, self._start = path, data, start
        self._stop = len(data) if stop is None else stop
        self._checked: set[str] = set()
        if not 0 <= start < self._stop <= len(data):
            raise self.broken(f"bytes {start} to {self._stop} are said to hold a tensor, and the file has {len(data)}")
        try:
            with zipfile.ZipFile(_Window(data, start, self._stop)) as archive:
                entries = archive.infolist()
        except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError, struct.error) as error:
            if reason := describe_content(path):
                raise InputError(f"{path} {reason}") from error
            raise self.broken(f"it is no archive as torch.save has written them since torch 1.6 ({error})") from error
        self._entries = {entry.filename.partition("/")[2]: entry for entry in entries}
        if "data.pkl" not in self._entries or len(self._entries) != len(entries):
            raise self.broken("its archive is not one of torch.save's")
        self.content = self._unpickle(is_trusted)

    def broken(self, reason: str) -> InputError:
        """Returns the error for a broken file."""
        return InputError(f"{self.path} is broken: {reason}; fetch the file again")

    def record(self, storage: _Storage) -> Tensor:  # [n]
        """Returns the values of a storage, mapped."""
        begin, end = self._place(f"data/{storage.record}")
        if end - begin != storage.num_elements * storage.dtype.itemsize:
            raise self.broken(
                f"record {storage.record} must have {storage.num_elements * storage.dtype.itemsize} bytes, got {end - begin}"
            )
        if begin == end:
            return torch.empty(0, dtype=storage.dtype)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "The given buffer is not writable")
            return torch.frombuffer(self._data.mapping(), dtype=storage.dtype, count=storage.num_elements, offset=begin)

    def read_record(self, record: str, offset: int, into: memoryview) -> None:
        """Fills `into` with the record's bytes from `offset` on."""
        begin, end = self._place(f"data/{record}")
        assert begin + offset + len(into) <= end, (record, offset, len(into))
        try:
            self._data.read_at(begin + offset, into)
        except OSError as error:
            raise self.broken(f"record {record} can not be read: {error.strerror}") from error
        except EOFError as error:
            raise self.broken(f"it was cut short while record {record} was read") from error

    def check_record(self, record: str) -> None:
        """Raises InputError where the record's bytes do not match its CRC-32."""
        self._check(f"data/{record}")

    def release_record(self, record: str) -> None:
        """Releases the record's pages from this process's memory. They stay in the system's cache."""
        begin, end = self._place(f"data/{record}")
        begin = begin // mmap.PAGESIZE * mmap.PAGESIZE
        self._data.mapping().madvise(mmap.MADV_DONTNEED, begin, end - begin)

    def _check(self, name: str) -> None:
        if name in self._checked:
            return
        begin, end = self._place(name)
        crc = 0
        with memoryview(self._data.mapping()) as view:
            for position in range(begin, end, 1 << 24):
                crc = zlib.crc32(view[position : min(end, position + (1 << 24))], crc)
        if crc != self._entries[name].CRC:
            raise self.broken(f"the bytes of its record {name} are not those that were written")
        self._checked.add(name)

    def _place(self, name: str) -> tuple[int, int]:
        """Returns the position of an entry's bytes in the file."""
        entry = self._entries.get(name)
        if entry is None or entry.compress_type != zipfile.ZIP_STORED:
            raise self.broken(f"record {name} is missing, or compressed")
        local = self._start + entry.header_offset
        if local + 30 > self._stop or self._data[local : local + 4] != b"PK\x03\x04":
            raise self.broken(f"record {name} has no header")
        name_length, extra_length = struct.unpack("<HH", self._data[local + 26 : local + 30])
        begin = local + 30 + name_length + extra_length
        if begin + entry.file_size > self._stop:
            raise self.broken(f"record {name} ends beyond the end of the file")
        return begin, begin + entry.file_size

    def _unpickle(self, is_trusted: bool) -> Any:
        self._check("data.pkl")
        begin, end = self._place("data.pkl")
        if "byteorder" in self._entries:
            where = self._place("byteorder")
            if self._data[where[0] : where[1]] != b"little":
                raise self.broken("its numbers are not little-endian")
        try:
            return _Unpickler(io.BytesIO(self._data[begin:end]), self, is_trusted).load()
        except _NotAllowed as error:
            raise InputError(
                f"{self.path} holds a pickle that asks for {error}, and unpickling may run anything; do not load this file, "
                "or, if you trust its author, give --trust-pickle"
            ) from error
        except Exception as error:  # a malicious pickle may raise anything
            raise self.broken(f"its pickle can not be read ({error!r})") from error


class _NotAllowed(pickle.UnpicklingError):
    """Names an object that a pickle asked for and may not have."""


class _Unpickler(pickle._Unpickler):  # the pure Python unpickler: the one in C allocates for any memo index in a pickle
    def __init__(self, file: io.BytesIO, archive: Archive, is_trusted: bool):
        super().__init__(file)
        self._archive, self._is_trusted = archive, is_trusted
        self._rebuild: dict[str, Callable[..., Any]] = {
            "torch._utils._rebuild_tensor_v2": self._tensor,
            "torch._utils._rebuild_tensor_v3": self._untyped_tensor,
            "torch._utils._rebuild_parameter": lambda tensor, *_: tensor,
        }

    def find_class(self, module_name: str, global_name: str) -> Any:
        name = plain_name(module_name, global_name)
        for table in (_STORAGES, self._rebuild):
            if name in table:
                return table[name]
        if name == _UNTYPED:
            return torch.uint8
        try:
            return harmless(name)
        except KeyError:
            if self._is_trusted:
                return super().find_class(module_name, global_name)
            raise _NotAllowed(name) from None

    def persistent_load(self, pid: Any) -> _Storage:
        kind, dtype, record, _, num_elements = pid
        if (
            kind != "storage"
            or not isinstance(dtype, torch.dtype)
            or not isinstance(record, str)
            or not isinstance(num_elements, int)
        ):
            raise ValueError(f"a storage can not be {pid!r}")
        return _Storage(record, dtype, num_elements)

    def _tensor(
        self, storage: Any, offset: int, shape: tuple[int, ...], stride: tuple[int, ...], *_: Any
    ) -> "StoredTensor | Inert":
        if isinstance(storage, Inert):  # within a random generator, whose tensors carry their own bytes
            return storage
        if not isinstance(storage, _Storage) or not all(
            isinstance(n, int) and n >= 0 for n in (offset, *shape, *stride)
        ):
            raise ValueError("a tensor without storage, or of a negative size")
        return StoredTensor(self._archive, storage, offset, tuple(shape), tuple(stride))

    def _untyped_tensor(
        self,
        storage: _Storage,
        offset: int,
        shape: tuple[int, ...],
        stride: tuple[int, ...],
        requires_grad: bool,
        hooks: Any,
        dtype: torch.dtype,
        *_: Any,
    ) -> "StoredTensor | Inert":
        """Rebuilds a tensor of a dtype without a storage class, whose storage torch counts in bytes."""
        typed = _Storage(storage.record, dtype, storage.num_elements // dtype.itemsize)
        return self._tensor(typed, offset, shape, stride)


class _Window(io.RawIOBase):
    """Bytes `start`..`stop` of a mapped file, as a file object."""

    def __init__(self, data: MappedFile, start: int, stop: int):
        self._data, self._start, self._stop, self._position = data, start, stop, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._stop - self._start}[whence]
        if base + offset < 0:
            raise OSError("a position before the beginning")
        self._position = base + offset
        return self._position

    def tell(self) -> int:
        return self._position

    def readinto(self, buffer: Any) -> int:
        here = self._start + self._position
        chunk = self._data[here : min(self._stop, here + len(buffer))]
        buffer[: len(chunk)] = chunk
        self._position += len(chunk)
        return len(chunk)


def saved_arguments(content: Any) -> dict[str, Any] | None:
    """Returns the arguments that Megatron saved within `content`, or None."""
    arguments = content.get("args") if isinstance(content, dict) else None
    return vars(arguments) if isinstance(arguments, argparse.Namespace | types.SimpleNamespace) else None
