"""Tensors passed on in blocks of rows, so that none of them is ever in memory whole."""

import ctypes
from collections.abc import Iterator

import torch
from torch import Tensor

from ee_tuning.checkpoint.names import Shard, TensorSlice
from ee_tuning.checkpoint.safetensors_file import SafetensorsFile
from ee_tuning.checkpoint.safetensors_reader import TensorSource

BLOCK_BYTES = 4 << 20
"""Large enough that a block costs its bytes and nothing else, small enough that the allocator keeps it for the next
one.
"""


def tensor_blocks(source: TensorSource, name: str) -> Iterator[Tensor]:
    """The rows of a tensor, as stored, block by block. Each block is the caller's own."""
    rows, *width = source.shape(name)
    step = _rows_per_block(width, source.dtype(name))
    for row in range(0, rows, step):
        yield source.rows(name, row, min(rows, row + step))


def stored_blocks(file: SafetensorsFile, name: str) -> Iterator[Tensor]:
    """A tensor of one file, of whichever type, block by block."""
    shape = file.entries[name].shape
    if not shape:
        yield file.read(name)
        return
    entry = file.entries[name]
    step = max(1, BLOCK_BYTES * shape[0] // max(1, entry.end - entry.begin))
    for row in range(0, shape[0], step):
        yield file.read(name, (slice(row, min(shape[0], row + step)),))


def parameter_blocks(source: TensorSource, parameter: Shard, dtype: torch.dtype) -> Iterator[Tensor]:
    """The rows of a whole Megatron-core parameter (a shard of one) as `dtype`, block by block. Raises as
    `read_shard`.
    """
    for piece in parameter.pieces:
        source.check_shape(piece.name, piece.shape)
        for block in _piece_blocks(source, piece):
            yield block.to(dtype).contiguous()
    if parameter.zero_rows:
        yield torch.zeros(parameter.zero_rows, *parameter.shape[1:], dtype=dtype)


def parameter_dtype(source: TensorSource, parameter: Shard) -> torch.dtype:
    """What a parameter is stored in: the widest type of the tensors that it is made of."""
    dtypes = [source.dtype(piece.name) for piece in parameter.pieces]
    widest = dtypes[0]
    for dtype in dtypes[1:]:
        widest = torch.promote_types(widest, dtype)
    return widest


def keep_freed_blocks() -> None:
    """Has malloc keep what is freed, up to 256 MB, for the next blocks, from now on: pages that the system hands out
    anew for every block cost as much time as reading into them does. With another C library than glibc nothing changes.
    """
    if mallopt := getattr(ctypes.CDLL(None), "mallopt", None):
        trim_threshold, mmap_threshold = -1, -3
        mallopt(mmap_threshold, 32 << 20)
        mallopt(trim_threshold, 256 << 20)


def as_bytes(tensor: Tensor) -> memoryview:
    """The bytes of a contiguous tensor on the CPU, in place."""
    return tensor.detach().reshape(-1).view(torch.uint8).numpy().data


def _piece_blocks(source: TensorSource, piece: TensorSlice) -> Iterator[Tensor]:
    """A piece lies along the parameter's rows, or is all of its columns."""
    is_whole = piece.cut_dim == 1
    assert not is_whole or piece.size == piece.parameter_shape[1], piece
    first, last = (0, piece.parameter_shape[0]) if is_whole else (piece.start, piece.stop)
    read = source.columns if piece.is_transposed else source.rows
    step = _rows_per_block(piece.parameter_shape[1:], source.dtype(piece.name))
    for row in range(first, last, step):
        block = read(piece.name, row, min(last, row + step))
        yield block.t() if piece.is_transposed else block


def _rows_per_block(width: tuple[int, ...] | list[int], dtype: torch.dtype) -> int:
    size = dtype.itemsize
    for n in width:
        size *= n
    return max(1, BLOCK_BYTES // size)
