"""Megatron's indexed files: PREFIX.bin holds token ids, PREFIX.idx the documents' positions.

Megatron-core's own class reads them, mapped into memory, and reads those written here. An additional PREFIX.mask may
hold one byte per token: 1 where it counts as a label. Megatron-core ignores it.
"""

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ee_tuning.data.sources import BIN_SUFFIX, INDEX_SUFFIX
from ee_tuning.errors import InputError
from ee_tuning.parallel.megatron_import import importing_megatron

MASK_SUFFIX = ".mask"
_HEADER = b"MMIDIDX\x00\x00"
_TYPE_CODES = {np.dtype(np.int32): 4, np.dtype(np.uint16): 8}
_SCANNED_AT_ONCE = 1 << 22


@dataclass(frozen=True)
class TokenStream:
    """The token ids of consecutive documents."""

    ids: NDArray[np.integer]
    """[n], mapped: read on access."""
    starts: NDArray[np.int64]
    """[documents]: first token of each."""
    counts: NDArray[np.uint8] | None
    """[n]: 1 where a token counts as a label; None where all do."""

    def documents(self, first: int, stop: int) -> "TokenStream":
        """Returns the documents `first` .. `stop` - 1."""
        bounds = np.append(self.starts, len(self.ids))
        part = slice(int(bounds[first]), int(bounds[stop]))
        return TokenStream(
            self.ids[part], self.starts[first:stop] - part.start, None if self.counts is None else self.counts[part]
        )


def with_suffix(prefix: Path, suffix: str) -> Path:
    """Returns PREFIX.suffix, also for a PREFIX with dots."""
    return prefix.with_name(prefix.name + suffix)


def open_stream(prefix: Path) -> TokenStream:
    """Opens the documents of PREFIX.bin. Raises InputError where the files can not be read or are inconsistent."""
    index, data, mask = (with_suffix(prefix, suffix) for suffix in (INDEX_SUFFIX, BIN_SUFFIX, MASK_SUFFIX))
    try:
        size = data.stat().st_size
        if size == 0:
            raise InputError(f"{data} is empty; tokenize the texts again with `ee-tuning preprocess`, or leave it out")
        dtype, lengths, pointers, documents = _read_index(prefix)
        num_tokens = int(lengths.sum(dtype=np.int64))
        ends = np.cumsum(lengths, dtype=np.int64)
        in_order = np.array_equal(pointers, (ends - lengths) * dtype.itemsize)
        if num_tokens * dtype.itemsize != size or not in_order:
            raise InputError(
                f"{index} does not agree with {data}: it lists {num_tokens} tokens of {dtype.itemsize} bytes"
                f"{'' if in_order else ', not one after the other'}, and {data.name} has {size} bytes; copy the two again, or "
                "tokenize the texts again"
            )
        starts = np.append(0, ends)[documents[:-1]]
        counts = None
        if mask.exists():
            counts = np.memmap(mask, np.uint8, mode="r")
            if len(counts) != num_tokens:
                raise InputError(
                    f"{mask} must have a byte for each of the {num_tokens} tokens of {data}, got {len(counts)}; tokenize the texts again"
                )
        return TokenStream(np.memmap(data, dtype, mode="r"), starts, counts)
    except OSError as error:
        raise InputError(
            f"{prefix}{BIN_SUFFIX} and {INDEX_SUFFIX} can not be read: {error.strerror}; make them readable"
        ) from error


def _read_index(prefix: Path) -> tuple[np.dtype, NDArray[np.int32], NDArray[np.int64], NDArray[np.int64]]:
    """Returns the dtype of ids, length and byte offset per sequence, the first sequence of each document, and their
    number.
    """
    with importing_megatron():
        # takes seconds, so only where such files are read
        from megatron.core.datasets.indexed_dataset import IndexedDataset

    try:
        # If Megatron-core's class fails, it prints a second error when it is collected.
        _check_header(with_suffix(prefix, INDEX_SUFFIX))
        dataset = IndexedDataset(str(prefix))
        index = dataset.index
        documents = np.array(index.document_indices)
        lengths, pointers = np.array(index.sequence_lengths), np.array(index.sequence_pointers)
        dtype = np.dtype(index.dtype)
        # Megatron-core asserts only that the last one is the number of sequences.
        if dtype.kind not in "iu" or documents[0] != 0 or (np.diff(documents) < 0).any() or (lengths < 0).any():
            raise ValueError("its numbers make no sense")
    except (AssertionError, ValueError, IndexError, AttributeError, struct.error) as error:
        reason = " ".join(str(error).split())[:150]
        raise InputError(
            f"{prefix}{INDEX_SUFFIX} is no index of Megatron's, or is cut short ({reason}); copy it again, or tokenize the texts again"
        ) from error
    return dtype, lengths, pointers, documents


def _check_header(path: Path) -> None:
    """Raises ValueError, or struct.error, where this is no index, or one shorter than its header says."""
    with path.open("rb") as file:
        header = file.read(34)
    version, _, num_sequences, num_documents = struct.unpack("<QBQQ", header[len(_HEADER) :])
    if header[: len(_HEADER)] != _HEADER or version != 1:
        raise ValueError("its first bytes are others")
    if (size := path.stat().st_size) < (
        least := len(header) + 12 * num_sequences + 8 * num_documents
    ) or num_documents == 0:
        raise ValueError(f"it should have {least} bytes, and has {size}")


def write_index(path: Path, dtype: np.dtype, lengths: NDArray[np.int64]) -> None:
    """Writes a .idx for documents of `lengths` tokens, each one sequence."""
    with path.open("wb") as file:
        file.write(_HEADER + struct.pack("<QBQQ", 1, _TYPE_CODES[dtype], len(lengths), len(lengths) + 1))
        lengths.astype(np.int32).tofile(file)
        ((np.cumsum(lengths) - lengths) * dtype.itemsize).astype(np.int64).tofile(file)
        np.arange(len(lengths) + 1, dtype=np.int64).tofile(file)


def id_range(stream: TokenStream) -> Iterator[tuple[int, int, int]]:
    """Yields the smallest and largest id of each block of the file, and the block's bytes. The file may exceed
    memory.
    """
    for start in range(0, len(stream.ids), _SCANNED_AT_ONCE):
        block = stream.ids[start : start + _SCANNED_AT_ONCE]
        yield int(block.min()), int(block.max()), block.nbytes
