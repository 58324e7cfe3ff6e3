"""JSON lines files that a user names by a flag, such as prompts and tasks."""

from pathlib import Path

from ee_tuning.errors import InputError
from ee_tuning.line_file import read_lines


def read_json_lines(path: Path, flag: str) -> list[str]:
    """Reads the lines of a JSON lines file that the user named by `flag`. Raises InputError where it can not be
    read.
    """
    try:
        return read_lines(path)
    except OSError as error:
        raise InputError(f"{flag} must name a file of JSON lines; {path} can not be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise InputError(
            f"{flag} must name a file of JSON lines in UTF-8, got {path}: {error}; unpack it where it is packed, else "
            "convert it (iconv -t utf-8)"
        ) from error
