"""Records of files that hold several: JSON lines, JSON arrays, tables. Each comes with its place."""

import csv
import io
import json
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from ee_tuning.data.file_kind import opened
from ee_tuning.data.messages import Where
from ee_tuning.errors import InputError
from ee_tuning.line_file import line_text

Record = tuple[Any, Where]
_BLANK = b"\xef\xbb\xbf \t\r\n"


def records_of_lines(path: Path, packing: str | None, start: int, stop: int) -> Iterator[Record]:
    """Yields the objects of the lines that begin within bytes `start` to `stop`. A compressed file is read whole."""
    with opened(path, packing) as lines:
        if start:
            lines.seek(start - 1)
            lines.readline()
        place = lines.tell()
        for line in iter(lines.readline, b""):
            if packing is None and place >= stop:
                return
            if line.strip(_BLANK):
                where = partial(_place_of_line, path, packing, place)
                yield _parsed(line, where), where
            place += len(line)


def records_of_json(path: Path, packing: str | None) -> Iterator[Record]:
    """Yields the elements of an array, or consecutive values, each of any number of lines."""
    with opened(path, packing) as file:
        content = file.read()
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(
            f"{path} must be JSON in UTF-8, got byte {error.object[error.start]:#04x} at offset {error.start}; convert it "
            "(iconv -t utf-8)"
        ) from error
    decoder, number = json.JSONDecoder(), 0
    at = _behind_blank(text, 0)
    is_array = text.startswith("[", at)
    at = _behind_blank(text, at + is_array)
    while at < len(text) and not (is_array and text.startswith("]", at)):
        try:
            value, stop = decoder.raw_decode(text, at)
        except (ValueError, RecursionError) as error:
            line = text.count("\n", 0, getattr(error, "pos", at)) + 1
            raise InputError(
                f"{path}:{line}: it must be an array of JSON objects, or objects one after the other: "
                f"{getattr(error, 'msg', error)}; mend the file"
            ) from error
        number += 1
        yield value, partial("{}, record {}".format, path, number)
        at = _behind_blank(text, stop)
        at = _behind_blank(text, at + 1) if is_array and text.startswith(",", at) else at
    if is_array and at >= len(text):
        raise InputError(f"{path}: its array has no end after record {number}: the file is cut short; copy it again")


def records_of_table(path: Path, packing: str | None) -> Iterator[Record]:
    """Yields the rows of a .csv or .tsv file as dictionaries, with keys from its first line."""
    csv.field_size_limit(sys.maxsize)  # texts exceed the default of 128 KiB
    with opened(path, packing) as file:
        lines = io.TextIOWrapper(file, encoding="utf-8-sig", newline="")
        try:
            header = lines.readline()
            delimiter = (
                "\t" if "\t" in header and "," not in header else ";" if ";" in header and "," not in header else ","
            )
            names = next(csv.reader([header], delimiter=delimiter), [])
            rows = csv.reader(lines, delimiter=delimiter, strict=True)
            for row in rows:
                where = partial("{}:{}".format, path, rows.line_num + 1)
                if len(row) > len(names):
                    raise InputError(
                        f"{where()}: a row has {len(row)} cells, and the first line names {len(names)}; put cells that hold "
                        f"{delimiter!r} into quotation marks"
                    )
                if row:
                    yield dict(zip(names, row, strict=False)), where
        except UnicodeDecodeError as error:
            raise InputError(
                f"{path} must be a table in UTF-8, got byte {error.object[error.start]:#04x}; convert it (iconv -t "
                "utf-8)"
            ) from error
        except csv.Error as error:
            raise InputError(
                f"{path}:{rows.line_num + 1}: it can not be read as a table: {error}; mend its quotation marks"
            ) from error


def _parsed(line: bytes, where: Where) -> Any:
    try:
        return json.loads(line_text(line))
    # ValueError: broken JSON, broken UTF-8, and numbers of thousands of digits.
    except (ValueError, RecursionError) as error:
        raise InputError(
            f"{where()}: a line must be one JSON object in UTF-8: {error}; mend or remove the line, or name the file "
            ".json where a record takes several"
        ) from error


def _place_of_line(path: Path, packing: str | None, place: int) -> str:
    """Returns the place of the line that begins at byte `place`, as FILE:NUMBER. Lines are counted on demand."""
    number = 1
    with opened(path, packing) as file:
        while place > 0 and (block := file.read(min(place, 1 << 20))):
            number += block.count(b"\n")
            place -= len(block)
    return f"{path}:{number}"


def _behind_blank(text: str, at: int) -> int:
    while at < len(text) and text[at] in " \t\r\n":
        at += 1
    return at
