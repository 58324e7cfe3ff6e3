"""JSON: what a stranger may have written is read whole or refused in a few words; what is written here, any reader can
read.
"""

import errno
import json
import math
import stat
from pathlib import Path
from typing import Any

from ee_tuning.foreign_content import describe_content


def read_json(path: Path) -> Any:
    """What a JSON file holds. Raises OSError where there is no plain file that can be read (a pipe would be waited for
    without end), and ValueError as `parse_json`.
    """
    if not stat.S_ISREG(path.stat().st_mode):
        raise OSError(errno.EINVAL, "it is no plain file", str(path))
    try:
        return parse_json(path.read_bytes())
    except ValueError as error:
        if reason := describe_content(path):
            raise ValueError(f"it {reason}") from error
        raise


def parse_json(data: bytes) -> Any:
    """What JSON says. Raises ValueError where it is none, is nested beyond sense, or has an object with one key
    twice.
    """
    try:
        return json.loads(data.decode(), object_pairs_hook=_without_doubles)
    except UnicodeDecodeError as error:  # its own words hold all of the data
        raise ValueError(f"byte {error.start} is not UTF-8") from error
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def parse_strict_json(text: str) -> Any:
    """Does what `parse_json` does, and refuses numbers that JSON has no word for (NaN, Infinity) or no float can hold
    (1e999).
    """
    tree = parse_json(text.encode(errors="surrogatepass"))
    if not _is_finite(tree):
        raise ValueError("it holds a number that is not finite")
    return tree


def to_json(value: Any, **layout: Any) -> str:
    """`value` as strict JSON (RFC 8259): a number that is not finite becomes null. `layout` is what json.dumps takes.

    Texts stay readable with ensure_ascii=False, but for one that is no Unicode (half a surrogate pair), which UTF-8 can
    not hold.
    """
    try:
        text = json.dumps(value, allow_nan=False, **layout)
    except ValueError:
        text = json.dumps(finite(value), allow_nan=False, **layout)
    if layout.get("ensure_ascii", True) or _is_unicode(text):
        return text
    return to_json(value, **{**layout, "ensure_ascii": True})


def finite(value: Any) -> Any:
    """`value` with None in place of floats that are not finite, as deep as they lie."""
    if isinstance(value, dict):
        return {key: finite(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _is_finite(value: Any) -> bool:
    if isinstance(value, dict | list):
        return all(map(_is_finite, value.values() if isinstance(value, dict) else value))
    return not isinstance(value, float) or math.isfinite(value)


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _without_doubles(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    tree = dict(pairs)
    if len(tree) != len(pairs):
        last = {name: place for place, (name, _) in enumerate(pairs)}
        raise ValueError(
            f"{next(name for place, (name, _) in enumerate(pairs) if last[name] != place)} stands in it twice"
        )
    return tree
