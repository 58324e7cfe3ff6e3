"""Differences between a stored job's settings and this job's, in words for messages."""

from collections.abc import Mapping
from typing import Any

_MOST_LISTED, _LONGEST = 5, 40


def differences_text(there: Mapping[str, Any], here: Mapping[str, Any]) -> str:
    """Lists the keys whose values differ, with both values. Returns an empty text where none differs."""
    keys = [key for key in {**there, **here} if there.get(key) != here.get(key)]
    listed = [f"{key} ({_shown(there.get(key))} there, {_shown(here.get(key))} here)" for key in keys[:_MOST_LISTED]]
    more = f" and {len(keys) - _MOST_LISTED} more" if len(keys) > _MOST_LISTED else ""
    return ", ".join(listed) + more


def _shown(value: Any) -> str:
    text = ",".join(map(str, value)) if isinstance(value, tuple) else str(value)
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST - 3]}…"
