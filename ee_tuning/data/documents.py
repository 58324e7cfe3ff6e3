"""Reads data files document by document, in ranges that processes can share.

A text file is one document; other files have one per line, element or row (`records.py` describes their forms).
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from ee_tuning.data.file_kind import FileKind, check_no_lines, kind_of, named_format, opened
from ee_tuning.data.parquet import read_arrow, read_rows, row_groups
from ee_tuning.data.record_files import Record, records_of_json, records_of_lines, records_of_table
from ee_tuning.data.records import KEYS, Document, LeftOut, document_of, mentions_records
from ee_tuning.errors import InputError

RANGE_BYTES = 4_000_000
_HEAD_BYTES = 1 << 16


@dataclass(frozen=True)
class FileRange:
    """A part of a file that is read on its own."""

    path: Path
    start: int
    """First byte; for a .parquet file, its first row group."""
    stop: int
    """Position after the last document."""
    num_bytes: int
    """Size of the work in bytes."""
    kind: FileKind


def may_hold_records(path: Path, text_key: str) -> bool:
    """Whether a file in a folder may hold records. False for a .json file or a table whose beginning names no key of
    records.

    Raises InputError where it can not be read.
    """
    if (promised := named_format(path.name)) not in ("json", "table"):
        return True
    with opened(path, kind_of(path).packing) as file:
        return mentions_records(file.readline(_HEAD_BYTES) if promised == "table" else file.read(_HEAD_BYTES), text_key)


def file_ranges(files: Iterable[Path]) -> list[FileRange]:
    """Cuts `files` into ranges, in order. Raises InputError where one can not be read or has an unsupported kind."""
    ranges = []
    for path in files:
        kind = kind_of(path)
        if kind.format == "parquet":
            ranges += [FileRange(path, group, group + 1, size, kind) for group, size in enumerate(row_groups(path))]
            continue
        size = path.stat().st_size
        step = RANGE_BYTES if kind == FileKind("lines") else max(size, 1)
        ranges += [
            FileRange(path, start, min(start + step, size), min(step, size - start), kind)
            for start in range(0, max(size, 1), step)
        ]
    return ranges


def read_documents(part: FileRange, text_key: str) -> Iterator[Document | LeftOut]:
    """Yields the documents that begin in `part`, and a LeftOut for each record without content.

    `text_key` is the key or column of a text. Raises InputError naming the file (and line, record or row) where one can
    not be read, is not UTF-8, or has no known form.
    """
    if part.kind.format == "text":
        text = _read_text(part)
        yield text or LeftOut("empty text", partial(str, part.path))
        return
    for record, where in _records(part, (text_key, *KEYS)):
        yield document_of(record, text_key, where)


def read_records(part: FileRange, text_key: str) -> Iterator[Record]:
    """Yields the records that begin in `part`, with all their keys and their places.

    A text file is one record with its text under `text_key`. Raises InputError where the file can not be read.
    """
    if part.kind.format == "text":
        yield {text_key: _read_text(part)}, partial(str, part.path)
        return
    yield from _records(part, None)


def _records(part: FileRange, columns: tuple[str, ...] | None) -> Iterator[Record]:
    path, packing = part.path, part.kind.packing
    if part.kind.format == "lines":
        return records_of_lines(path, packing, part.start, part.stop)
    if part.kind.format == "json":
        return records_of_json(path, packing)
    if part.kind.format == "table":
        return records_of_table(path, packing)
    rows = read_arrow(path, columns) if part.kind.format == "arrow" else read_rows(path, part.start, part.stop, columns)
    return ((row, partial("{}, row {}".format, path, number)) for number, row in rows)


def _read_text(part: FileRange) -> str:
    path = part.path
    with opened(path, part.kind.packing) as file:
        content = file.read()
    if (place := content.find(b"\0")) >= 0:
        raise InputError(
            f"{path} must be UTF-8 text, got a NUL byte at offset {place}; convert it (iconv -t utf-8), or leave it out"
        )
    try:
        text = content.decode("utf-8-sig")  # "-sig": a byte order mark is no part of the text
    except UnicodeDecodeError as error:
        raise InputError(
            f"{path} must be UTF-8 text, got byte {error.object[error.start]:#04x} at offset {error.start}; "
            "convert it (iconv -t utf-8), or leave it out"
        ) from error
    check_no_lines(text, path)
    return text
