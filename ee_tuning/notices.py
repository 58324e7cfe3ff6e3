"""Warnings for the user on stderr: peculiarities of a model that are no reason to stop."""

import os
import sys

_shown_lines: set[str] = set()


def warn(line: str) -> None:
    """Prints a line."""
    print(f"ee-tuning: warning: {line}", file=sys.stderr)


def warn_once(line: str) -> None:
    """Prints a line, once, on the first process that torchrun started."""
    if line not in _shown_lines and os.environ.get("RANK", "0") == "0":
        warn(line)
    _shown_lines.add(line)
