"""Paths as users write them: `~` and environment variables are expanded, and lists are split at commas."""

import os
import re
from collections.abc import Mapping
from typing import Any

from ee_tuning.errors import InputError
from ee_tuning.utf8 import file_path

PATH: Mapping[str, Any] = {"path": True}
"""Metadata of config keys that hold one or several paths."""


def is_number(text: str) -> bool:
    """Whether `text` may be the weight of a blend."""
    try:
        float(text)
    except ValueError:
        return False
    return True


def expanded(path: str, name: str) -> str:
    """Expands `~` and $VARIABLES in `path`, the value of `name`, as no shell does in YAML, --set or --flag=~/x.

    A path that exists literally is kept. Raises InputError where a variable is not set, or the home folder is unknown.
    """
    path = file_path(path)
    if (not path.startswith("~") and "$" not in path) or os.path.lexists(path):
        return path
    found = os.path.expanduser(os.path.expandvars(path))
    if unset := re.search(r"\$\{?([A-Za-z_]\w*)\}?", found):
        raise InputError(
            f"{name} = {path} names the variable {unset[1]}, which is not set; set it, or write the path in full"
        )
    if found == "~" or found.startswith("~/"):
        raise InputError(
            f"{name} = {path} lies in the home folder, which is not known here; set HOME, or write the path in full"
        )
    return found


def split_paths(text: str) -> list[str]:
    """Splits `text` at commas, unless it is itself an existing file or prefix of .bin and .idx."""
    whole = os.path.expanduser(os.path.expandvars(text))
    if any(os.path.lexists(whole + suffix) for suffix in ("", ".bin", ".idx")):
        return [text]
    return [part.strip() for part in text.split(",") if part.strip()]
