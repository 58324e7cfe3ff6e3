"""JSON lines files that a user names by a flag, such as prompts and tasks."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ee_tuning.errors import InputError
from ee_tuning.json_file import parse_strict_json
from ee_tuning.line_file import read_lines


def read_json_lines(path: Path, flag: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yields number and object of each line of a file that the user named by `flag`; empty lines are skipped.

    Raises InputError where the file can not be read or a line is no strict JSON object.
    """
    for number, line in enumerate(_lines(path, flag), 1):
        if not line.strip():
            continue
        try:
            value = parse_strict_json(line)
        except ValueError as error:
            raise InputError(f"{path}:{number}: a line must be a JSON object, got {line[:60]!r}: {error}") from error
        if not isinstance(value, dict):
            raise InputError(f"{path}:{number}: a line must be a JSON object, got {line[:60]!r}")
        yield number, value


def _lines(path: Path, flag: str) -> list[str]:
    try:
        return read_lines(path)
    except OSError as error:
        raise InputError(f"{flag} must name a file of JSON lines; {path} can not be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise InputError(
            f"{flag} must name a file of JSON lines in UTF-8, got {path}: {error}; unpack it where it is packed, else "
            "convert it (iconv -t utf-8)"
        ) from error
