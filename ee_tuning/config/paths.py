"""Paths as people write them: `~` and variables of the environment are expanded, lists are cut at commas."""

import os
import re
from collections.abc import Mapping
from typing import Any

from ee_tuning.errors import InputError
from ee_tuning.utf8 import file_path

PATH: Mapping[str, Any] = {"path": True}
"""Metadata of config keys that hold a path, or several."""


def is_number(text: str) -> bool:
    """Whether it may be the weight of a blend."""
    try:
        float(text)
    except ValueError:
        return False
    return True


def expanded(path: str, name: str) -> str:
    """`path`, the value of `name`, with `~` and $VARIABLES replaced: no shell does so within YAML, --set or --flag=~/x.
    A path that exists as it is written stays.

    Raises InputError where a variable is not set, or the home folder is not known.
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
    """The paths that `text` lists between commas; itself alone where there is such a file, or such a prefix of .bin and
    .idx.
    """
    whole = os.path.expanduser(os.path.expandvars(text))
    if any(os.path.lexists(whole + suffix) for suffix in ("", ".bin", ".idx")):
        return [text]
    return [part.strip() for part in text.split(",") if part.strip()]
