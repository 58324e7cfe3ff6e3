"""Rows of .parquet files, by pyarrow, which is wanted only where there are such files."""
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from ee_tuning.errors import InputError


def row_groups(path: Path) -> list[int]:
    """Bytes of each row group. Raises InputError where the file is no parquet, or pyarrow is missing."""
    with _open(path) as file:
        return [file.metadata.row_group(group).total_byte_size for group in range(file.metadata.num_row_groups)]


def read_rows(path: Path, first_group: int, stop_group: int, columns: Sequence[str]) -> Iterator[tuple[int, dict[str, Any]]]:
    """Number in the file, from 0, and content of each row of some row groups: those of `columns` that the file has.

    Raises InputError where it has none of them.
    """
    with _open(path) as file:
        present = [name for name in columns if name in file.schema_arrow.names]
        if not present:
            raise InputError(f"{path}: a column {' or '.join(map(repr, columns))} is needed, its columns are "
                             f"{', '.join(map(repr, file.schema_arrow.names))}; set data.text_key to that of the text")
        number = sum(file.metadata.row_group(group).num_rows for group in range(first_group))
        try:
            for batch in file.iter_batches(batch_size=1024, row_groups=range(first_group, stop_group), columns=present):
                for row in batch.to_pylist():
                    yield number, row
                    number += 1
        except (OSError, ValueError) as error:  # pyarrow's errors are ValueErrors
            raise _broken(path, error) from error


def _open(path: Path) -> Any:
    try:
        import pyarrow.parquet
    except ImportError as error:
        raise InputError(f"{path}: reading .parquet needs pyarrow, which is not installed; pip install 'ee_tuning[parquet]', or give "
                         ".jsonl") from error
    try:
        return pyarrow.parquet.ParquetFile(path)
    except (OSError, ValueError) as error:
        raise _broken(path, error) from error


def _broken(path: Path, error: Exception) -> InputError:
    return InputError(f"{path} can not be read as parquet: {' '.join(str(error).split())[:200]}; write it anew, or leave it out")
