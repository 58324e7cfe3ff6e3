"""JSON from untrusted files, read strictly, and JSON output that every reader can parse."""

import errno
import functools
import json
import math
import stat
from pathlib import Path
from typing import Any

from ee_tuning.foreign_content import describe_content


def read_json(path: Path) -> Any:
    """Reads a JSON file. Raises OSError where it is no readable plain file (a pipe would block), and ValueError like
    `parse_json`.
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
    """Parses JSON. Raises ValueError where it is invalid, nested too deeply, or has an object with a duplicate key."""
    try:
        return json.loads(data.decode(), object_pairs_hook=_without_doubles)
    except UnicodeDecodeError as error:  # the original message contains all of the data
        raise ValueError(f"byte {error.start} is not UTF-8") from error
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def parse_strict_json(text: str) -> Any:
    """Like `parse_json`, but refuses numbers that JSON does not define (NaN, Infinity) or no float can hold (1e999)."""
    tree = parse_json(text.encode(errors="surrogatepass"))
    if not _is_finite(tree):
        raise ValueError("it holds a number that is not finite")
    return tree


def to_json(value: Any, **layout: Any) -> str:
    """Returns `value` as strict JSON (RFC 8259): a number that is not finite becomes null. `layout` goes to json.dumps.

    Texts stay readable with ensure_ascii=False, unless one is invalid Unicode (half a surrogate pair), which UTF-8 can
    not hold.
    """
    encoder = _encoder(tuple(layout.items()))
    try:
        text = encoder.encode(value)
    except ValueError:
        text = encoder.encode(finite(value))
    if layout.get("ensure_ascii", True) or _is_unicode(text):
        return text
    return to_json(value, **{**layout, "ensure_ascii": True})


@functools.lru_cache(16)
def _encoder(layout: tuple[tuple[str, Any], ...]) -> json.JSONEncoder:
    # json.dumps makes one for each call, which takes longer than a chunk of a stream.
    return json.JSONEncoder(allow_nan=False, **dict(layout))


def finite(value: Any) -> Any:
    """Returns `value` with None instead of floats that are not finite, at any depth."""
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
