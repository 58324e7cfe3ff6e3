"""Rows of .parquet and .arrow files, read by pyarrow, which is needed for such files only."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from ee_tuning.errors import InputError

Row = tuple[int, dict[str, Any]]
"""Number in the file, from 0, and content."""


def row_groups(path: Path) -> list[int]:
    """Returns the size of each row group in bytes. Raises InputError where the file is no parquet, or pyarrow is
    missing.
    """
    with _open(path) as file:
        return [file.metadata.row_group(group).total_byte_size for group in range(file.metadata.num_row_groups)]


def read_rows(path: Path, first_group: int, stop_group: int, columns: Sequence[str] | None) -> Iterator[Row]:
    """Yields the rows of some row groups of a .parquet file, with those of `columns` that the file has, or all.

    Raises InputError where it has none of them.
    """
    with _open(path) as file:
        present = _present(path, file.schema_arrow.names, columns)
        number = sum(file.metadata.row_group(group).num_rows for group in range(first_group))
        batches = file.iter_batches(batch_size=1024, row_groups=range(first_group, stop_group), columns=present)
        yield from _rows(path, batches, number)


def read_arrow(path: Path, columns: Sequence[str] | None) -> Iterator[Row]:
    """Yields the rows of an .arrow file: a stream of batches (as the library datasets writes) or a file of them.

    Otherwise like `read_rows`.
    """
    pyarrow = _pyarrow(path)
    try:
        with pyarrow.memory_map(str(path)) as file:
            is_file = file.read(6) == b"ARROW1"
            file.seek(0)
            reader = pyarrow.ipc.open_file(file) if is_file else pyarrow.ipc.open_stream(file)
            present = _present(path, reader.schema.names, columns)
            batches = map(reader.get_batch, range(reader.num_record_batches)) if is_file else iter(reader)
            yield from _rows(path, (batch.select(present) for batch in batches), 0)
    except (OSError, ValueError) as error:
        if isinstance(error, InputError):
            raise
        raise _broken(path, error) from error


def _rows(path: Path, batches: Iterator[Any], number: int) -> Iterator[Row]:
    try:
        for batch in batches:
            for row in batch.to_pylist():
                yield number, row
                number += 1
    except (OSError, ValueError) as error:  # pyarrow's errors are ValueErrors
        if isinstance(error, InputError):  # raised by the consumer of the rows
            raise
        raise _broken(path, error) from error


def _present(path: Path, names: Sequence[str], columns: Sequence[str] | None) -> list[str]:
    if columns is None:
        return list(names)
    present = [name for name in columns if name in names]
    if not present:
        raise InputError(
            f"{path}: a column {columns[0]!r}, or of chats or prompts with completions, is needed, its columns are "
            f"{', '.join(map(repr, names))}; set data.text_key to that of the text"
        )
    return present


def _pyarrow(path: Path) -> Any:
    try:
        import pyarrow.ipc
        import pyarrow.parquet
    except ImportError as error:
        raise InputError(
            f"{path}: reading {path.suffix} needs pyarrow, which is not installed; pip install 'ee_tuning[parquet]', or give "
            ".jsonl"
        ) from error
    return pyarrow


def _open(path: Path) -> Any:
    pyarrow = _pyarrow(path)
    try:
        return pyarrow.parquet.ParquetFile(path)
    except (OSError, ValueError) as error:
        raise _broken(path, error) from error


def _broken(path: Path, error: Exception) -> InputError:
    return InputError(
        f"{path} can not be read as {path.suffix[1:]}: {' '.join(str(error).split())[:200]}; write it again, or leave it out"
    )
