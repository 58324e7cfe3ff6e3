"""JSON that a stranger may have written: read whole or refused in a few words."""
import errno
import json
import stat
from pathlib import Path
from typing import Any

from ee_tuning.foreign_content import told_content


def read_json(path: Path) -> Any:
    """What a JSON file holds. Raises OSError where there is no plain file that can be read (a pipe would be waited for without end), and
    ValueError as `parse_json`.
    """
    if not stat.S_ISREG(path.stat().st_mode):
        raise OSError(errno.EINVAL, "it is no plain file", str(path))
    try:
        return parse_json(path.read_bytes())
    except ValueError as error:
        if told := told_content(path):
            raise ValueError(f"it {told}") from error
        raise


def parse_json(data: bytes) -> Any:
    """What JSON says. Raises ValueError where it is none, is nested beyond sense, or has an object with one key twice."""
    try:
        return json.loads(data.decode(), object_pairs_hook=_without_doubles)
    except UnicodeDecodeError as error:  # its own words hold all of the data
        raise ValueError(f"byte {error.start} is not UTF-8") from error
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def _without_doubles(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    tree = dict(pairs)
    if len(tree) != len(pairs):
        last = {name: place for place, (name, _) in enumerate(pairs)}
        raise ValueError(f"{next(name for place, (name, _) in enumerate(pairs) if last[name] != place)} stands in it twice")
    return tree
