"""Tensors in blocks of rows, so that no tensor is ever in memory as a whole."""

from collections.abc import Iterator

import torch
from torch import Tensor

from ee_tuning.storage.safetensors_file import SafetensorsFile
from ee_tuning.storage.tensor_slice import Shard, TensorSlice
from ee_tuning.storage.tensor_source import TensorSource

BLOCK_BYTES = 4 << 20
"""Large enough for low overhead, small enough that the allocator reuses it for the next block."""


def tensor_blocks(source: TensorSource, name: str) -> Iterator[Tensor]:
    """Yields the rows of a tensor, as stored, block by block. The caller owns each block."""
    rows, *width = source.shape(name)
    step = _rows_per_block(width, source.dtype(name))
    for row in range(0, rows, step):
        yield source.rows(name, row, min(rows, row + step))


def paired_blocks(first: tuple[TensorSource, str], second: tuple[TensorSource, str]) -> Iterator[tuple[Tensor, Tensor]]:
    """Yields the same rows of two tensors of one shape, each as stored, block by block. Their dtypes may differ."""
    rows, *width = first[0].shape(first[1])
    step = min(_rows_per_block(width, source.dtype(name)) for source, name in (first, second))
    for row in range(0, rows, step):
        stop = min(rows, row + step)
        yield first[0].rows(first[1], row, stop), second[0].rows(second[1], row, stop)


def stored_blocks(file: SafetensorsFile, name: str) -> Iterator[Tensor]:
    """Yields a tensor of one file, of any dtype, block by block."""
    shape = file.entries[name].shape
    if not shape:
        yield file.read(name)
        return
    entry = file.entries[name]
    step = max(1, BLOCK_BYTES * shape[0] // max(1, entry.end - entry.begin))
    for row in range(0, shape[0], step):
        yield file.read(name, (slice(row, min(shape[0], row + step)),))


def parameter_blocks(source: TensorSource, parameter: Shard, dtype: torch.dtype) -> Iterator[Tensor]:
    """Yields the rows of a whole Megatron-core parameter (of one shard) as `dtype`. Raises like `shard`."""
    for piece in parameter.pieces:
        source.check_shape(piece.name, piece.shape)
        for block in _piece_blocks(source, piece):
            yield block.to(dtype).contiguous()
    if parameter.zero_rows:
        yield torch.zeros(parameter.zero_rows, *parameter.shape[1:], dtype=dtype)


def parameter_dtype(source: TensorSource, parameter: Shard) -> torch.dtype:
    """Returns the stored dtype of a parameter: the widest one of its tensors."""
    dtypes = [source.dtype(piece.name) for piece in parameter.pieces]
    widest = dtypes[0]
    for dtype in dtypes[1:]:
        widest = torch.promote_types(widest, dtype)
    return widest


def as_bytes(tensor: Tensor) -> memoryview:
    """Returns the bytes of a contiguous tensor on the CPU, without a copy."""
    return tensor.detach().reshape(-1).view(torch.uint8).numpy().data


def _piece_blocks(source: TensorSource, piece: TensorSlice) -> Iterator[Tensor]:
    """Yields the blocks of a slice, which either lies along the parameter's rows or has all of its columns."""
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
